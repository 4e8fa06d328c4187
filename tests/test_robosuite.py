"""robosuite tasks: the bits of robosuite stepped on its own, exact swaps and restores, rewards, seeds."""

from __future__ import annotations

import copy
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("robosuite", reason="robosuite is not installed")

from benchmark.envs import ChunkStep
from benchmark.envs import robosuite_simulator as simulator_module
from benchmark.envs.robosuite import MODEL_VARIANTS, OBSERVATION_KEYS, RobosuiteEnv, default_arguments

ROOT = Path(__file__).parents[1]
TASKS = ("lift", "can", "square", "transport")
VARIANTS = {"lift": MODEL_VARIANTS, "can": 1, "square": 1, "transport": MODEL_VARIANTS}
pytestmark = pytest.mark.robosuite


class Stock:
    """Robosuite as its users drive it: construct, seed, reset, step."""

    def __init__(self, task: str, seed: int, arguments: dict[str, Any] | None = None) -> None:
        suite = simulator_module.load_robosuite()
        self.keys = ["object-state" if key == "object" else key for key in OBSERVATION_KEYS[task]]
        arguments = copy.deepcopy(arguments or default_arguments(task))  # robosuite writes into them
        self.seed(seed % VARIANTS[task])
        self.env: Any = suite.make(arguments["env_name"], hard_reset=False, **arguments["env_kwargs"])
        self.seed(seed % 2**32)
        self.start = self.vector(self.env.reset())

    def seed(self, seed: int) -> None:
        np.random.seed(seed)
        random.seed(seed)

    def vector(self, observations: dict[str, np.ndarray]) -> np.ndarray:
        return np.concatenate([observations[key] for key in self.keys])

    def run(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Observations (T, O) and rewards (T,) of (T, A) actions."""
        rows = [self.env.step(action)[:2] for action in actions]
        return np.array([self.vector(row[0]) for row in rows]), np.array([row[1] for row in rows])


def action_sequences(steps: int, size: int) -> np.ndarray:
    """(4, T, A): random; smooth; with spells of exactly zero rotation and of zero action; gripper back and forth."""
    rng = np.random.default_rng(size)
    actions = rng.uniform(-1.0, 1.0, (4, steps, size))
    time_axis = np.arange(steps)[:, None]
    actions[1] = 0.7 * np.sin(time_axis * rng.uniform(0.02, 0.2, size) + rng.uniform(0, 6, size))
    spell = (np.arange(steps) // 10) % 3
    for arm in range(0, size, 7):
        actions[2, spell == 1, arm + 3 : arm + 6] = 0.0
        actions[3, :, arm + 6] = np.where(np.arange(steps) % 3 == 0, -1.0, 1.0)
    actions[2, spell == 2] = 0.0
    return actions.astype(np.float32)


def follow(env: RobosuiteEnv, actions: np.ndarray, first: int = 0) -> list[ChunkStep]:
    """Play (N, T, A) actions in all environments, chunk by chunk, from step `first` on."""
    horizon = env.action_horizon
    everyone = np.arange(env.num_envs)
    return [env.step(everyone, actions[:, t : t + horizon]) for t in range(first, actions.shape[1], horizon)]


def assert_same(first: ChunkStep, second: ChunkStep) -> None:
    for name, values in vars(first).items():
        np.testing.assert_array_equal(values, getattr(second, name), err_msg=name, strict=True)


def check_against_stock(task: str, seeds: list[int], steps: int, limit: int | None = None) -> None:
    """Interleave episodes in one pool, beside another batch of it, and compare each with robosuite on its own.

    Most seeds below share a model, of lift and transport too, so that their episodes take turns in one simulator.
    """
    env = RobosuiteEnv(task, len(seeds), 4, max_episode_steps=limit)
    other = RobosuiteEnv(task, 2, 3)
    actions = action_sequences(steps, env.action_dim)[: len(seeds)]
    start = env.reset(np.arange(len(seeds)), np.array(seeds))
    other.reset(np.arange(2), np.array([14, 11]))
    outcomes = []
    for t in range(0, steps, 4):
        outcomes.append(env.step(np.arange(len(seeds)), actions[:, t : t + 4]))
        if t % 20 == 0:
            other.step(np.arange(1), actions[:1, :3])
        if t % 40 == 0:
            other.reset(np.arange(2), np.array([t + 2, t + 3]))
    for row, seed in enumerate(seeds):
        stock = Stock(task, seed)
        observations, rewards = stock.run(actions[row])
        np.testing.assert_array_equal(start[row], stock.start, strict=True)
        np.testing.assert_array_equal([outcome.observations[row] for outcome in outcomes], observations[3::4])
        np.testing.assert_array_equal(np.concatenate([outcome.rewards[row] for outcome in outcomes]), rewards)
    assert all(not outcome.terminated.any() and (outcome.steps == 4).all() for outcome in outcomes)
    assert [bool(outcome.truncated.all()) for outcome in outcomes[-2:]] == [False, steps == env.max_episode_steps]


@pytest.mark.parametrize("task", TASKS)
def test_interleaved_episodes_are_robosuites_bits(task: str) -> None:
    check_against_stock(task, [2, 6, 10, 2**40 + 3], 24 if task == "transport" else 60)


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_whole_episodes_are_robosuites_bits(task: str) -> None:
    """Up to the published time limit, where the last chunk is truncated."""
    steps = {"lift": 300, "can": 300, "square": 400, "transport": 800}[task]
    check_against_stock(task, [1, 5, 9] if task != "transport" else [7], steps)


def lift_script(observation: np.ndarray, step: int) -> np.ndarray:
    """An action that goes above the cube, down, closes and rises, by the clock."""
    hand, cube = observation[:3], observation[9:12]
    offset = 0.08 if step < 24 else 0.0 if step < 56 else 0.2
    target = cube + np.array([0.0, 0.0, offset]) if step < 56 else hand + np.array([0.0, 0.0, 0.05])
    action = np.zeros(7)
    action[:3] = np.clip((target - hand) / 0.05, -1.0, 1.0)
    action[6] = 1.0 if step >= 40 else -1.0
    return action.astype(np.float32)


def test_lifted_cube_pays_one_per_step_as_in_robosuite() -> None:
    env = RobosuiteEnv("lift", 3, 4)
    everyone = np.arange(3)
    observations = env.reset(everyone, everyone)
    actions = np.zeros((3, 88, 7), dtype=np.float32)
    rewards = np.zeros((3, 88))
    for t in range(0, 88, 4):
        for row in everyone:
            actions[row, t : t + 4] = lift_script(observations[row], t)
        outcome = env.step(everyone, actions[:, t : t + 4])
        observations, rewards[:, t : t + 4] = outcome.observations, outcome.rewards
    assert np.all(rewards[:, :40] == 0.0) and np.all(rewards[:, -4:] == 1.0)
    assert set(np.unique(rewards)) == {0.0, 1.0}
    for row in everyone:
        np.testing.assert_array_equal(rewards[row], Stock("lift", int(row)).run(actions[row])[1])


PLACES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "can": lambda env: {"Can_joint0": env.target_bin_placements[3] + np.array([0.0, 0.0, 0.06])},
    "square": lambda env: {"SquareNut_joint0": env.sim.data.body_xpos[env.peg1_body_id] - np.array([0.0, 0.0, 0.02])},
    "transport": lambda env: {
        "payload_joint0": env.transport.target_bin_pos + np.array([0.0, 0.05, 0.05]),
        "trash_joint0": env.transport.trash_bin_pos + np.array([0.0, 0.0, 0.03]),
    },
}


def put_in_place(task: str, env: RobosuiteEnv, stock: Stock) -> None:
    """Move the task's objects to where they belong, in the environment's only episode and in robosuite itself."""
    state = env.state_dict()
    for joint, position in PLACES[task](stock.env).items():
        first, _ = stock.env.sim.model.get_joint_qpos_addr(joint)
        stock.env.sim.data.qpos[first : first + 7] = [*position, 1.0, 0.0, 0.0, 0.0]
        state["states"][0, 2 + first : 9 + first] = [*position, 1.0, 0.0, 0.0, 0.0]  # after the model and the time
    env.load_state_dict(state)


@pytest.mark.parametrize("task", PLACES)
def test_object_put_in_its_place_pays_one_as_in_robosuite(task: str) -> None:
    """The success branches of the rewards: the object is moved in both, and lies there after some steps."""
    env = RobosuiteEnv(task, 1, 1)
    env.reset(np.array([0]), np.array([3]))
    stock = Stock(task, 3)
    actions = 0.1 * action_sequences(40, env.action_dim)[0]
    for t in range(4):
        env.step(np.array([0]), actions[None, t : t + 1])
    stock.run(actions[:4])
    put_in_place(task, env, stock)
    outcomes = [env.step(np.array([0]), actions[None, t : t + 1]) for t in range(4, 40)]
    observations, rewards = stock.run(actions[4:])
    np.testing.assert_array_equal([outcome.observations[0] for outcome in outcomes], observations)
    np.testing.assert_array_equal([outcome.rewards[0, 0] for outcome in outcomes], rewards)
    assert rewards[-1] == 1.0


RESUME = """
import sys
import numpy as np
from benchmark.envs.robosuite import RobosuiteEnv
given = np.load(sys.argv[2])
actions = given["actions"]
env = RobosuiteEnv(sys.argv[1], len(actions), 4)
env.load_state_dict({name: given[name] for name in ("states", "elapsed", "ended")})
outcomes = [env.step(np.arange(len(actions)), actions[:, t : t + 4]) for t in range(0, actions.shape[1], 4)]
np.savez(sys.argv[3], observations=[o.observations for o in outcomes], rewards=[o.rewards for o in outcomes])
"""


@pytest.mark.parametrize("task", TASKS)
def test_restored_environment_continues_bit_identically_in_a_fresh_process(task: str, tmp_path: Path) -> None:
    """Right after a reset, and in mid-episode; also where other episodes were played in between."""
    steps = 12 if task == "transport" else 24
    env = RobosuiteEnv(task, 4, 4)
    actions = action_sequences(20 + steps, env.action_dim)
    env.reset(np.arange(4), np.array([4, 8, 9, 12]))
    follow(env, actions[:, :20])
    env.reset(np.array([1]), np.array([16]))
    actions[1, :20] = 0.0
    saved = env.state_dict()
    expected = follow(env, actions, 20)
    np.savez(tmp_path / "in.npz", actions=actions[:, 20:], **saved)
    script = [sys.executable, "-c", RESUME, task, str(tmp_path / "in.npz"), str(tmp_path / "out.npz")]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr == "", done.stderr  # also: no warning about robosuite's macros
    resumed = np.load(tmp_path / "out.npz")
    np.testing.assert_array_equal(resumed["observations"], [outcome.observations for outcome in expected])
    np.testing.assert_array_equal(resumed["rewards"], [outcome.rewards for outcome in expected])

    env.reset(np.arange(4), np.array([0, 1, 2, 3]))
    follow(env, actions[:, :4])
    env.load_state_dict(saved)
    for first, second in zip(expected, follow(env, actions, 20), strict=True):
        assert_same(first, second)


def test_episode_is_a_function_of_its_seed() -> None:
    env = RobosuiteEnv("lift", 6, 4)
    seeds = np.array([3, 8, 3, 2**61 + 1, 7, 3])
    first = env.reset(np.arange(6), seeds)
    np.random.seed(1)
    np.random.uniform(size=5)
    reversed_order = env.reset(np.arange(6), seeds[::-1])[::-1]
    np.testing.assert_array_equal(first, reversed_order)
    np.testing.assert_array_equal(first[0], first[2])
    assert len(np.unique(first[:, 9])) == 4  # positions of the cube


def test_seeds_vary_the_cubes_size_and_leave_global_generators_alone() -> None:
    np.random.seed(5)
    random.seed(5)
    expected = np.random.uniform(), random.random()
    np.random.seed(5)
    random.seed(5)
    env = RobosuiteEnv("lift", MODEL_VARIANTS, 4)
    env.reset(np.arange(MODEL_VARIANTS), np.arange(MODEL_VARIANTS))
    env.step(np.arange(MODEL_VARIANTS), np.zeros((MODEL_VARIANTS, 4, 7), dtype=np.float32))
    assert (np.random.uniform(), random.random()) == expected
    pool: Any = env._pool
    sizes = [pool._simulator(model).env.cube.size for model in range(MODEL_VARIANTS)]
    assert len({tuple(size) for size in sizes}) == MODEL_VARIANTS
