"""What an episode comes to: returns, and success by each definition."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from benchmark.envs import ChunkStep, VectorEnv
from benchmark.evaluation import Diverged, Played, evaluate
from benchmark.policies import Normalizer
from benchmark.tasks import TASKS
from otpr.method import ActionChunk

HORIZON = 4
UNIT = Normalizer(*(np.float32([-1.0]), np.float32([1.0])) * 2)


class Scripted(VectorEnv):
    """Pays the rewards of a script, (N, T) with NaN after an episode's end."""

    def __init__(self, rewards: NDArray[np.float64]) -> None:
        self.rewards, self.num_envs, self.action_horizon = rewards, len(rewards), HORIZON
        self.observation_dim = self.action_dim = 1
        self.at = np.zeros(self.num_envs, dtype=np.int64)

    def reset(self, indices: NDArray[np.int64], seeds: NDArray[np.int64]) -> NDArray[np.float64]:
        self.at[indices] = 0
        return np.zeros((len(indices), 1))

    def step(self, indices: NDArray[np.int64], actions: NDArray[np.float32]) -> ChunkStep:
        rows = np.stack([self.rewards[i, self.at[i] : self.at[i] + HORIZON] for i in indices])
        steps = (~np.isnan(rows)).sum(1)
        self.at[indices] += HORIZON
        over = np.array([self.at[i] >= self.rewards.shape[1] or np.isnan(self.rewards[i, self.at[i]]) for i in indices])
        return ChunkStep(np.zeros((len(indices), 1)), np.nan_to_num(rows), steps, np.zeros_like(over), over)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


def play(rewards: list[list[float]], value: float = 0.0) -> Played:
    width = max(map(len, rewards))
    env = Scripted(np.array([row + [np.nan] * (width - len(row)) for row in rewards]))
    act = lambda observations: ActionChunk(torch.full((len(observations), HORIZON, 1), value))  # noqa: E731
    return evaluate(env, act, UNIT, np.arange(len(rewards)), "cpu")


def test_returns_and_both_definitions_of_success() -> None:
    played = play(
        [
            [0, 0, 0, 0, 0, 0, 0, 0],
            [0, 0, 1, 0, 0, 0, 0, 0],  # solved for one step
            [0, 0, 1, 1, 1, 1, 0, 0],  # for four steps, of two chunks
            [0, 0, 0, 0, 1, 1, 1, 1],  # for a whole chunk
            [0, 0, 0, 0, 1, 1],  # the limit cuts the chunk: all that was executed
        ]
    )
    assert played.returns.tolist() == [0, 1, 4, 4, 2]
    lift = TASKS["lift-local"]
    assert played.successes(lift, "any_step").tolist() == [False, True, True, True, True]  # type: ignore[union-attr]
    assert played.successes(lift, "whole_chunk").tolist() == [False, False, False, True, True]  # type: ignore[union-attr]
    row = played.row(lift, "any_step")
    assert (row["success_rate"], row["score"], row["episodes"]) == (0.8, 0.8, 5)


def test_kitchen_succeeds_with_all_four_and_scores_by_return() -> None:
    played = play([[1, 0, 1, 0, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]])
    row = played.row(TASKS["kitchen-complete-v0"], "any_step")
    assert (row["success_rate"], row["score"]) == (0.5, 2.5 / 4)


def test_locomotion_has_no_success() -> None:
    row = play([[1.0] * 8]).row(TASKS["hopper-local"], "any_step")
    assert row["success_rate"] == ""
    assert row["score"] == pytest.approx((8 + 20.272305) / (3234.3 + 20.272305))


def test_an_action_that_is_not_finite_ends_the_run_as_diverged() -> None:
    with pytest.raises(Diverged, match="not finite"):
        play([[0.0] * 8], float("nan"))
