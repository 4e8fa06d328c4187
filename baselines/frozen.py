"""The pre-trained policy without updates: the line that every learner has to leave."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from otpr.diffusion import DiffusionPolicy
from otpr.method import ActionChunk, Rollout, Rule, TaskShape


class Frozen:
    """Acts with the pre-trained policy and never changes."""

    def __init__(
        self, settings: Settings, policy: DiffusionPolicy, shape: TaskShape, generator: torch.Generator
    ) -> None:
        self.settings, self.policy = settings, policy.clone().requires_grad_(False)
        self.gradient_steps = 0

    @torch.no_grad()
    def act(self, observations: Tensor, explore: bool, generator: torch.Generator) -> ActionChunk:
        """Sample chunks for (N, O)."""
        return ActionChunk(self.policy.sample(observations, explore, generator))

    def other_rules(self) -> dict[str, Rule]:
        """There is one way to act."""
        return {}

    def update(self, rollout: Rollout) -> dict[str, float]:
        """Nothing is learned."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Nothing changes, so nothing is kept."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


@dataclass(frozen=True)
class Settings:
    """The frozen policy has no settings."""


_FAMILIES = ("hopper", "walker2d", "halfcheetah", "kitchen", "lift", "can", "square", "transport", "toy")
PUBLISHED: dict[str, dict[str, Any]] = {family: {} for family in _FAMILIES}
EMBEDDED: dict[str, dict[str, Any]] = {family: {} for family in _FAMILIES}
