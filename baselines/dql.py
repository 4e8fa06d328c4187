"""DQL: diffusion Q-learning (Wang et al. 2023, arXiv 2208.06193), as run online by DPPO.

The actor follows the gradient of Q through its whole denoising chain, held by a behaviour-cloning term. DPPO's code
takes that term on the policy's own fresh actions (`bc_on` "policy"; the method ``dql-dppo``), an anchor to nothing;
its paper and the original take it on the data (`bc_on` "replay"; the method ``dql``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from otpr.checks import check_choice, check_range
from otpr.critic import (
    FusedAdamW,
    Metrics,
    descend,
    frozen_copy,
    td_target,
    twin_q_loss,
    without_parameter_gradients,
)
from otpr.diffusion import DiffusionPolicy
from otpr.method import ActionChunk, TaskShape
from otpr.networks import TwinQ, network_generator, polyak_update
from otpr.offpolicy import ROBOMIMIC, SHORT_BUDGETS, OffPolicy, OffPolicySettings, published_for_all
from otpr.replay import Batch


def normalised_q_loss(q: Tensor, other: Tensor) -> Tensor:
    """-mean(Q_i) / mean |Q_j|, both (B,), without gradient of the scale: eta is free of the size of the rewards."""
    return -q.mean() / other.abs().mean().detach()


class DQL(OffPolicy):
    """Twin Q with a one-step target from the current policy; the actor climbs Q through the denoising chain."""

    stateful = ("actor", "actor_optimizer", "replay", "critic", "target_critic", "critic_optimizer")

    def __init__(
        self, settings: Settings, policy: DiffusionPolicy, shape: TaskShape, generator: torch.Generator
    ) -> None:
        super().__init__(settings, policy, shape, generator)
        self.settings = settings
        chunk_dim = shape.action_horizon * shape.action_dim
        sizes = (shape.observation_dim, chunk_dim, settings.critic_hidden_dims, settings.q_residual)
        init = network_generator(generator)
        self.critic = TwinQ(*sizes, init).to(generator.device)
        self.target_critic = frozen_copy(self.critic, TwinQ(*sizes, init).to(generator.device))
        # moving averages and what they follow, listed once: `polyak_update` is called every gradient step
        self.averaged = list(self.target_critic.parameters()), list(self.critic.parameters())
        self.critic_optimizer = FusedAdamW(self.critic.parameters(), settings.critic_learning_rate)

    @torch.no_grad()
    def act(self, observations: Tensor, explore: bool, generator: torch.Generator) -> ActionChunk:
        """One sample of the policy per row of (N, O)."""
        return ActionChunk(self.actor.sample(observations, explore, generator))

    def candidate_q(self, observations: Tensor, candidates: Tensor) -> Tensor:
        """The smaller target Q of candidates (N, S, H, A), (N, S)."""
        return self.target_critic.per_candidate(observations, candidates)

    def critic_loss(self, batch: Batch, next_actions: Tensor) -> tuple[Tensor, Metrics]:
        """TD loss of both heads to r + gamma min target Q(s', a') with a' (B, H, A) from the current policy."""
        with torch.no_grad():
            following = self.target_critic.minimum(batch.next_observations, next_actions)
            target = td_target(batch, following, self.settings.discount)
        q1, q2 = self.critic(batch.observations, batch.actions)
        return twin_q_loss(q1, q2, target)

    def critic_step(self, batch: Batch) -> Metrics:
        """A step of Q, then of its target.

        DPPO moves the target after the actor's step; the actor reads only the online critic, so the result is the same.
        """
        with torch.no_grad():
            next_actions = self.actor.sample(batch.next_observations, True, self.generator)
        loss, metrics = self.critic_loss(batch, next_actions)
        descend(self.critic_optimizer, loss)
        polyak_update(*self.averaged, self.settings.target_ema)
        return metrics

    def actor_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """bc + eta q_loss on fresh actions with exploration noise, differentiated through all denoising steps."""
        actions = self.actor.sample(batch.observations, True, self.generator)
        with without_parameter_gradients(self.critic):
            q1, q2 = self.critic(batch.observations, actions)
        heads = torch.rand((), generator=self.generator, device=self.generator.device) > 0.5  # which of them is climbed
        q_loss = normalised_q_loss(torch.where(heads, q1, q2), torch.where(heads, q2, q1))
        cloned = batch.actions if self.settings.bc_on == "replay" else actions
        bc_loss = self.actor.bc_losses(cloned, batch.observations, self.generator).mean()
        metrics = {"actor/bc_loss": bc_loss.detach(), "actor/q_loss": q_loss.detach(), "actor/q": q1.detach().mean()}
        return bc_loss + self.settings.eta * q_loss, metrics


@dataclass(frozen=True)
class Settings(OffPolicySettings):
    """Settings of DQL, added to those of every off-policy method; the defaults are the published gym ones."""

    replay_ratio: float = 16.0  # times that a collected chunk is drawn for training, on average
    eta: float = 1.0  # weight of the Q term in the actor's loss
    target_ema: float = 0.005  # Polyak rate of the target critic, per gradient step
    bc_on: Literal["replay", "policy"] = "replay"  # actions of the cloning term; "policy" is what DPPO's code does

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: a value outside its range.
        """
        super().__post_init__()
        check_range(self, ("eta",), 0, float("inf"))
        check_range(self, ("target_ema",), 0, 1)
        check_choice(self, "bc_on", ("replay", "policy"))


PUBLISHED: dict[str, dict[str, Any]] = published_for_all(ROBOMIMIC)
EMBEDDED: dict[str, dict[str, Any]] = {
    family: budget | {"target_ema": 0.05 if family == "toy" else 0.02} for family, budget in SHORT_BUDGETS.items()
}
