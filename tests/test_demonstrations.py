"""Expert pairs: what is shipped, how pairs are chosen, damaged files."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmark.data.episodes import Dataset, Episodes
from benchmark.policies import Normalizer, load_pretrained
from benchmark.policies.demonstrations import (
    HELD_SHARE,
    choose_demonstrations,
    demonstrations_path,
    load_demonstrations,
)
from benchmark.tasks import TASKS, get_task


def dataset(episodes: int = 20, length: int = 6) -> Dataset:
    """Toy episodes whose reward per step is the episode's number."""
    number = np.repeat(np.arange(episodes), length)
    ends = np.tile(np.arange(length) == length - 1, episodes)
    observations = np.stack([number, np.arange(len(number))], 1).astype(np.float32)
    actions = np.repeat(number[:, None] / episodes, 2, 1).astype(np.float32)
    made = Episodes(observations, actions, number.astype(np.float32), ends, np.zeros_like(ends))
    return Dataset(made, {}, "digest")


def unit_normalizer(task_name: str) -> Normalizer:
    task = get_task(task_name)
    ones = [np.ones(size, np.float32) for size in (task.observation_dim, task.action_dim)]
    return Normalizer(-ones[0], ones[0], -ones[1], ones[1])


@pytest.mark.parametrize("name", [name for name in TASKS if name == "toy" or name.endswith("-local")])
def test_shipped_pairs_belong_to_the_shipped_policy(name: str) -> None:
    task = get_task(name)
    held = load_demonstrations(task)
    state = torch.load(demonstrations_path(task), weights_only=True)
    assert state["data_digest"] == load_pretrained(task).data_digest
    assert held.pairs.observations.shape[0] == held.pairs.actions.shape[0] >= 1000
    assert 0 < held.pairs.ranks.min() <= held.pairs.ranks.max() <= HELD_SHARE
    assert held.pairs.observations.abs().max() <= 1.001 and held.pairs.actions.abs().max() <= 1.001
    best = held.pairs.best(0.1)
    assert 0 < len(best.actions) < len(held.pairs.actions) and best.ranks.max() <= 0.1


def test_pairs_are_whole_chunks_of_the_best_episodes() -> None:
    task = get_task("toy")
    pairs = choose_demonstrations(task, dataset(), unit_normalizer("toy"))
    episodes = pairs.observations[:, 0].round().int()
    assert set(episodes.tolist()) == {15, 16, 17, 18, 19}
    torch.testing.assert_close(pairs.ranks, (20 - episodes) / 20)
    assert len(pairs.ranks) == 5 * 3  # windows of 4 steps in episodes of 6
    expected = episodes[:, None, None] / 20
    torch.testing.assert_close(pairs.actions, expected.expand(-1, 4, 2), atol=1e-5, rtol=0)


def test_where_rewards_are_sparse_the_best_are_the_quickest() -> None:
    lengths, solved_after = np.array([9, 30, 7, 8, 9, 9, 9, 9]), [5, 6, 4, 8, 7, 7, 7, 7]
    starts, ends = np.cumsum(lengths) - lengths, np.zeros(lengths.sum(), dtype=bool)
    ends[starts + lengths - 1] = True
    rewards = np.zeros(len(ends), np.float32)
    for start, length, steps in zip(starts, lengths, solved_after, strict=True):
        rewards[start + steps : start + length] = 1.0  # the second has the highest return, the fourth fails
    number = np.repeat(np.arange(len(lengths)), lengths)
    task = dataclasses.replace(get_task("toy"), success_reward=1.0)
    made = Episodes(np.stack([number, number], 1) / 10, np.zeros((len(ends), 2)), rewards, ends, np.zeros_like(ends))
    assert made.steps_to(1.0).tolist() == [6, 7, 5, np.inf, 8, 8, 8, 8]
    pairs = choose_demonstrations(task, Dataset(made, {}, "digest"), unit_normalizer("toy"))
    episodes = (10 * pairs.observations[:, 0]).round().int()
    assert set(episodes.tolist()) == {2, 0}
    torch.testing.assert_close(pairs.ranks, torch.where(episodes == 2, 1 / 8, 2 / 8))


def test_a_missing_or_foreign_file_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no expert pairs .*benchmark\.policies\.demonstrations --task toy"):
        load_demonstrations(get_task("toy"), tmp_path / "none.pt")
    with pytest.raises(ValueError, match="not expert pairs of 'hopper-local'"):
        load_demonstrations(get_task("hopper-local"), demonstrations_path(get_task("toy")))
    (tmp_path / "broken.pt").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="unreadable expert pairs"):
        load_demonstrations(get_task("toy"), tmp_path / "broken.pt")
