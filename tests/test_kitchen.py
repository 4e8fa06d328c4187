"""Franka Kitchen: D4RL's numbers bit for bit, its model, its noise; restore, threads, time limit, refusals."""

# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
import pytest
from kitchen_references import Wheel, WrittenOut, copy_wheel, find_wheel, load_wheel

from benchmark.envs import kitchen
from benchmark.envs.base import ChunkStep
from benchmark.envs.kitchen import DEFINITIONS, GOALS, START, KitchenEnv

COMPLETE, MIXED = DEFINITIONS
FIELDS = ("observations", "rewards", "steps", "terminated", "truncated")
Reference = Callable[[str], Any]  # definition -> its reference environment
FIRST = np.array([0])


@pytest.fixture(scope="module")
def wheel_module(tmp_path_factory: pytest.TempPathFactory) -> Iterable[Any]:
    folder = tmp_path_factory.mktemp("wheel")
    copy_wheel(find_wheel(), folder)
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield load_wheel(folder, monkeypatch)


@pytest.fixture(params=["written-out", "wheel"])
def reference(request: pytest.FixtureRequest) -> Reference:
    """Both references: the rules written out on gymnasium-robotics' model, D4RL's own code on D4RL's own model."""
    if request.param == "wheel":
        module = request.getfixturevalue("wheel_module")
        return lambda definition: Wheel(module, definition)
    return lambda definition: WrittenOut(DEFINITIONS[definition])


