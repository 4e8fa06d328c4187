"""IDQL: implicit diffusion Q-learning (Hansen-Estruch et al. 2023, arXiv 2304.10573), as run online by DPPO.

An implicit Q-learning critic, a diffusion actor cloned on everything in the replay, and a choice among the actor's
candidates by the critic: the only place where values improve the policy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from otpr import offpolicy
from otpr.checks import check_range
from otpr.critic import CriticSettings, ImplicitQCritic, Metrics, expectile_choice
from otpr.diffusion import DiffusionPolicy
from otpr.method import ActionChunk, TaskShape
from otpr.networks import network_generator
from otpr.offpolicy import SHORT_BUDGETS, OffPolicy, OffPolicySettings, pick, sample_candidates
from otpr.replay import Batch


class IDQL(OffPolicy):
    """Clones the replay without weights and acts by choosing among candidates."""

    def __init__(
        self, settings: Settings, policy: DiffusionPolicy, shape: TaskShape, generator: torch.Generator
    ) -> None:
        super().__init__(settings, policy, shape, generator)
        self.settings, self.evaluation_candidates = settings, settings.candidates
        critic_settings = CriticSettings(
            hidden_dims=settings.critic_hidden_dims,
            q_residual=settings.q_residual,
            expectile=settings.expectile,
            discount=settings.discount,
            polyak=settings.critic_tau,
            learning_rate=settings.critic_learning_rate,
        )
        chunk_dim = shape.action_horizon * shape.action_dim
        init = network_generator(generator)
        self.critic = ImplicitQCritic(critic_settings, shape.observation_dim, chunk_dim, init, generator.device)

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

    def candidate_q(self, observations: Tensor, candidates: Tensor) -> Tensor:
        """The smaller target Q of candidates (N, S, H, A), (N, S)."""
        return self.critic.candidate_q(observations, candidates)

    def critic_step(self, batch: Batch) -> Metrics:
        """V, Q and target, one step each."""
        return self.critic.update(batch)

    def actor_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Unweighted behaviour cloning of the replay."""
        loss = self.actor.bc_losses(batch.actions, batch.observations, self.generator).mean()
        return loss, {"actor/bc_loss": loss.detach()}


@dataclass(frozen=True)
class Settings(OffPolicySettings):
    """Settings of IDQL, added to those of every off-policy method; the defaults are the published gym ones."""

    candidates: int = 20  # S, chunks to choose from, while exploring and in evaluation
    expectile: float = 0.8  # of the value regression
    exploration_weight: float = 0.7  # relative chance of a candidate better than V; worse ones have 1 minus this
    critic_tau: float = 0.001  # Polyak rate of the target critic, per gradient step

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: a value outside its range.
        """
        super().__post_init__()
        check_range(self, ("candidates",), 1, float("inf"))
        check_range(self, ("expectile", "exploration_weight"), 0, 1, open_ends=True)
        check_range(self, ("critic_tau",), 0, 1)


ROBOMIMIC: dict[str, Any] = offpolicy.ROBOMIMIC | {"replay_capacity": 250_000, "candidates": 10}
PUBLISHED: dict[str, dict[str, Any]] = {
    "hopper": {},
    "walker2d": {},
    "halfcheetah": {},
    "kitchen": {"reward_scale": 1.0},  # nobody published IDQL settings for kitchen: gym's, with rewards unscaled
    "lift": ROBOMIMIC,
    "can": ROBOMIMIC,
    "square": ROBOMIMIC,
    "transport": ROBOMIMIC,
}
# A value spreads over 1 / critic_tau gradient steps a chunk: short budgets need a faster target than the published one.
_TOY = {"candidates": 4, "critic_tau": 0.05}
EMBEDDED: dict[str, dict[str, Any]] = {
    family: budget | {"candidates": 10, "critic_tau": 0.02} | (_TOY if family == "toy" else {})
    for family, budget in SHORT_BUDGETS.items()
}
