"""Fast stepping of the robosuite tasks: stock robosuite's bits over whole solved episodes; what it leaves to stock."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("robosuite", reason="robosuite is not installed")

from test_robosuite import TASKS, Stock, action_sequences, assert_same, follow, put_in_place

from benchmark.data.manipulation_scripts import SCRIPTS, STYLES
from benchmark.envs.robosuite import STEPPING_VARIABLE, RobosuiteEnv, default_arguments
from benchmark.envs.robosuite_fast import FastSimulator
from benchmark.envs.robosuite_simulator import Simulator
from benchmark.speed.measuring import Sizes
from benchmark.speed.robosuite import AIMS, PHYSICS_AIM, OurBlocks, PhysicsBlocks, StockBlocks, robosuite_of

ROOT = Path(__file__).parents[1]
ONE = np.array([0])
pytestmark = pytest.mark.robosuite


def simulator_of(env: RobosuiteEnv) -> Any:
    pool: Any = env._pool
    return pool._simulator(0)


def read_observation(row: np.ndarray) -> dict[str, np.ndarray]:
    names = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos", "object")
    return dict(zip(names, np.split(row, [3, 7, 9]), strict=True))


@pytest.mark.parametrize("task", SCRIPTS)
def test_whole_scripted_episodes_are_robosuites_bits(task: str) -> None:
    """From the start to the published time limit, the task solved on the way."""
    env = RobosuiteEnv(task, 1, 1)
    assert isinstance(simulator_of(env), FastSimulator)
    script = SCRIPTS[task](STYLES[task], np.random.default_rng(0))
    observations, actions, rewards, truncated = [env.reset(ONE, np.array([2]))[0]], [], [], False
    while not truncated:
        actions.append(script.act(read_observation(observations[-1])))
        outcome = env.step(ONE, actions[-1][None, None])
        observations.append(outcome.observations[0])
        rewards.append(outcome.rewards[0, 0])
        truncated = outcome.truncated[0]
    assert len(actions) == env.max_episode_steps
    assert set(rewards) == {0.0, 1.0}
    stock = Stock(task, 2)
    expected, paid = stock.run(np.array(actions))
    np.testing.assert_array_equal(observations, [stock.start, *expected])
    np.testing.assert_array_equal(rewards, paid)


def test_a_whole_solved_episode_of_transport_is_robosuites_bits() -> None:
    """Random actions to the time limit; payload and trash are put into their bins in both after 400 steps."""
    env = RobosuiteEnv("transport", 1, 1)
    assert isinstance(simulator_of(env), FastSimulator)
    actions = action_sequences(env.max_episode_steps, env.action_dim)[1]
    stock = Stock("transport", 6)
    np.testing.assert_array_equal(env.reset(ONE, np.array([6]))[0], stock.start)
    seen = np.zeros((2, len(actions), env.observation_dim))
    rewards = np.zeros((2, len(actions)))
    for part in np.split(np.arange(len(actions)), 2):
        for t in part:
            outcome = env.step(ONE, actions[None, t : t + 1])
            seen[0, t], rewards[0, t] = outcome.observations[0], outcome.rewards[0, 0]
        seen[1, part], rewards[1, part] = stock.run(actions[part])
        if part[0] == 0:
            put_in_place("transport", env, stock)
    assert outcome.truncated[0]
    assert set(rewards[0]) == {0.0, 1.0}
    np.testing.assert_array_equal(*seen)
    np.testing.assert_array_equal(*rewards)


@pytest.mark.parametrize("task", TASKS)
def test_either_stepping_continues_the_others_state(task: str) -> None:
    """After a reset, and in mid-episode, whichever played what came before."""
    both = {stepping: RobosuiteEnv(task, 2, 4, stepping=stepping) for stepping in ("fast", "stock")}
    assert type(simulator_of(both["stock"])) is Simulator
    actions = action_sequences(16, both["fast"].action_dim)[1:3]
    for first, second in (("fast", "stock"), ("stock", "fast")):
        for env in both.values():
            env.reset(np.arange(2), np.array([4, 8]))
            follow(env, actions[:, :8])
            env.reset(np.array([1]), np.array([12]))
        both[second].load_state_dict(both[first].state_dict())
        results = [follow(both[name], actions, 8) for name in (first, second)]
        for one, other in zip(*results, strict=True):
            assert_same(one, other)


def changed_controller(**changes: Any) -> dict[str, Any]:
    arguments = default_arguments("lift")
    arguments["env_kwargs"]["controller_configs"].update(changes)
    return arguments


def changed_robot(task: str = "lift", **changes: Any) -> dict[str, Any]:
    arguments = default_arguments(task)
    arguments["env_kwargs"].update(changes)
    return arguments


LIMITS = [[-0.05, -0.01, 0.95], [0.05, 0.01, 1.0]]
MIXED = {"robots": ["Panda", "UR5e"], "gripper_types": "PandaGripper"}
NARROW = {"output_max": [0.02, 0.03, 0.04, 0.1, 0.2, 0.3], "output_min": [-0.04, -0.03, -0.02, -0.3, -0.2, -0.1]}


@pytest.mark.parametrize(
    "arguments",
    [
        changed_controller(kp=60, damping_ratio=0.7),
        changed_controller(**NARROW),
        changed_robot(robots=["UR5e"], gripper_types="PandaGripper"),
    ],
    ids=["gains", "ranges", "six joints"],
)
def test_other_controllers_and_robots_are_robosuites_bits(arguments: dict[str, Any]) -> None:
    env = RobosuiteEnv("lift", 1, 4, arguments=arguments)
    assert isinstance(simulator_of(env), FastSimulator)
    stock = Stock("lift", 4, arguments)
    np.testing.assert_array_equal(env.reset(ONE, np.array([4]))[0], stock.start)
    actions = action_sequences(24, 7)[1]
    observations, rewards = stock.run(actions)
    outcomes = follow(env, actions[None])
    np.testing.assert_array_equal([outcome.observations[0] for outcome in outcomes], observations[3::4])
    np.testing.assert_array_equal(np.concatenate([outcome.rewards[0] for outcome in outcomes]), rewards)


@pytest.mark.parametrize(
    ("task", "arguments", "reason"),
    [
        ("lift", changed_controller(uncouple_pos_ori=False), "a controller other than OSC_POSE with relative goals"),
        ("lift", changed_controller(control_delta=False), "a controller other than OSC_POSE with relative goals"),
        ("lift", changed_controller(position_limits=LIMITS), "uncoupled, without limits"),
        ("lift", changed_robot(gripper_types="RethinkGripper"), "SingleArm, RethinkGripper, Operational"),
        ("transport", changed_robot("transport", **MIXED), "arms with different numbers of joints"),
    ],
    ids=["coupled", "absolute", "limited", "gripper", "mixed arms"],
)
def test_what_is_not_covered_is_stepped_by_robosuite_and_said(
    task: str, arguments: dict[str, Any], reason: str
) -> None:
    with pytest.warns(UserWarning, match=f"task '{task}' is stepped by robosuite's own, slower code .*{reason}"):
        env = RobosuiteEnv(task, 1, 4, arguments=arguments)
    assert type(simulator_of(env)) is Simulator
    stock = Stock(task, 0, arguments)
    np.testing.assert_array_equal(env.reset(ONE, ONE)[0], stock.start)
    actions = action_sequences(4, env.action_dim)[0]
    np.testing.assert_array_equal(env.step(ONE, actions[None]).observations[0], stock.run(actions)[0][-1])


def test_stepping_is_chosen_by_argument_or_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    def kind(stepping: str | None) -> type:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return type(simulator_of(RobosuiteEnv("lift", 1, stepping=stepping)))

    monkeypatch.delenv(STEPPING_VARIABLE, raising=False)
    assert (kind(None), kind("stock")) == (FastSimulator, Simulator)
    monkeypatch.setenv(STEPPING_VARIABLE, "stock")
    assert (kind(None), kind("fast")) == (Simulator, FastSimulator)
    monkeypatch.setenv(STEPPING_VARIABLE, "slow")
    with pytest.raises(ValueError, match="OTPR_BENCH_ROBOSUITE must be one of fast, stock, got 'slow'"):
        RobosuiteEnv("lift", 1)
    with pytest.raises(ValueError, match="stepping must be one of fast, stock, got 'quick'"):
        RobosuiteEnv("lift", 1, stepping="quick")


def test_pictures_of_a_running_episode_are_the_same_and_change_nothing() -> None:
    code = (
        "import numpy as np; from benchmark.envs.robosuite import RobosuiteEnv; one = np.array([0]);"
        "fast, stock = envs = [RobosuiteEnv('can', 1, 4, stepping=name) for name in ('fast', 'stock')];"
        "actions = np.full((1, 4, 7), 0.5, dtype=np.float32); [env.reset(one, one) for env in envs];"
        "[env.step(one, actions) for env in envs]; start, expected = (env.render(0, 120, 90) for env in envs);"
        "assert np.array_equal(start, expected); [env.step(one, actions) for env in envs];"
        "later, expected = (env.render(0, 120, 90) for env in envs); assert np.array_equal(later, expected);"
        "assert np.any(start != later);"
        "last, expected = (env.step(one, actions).observations for env in envs); assert np.array_equal(last, expected)"
    )
    environment = {**os.environ, "MUJOCO_GL": "egl"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if "cannot be rendered on this machine" in done.stderr:
        pytest.skip("no EGL on this machine")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("task", ["can", "transport"])
def test_speed_compares_the_same_trajectory(task: str) -> None:
    """Our environment and the physics alone end every block where stock robosuite does."""
    env = RobosuiteEnv(task, 1, 4)
    actions = np.stack(np.split(action_sequences(16, env.action_dim)[0], 2))
    stock = StockBlocks(task, actions)
    physics, ours = PhysicsBlocks(stock), OurBlocks(env, actions)
    for _, _, _, states in physics.recorded:
        assert [contender.run() for contender in (stock, physics, ours)] == [8, 8, 8]
        expected = stock.simulator.simulation_state()
        np.testing.assert_array_equal(states[0, -1, : len(expected)], expected)
        np.testing.assert_array_equal(env.state_dict()["states"][0, 1 : 1 + len(expected)], expected)


def test_speed_measures_ours_stock_and_the_physics_alone() -> None:
    rows = robosuite_of("lift", Sizes(repeats=2, robosuite_chunks=1))
    assert [row.name for row in rows] == ["lift, ours", "lift, stock", "lift, physics alone"]
    assert all(len(row.samples) == 2 and min(row.samples) > 0 for row in rows)
    assert [(figure.name, figure.aim) for figure in rows[0].figures] == [
        ("x stock", AIMS["lift"]),
        ("x physics alone", PHYSICS_AIM),
    ]
