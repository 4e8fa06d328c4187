"""OTPR: optimal-transport-guided score-based diffusion policy (Sun et al. 2025, arXiv 2502.12631), its unmasked arm.

Transport between replayed states and replayed chunks with cost -Q gives a compatibility H(s, a), the density of the
plan against the product of both. H weights the denoising loss and draws the executed chunk among the actor's
candidates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from otpr.checks import check_range
from otpr.critic import CriticSettings, ImplicitQCritic, Metrics, expectile_choice
from otpr.diffusion import DiffusionPolicy
from otpr.method import ActionChunk, TaskShape
from otpr.networks import network_generator
from otpr.offpolicy import SHORT_BUDGETS, OffPolicy, OffPolicySettings, average, pick, sample_candidates
from otpr.replay import Batch
from otpr.transport import Transport, TransportSettings, effective_share

SELECTION_FLOOR = 1e-7  # added to H of every candidate: where all are zero the draw is uniform, as released


class OTPR(OffPolicy):
    """Implicit Q-learning critic, transport potentials fitted to it, actor cloned with weights H."""

    stateful = ("actor", "actor_optimizer", "replay", "critic", "transport")

    def __init__(
        self, settings: Settings, policy: DiffusionPolicy, shape: TaskShape, generator: torch.Generator
    ) -> None:
        super().__init__(settings, policy, shape, generator)
        self.settings, self.evaluation_candidates = settings, settings.candidates
        chunk_dim = shape.action_horizon * shape.action_dim
        init = network_generator(generator)
        self.critic = ImplicitQCritic(settings.critic(), shape.observation_dim, chunk_dim, init, generator.device)
        self.transport = Transport(settings.transport(), shape.observation_dim, chunk_dim, init, generator.device)
        self.selections: list[Metrics] = []  # of the chunks chosen since the last update

    @torch.no_grad()
    def act(self, observations: Tensor, explore: bool, generator: torch.Generator) -> ActionChunk:
        """Sample candidates for (N, O) and draw one in proportion to H, in evaluation too (the paper's rule).

        Before the first fit the draw is IDQL's, as in the released code.
        """
        candidates = sample_candidates(self.actor, observations, self.settings.candidates, explore, generator)
        cost = self.cost(observations, candidates)
        if self.transport.fits:
            h = self.transport.compatibility(observations, candidates, cost)
            index = self.resample(h, explore, generator)
        else:
            index = expectile_choice(-cost, torch.zeros_like(cost[:, 0]), self.settings.exploration_weight, generator)
        return ActionChunk(pick(candidates, index))

    def candidate_q(self, observations: Tensor, candidates: Tensor) -> Tensor:
        """The smaller target Q of candidates (N, S, H, A), (N, S)."""
        return self.critic.candidate_q(observations, candidates)

    @torch.no_grad()
    def cost(self, observations: Tensor, chunks: Tensor) -> Tensor:
        """Transport cost V - Q of S chunks (B, S, H, A) at each of (B, O) observations, (B, S).

        The plan is that of -Q, since V depends on the state alone; the numbers are better conditioned.
        """
        return self.critic.value(observations)[:, None] - self.critic.candidate_q(observations, chunks)

    def resample(self, h: Tensor, explore: bool, generator: torch.Generator) -> Tensor:
        """Draw a candidate per state with probability H / sum H; h is (N, S), the result (N,) int64."""
        weights = h + SELECTION_FLOOR
        share = weights / weights.sum(1, keepdim=True)
        if explore:
            entropy = -(share * share.log()).sum(1).mean() / torch.tensor(float(h.shape[1])).log()
            empty = (h.sum(1) == 0).float().mean()
            self.selections.append({"transport/selection_entropy": entropy, "transport/selection_empty": empty})
        return torch.multinomial(share, 1, generator=generator)[:, 0]

    def learn(self) -> dict[str, float]:
        """Critic steps, then the transport fit, then actor steps: the actor sees potentials of the present critic."""
        count = self.steps_per_iteration
        metrics = self.minibatches(count, self.critic_step)
        if self.trains_actor:
            metrics |= self.fit_transport()
            metrics |= self.minibatches(count, self.actor_step)
        if self.selections:
            metrics |= average(self.selections)
            self.selections.clear()
        return metrics

    def fit_transport(self) -> dict[str, float]:
        """Fit the potentials to the replay's marginals: its states and its chunks, every one with every other."""
        batch = self.replay.sample(self.transport.settings.points, self.generator)
        return self.transport.fit(batch.observations, batch.actions, self.cost)

    def critic_step(self, batch: Batch) -> Metrics:
        """V, Q and target, one step each."""
        return self.critic.update(batch)

    def actor_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Denoising loss weighted by H (eq. 10), normalised to mean one over the batch and clipped."""
        weights = self.weights(batch)
        losses = self.actor.bc_losses(batch.actions, batch.observations, self.generator)
        loss = (weights * losses).mean()
        return loss, {
            "actor/weighted_bc_loss": loss.detach(),
            "actor/bc_loss": losses.detach().mean(),
            "actor/weight_effective_share": effective_share(weights),
            "actor/weight_zero_share": (weights == 0).float().mean(),
        }

    @torch.no_grad()
    def weights(self, batch: Batch) -> Tensor:
        """H of the replayed pairs over its batch mean, at most `weight_clip`, (B,)."""
        chunks = batch.actions[:, None]  # (B, 1, H, A)
        h = self.transport.compatibility(batch.observations, chunks, self.cost(batch.observations, chunks))[:, 0]
        return (h / h.mean().clamp(min=SELECTION_FLOOR)).clamp(max=self.settings.weight_clip)


@dataclass(frozen=True)
class Settings(OffPolicySettings):
    """Settings of OTPR, added to those of every off-policy method. None were published: IDQL's, and our own."""

    candidates: int = 20  # S, chunks to draw from, while exploring and in evaluation
    expectile: float = 0.8  # of the value regression
    exploration_weight: float = 0.7  # of the draw before the first fit, as in IDQL
    critic_tau: float = 0.001  # Polyak rate of the target critic, per gradient step
    epsilon: float = 0.1  # strength of the L2 regulariser, in units of the standardised cost
    transport_block_size: int = 512  # states and chunks of one fit, every one with every other
    transport_first_steps: int = 1000  # Adam steps of the first fit
    transport_warm_steps: int = 200  # Adam steps of each later fit, which goes on from the one before
    transport_learning_rate: float = 3e-3
    weight_clip: float = 10.0  # largest weight of a sample, in multiples of the batch mean

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: a value outside its range.
        """
        super().__post_init__()
        check_range(self, ("candidates", "transport_block_size"), 1, float("inf"))
        check_range(self, ("transport_first_steps", "transport_warm_steps"), 1, float("inf"))
        check_range(self, ("expectile", "exploration_weight"), 0, 1, open_ends=True)
        check_range(self, ("critic_tau",), 0, 1)
        check_range(self, ("epsilon", "transport_learning_rate", "weight_clip"), 0, float("inf"), open_ends=True)

    def critic(self) -> CriticSettings:
        """The critic's part."""
        return CriticSettings(
            self.critic_hidden_dims,
            self.q_residual,
            self.expectile,
            self.discount,
            self.critic_tau,
            self.critic_learning_rate,
        )

    def transport(self) -> TransportSettings:
        """The transport's part."""
        return TransportSettings(
            epsilon=self.epsilon,
            learning_rate=self.transport_learning_rate,
            first_steps=self.transport_first_steps,
            warm_steps=self.transport_warm_steps,
            block_size=self.transport_block_size,
        )


PUBLISHED: dict[str, dict[str, Any]] = {"hopper": {}, "walker2d": {}, "halfcheetah": {}}
EMBEDDED: dict[str, dict[str, Any]] = {
    "hopper": {
        **SHORT_BUDGETS["hopper"],
        "candidates": 10,
        "critic_tau": 0.02,
        "transport_block_size": 128,
        "transport_first_steps": 300,
        "transport_warm_steps": 60,
    },
    "toy": {
        **SHORT_BUDGETS["toy"],
        "candidates": 4,
        "critic_tau": 0.05,
        "transport_block_size": 128,
        "transport_first_steps": 200,
        "transport_warm_steps": 40,
    },
}
