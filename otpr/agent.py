"""OTPR: optimal-transport-guided score-based diffusion policy (Sun et al. 2025, arXiv 2502.12631).

Transport between states and action chunks with cost -Q, guided by expert keypoints, gives a compatibility H(s, a): the
density of the plan against the product of both. H weights the denoising loss (eq. 10) and draws the executed chunk
among the actor's candidates. `otpr/README.md` says where paper, released code and this file differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from otpr import implicit_q
from otpr.checks import check_choice, check_range
from otpr.critic import Metrics, expectile_choice
from otpr.diffusion import DiffusionPolicy
from otpr.duality import effective_share
from otpr.implicit_q import ImplicitQ, ImplicitQSettings
from otpr.keypoints import Keypoints
from otpr.method import ActionChunk, Demonstrations, TaskShape
from otpr.networks import network_generator
from otpr.offpolicy import average, pick, sample_candidates
from otpr.potentials import TransportSettings
from otpr.replay import Batch
from otpr.transport import Transport

GUIDANCES = ("h", "q", "advantage")
ROW_CONDITIONS = ("potential", "candidates")
# of a fit, beside those that start with transport_
_FIT_SETTINGS = (
    "regulariser", "epsilon", "action_bound", "row_condition", "policy_share", "guide_weight", "relation_temperature",
)  # fmt: skip
GUIDANCE_ROWS = 4096  # pairs judged in one pass
SELECTION_FLOOR = 1e-7  # added to every candidate's weight: where all are zero the draw is uniform, as released


class OTPR(ImplicitQ):
    """Implicit Q-learning critic, transport potentials fitted to it, actor cloned with weights H."""

    stateful = ("actor", "actor_optimizer", "replay", "critic", "transport")

    def __init__(
        self,
        settings: Settings,
        policy: DiffusionPolicy,
        shape: TaskShape,
        generator: torch.Generator,
        demonstrations: Demonstrations | None = None,
    ) -> None:
        """`demonstrations` are needed where `settings.uses_demonstrations`.

        Raises:
            ValueError: settings that ask for more keypoints or a larger share of demonstrations than there are.
        """
        super().__init__(settings, policy, shape, generator)
        self.settings, self.evaluation_candidates = settings, settings.candidates
        chunk_dim = shape.action_horizon * shape.action_dim
        init = network_generator(generator)
        self.critic = self.build_critic(settings, init)
        sizes = (shape.observation_dim, chunk_dim, init, generator.device)
        self.transport = Transport(settings.transport(), *sizes, settings.cost_shares)
        self.expert = _expert(settings, demonstrations, generator.device)
        self.keypoints = _keypoints(settings, self.expert, init)
        self.selections: list[Metrics] = []  # of the chunks chosen since the last update
        # of all replayed pairs, then of all expert pairs, while actor steps draw them over and over
        self.known_guidance: Tensor | None = None

    @property
    def guided(self) -> bool:
        """Whether the guidance has been learned: the first actor steps have been taken."""
        return self.iteration > self.settings.critic_warmup_iterations

    @torch.no_grad()
    def act(self, observations: Tensor, explore: bool, generator: torch.Generator) -> ActionChunk:
        """Sample candidates for (N, O), draw one in proportion to its guidance, in evaluation too: the paper's rule.

        Before there is guidance the draw is IDQL's, as in the released code. Without selection: one sample.
        """
        if not self.settings.selection:
            return ActionChunk(self.actor.sample(observations, explore, generator))
        candidates = sample_candidates(self.actor, observations, self.settings.candidates, explore, generator)
        if self.guided:
            index = self.resample(self.candidate_guidance(observations, candidates), explore, generator)
        else:
            q, value = self.candidate_q(observations, candidates), self.critic.value(observations)
            index = expectile_choice(q, value, self.settings.exploration_weight, generator)
        return ActionChunk(pick(candidates, index))

    @torch.no_grad()
    def cost(self, observations: Tensor, chunks: Tensor) -> Tensor:
        """Cost terms of S chunks (B, S, H, A) at each of (B, O) observations: V - Q and, with keypoints, the guide.

        (B, S, 1 or 2). The plan is that of -Q, since V depends on the state alone; the numbers are better conditioned.
        """
        terms = [self.critic.value(observations)[:, None] - self.candidate_q(observations, chunks)]
        if self.keypoints is not None:
            terms.append(self.keypoints.guide(observations, chunks))
        return torch.stack(terms, -1)

    @torch.no_grad()
    def guidance(self, observations: Tensor, chunks: Tensor) -> Tensor:
        """What weights and selects S chunks (B, S, H, A) at (B, O): H, (Q)_+ or (Q - V)_+, (B, S)."""
        if self.settings.guidance == "h":
            return self.transport.compatibility(observations, chunks, self.cost(observations, chunks))
        q = self.candidate_q(observations, chunks)
        base = self.critic.value(observations)[:, None] if self.settings.guidance == "advantage" else 0.0
        return (q - base).relu()

    def candidate_guidance(self, observations: Tensor, candidates: Tensor) -> Tensor:
        """Guidance of a state's own candidates (N, S, H, A), with u(s) from where `row_condition` says, (N, S)."""
        if self.settings.guidance == "h" and self.settings.row_condition == "candidates":
            return self.transport.conditional(observations, candidates, self.cost(observations, candidates))
        return self.guidance(observations, candidates)

    def resample(self, weights: Tensor, explore: bool, generator: torch.Generator) -> Tensor:
        """Draw a candidate per state with probability w / sum w of weights (N, S); the result is (N,) int64."""
        floored = weights + SELECTION_FLOOR
        share = floored / floored.sum(1, keepdim=True)
        if explore:
            entropy = -torch.xlogy(share, share).sum(1).mean() / torch.tensor(float(max(share.shape[1], 2))).log()
            empty = (weights.sum(1) == 0).float().mean()
            self.selections.append({"actor/selection_entropy": entropy, "actor/selection_empty": empty})
        # Values that are not finite are noticed in losses or actions, as with every method; the draw refuses them.
        return torch.multinomial(share.nan_to_num(1.0), 1, generator=generator)[:, 0]

    def learn(self) -> dict[str, float]:
        """Critic steps, then the transport fit, then actor steps: the actor sees potentials of the present critic."""
        count = self.steps_per_iteration
        metrics = self.minibatches(count, self.critic_step)
        if self.trains_actor:
            if self.settings.guidance == "h":
                metrics |= self.fit_transport()
            self.known_guidance = self.guidance_ahead(count * self.settings.batch_size)
            metrics |= self.minibatches(count, self.actor_step)
            self.known_guidance = None
        if self.selections:
            metrics |= average(self.selections)
            self.selections.clear()
        return metrics

    def fit_transport(self) -> dict[str, float]:
        """Fit the potentials to the cost of the present critic."""
        observations, chunks = self.transport_points()
        return self.transport.fit(observations, chunks, self.cost, 0 if self.keypoints is None else len(self.keypoints))

    @torch.no_grad()
    def transport_points(self) -> tuple[Tensor, Tensor]:
        """States (b, O) and chunks (b, H, A) of a fit: keypoints, then replayed states, replayed and sampled chunks.

        Chunks of the replay alone would have Q judge only actions that the critic has seen elsewhere; those that the
        actor takes at the fit's own states are what H is asked about.
        """
        settings, fixed = self.settings, self.keypoints
        known = 0 if fixed is None else len(fixed)
        batch = self.replay.sample(settings.transport_block_size - known, self.generator)
        observations, chunks = batch.observations, batch.actions
        sampled = round(settings.policy_share * len(chunks))
        if sampled:
            fresh = self.actor.sample(observations[:sampled], True, self.generator)
            chunks = torch.cat([fresh, chunks[sampled:]])
        if fixed is not None:
            observations = torch.cat([fixed.observations, observations])
            chunks = torch.cat([fixed.chunks, chunks])
        return observations, chunks

    def guidance_ahead(self, draws: int) -> Tensor | None:
        """Guidance of every replayed and every expert pair, where actor steps draw more pairs than there are.

        Critic and potentials stand still during actor steps, so that once per pair is enough.

        Returns:
            (len(replay) + number of expert pairs,), without the latter where the actor sees none.
        """
        experts = self.expert if self.expert_count(self.settings.batch_size) else None
        if not self.settings.weighting or draws < len(self.replay) + (len(experts.actions) if experts else 0):
            return None
        sources = [self.replay.contents(), *([experts] if experts else [])]
        return torch.cat([self.pair_guidance(source.observations, source.actions) for source in sources])

    def actor_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Denoising loss weighted by the guidance (eq. 10) on replayed and expert pairs."""
        observations, actions, places = self.actor_pairs(batch)
        losses = self.actor.bc_losses(actions, observations, self.generator)
        metrics = {"actor/bc_loss": losses.detach().mean()}
        if not self.settings.weighting:
            return losses.mean(), metrics
        known = self.known_guidance
        weights = self.weights(self.pair_guidance(observations, actions) if known is None else known[places])
        loss = (weights * losses).mean()
        return loss, metrics | {
            "actor/weighted_bc_loss": loss.detach(),
            "actor/weight_effective_share": effective_share(weights),
            "actor/weight_zero_share": (weights == 0).float().mean(),
        }

    def actor_pairs(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """The batch, its first `expert_count` replaced by expert pairs.

        Returns:
            Observations (B, O), chunks (B, H, A), and the pairs' places (B,) in `known_guidance`.
        """
        count = self.expert_count(len(batch.actions))
        if self.expert is None or not count:
            return batch.observations, batch.actions, batch.places
        picks = torch.randint(len(self.expert.actions), (count,), generator=self.generator, device=batch.actions.device)
        observations = torch.cat([self.expert.observations[picks], batch.observations[count:]])
        actions = torch.cat([self.expert.actions[picks], batch.actions[count:]])
        return observations, actions, torch.cat([len(self.replay) + picks, batch.places[count:]])

    def expert_count(self, batch_size: int) -> int:
        """How many of an actor's batch are expert pairs, the first ones."""
        return 0 if self.expert is None else round(self.settings.expert_fraction * batch_size)

    @torch.no_grad()
    def pair_guidance(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Guidance of the pairs (B, O), (B, H, A), (B,)."""
        blocks = zip(observations.split(GUIDANCE_ROWS), actions[:, None].split(GUIDANCE_ROWS), strict=True)
        return torch.cat([self.guidance(states, chunks)[:, 0] for states, chunks in blocks])

    def weights(self, guidance: Tensor) -> Tensor:
        """Guidance (B,) over its batch mean, at most `weight_clip`, (B,)."""
        return (guidance / guidance.mean().clamp(min=SELECTION_FLOOR)).clamp(max=self.settings.weight_clip)


def _expert(settings: Settings, demonstrations: Demonstrations | None, device: torch.device) -> Demonstrations | None:
    """The demonstrations of the best `expert_share` of episodes, where the settings use any."""
    if not settings.uses_demonstrations:
        return None
    if demonstrations is None:
        raise ValueError("keypoints and expert_fraction need demonstrations, and this task has none")
    best = demonstrations.best(settings.expert_share)
    return Demonstrations(*(getattr(best, name).to(device) for name in ("observations", "actions", "ranks")))


def _keypoints(settings: Settings, expert: Demonstrations | None, generator: torch.Generator) -> Keypoints | None:
    """A fixed random choice of expert pairs, drawn with `generator` (CPU)."""
    if expert is None or not settings.keypoints:
        return None
    if settings.keypoints > len(expert.actions):
        raise ValueError(f"keypoints must be at most the {len(expert.actions)} expert pairs, got {settings.keypoints}")
    picks = torch.randperm(len(expert.actions), generator=generator)[: settings.keypoints].to(expert.actions.device)
    return Keypoints(expert.observations[picks], expert.actions[picks], settings.relation_temperature)


@dataclass(frozen=True)
class Settings(ImplicitQSettings):
    """Settings of OTPR, added to those that it shares with IDQL. None were published: IDQL's, and our own."""

    guidance: str = "h"  # what weights and selects: "h", or in its place "q" or "advantage", cut off at zero
    weighting: bool = True  # weight the denoising loss by the guidance
    selection: bool = True  # draw the executed chunk among candidates by the guidance
    weight_clip: float = 10.0  # largest weight of a sample, in multiples of the batch mean
    regulariser: str = "l2"  # of the transport, or "entropic"
    epsilon: float = 0.1  # strength of the regulariser, in units of the standardised cost
    action_bound: float = 1.0  # w of the relaxed action marginal; 1 is strict
    row_condition: str = "potential"  # u(s) when drawing: the fitted one, or such that H of the "candidates" has mean 1
    policy_share: float = 0.5  # of the chunks in a fit that the actor samples at the fit's states; the rest is replayed
    transport_block_size: int = 512  # states and chunks of one fit, every one with every other
    transport_first_steps: int = 2000  # most Adam steps of the first fit
    transport_warm_steps: int = 200  # most Adam steps of each later fit, which goes on from the one before
    transport_tolerance: float = 0.01  # marginal error at which a fit stops early
    transport_learning_rate: float = 3e-3
    keypoints: int = 0  # K expert pairs of the mask and of the guide; 0: unmasked, cost -Q alone
    guide_weight: float = 0.0  # share of the guide in the cost, each in units of its deviation; the rest is -Q
    relation_temperature: float = 0.1  # of the softmax over distances to keypoints
    expert_share: float = 0.1  # of the data's episodes, the best, whose chunks count as expert pairs
    expert_fraction: float = 0.0  # of the actor's batches that is expert pairs

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: a value outside its range, or a combination without meaning.
        """
        super().__post_init__()
        check_choice(self, "guidance", GUIDANCES)
        check_choice(self, "row_condition", ROW_CONDITIONS)
        check_range(self, ("policy_share", "guide_weight", "expert_share", "expert_fraction"), 0, 1)
        check_range(self, ("weight_clip", "relation_temperature"), 0, float("inf"), open_ends=True)
        check_range(self, ("keypoints",), 0, self.most_keypoints)
        self.transport()
        if self.guide_weight and not self.keypoints:
            raise ValueError(f"guide_weight {self.guide_weight} needs keypoints, got keypoints 0")
        if not (self.weighting or self.selection):
            raise ValueError("weighting and selection are both off, which leaves nothing of the method")

    @property
    def uses_demonstrations(self) -> bool:
        """Whether offline data takes part in fine-tuning."""
        return self.keypoints > 0 or self.expert_fraction > 0

    @property
    def most_keypoints(self) -> int:
        """Those that leave room for another pair in a block."""
        return self.transport_block_size - 1

    @property
    def idle(self) -> dict[str, str]:
        """The settings that change nothing, and beside which value of another."""
        fitted = (*_FIT_SETTINGS, *(name for name in vars(self) if name.startswith("transport_")))
        rules = (
            (self.guidance != "h", f"guidance {self.guidance!r}", fitted),
            (not self.weighting, "weighting off", ("weight_clip",)),
            (not self.selection, "selection off", ("row_condition", "exploration_weight")),
            (not self.keypoints, "keypoints 0", ("relation_temperature",)),
            (not self.uses_demonstrations, "keypoints 0 and expert_fraction 0", ("expert_share",)),
        )
        return {name: reason for applies, reason, names in rules if applies for name in names}

    @property
    def cost_shares(self) -> tuple[float, ...]:
        """Shares of -Q and of the guide in the cost."""
        return (1.0 - self.guide_weight, self.guide_weight) if self.keypoints else (1.0,)

    def transport(self) -> TransportSettings:
        """The transport's part."""
        return TransportSettings(
            regulariser=self.regulariser,
            epsilon=self.epsilon,
            action_bound=self.action_bound,
            learning_rate=self.transport_learning_rate,
            first_steps=self.transport_first_steps,
            warm_steps=self.transport_warm_steps,
            tolerance=self.transport_tolerance,
            block_size=self.transport_block_size,
        )


# No settings of OTPR were published: those of IDQL, which it was made from.
PUBLISHED: dict[str, dict[str, Any]] = implicit_q.PUBLISHED
_SHORT: dict[str, Any] = {
    "transport_block_size": 128,
    "transport_first_steps": 300,
    "transport_warm_steps": 60,
}
_TOY = {"transport_first_steps": 200, "transport_warm_steps": 40}
EMBEDDED: dict[str, dict[str, Any]] = {
    family: budget | _SHORT | (_TOY if family == "toy" else {}) for family, budget in implicit_q.EMBEDDED.items()
}
