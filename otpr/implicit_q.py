"""What IDQL and OTPR share: an implicit Q-learning critic, and an actor whose candidates the critic judges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from otpr import offpolicy
from otpr.checks import check_range
from otpr.critic import CriticSettings, ImplicitQCritic, Metrics
from otpr.offpolicy import SHORT_BUDGETS, OffPolicy, OffPolicySettings, published_for_all
from otpr.replay import Batch


class ImplicitQ(OffPolicy):
    """An off-policy method whose critic is trained on replayed actions alone (Kostrikov et al. 2021).

    A subclass calls `build_critic` and defines `act` and `actor_loss`.
    """

    critic: ImplicitQCritic

    def build_critic(self, settings: ImplicitQSettings, init: torch.Generator) -> ImplicitQCritic:
        """The critic, initialised with `init` (CPU), on the method's device."""
        shape = self.shape
        chunk_dim = shape.action_horizon * shape.action_dim
        return ImplicitQCritic(settings.critic(), shape.observation_dim, chunk_dim, init, self.generator.device)

    def candidate_q(self, observations: Tensor, candidates: Tensor) -> Tensor:
        """The smaller target Q of candidates (N, S, H, A), (N, S)."""
        return self.critic.candidate_q(observations, candidates)

    def critic_step(self, batch: Batch) -> Metrics:
        """V, Q and target, one step each."""
        return self.critic.update(batch)


@dataclass(frozen=True)
class ImplicitQSettings(OffPolicySettings):
    """Settings of both, added to those of every off-policy method; the defaults are those of DPPO's IDQL on gym."""

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

    def critic(self) -> CriticSettings:
        """The critic's part."""
        return CriticSettings(
            hidden_dims=self.critic_hidden_dims,
            q_residual=self.q_residual,
            expectile=self.expectile,
            discount=self.discount,
            polyak=self.critic_tau,
            learning_rate=self.critic_learning_rate,
        )


PUBLISHED: dict[str, dict[str, Any]] = published_for_all(
    offpolicy.ROBOMIMIC | {"replay_capacity": 250_000, "candidates": 10}
)
# A value spreads over 1 / critic_tau gradient steps a chunk: short budgets need a faster target than the published one.
_TOY = {"candidates": 4, "critic_tau": 0.05}
EMBEDDED: dict[str, dict[str, Any]] = {
    family: budget | {"candidates": 10, "critic_tau": 0.02} | (_TOY if family == "toy" else {})
    for family, budget in SHORT_BUDGETS.items()
}
