"""The one evaluator: whole, seeded episodes, and what they come to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmark.envs import VectorEnv
from benchmark.policies import Normalizer
from benchmark.tasks import Task
from otpr.method import ActionChunk

Act = Callable[[Tensor], ActionChunk]


class Diverged(Exception):
    """A loss, a weight or an action is no longer finite."""


@dataclass(frozen=True)
class Played:
    """What E whole episodes came to.

    Attributes:
        returns: (E,) float64, undiscounted.
        best_step: (E,) float64, the largest reward of a step.
        best_chunk: (E,) float64, over the chunks, the largest of their smallest rewards.
    """

    returns: NDArray[np.float64]
    best_step: NDArray[np.float64]
    best_chunk: NDArray[np.float64]

    def successes(self, task: Task, success_rule: str) -> NDArray[np.bool_] | None:
        """Which episodes succeeded, (E,); None where the task has no such notion.

        Args:
            success_rule: for sparse rewards, "any_step": one step solved the task (robomimic); "whole_chunk": all
                steps of one chunk did (DPPO).
        """
        if task.success_reward is not None:
            best = self.best_step if success_rule == "any_step" else self.best_chunk
            return best >= task.success_reward
        return None if task.success_return is None else self.returns >= task.success_return

    def row(self, task: Task, success_rule: str) -> dict[str, Any]:
        """The evaluation columns of `curve.csv`."""
        successes = self.successes(task, success_rule)
        rate, mean = None if successes is None else float(successes.mean()), float(self.returns.mean())
        return {
            "episodes": len(self.returns),
            "return_mean": mean,
            "return_std": float(self.returns.std()),
            "success_rate": "" if rate is None else rate,
            "score": task.score(mean, rate),
        }


@torch.no_grad()
def evaluate(env: VectorEnv, act: Act, normalizer: Normalizer, seeds: NDArray[np.int64], device: str) -> Played:
    """Play one whole episode in every environment of `env`.

    Args:
        act: chooses chunks for normalised observations (n, O).
        seeds: (num_envs,) reset seeds.

    Raises:
        Diverged: an action is not finite.
    """
    active, order = np.arange(env.num_envs), np.arange(env.action_horizon)
    returns = np.zeros(env.num_envs)
    best_step, best_chunk = np.full((2, env.num_envs), -np.inf)
    observations = env.reset(active, seeds)
    while active.size:
        chunk = act(torch.from_numpy(normalizer.normalize_observations(observations)).to(device))
        step = env.step(active, environment_actions(chunk.actions, normalizer))
        executed = order < step.steps[:, None]  # (n, H)
        returns[active] += step.rewards.sum(1)
        largest = np.where(executed, step.rewards, -np.inf).max(1)
        smallest = np.where(executed, step.rewards, np.inf).min(1)
        best_step[active] = np.maximum(best_step[active], largest)
        best_chunk[active] = np.maximum(best_chunk[active], smallest)
        running = ~(step.terminated | step.truncated)
        active, observations = active[running], step.observations[running]
    return Played(returns, best_step, best_chunk)


def environment_actions(actions: Tensor, normalizer: Normalizer) -> NDArray[np.float32]:
    """Chunks (n, H, A) in [-1, 1] as the environment takes them.

    Raises:
        Diverged: one is not finite.
    """
    array = actions.cpu().numpy()
    if not np.isfinite(array).all():
        raise Diverged("the policy's actions are not finite")
    return normalizer.denormalize_actions(array)
