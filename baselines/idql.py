"""IDQL: implicit diffusion Q-learning (Hansen-Estruch et al. 2023, arXiv 2304.10573), as run online by DPPO.

An implicit Q-learning critic, a diffusion actor cloned on everything in the replay, and a choice among the actor's
candidates by the critic: the only place where values improve the policy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from otpr import implicit_q
from otpr.critic import Metrics, expectile_choice
from otpr.diffusion import DiffusionPolicy
from otpr.implicit_q import ImplicitQ, ImplicitQSettings
from otpr.method import ActionChunk, TaskShape
from otpr.networks import network_generator
from otpr.offpolicy import pick, sample_candidates
from otpr.replay import Batch


class IDQL(ImplicitQ):
    """Clones the replay without weights and acts by choosing among candidates."""

    def __init__(
        self, settings: Settings, policy: DiffusionPolicy, shape: TaskShape, generator: torch.Generator
    ) -> None:
        super().__init__(settings, policy, shape, generator)
        self.settings, self.evaluation_candidates = settings, settings.candidates
        self.critic = self.build_critic(settings, network_generator(generator))

    @torch.no_grad()
    def act(self, observations: Tensor, explore: bool, generator: torch.Generator) -> ActionChunk:
        """Sample candidates for (N, O) and execute the one that `choose` names."""
        candidates = sample_candidates(self.actor, observations, self.settings.candidates, explore, generator)
        return ActionChunk(pick(candidates, self.choose(observations, candidates, explore, generator)))

    def choose(self, observations: Tensor, candidates: Tensor, explore: bool, generator: torch.Generator) -> Tensor:
        """Index (N,) of the candidate to execute: two-level draw while exploring, the largest target Q in evaluation.

        Args:
            observations: (N, O).
            candidates: (N, S, H, A).
            explore: whether experience is being collected.
            generator: source of the draw.
        """
        q = self.candidate_q(observations, candidates)
        if not explore:
            return q.argmax(1)
        return expectile_choice(q, self.critic.value(observations), self.settings.exploration_weight, generator)

    def actor_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Unweighted behaviour cloning of the replay."""
        loss = self.actor.bc_losses(batch.actions, batch.observations, self.generator).mean()
        return loss, {"actor/bc_loss": loss.detach()}


@dataclass(frozen=True)
class Settings(ImplicitQSettings):
    """Settings of IDQL: all are shared with OTPR."""


PUBLISHED: dict[str, dict[str, Any]] = implicit_q.PUBLISHED
EMBEDDED: dict[str, dict[str, Any]] = implicit_q.EMBEDDED
