"""The replay buffer: order, wrap-around, time limits, sampling, resume."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor

from otpr.method import Rollout
from otpr.replay import Replay


def numbered(start: int, n_steps: int, n_envs: int) -> Rollout:
    """A rollout whose transition number i (in time order) holds i everywhere, and i + 0.5 as its next observation."""
    numbers = torch.arange(start, start + n_steps * n_envs, dtype=torch.float32).view(n_steps, n_envs)
    flags = torch.zeros(n_steps, n_envs, dtype=torch.bool)
    observations = numbers[..., None].expand(-1, -1, 3)
    actions = numbers[..., None, None].expand(-1, -1, 2, 2)
    return Rollout(observations, actions, numbers, flags, flags.clone(), observations + 0.5)


def stored(replay: Replay) -> Tensor:
    return replay.contents().rewards.sort().values


def test_transitions_stay_together() -> None:
    replay = Replay(100, 3, (2, 2), "cpu")
    replay.add(numbered(0, 4, 5), reward_scale=2.0)
    batch = replay.sample(64, torch.Generator().manual_seed(0))
    number = batch.observations[:, 0]
    assert torch.equal(batch.observations, number[:, None].expand(-1, 3))
    assert torch.equal(batch.actions, number[:, None, None].expand(-1, 2, 2))
    assert torch.equal(batch.rewards, 2 * number)
    assert torch.equal(batch.next_observations, number[:, None].expand(-1, 3) + 0.5)
    assert not batch.terminated.any()


def test_the_oldest_are_overwritten_first() -> None:
    replay = Replay(7, 3, (2, 2), "cpu")
    for i, kept in enumerate([range(0, 4), range(1, 8), range(5, 12), range(9, 16)]):
        replay.add(numbered(4 * i, 2, 2), reward_scale=1.0)
        assert stored(replay).tolist() == list(kept)


def test_a_rollout_larger_than_the_capacity_keeps_the_newest() -> None:
    replay = Replay(7, 3, (2, 2), "cpu")
    replay.add(numbered(0, 1, 3), reward_scale=1.0)
    replay.add(numbered(3, 5, 4), reward_scale=1.0)
    assert stored(replay).tolist() == list(range(16, 23))
    replay.add(numbered(23, 1, 2), reward_scale=1.0)
    assert stored(replay).tolist() == list(range(18, 25))


@pytest.mark.parametrize(("time_limit", "expected"), [("bootstrap", [1, 0, 1, 0]), ("terminal", [1, 1, 1, 0])])
def test_truncation_is_terminal_only_on_request(time_limit, expected: list[int]) -> None:
    rollout = numbered(0, 1, 4)
    rollout.terminated = torch.tensor([[True, False, True, False]])
    rollout.truncated = torch.tensor([[False, True, True, False]])
    replay = Replay(10, 3, (2, 2), "cpu")
    replay.add(rollout, 1.0, time_limit)
    assert replay.contents().terminated.tolist() == expected


def test_sampling_is_uniform_over_what_is_stored() -> None:
    replay = Replay(50, 3, (2, 2), "cpu")
    replay.add(numbered(0, 2, 5), reward_scale=1.0)
    drawn = replay.sample(50_000, torch.Generator().manual_seed(0)).rewards.long()
    counts = torch.bincount(drawn, minlength=10)
    assert len(counts) == 10
    assert ((counts - 5000).abs() < 350).all()  # 5 standard deviations


def test_resume_continues_the_ring_and_stores_only_what_is_filled() -> None:
    whole, parted = Replay(1000, 3, (2, 2), "cpu"), Replay(1000, 3, (2, 2), "cpu")
    for i in range(70):
        rollout = numbered(20 * i, 4, 5)
        whole.add(rollout, 1.0)
        parted.add(rollout, 1.0)
        if i in (1, 60):
            file = io.BytesIO()
            torch.save(parted.state_dict(), file)
            assert i != 1 or file.tell() < 5000
            file.seek(0)
            parted = Replay(1000, 3, (2, 2), "cpu")
            parted.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(whole.rows, parted.rows)
    assert whole.added == parted.added == 1400


def test_misuse_is_one_clear_error() -> None:
    with pytest.raises(ValueError, match="capacity must be positive, got 0"):
        Replay(0, 3, (2, 2), "cpu")
    replay = Replay(10, 3, (2, 2), "cpu")
    with pytest.raises(ValueError, match="empty"):
        replay.sample(1, torch.Generator())
    replay.add(numbered(0, 2, 2), 1.0)
    with pytest.raises(ValueError, match="does not fit"):
        Replay(10, 4, (2, 2), "cpu").load_state_dict(replay.state_dict())
