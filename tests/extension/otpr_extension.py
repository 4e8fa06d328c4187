"""An example of another package's method and task: `elite`, cloning of the best chunks, and `line`, a walk to 1."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmark.envs.base import (
    ChunkStep,
    VectorEnv,
    check_actions,
    check_indices,
    check_running,
    check_seeds,
    check_sizes,
    load_arrays,
)
from benchmark.methods import Arm
from benchmark.tasks import LoopSettings, NetworkSettings, PretrainSettings, Task
from otpr.diffusion import DiffusionPolicy
from otpr.method import ActionChunk, Rollout, Rule, TaskShape


class Elite:
    """Clones the chunks of each iteration that brought the most reward."""

    def __init__(
        self, settings: Settings, policy: DiffusionPolicy, shape: TaskShape, generator: torch.Generator
    ) -> None:
        self.settings, self.generator, self.gradient_steps = settings, generator, 0
        self.actor = policy.clone()
        self.optimizer = torch.optim.Adam(self.actor.parameters(), lr=settings.learning_rate)

    @torch.no_grad()
    def act(self, observations: Tensor, explore: bool, generator: torch.Generator) -> ActionChunk:
        """One sample of the actor for each of (N, O)."""
        return ActionChunk(self.actor.sample(observations, explore, generator))

    def other_rules(self) -> dict[str, Rule]:
        """There is one way to act."""
        return {}

    def update(self, rollout: Rollout) -> dict[str, float]:
        """`steps` gradient steps on the chunks whose reward is in the upper `share`."""
        rewards = rollout.rewards.flatten()
        best = rewards.topk(max(1, int(self.settings.share * len(rewards)))).indices
        actions, observations = rollout.actions.flatten(0, 1)[best], rollout.observations.flatten(0, 1)[best]
        for _ in range(self.settings.steps):
            loss = self.actor.bc_losses(actions, observations, self.generator).mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        self.gradient_steps += self.settings.steps
        return {"actor/loss": loss.item()}

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimiser, generator, counter."""
        return {
            "actor": self.actor.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "gradient_steps": self.gradient_steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        self.actor.load_state_dict(state["actor"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"].cpu())
        self.gradient_steps = state["gradient_steps"]


@dataclass(frozen=True)
class Settings:
    """Settings of the method."""

    learning_rate: float = 1e-3
    share: float = 0.25  # of the chunks, best by reward, that are cloned
    steps: int = 20  # gradient steps per iteration


PUBLISHED: dict[str, dict[str, Any]] = {}
EMBEDDED: dict[str, dict[str, Any]] = {"toy": {"steps": 40}}  # by task family; other tasks may bring their own
ARM = Arm("otpr_extension", "Elite")


class LineEnv(VectorEnv):
    """A point on a line. Observations are its place; actions move it by up to 0.1; the goal at 1 pays 1 and ends."""

    observation_dim = action_dim = 1
    max_episode_steps = 40

    def __init__(self, num_envs: int, action_horizon: int, threads: int) -> None:
        check_sizes(num_envs, action_horizon, threads)
        self.num_envs, self.action_horizon = num_envs, action_horizon
        self._arrays = {
            "place": np.zeros(num_envs),
            "elapsed": np.zeros(num_envs, dtype=np.int64),
            "ended": np.ones(num_envs, dtype=np.bool_),
        }

    def reset(self, indices: NDArray[np.int64], seeds: NDArray[np.int64]) -> NDArray[np.float64]:
        """Start within 0.2 of zero."""
        indices = check_indices(self, indices)
        for index, seed in zip(indices, check_seeds(indices, seeds), strict=True):
            self._arrays["place"][index] = np.random.default_rng(int(seed)).uniform(-0.2, 0.2)
        self._arrays["elapsed"][indices], self._arrays["ended"][indices] = 0, False
        return self._arrays["place"][indices, None]

    def step(self, indices: NDArray[np.int64], actions: NDArray[np.float32]) -> ChunkStep:
        """Move."""
        indices = check_indices(self, indices)
        actions = check_actions(self, indices, actions)
        check_running(indices, self._arrays["ended"])
        place, elapsed = self._arrays["place"][indices], self._arrays["elapsed"][indices]
        rewards, started = np.zeros((len(indices), self.action_horizon)), elapsed.copy()
        for t in range(self.action_horizon):
            running = (place < 1) & (elapsed < self.max_episode_steps)
            place[running] += 0.1 * np.clip(actions[running, t, 0], -1, 1)
            elapsed[running] += 1
            rewards[:, t] = running & (place >= 1)
        terminated, truncated = place >= 1, elapsed >= self.max_episode_steps
        self._arrays["place"][indices], self._arrays["elapsed"][indices] = place, elapsed
        self._arrays["ended"][indices] = terminated | truncated
        return ChunkStep(place[:, None], rewards, elapsed - started, terminated, truncated)

    def state_dict(self) -> dict[str, Any]:
        """Copies of the arrays."""
        return {name: array.copy() for name, array in self._arrays.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`."""
        load_arrays(self._arrays, state)


TASK = Task(
    name="line",
    family="line",
    environment="otpr_extension:LineEnv",
    observation_dim=1,
    action_dim=1,
    action_horizon=2,
    max_episode_steps=LineEnv.max_episode_steps,
    random_return=0.0,
    expert_return=1.0,
    success_return=1.0,
    network=NetworkSettings(hidden_dims=(32, 32, 32), time_dim=8),
    pretraining=PretrainSettings(gradient_steps=500),
    loops={"embedded": LoopSettings(n_envs=16, n_steps=20, iterations=4, eval_every=2, eval_episodes=16)},
    policy=str(Path(__file__).with_name("line.pt")),
    settings={"frozen": {}, "elite": {"steps": 30}},
)
