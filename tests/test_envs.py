"""Environments: gymnasium's bits, exact restore, independence of threads, refusals, and the toy task's two ways."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from benchmark.envs import NAMES, ROBOSUITE, ChunkStep, VectorEnv, make_env
from benchmark.envs.toy import ToyEnv, toy_demonstrations

ROOT = Path(__file__).parents[1]
GYMNASIUM = {"hopper": "Hopper-v4", "walker2d": "Walker2d-v4", "halfcheetah": "HalfCheetah-v4"}
# Of random actions, one per episode; the weaker ones last longer. Two go beyond [-1, 1], where MuJoCo clamps.
SCALES = {"hopper": (0.0, 0.05, 1.0), "walker2d": (0.0, 0.1, 1.5), "halfcheetah": (0.05, 0.3, 1.5)}
Policy = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (live indices, their observations) -> (n, H, A)
EVERY = [pytest.param(name, marks=pytest.mark.robosuite) if name in ROBOSUITE else name for name in NAMES]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def reference(task: str) -> Any:
    return gymnasium.make(GYMNASIUM[task], disable_env_checker=True)


def chunks(env: VectorEnv, count: int, scale: float, rng: np.random.Generator) -> np.ndarray:
    shape = (count, env.action_horizon, env.action_dim)
    return (scale * rng.uniform(-1.0, 1.0, shape)).astype(np.float32)


def assert_same(first: ChunkStep, second: ChunkStep) -> None:
    for name in ("observations", "rewards", "steps", "terminated", "truncated"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name), err_msg=name, strict=True)


def follow_gymnasium(env: VectorEnv, task: str, seeds: list[int], policy: Policy) -> int:
    """Play one episode per environment beside gymnasium, comparing everything; returns the steps compared."""
    references = [reference(task) for _ in seeds]
    live = np.arange(env.num_envs)
    observations = env.reset(live, np.array(seeds))
    for env_reference, seed, start in zip(references, seeds, observations, strict=True):
        np.testing.assert_array_equal(env_reference.reset(seed=seed)[0], start, strict=True)
    total = 0
    while live.size:
        actions = policy(live, observations)
        outcome = env.step(live, actions)
        for row, index in enumerate(live):
            total += check_row(references[index], actions[row], outcome, row)
        running = ~(outcome.terminated | outcome.truncated)
        live, observations = live[running], outcome.observations[running]
    return total


def check_row(env_reference: Any, actions: np.ndarray, outcome: ChunkStep, row: int) -> int:
    """Step gymnasium through one chunk until its episode ends and compare; returns the steps taken."""
    rewards = np.zeros(len(actions))
    steps, observation, terminated, truncated = 0, None, False, False
    while steps < len(actions) and not (terminated or truncated):
        observation, rewards[steps], terminated, truncated, _ = env_reference.step(actions[steps])
        steps += 1
    assert outcome.steps[row] == steps
    assert (outcome.terminated[row], outcome.truncated[row]) == (terminated, truncated)
    np.testing.assert_array_equal(outcome.observations[row], observation, strict=True)
    np.testing.assert_array_equal(outcome.rewards[row], rewards, strict=True)
    return steps


@pytest.mark.parametrize("horizon", [1, 4])
@pytest.mark.parametrize("task", sorted(GYMNASIUM))
def test_whole_episodes_are_gymnasiums_bits(task: str, horizon: int) -> None:
    rng = np.random.default_rng(7)
    scales = np.array(SCALES[task], dtype=np.float32)
    env = make_env(task, 3, horizon)

    def policy(live: np.ndarray, observations: np.ndarray) -> np.ndarray:
        return chunks(env, len(observations), 1.0, rng) * scales[live, None, None]

    assert follow_gymnasium(env, task, [3, 2**31 - 1, 12345], policy) > 100
    # A second round in the same environments: nothing is left over from the first.
    follow_gymnasium(env, task, [5, 6, 3], policy)


def test_hopper_held_up_to_the_time_limit_is_gymnasiums_bits() -> None:
    """A long episode with contacts: this feedback law, found by random search, keeps the hopper up from seed 3."""
    gains = 0.3 * np.random.default_rng(2620).normal(size=(11, 3))

    def policy(live: np.ndarray, observations: np.ndarray) -> np.ndarray:
        return np.repeat(np.tanh(observations @ gains)[:, None], 4, axis=1).astype(np.float32)

    assert follow_gymnasium(make_env("hopper", 1), "hopper", [3], policy) == 1000


@pytest.mark.parametrize("task", sorted(GYMNASIUM))
def test_steps_from_extreme_postures_are_gymnasiums_bits(task: str) -> None:
    """Heights, angles and speeds around every bound of the health check and the velocity clip."""
    count = 400
    indices = np.arange(count)
    rng = np.random.default_rng(11)
    env = make_env(task, count, 1)
    env_reference = reference(task).unwrapped
    size = env_reference.model.nq
    env.reset(indices, indices)
    state = env.state_dict()  # each row: time, positions, velocities, ...
    state["states"][:, 2] += rng.uniform(-0.7, 1.0, count)
    state["states"][:, 3] += rng.uniform(-0.3, 0.3, count) * rng.choice([1.0, 4.0], count)
    speeds = rng.normal(0.0, 1.0, (count, size)) * rng.choice([0.1, 10.0, 60.0], (count, 1))
    state["states"][:, size + 1 : 2 * size + 1] = speeds
    env.load_state_dict(state)
    actions = chunks(env, count, 1.0, rng)
    outcome = env.step(indices, actions)
    assert outcome.terminated.any() != (task == "halfcheetah") and not outcome.terminated.all()
    for row, start in enumerate(state["states"]):
        env_reference.reset(seed=row)
        env_reference.set_state(start[1 : size + 1], start[size + 1 : 2 * size + 1])
        check_row(env_reference, actions[row], outcome, row)


def test_time_limit_is_a_truncation_even_inside_a_chunk() -> None:
    env = make_env("halfcheetah", 1, 3)
    index = np.array([0])
    env.reset(index, np.array([0]))
    outcome = None
    for _ in range(334):
        outcome = env.step(index, np.full((1, 3, env.action_dim), 0.1, dtype=np.float32))
    assert outcome is not None
    assert (outcome.steps[0], outcome.terminated[0], outcome.truncated[0]) == (1, False, True)
    assert np.all(outcome.rewards[0, 1:] == 0.0) and outcome.rewards[0, 0] != 0.0


@pytest.mark.parametrize("name", EVERY)
def test_restored_environment_continues_bit_identically(name: str) -> None:
    rng = np.random.default_rng(0)
    indices = np.arange(6)
    env = make_env(name, 6)
    env.reset(indices, indices + 10)
    for _ in range(3):
        env.step(indices, chunks(env, 6, 0.3, rng))
    saved = env.state_dict()
    fresh = make_env(name, 6)
    fresh.load_state_dict(saved)
    for _ in range(3):
        actions = chunks(env, 6, 0.3, rng)
        assert_same(env.step(indices, actions), fresh.step(indices, actions))
    again = make_env(name, 6)
    again.load_state_dict(saved)  # the saved state is a copy that later steps did not touch
    assert any(not np.array_equal(again.state_dict()[key], env.state_dict()[key]) for key in saved)


@pytest.mark.parametrize("name", EVERY)
def test_state_that_does_not_fit_is_refused(name: str) -> None:
    state = make_env(name, 3).state_dict()
    env = make_env(name, 2)
    with pytest.raises(ValueError, match="must be"):
        env.load_state_dict(state)
    state.pop("elapsed")
    with pytest.raises(ValueError, match="lacks 'elapsed'"):
        make_env(name, 3).load_state_dict(state)


@pytest.mark.parametrize("task", sorted(GYMNASIUM))
def test_threads_and_grouping_do_not_change_results(task: str) -> None:
    indices = np.arange(13)
    one, many, grouped = make_env(task, 13), make_env(task, 13, threads=3), make_env(task, 13)
    for env in (one, many, grouped):
        env.reset(indices, indices)
    rng = np.random.default_rng(1)
    live = indices
    for _ in range(8):
        actions = chunks(one, len(live), 1.0, rng)
        expected = one.step(live, actions)
        assert_same(expected, many.step(live, actions))
        for row in reversed(range(len(live))):
            single = grouped.step(live[row : row + 1], actions[row : row + 1])
            np.testing.assert_array_equal(single.observations[0], expected.observations[row])
        live = live[~(expected.terminated | expected.truncated)]
    many.close()


@pytest.mark.parametrize("name", EVERY)
def test_bad_calls_are_refused_and_change_nothing(name: str) -> None:
    env = make_env(name, 3, 2)
    zero = np.zeros((1, 2, env.action_dim), dtype=np.float32)
    with pytest.raises(RuntimeError, match="no running episode"):
        env.step(np.array([0]), zero)
    env.reset(np.array([0, 1]), np.array([0, 1]))
    before = env.state_dict()
    with pytest.raises(RuntimeError, match=r"\[2\]"):
        env.step(np.array([0, 2]), np.zeros((2, 2, env.action_dim), dtype=np.float32))
    for indices, actions, match in (
        ([3], zero, "outside"),
        ([-1], zero, "outside"),
        ([0, 0], np.zeros((2, 2, env.action_dim)), "distinct"),
        ([0], zero[:, :1], "shape"),
        ([0], zero * np.nan, "finite"),
    ):
        with pytest.raises(ValueError, match=match):
            env.step(np.array(indices), np.asarray(actions, dtype=np.float32))
    with pytest.raises(ValueError, match="non-negative"):
        env.reset(np.array([0]), np.array([-1]))
    with pytest.raises(ValueError, match="shape"):
        env.reset(np.array([0]), np.array([1, 2]))
    for key, value in env.state_dict().items():
        np.testing.assert_array_equal(value, before[key])


@pytest.mark.parametrize("name", ["hopper", "toy"])
def test_ended_episode_must_be_reset(name: str) -> None:
    env = make_env(name, 2, 1000)
    both = np.arange(2)
    env.reset(both, both)
    actions = np.ones((2, 1000, env.action_dim), dtype=np.float32)
    outcome = env.step(both, actions)
    assert np.all(outcome.terminated | outcome.truncated)
    assert np.all(outcome.steps < 1000)
    for row, steps in enumerate(outcome.steps):
        assert np.all(outcome.rewards[row, steps:] == 0.0)
    env.reset(both[:1], both[:1])
    with pytest.raises(RuntimeError, match=r"\[1\]"):
        env.step(both, actions)
    again = env.step(both[:1], actions[:1])
    np.testing.assert_array_equal(again.rewards, outcome.rewards[:1])


@pytest.mark.parametrize("name", EVERY)
def test_no_environments_is_no_work(name: str) -> None:
    none = np.zeros(0, dtype=np.int64)
    env = make_env(name, 2, threads=2)
    assert env.reset(none, none).shape == (0, env.observation_dim)
    assert env.step(none, chunks(env, 0, 1.0, np.random.default_rng(0))).rewards.shape == (0, 4)
    env.close()


def test_unknown_names_and_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'ant'.*hopper, walker2d, halfcheetah, kitchen-.*lift, .*toy"):
        make_env("ant", 1)
    with pytest.raises(ValueError, match="num_envs must be at least 1, got 0"):
        make_env("hopper", 0)
    with pytest.raises(ValueError, match="action_horizon"):
        make_env("toy", 1, 0)


def test_kernel_compiles_without_a_cache_folder() -> None:
    code = (
        "import numpy as np; from benchmark.envs import make_env; env = make_env('hopper', 1); i = np.arange(1);"
        "env.reset(i, i); env.step(i, np.zeros((1, 4, 3), np.float32)); print('stepped')"
    )
    # numba honours only the locators named here, and none of them accepts an ordinary source file
    environment = {**os.environ, "NUMBA_CACHE_LOCATOR_CLASSES": "_ZipCacheLocator", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "stepped", done.stderr


def toy_way(side: float) -> np.ndarray:
    """(1, 48, 2) full-speed actions past the disc on one side and on to the goal."""
    actions = np.zeros((1, 48, 2), dtype=np.float32)
    actions[0, :8] = (side, 0.0)
    actions[0, 8:27] = (0.0, 1.0)
    actions[0, 27:] = (-side, 0.0)
    return actions


@pytest.mark.parametrize("side", [-1.0, 1.0])
def test_toy_goal_is_reached_on_both_sides(side: float) -> None:
    env = ToyEnv(1, 48)
    index = np.array([0])
    env.reset(index, np.array([4]))
    outcome = env.step(index, toy_way(side))
    assert outcome.terminated[0] and not outcome.truncated[0]
    assert outcome.rewards.sum() == 1.0 and outcome.rewards[0, outcome.steps[0] - 1] == 1.0


def test_toy_straight_line_ends_at_the_disc() -> None:
    env = ToyEnv(1, 48)
    index = np.array([0])
    env.reset(index, np.array([4]))
    outcome = env.step(index, np.full((1, 48, 2), (0.0, 1.0), dtype=np.float32))
    assert outcome.terminated[0] and not outcome.truncated[0]
    assert outcome.rewards.sum() == 0.0 and -0.4 < outcome.observations[0, 1] < -0.3


def test_toy_is_a_function_of_seed_and_actions() -> None:
    indices = np.arange(5)
    rng = np.random.default_rng(2)
    first, second = ToyEnv(5), ToyEnv(7)
    np.testing.assert_array_equal(first.reset(indices, indices), second.reset(indices + 2, indices))
    assert len(np.unique(first.state_dict()["position"])) == 10
    for _ in range(12):
        actions = chunks(first, 5, 0.2, rng)  # too small to end an episode
        assert_same(first.step(indices, actions), second.step(indices + 2, actions))


def test_toy_demonstrations_are_bimodal_and_imperfect() -> None:
    data = toy_demonstrations(np.random.default_rng(0), 600)
    same = toy_demonstrations(np.random.default_rng(0), 600)
    for name, values in data.items():
        np.testing.assert_array_equal(values, same[name])
    assert np.abs(data["actions"]).max() <= 1.0 and data["actions"].dtype == np.float32
    assert not np.any(data["terminals"] & data["timeouts"])
    ends = np.flatnonzero(data["terminals"] | data["timeouts"])
    assert len(ends) == 600 and ends[-1] == len(data["rewards"]) - 1
    successes = data["rewards"][ends] == 1.0
    assert data["rewards"].sum() == successes.sum() and data["terminals"][ends].all()
    assert 0.4 < successes.mean() < 0.6
    starts = np.concatenate([[0], ends[:-1] + 1])
    widest = [data["observations"][a : b + 1, 0] for a, b in zip(starts, ends, strict=True)]
    right = np.array([x[np.abs(x).argmax()] > 0 for x in widest])[successes]
    assert 0.4 < right.mean() < 0.6


def test_toy_demonstrations_replay_to_the_same_rewards() -> None:
    data = toy_demonstrations(np.random.default_rng(1), 3)
    seeds = np.random.default_rng(1).integers(2**31, size=3)
    ends = np.flatnonzero(data["terminals"] | data["timeouts"])
    env = ToyEnv(3, 1)
    start = 0
    for index, end in enumerate(ends):
        chosen = np.array([index])
        observations = env.reset(chosen, seeds[[index]])
        for row in range(start, end + 1):
            np.testing.assert_array_equal(observations[0].astype(np.float32), data["observations"][row])
            outcome = env.step(chosen, data["actions"][None, None, row])
            observations = outcome.observations
            assert outcome.rewards[0, 0] == data["rewards"][row] and outcome.terminated[0] == data["terminals"][row]
        start = end + 1
