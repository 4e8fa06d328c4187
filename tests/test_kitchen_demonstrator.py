"""The scripted kitchen demonstrator: its seeds decide its episodes, which are varied and the environment's own."""

from __future__ import annotations

import numpy as np
import pytest

from benchmark.data.episodes import COLUMNS, Episodes
from benchmark.data.kitchen import Demonstration, demonstrate, is_complete
from benchmark.envs.kitchen import DEFINITIONS, START, KitchenEnv, goal_positions

DEFINITION = "kitchen-microwave-kettle-light-slider"
SEEDS = np.arange(12)


@pytest.fixture(scope="module")
def episodes() -> Episodes:
    return demonstrate(SEEDS, threads=2)


def part(episodes: Episodes, number: int, name: str) -> np.ndarray:
    start, stop = episodes.boundaries[number : number + 2]
    return getattr(episodes, name)[start:stop]


def test_an_episode_depends_on_its_seed_alone(episodes: Episodes) -> None:
    chosen = [9, 4]
    again = demonstrate(SEEDS[chosen], threads=1)
    for name in COLUMNS:
        for place, number in enumerate(chosen):
            np.testing.assert_array_equal(part(again, place, name), part(episodes, number, name), strict=True)
    assert not np.array_equal(part(episodes, 9, "actions")[:20], part(episodes, 4, "actions")[:20])


@pytest.mark.parametrize("number", [0, 3])
def test_replaying_in_the_environment_gives_the_recorded_numbers(episodes: Episodes, number: int) -> None:
    env, index, demonstration = KitchenEnv(DEFINITION, 1, action_horizon=1), np.array([0]), Demonstration(number)
    seen = env.reset(index, SEEDS[[number]])[0]
    columns = [part(episodes, number, name) for name in ("observations", "actions", "rewards", "terminals")]
    for observation, action, reward, terminal in zip(*columns, strict=True):
        np.testing.assert_array_equal(seen.astype(np.float32), observation)
        np.testing.assert_array_equal(demonstration.act(seen), action)  # it is shown nothing but the observation
        outcome = env.step(index, action[None, None])
        assert (outcome.rewards[0, 0], outcome.terminated[0]) == (reward, terminal)
        seen = outcome.observations[0]


def test_shapes_and_ranges(episodes: Episodes) -> None:
    assert len(episodes.lengths) == len(SEEDS)
    assert episodes.lengths.max() <= 280
    assert episodes.observations.shape[1:] == (60,)
    assert episodes.actions.shape[1:] == (9,)
    assert np.abs(episodes.actions).max() <= 1.0
    last = episodes.boundaries[1:] - 1
    assert (episodes.terminals ^ episodes.timeouts)[last].all()
    assert (episodes.terminals | episodes.timeouts).sum() == len(SEEDS)
    np.testing.assert_array_equal(episodes.terminals[last], episodes.returns == 4)


def test_two_sub_tasks_or_more_on_average_in_varied_orders(episodes: Episodes) -> None:
    assert episodes.returns.mean() >= 2.0
    assert len(set(episodes.returns)) >= 2
    orders = set()
    for number in range(len(SEEDS)):
        positions = part(episodes, number, "observations")[:, : len(START)].astype(np.float64)
        done = {name: [is_complete(name, row) for row in positions] for name in DEFINITIONS[DEFINITION]}
        orders.add(tuple(sorted((name for name in done if any(done[name])), key=lambda name: done[name].index(True))))
    assert len(orders) >= 3
    assert len({order[0] for order in orders if order}) >= 2


def test_completion_is_the_environments() -> None:
    goal = goal_positions(DEFINITIONS[DEFINITION])
    for name in DEFINITIONS[DEFINITION]:
        assert not is_complete(name, START)
        assert is_complete(name, goal)


@pytest.mark.parametrize(
    ("seeds", "threads", "message"),
    [
        (np.array([], dtype=np.int64), 1, "at least one non-negative integer, got \\[\\]"),
        (np.array([3, -1]), 1, "non-negative integer, got \\[3, -1\\]"),
        (np.array([3]), 0, "threads must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused(seeds: np.ndarray, threads: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        demonstrate(seeds, threads)
