"""Scripted demonstrators: reproducible, replayable, in robomimic's terms, and mostly successful."""

from __future__ import annotations

import functools
import math
import random
from pathlib import Path

import numpy as np
import pytest

from benchmark.data import manipulation_scripts as scripts
from benchmark.data.manipulation import STEP_LIMITS, demonstrate, record_episode
from benchmark.data.robomimic import Demonstration, read_robomimic, write_robomimic
from benchmark.envs.robosuite import OBSERVATION_KEYS, default_arguments

BODIES = {"lift": "cube_main", "can": "Can_main", "square": "SquareNut_main"}
SEEDS = np.array([3, 0, 2**40 + 1, 6])
robosuite = pytest.mark.robosuite


@functools.cache
def played(task: str) -> list[Demonstration]:
    pytest.importorskip("robosuite", reason="the demonstrators play in robosuite")
    return list(demonstrate(task, SEEDS))


def assert_same(first: Demonstration, second: Demonstration) -> None:
    for name in ("actions", "rewards", "dones", "states"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name), err_msg=name)
    assert first.observations.keys() == second.observations.keys()
    for key, values in first.observations.items():
        np.testing.assert_array_equal(values, second.observations[key], err_msg=key)
    assert first.model_file == second.model_file


@robosuite
@pytest.mark.parametrize("task", STEP_LIMITS)
def test_demonstrations_are_robomimics(task: str) -> None:
    for demonstration in played(task):
        steps = len(demonstration.actions)
        assert demonstration.actions.shape == (steps, 7)
        assert demonstration.actions.dtype == np.float32
        assert np.abs(demonstration.actions).max() <= 1.0
        assert set(np.sign(demonstration.actions[:, 6])) == {-1.0, 1.0}
        assert tuple(demonstration.observations) == OBSERVATION_KEYS[task]
        assert set(demonstration.rewards) <= {0.0, 1.0}
        np.testing.assert_array_equal(demonstration.dones[:-1], demonstration.rewards[:-1] > 0.0)
        assert demonstration.dones[-1] == 1
        solved = np.flatnonzero(demonstration.rewards)
        if solved.size and steps < STEP_LIMITS[task]:
            assert 5 <= steps - 1 - solved[0] <= 10
        else:
            assert steps == STEP_LIMITS[task]


@robosuite
@pytest.mark.parametrize("task", STEP_LIMITS)
def test_most_succeed_and_no_two_are_alike(task: str) -> None:
    demonstrations = played(task)
    assert sum(demonstration.rewards.any() for demonstration in demonstrations) >= 3
    assert len({len(demonstration.actions) for demonstration in demonstrations}) >= 3


@robosuite
@pytest.mark.parametrize("task", STEP_LIMITS)
def test_an_episode_is_a_function_of_its_seed(task: str) -> None:
    before = played(task)
    np.random.seed(5)
    random.seed(5)
    expected = np.random.get_state()[1].tolist(), random.getstate()
    again = record_episode(task, int(SEEDS[1]))  # after others than before
    assert (np.random.get_state()[1].tolist(), random.getstate()) == expected
    assert_same(again, before[1])


@robosuite
def test_workers_do_not_matter() -> None:
    expected = played("lift")[:2]
    parallel = list(demonstrate("lift", SEEDS[:2], workers=2))
    assert len(parallel) == len(expected)
    for first, second in zip(parallel, expected, strict=True):
        assert_same(first, second)


@robosuite
@pytest.mark.parametrize("task", STEP_LIMITS)
def test_the_environment_replays_the_actions(task: str) -> None:
    from benchmark.envs.robosuite import RobosuiteEnv

    seen = [np.hstack(list(demonstration.observations.values())) for demonstration in played(task)]
    env, index = RobosuiteEnv(task, 1, action_horizon=1), np.array([0])
    for number in (0, 2):
        demonstration = played(task)[number]
        observations = [env.reset(index, SEEDS[number : number + 1])]
        rewards = []
        for action in demonstration.actions:
            outcome = env.step(index, action[None, None])
            observations.append(outcome.observations)
            rewards.append(outcome.rewards[0, 0])
        np.testing.assert_array_equal(np.concatenate(observations)[:-1], seen[number])
        np.testing.assert_array_equal(rewards, demonstration.rewards)


@robosuite
@pytest.mark.parametrize("task", STEP_LIMITS)
def test_states_reproduce_the_observations(task: str) -> None:
    import mujoco

    demonstration = played(task)[2]
    model = mujoco.MjModel.from_xml_string(demonstration.model_file)
    data = mujoco.MjData(model)
    for step in range(0, len(demonstration.actions), 7):
        state = demonstration.states[step]
        data.qpos, data.qvel = state[1 : 1 + model.nq], state[1 + model.nq :]
        mujoco.mj_forward(model, data)
        shown = {key: values[step] for key, values in demonstration.observations.items()}
        # Observations lag behind by one physics step of 2 ms.
        np.testing.assert_allclose(data.site("gripper0_grip_site").xpos, shown["robot0_eef_pos"], atol=2e-3)
        np.testing.assert_allclose(data.body(BODIES[task]).xpos, shown["object"][:3], atol=4e-3)


@robosuite
def test_demonstrations_survive_their_file(tmp_path: Path) -> None:
    demonstrations = played("lift")
    write_robomimic(tmp_path / "lift.hdf5", demonstrations, default_arguments("lift"), {"task": "lift-local"})
    episodes = read_robomimic(tmp_path / "lift.hdf5", OBSERVATION_KEYS["lift"], 7).episodes
    np.testing.assert_array_equal(episodes.lengths, [len(one.actions) for one in demonstrations])
    np.testing.assert_array_equal(episodes.actions, np.concatenate([one.actions for one in demonstrations]))


def test_bad_requests_are_refused() -> None:
    for task, seeds, workers, message in (
        ("transport", [0], 1, "no script demonstrates task 'transport'; valid: lift, can, square"),
        ("lift", [-1], 1, "seeds must be non-negative"),
        ("lift", [0], 0, "workers must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            demonstrate(task, np.array(seeds), workers)


@pytest.mark.parametrize("degrees", range(-180, 181, 9))
def test_the_nut_is_turned_to_a_side_of_the_peg_within_reach(degrees: int) -> None:
    angle = math.radians(degrees)
    turn = scripts.SquareScript._turn_to_peg(angle)
    sides = [abs(scripts.wrap(angle + turn - side, 2 * math.pi)) for side in (0.5 * math.pi, math.pi, 1.5 * math.pi)]
    assert min(sides) < 1e-9
    assert abs(turn) <= 0.5 * math.pi + 1e-9


@pytest.mark.parametrize("task", scripts.SCRIPTS)
def test_a_script_goes_to_its_object(task: str) -> None:
    script = scripts.SCRIPTS[task](scripts.STYLES[task], np.random.default_rng(0))
    rotation = np.array([1.0, 0.0, 0.0, 0.0])  # half a turn about x: the hand points down
    side = {"robot0_eef_quat": rotation, "robot0_gripper_qpos": np.array([0.04, -0.04])}
    goal = np.array([0.1, 0.2, 0.85, 0.0, 0.0, 0.0, 1.0])
    for direction in np.array([[1.0, 0.0], [0.0, -1.0], [-1.0, 0.0]]):
        hand = np.array([*(goal[:2] - 0.3 * direction), 0.95])
        actions = [script.act({**side, "robot0_eef_pos": hand, "object": goal}) for _ in range(40)]
        mean = np.mean(actions, axis=0)
        assert mean[:2] @ direction > 0.1
        assert mean[6] < 0.0