def held_actions(seed: int, steps: int = 280, hold: int = 20) -> np.ndarray:
    """(steps, 9) float32 random actions, each held for a while so that the arm gets somewhere; some beyond [-1, 1]."""
    draws = [np.random.default_rng((seed, k)).uniform(-1.5, 1.5, 9) for k in range(-(-steps // hold))]
    return np.repeat(draws, hold, axis=0)[:steps].astype(np.float32)


def assert_same(first: ChunkStep, second: ChunkStep) -> None:
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name), err_msg=name, strict=True)


def put(env: KitchenEnv, index: int, positions: np.ndarray) -> None:
    """Move one environment to the given (30,) positions; the robot's must stay."""
    state = env.state_dict()
    state["states"][index, 1:31] = positions  # after the time
    env.load_state_dict(state)


def positions_of(env: KitchenEnv, index: int = 0) -> np.ndarray:
    return env.state_dict()["states"][index, 1:31]


def at_goals(positions: np.ndarray, names: Iterable[str]) -> np.ndarray:
    moved = positions.copy()
    for name in names:
        first, values = GOALS[name]
        moved[first : first + len(values)] = values
    return moved


def compare_chunk(env: KitchenEnv, simulated: Any, actions: np.ndarray) -> ChunkStep:
    """Step environment 0 and the reference through one (H, 9) chunk, or to the end, and compare everything."""
    outcome = env.step(FIRST, actions[None])
    rewards = np.zeros(len(actions))
    observation, done = None, False
    for step in range(outcome.steps[0]):
        assert not done
        observation, rewards[step], done = simulated.step(actions[step])
    np.testing.assert_array_equal(outcome.observations[0], observation, strict=True)
    np.testing.assert_array_equal(outcome.rewards[0], rewards, strict=True)
    assert outcome.terminated[0] == done
    return outcome


@pytest.mark.parametrize(
    ("definition", "seed", "completed"), [(COMPLETE, 2, 2), (MIXED, 39, 0), (MIXED, 7, 0), (COMPLETE, 3, 1)]
)
def test_whole_episodes_are_d4rls_bits(reference: Reference, definition: str, seed: int, completed: int) -> None:
    """Random actions that hit the kettle, knobs, hinges and doors, and in two of the episodes complete a sub-task."""
    env, simulated = KitchenEnv(definition, 1), reference(definition)
    np.testing.assert_array_equal(env.reset(FIRST, FIRST + seed)[0], simulated.reset(seed, START), strict=True)
    total, outcome = 0.0, None
    for actions in held_actions(seed).reshape(-1, 4, 9):
        outcome = compare_chunk(env, simulated, actions)
        total += outcome.rewards.sum()
    assert outcome is not None and outcome.truncated[0] and total == completed
    assert np.abs(positions_of(env) - START)[9:].max() > 0.1


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_completions_are_d4rls(reference: Reference, definition: str) -> None:
    """One sub-task, then none a second time, then two at once, then the last: the episode ends inside the chunk."""
    env, simulated = KitchenEnv(definition, 1, 3), reference(definition)
    env.reset(FIRST, FIRST)
    simulated.reset(0, START)
    names = DEFINITIONS[definition]
    others = [name for name in GOALS if name not in names]
    outcome = None
    expected = [((), 0), ((names[3],), 1), ((names[3], *others), 0), ((names[0], names[2]), 2), ((names[1],), 1)]
    for chosen, reward in expected:
        moved = at_goals(positions_of(env), chosen)
        put(env, 0, moved)
        simulated.put(moved)
        outcome = compare_chunk(env, simulated, held_actions(1, 3))
        assert outcome.rewards.tolist() == [[reward, 0.0, 0.0]]
    assert outcome is not None and (outcome.terminated[0], outcome.truncated[0], outcome.steps[0]) == (True, False, 1)
    with pytest.raises(RuntimeError, match=r"\[0\] have no running episode"):
        env.step(FIRST, np.zeros((1, 3, 9), dtype=np.float32))


def test_completion_is_of_noisy_observations(reference: Reference) -> None:
    """A door 0.3 from its goal to within the noise: the observation decides, as in D4RL."""
    env, simulated = KitchenEnv(COMPLETE, 1, 1), reference(COMPLETE)
    rewards = []
    for seed in range(20):
        env.reset(FIRST, FIRST + seed)
        simulated.reset(seed, START)
        moved = START.copy()
        moved[22] = -0.45
        put(env, 0, moved)
        simulated.put(moved)
        rewards.append(compare_chunk(env, simulated, np.zeros((1, 9), dtype=np.float32)).rewards[0, 0])
    assert 3 < sum(rewards) < 17


def test_bounds_hold_the_commanded_positions(reference: Reference) -> None:
    """Full speed one way, then the other: every joint's command meets one of its bounds."""
    env, simulated = KitchenEnv(COMPLETE, 1, 60), reference(COMPLETE)
    env.reset(FIRST, FIRST)
    simulated.reset(0, START)
    lower, upper = kitchen._ROBOT_BOUNDS.T
    met = np.zeros(9, dtype=np.bool_)
    for sign in (1.0, -1.0):
        compare_chunk(env, simulated, np.full((60, 9), sign, dtype=np.float32))
        commands = env.state_dict()["states"][0, 89:98]  # after the time, 30 positions, 29 velocities and accelerations
        assert np.all((lower <= commands) & (commands <= upper))
        met |= (commands == lower) | (commands == upper)
    assert met.all()


# What differs besides: places of names and files, the kind of view, colours, and the sites, which only mark places.
SEEN_OR_NAMED = ("name_", "names_", "mesh_pathadr", "tex_pathadr", "site_", "geom_group", "geom_rgba", "mat_rgba")
SHIFTED_IDS = ("_bodyid", "body_parentid", "body_rootid", "body_weldid", "tree_bodyadr")  # D4RL's are one larger
STRUCTURE = ("B_row", "bvh_nodeid", "body_geomadr", "key_mpos", "key_mquat")  # follow from the extra body and geom


def test_model_is_d4rls_in_all_that_physics_sees(tmp_path: Path) -> None:
    """Field by field. D4RL's model has one more body, held in place, its geom that touches nothing, and its weld."""
    theirs = mujoco.MjModel.from_xml_path(str(copy_wheel(find_wheel(), tmp_path)))
    ours = kitchen.load_model()[0]
    assert theirs.body_dofnum[1] == theirs.body_mass[1] == theirs.geom_contype[1] == theirs.geom_conaffinity[1] == 0
    assert theirs.eq_type[5] == mujoco.mjtEq.mjEQ_WELD and (theirs.eq_obj1id[5], theirs.eq_obj2id[5]) == (1, 0)
    extra = {"body": 1, "geom": 1, "eq": 5, "site": 0}
    compared = 0
    for name in dir(ours):
        mine, other = getattr(ours, name), getattr(theirs, name)
        if name.startswith(("_", *SEEN_OR_NAMED, *STRUCTURE)) or not isinstance(mine, np.ndarray):
            continue
        kind = name.split("_")[0]
        if kind in extra and len(other) == len(mine) + 1:
            other = np.delete(other, extra[kind], axis=0)
        if name.endswith(SHIFTED_IDS):
            other = other - (other > 0)
        np.testing.assert_array_equal(mine, other, err_msg=name)
        compared += 1
    assert compared > 200
    for name in dir(ours.opt):
        if not name.startswith("_") and not callable(getattr(ours.opt, name)):
            np.testing.assert_array_equal(getattr(ours.opt, name), getattr(theirs.opt, name), err_msg=name)


def test_pedestal_is_the_only_change_to_the_model() -> None:
    changed = kitchen.load_model()[0]
    original = mujoco.MjModel.from_xml_path(str(kitchen._assets() / "kitchen_assets" / "kitchen_env_model.xml"))
    names = [name for name in dir(changed) if name[0] != "_" and isinstance(getattr(changed, name), np.ndarray)]
    different = {name for name in names if not np.array_equal(getattr(changed, name), getattr(original, name))}
    flags = {"geom_contype", "geom_conaffinity", "body_contype", "body_conaffinity"}
    assert flags <= different and all(name in flags or "bvh" in name or "path" in name for name in different)
    assert np.flatnonzero(changed.geom_contype != original.geom_contype).tolist() == [1]


def test_noise_is_a_function_of_the_seed() -> None:
    one, other = KitchenEnv(COMPLETE, 4), KitchenEnv(COMPLETE, 2)
    first = one.reset(np.arange(4), np.array([5, 6, 5, 2**62 - 1]))
    np.testing.assert_array_equal(first[0], first[2])
    np.testing.assert_array_equal(first[:2], other.reset(np.array([1, 0]), np.array([5, 6])))
    assert len(np.unique(first[:, 0])) == 3
    bounds = 0.1 * np.concatenate([np.full(9, 0.1), kitchen._NOISE[9:] * 10])
    for seed in range(5):
        noise = kitchen.observation_noise(seed)
        assert noise.shape == (281, 30) and np.all(np.abs(noise) <= bounds)
        np.testing.assert_allclose(noise.std(axis=0), bounds / np.sqrt(3), rtol=0.15)


def test_goal_stands_in_the_observation() -> None:
    goals = [KitchenEnv(name, 1).reset(FIRST, FIRST)[0, 30:] for name in DEFINITIONS]
    for goal, present in zip(goals, ([17, 18, 19, 22], [11, 12, 17, 18, 22]), strict=True):
        np.testing.assert_array_equal(np.flatnonzero(goal), [*present, 23, 24, 25, 26, 29])
        np.testing.assert_array_equal(goal[23:], [-0.23, 0.75, 1.62, 0.99, 0.0, 0.0, -0.06])


def test_threads_and_grouping_do_not_change_results() -> None:
    indices = np.arange(7)
    one, many, grouped = KitchenEnv(COMPLETE, 7), KitchenEnv(COMPLETE, 7, threads=3), KitchenEnv(COMPLETE, 7)
    for env in (one, many, grouped):
        env.reset(indices, indices)
        put(env, 2, at_goals(START, DEFINITIONS[COMPLETE]))
    live = indices
    for start in range(0, 32, 4):
        actions = np.stack([held_actions(int(index), start + 4)[start:] for index in live])
        expected = one.step(live, actions)
        assert_same(expected, many.step(live, actions))
        for row in reversed(range(len(live))):
            single = grouped.step(live[row : row + 1], actions[row : row + 1])
            for name in FIELDS:
                np.testing.assert_array_equal(getattr(single, name)[0], getattr(expected, name)[row], err_msg=name)
        live = live[~expected.terminated]
    assert live.tolist() == [0, 1, 3, 4, 5, 6]
    many.close()


def test_restored_environment_continues_bit_identically() -> None:
    """In contact with the kettle, one sub-task complete: all that matters is in a few kilobytes an environment."""
    indices = np.arange(2)
    env = KitchenEnv(COMPLETE, 2)
    env.reset(indices, np.array([7, 8]))
    actions = np.stack([held_actions(seed).reshape(-1, 4, 9) for seed in (7, 8)], axis=1)
    put(env, 1, at_goals(START, ["microwave"]))
    rewards = sum(env.step(indices, chunk).rewards.sum() for chunk in actions[:40])
    assert rewards == 1.0
    saved = env.state_dict()
    assert sum(array.nbytes for array in saved.values()) < 2 * 4000
    fresh = KitchenEnv(COMPLETE, 3)
    with pytest.raises(ValueError, match="must be"):
        fresh.load_state_dict(saved)
    with pytest.raises(ValueError, match="lacks 'seeds'"):
        env.load_state_dict({name: array for name, array in saved.items() if name != "seeds"})
    fresh = KitchenEnv(COMPLETE, 2)
    fresh.reset(indices, indices)
    fresh.step(indices, actions[0])
    fresh.load_state_dict(saved)
    for chunk in actions[40:]:
        assert_same(env.step(indices, chunk), fresh.step(indices, chunk))


def test_time_limit_is_a_truncation_even_inside_a_chunk() -> None:
    """280 steps are 93 chunks of 3 and one step; what is completed in that step terminates as well."""
    env = KitchenEnv(COMPLETE, 2, 3)
    indices = np.arange(2)
    env.reset(indices, indices)
    rest = np.zeros((2, 3, 9), dtype=np.float32)
    for _ in range(93):
        outcome = env.step(indices, rest)
        assert not outcome.truncated.any() and not outcome.rewards.any()
    put(env, 1, at_goals(positions_of(env, 1), DEFINITIONS[COMPLETE]))
    outcome = env.step(indices, rest)
    assert outcome.steps.tolist() == [1, 1]
    assert outcome.truncated.all() and outcome.terminated.tolist() == [False, True]
    assert outcome.rewards.tolist() == [[0.0, 0.0, 0.0], [4.0, 0.0, 0.0]]
    env.reset(FIRST, FIRST)
    with pytest.raises(RuntimeError, match=r"\[1\] have no running episode"):
        env.step(indices, rest)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=f"'kitchen'; valid: {MIXED}, {COMPLETE}"):
        KitchenEnv("kitchen", 1)
    for sizes, match in (((0,), "num_envs"), ((1, 0), "action_horizon"), ((1, 4, 0), "threads")):
        with pytest.raises(ValueError, match=f"{match} must be at least 1, got 0"):
            KitchenEnv(COMPLETE, *sizes)
    env = KitchenEnv(COMPLETE, 2, 1)
    with pytest.raises(RuntimeError, match=r"\[0\] have no running episode"):
        env.step(FIRST, np.zeros((1, 1, 9), dtype=np.float32))
    env.reset(FIRST, FIRST)
    before = env.state_dict()
    for actions in (np.zeros((1, 1, 8)), np.full((1, 1, 9), np.nan)):
        with pytest.raises(ValueError, match=r"shape|finite"):
            env.step(FIRST, actions.astype(np.float32))
    with pytest.raises(ValueError, match="non-negative"):
        env.reset(FIRST, FIRST - 1)
    with pytest.raises(ValueError, match="environment index 2 is outside"):
        env.render(2)
    for name, array in env.state_dict().items():
        np.testing.assert_array_equal(array, before[name])


@pytest.mark.filterwarnings("ignore:.*(GLFW|X11):UserWarning")  # where there is no screen
def test_picture_shows_the_state_and_changes_nothing() -> None:
    env, twin = (KitchenEnv(COMPLETE, 2) for _ in range(2))
    indices = np.arange(2)
    for each in (env, twin):
        each.reset(indices, indices)
        put(each, 1, at_goals(START, ["microwave", "slide cabinet"]))
    try:
        closed, opened = env.render(0, 120, 90), env.render(1, 120, 90)
    except ValueError as error:
        assert "\n" not in str(error) and "cannot render" in str(error)
        pytest.skip(f"no OpenGL: {error}")
    assert closed.shape == (90, 120, 3) and closed.dtype == np.uint8
    assert np.mean(np.any(closed != opened, axis=2)) > 0.02
    actions = held_actions(1, 8).reshape(2, 4, 9)
    assert_same(env.step(indices, actions), twin.step(indices, actions))
    env.close()
    env.close()
