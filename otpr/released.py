"""The released code of OTPR (github.com/Sunmmyy/OTPR, its masked mode) as far as it can run: for comparison only.

It differs from the paper's method and from `otpr.agent` in what is kept here on purpose, one item a line:

- the actor clones the replay without weights; selection alone uses H;
- potentials are made anew in every iteration and take 1000 Adam steps at a rate of 1e-5, each on a fresh batch of 128;
- the cost that they are fitted to is the guide alone, by cosine distances, in its own unit and with a mask whose
  keypoints are the next 128 expert pairs in file order, beside the batch, starting again with the first in every
  iteration; Q takes no part. This takes about half a minute of one core per iteration;
- H is then read with the cost -Q, without guide and mask;
- evaluation executes one of the candidates at random, which is a sample of the actor.

What keeps the release from running is repaired: syntax, devices, missing settings (epsilon among them) and parts.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from otpr import agent, implicit_q
from otpr.duality import L2, marginal_errors
from otpr.method import ActionChunk
from otpr.potentials import Potentials
from otpr.precision import backward, float32_products

LOG_FLOOR = 1e-10
BLOCK_ROWS = 16
# Settings of `otpr.agent` that would do nothing here, or not what they say.
LACKING = (
    "guidance", "row_condition", "guide_weight", "regulariser", "policy_share", "action_bound", "transport_tolerance",
    "transport_warm_steps",
)  # fmt: skip


def cosine_relation(points: Tensor, keypoints: Tensor, temperature: float) -> Tensor:
    """R_k(x) = softmax_k(-(1 - cos(x, x_k)) / temperature) of points (N, D) and keypoints (K, D), (N, K)."""
    with float32_products(points.device.type):
        cosines = F.normalize(points, dim=1) @ F.normalize(keypoints, dim=1).mT
    return ((cosines - 1) / temperature).softmax(-1)


def floored_jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """`otpr.keypoints.jensen_shannon` of each of (N, K) with each of (M, K), (N, M), its logarithms of x + 1e-10."""
    own = [(x * (x + LOG_FLOOR).log()).sum(-1) / 2 for x in (p, q)]
    mixed = []
    for rows in p.split(BLOCK_ROWS):  # which stay in the core's cache: a sixth of the time
        m = (rows[:, None] + q).mul_(0.5)  # (block, M, K)
        mixed.append((m * (m + LOG_FLOOR).log_()).sum(-1))
    return own[0][:, None] + own[1] - torch.cat(mixed)


class ReleasedOTPR(agent.OTPR):
    """OTPR with the released actor loss, the released fit of the potentials and the released evaluation."""

    @torch.no_grad()
    def act(self, observations: Tensor, explore: bool, generator: torch.Generator) -> ActionChunk:
        """Draw among candidates by H while exploring; in evaluation one sample of the actor."""
        if explore:
            return super().act(observations, explore, generator)
        return ActionChunk(self.actor.sample(observations, explore, generator))

    @torch.no_grad()
    def guidance(self, observations: Tensor, chunks: Tensor) -> Tensor:
        """H with cost -Q of S chunks (B, S, H, A) at (B, O), whatever the potentials were fitted to, (B, S)."""
        u, v = self.transport.potentials(observations, chunks)
        gap = u[:, None] + v + self.candidate_q(observations, chunks)
        return L2().density(gap, self.settings.epsilon)

    def fit_transport(self) -> dict[str, float]:
        """Potentials from scratch on the guide, masked, in file order; the errors are those of the last batch."""
        assert self.expert is not None
        started = time.perf_counter()
        settings, flat = self.transport.settings, self.shape.action_horizon * self.shape.action_dim
        device = self.generator.device
        seed = int(torch.randint(2**31, (1,), generator=self.generator, device=device))
        fresh = torch.Generator().manual_seed(seed)
        self.transport.potentials = Potentials(self.shape.observation_dim, flat, settings, fresh).to(device)
        optimizer = torch.optim.Adam(self.transport.potentials.parameters(), lr=settings.learning_rate, fused=True)
        count = self.settings.keypoints
        density = torch.ones(1, 1)
        for step in range(settings.first_steps):
            batch = self.replay.sample(settings.block_size, self.generator)
            rows = (torch.arange(count) + step * count) % (len(self.expert.actions) // count * count)
            states = torch.cat([self.expert.observations[rows], batch.observations])  # (K + B, O)
            actions = torch.cat([self.expert.actions[rows], batch.actions])  # (K + B, H, A)
            density = self._masked_step(optimizer, states, actions)
        rows, columns = marginal_errors(density)
        metrics = {"transport/row_marginal_error": rows, "transport/column_marginal_error": columns}
        values = {name: value.item() for name, value in metrics.items()}
        return values | {"transport/steps": settings.first_steps, "time/transport": time.perf_counter() - started}

    def _masked_step(self, optimizer: torch.optim.Optimizer, states: Tensor, actions: Tensor) -> Tensor:
        """One step on keypoints and batch, (K + B, O) and (K + B, H, A); returns H before it, (K + B, K + B)."""
        count, size = self.settings.keypoints, len(states)
        with torch.no_grad():
            temperature, flat = self.settings.relation_temperature, actions.flatten(1)  # (K + B, H * A)
            relations = [cosine_relation(points, points[:count], temperature) for points in (states, flat)]
            cost = floored_jensen_shannon(*relations)  # (K + B, K + B)
            mask = torch.ones_like(cost)
            mask[:count], mask[:, :count] = 0.0, 0.0
            mask.diagonal()[:count] = 1.0
        u, v = self.transport.potentials(states, actions)
        with torch.no_grad():
            density = mask * L2().density(u[:, None] + v[None] - cost, self.settings.epsilon)
            gradients = [(density.mean(1) - 1) / size, (density.mean(0) - 1) / size]
        optimizer.zero_grad(set_to_none=True)
        backward([u, v], gradients)
        optimizer.step()
        return density


@dataclass(frozen=True)
class Settings(agent.Settings):
    """Settings of the released code, of which none were published; what it lacks of `otpr.agent` stays as it is."""

    weighting: bool = False
    transport_block_size: int = 128  # replayed states and chunks of a batch
    transport_first_steps: int = 1000  # Adam steps in every iteration, from scratch
    transport_learning_rate: float = 1e-5
    keypoints: int = 128  # expert pairs in a batch, beside as many replayed ones
    guide_weight: float = 1.0  # its default alpha = 1 leaves the guide alone

    @property
    def most_keypoints(self) -> int:
        """As many as replayed pairs."""
        return self.transport_block_size

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: a value outside its range, or not the default of a setting that the released code lacks.
        """
        super().__post_init__()
        for name in LACKING:
            default = type(self).__dataclass_fields__[name].default
            value = getattr(self, name)
            if value != default:
                raise ValueError(f"the released code has no {name}: it must be {default!r}, got {value!r}")


PUBLISHED: dict[str, dict[str, Any]] = agent.PUBLISHED
_TOY = {"transport_first_steps": 20, "transport_block_size": 16, "keypoints": 16}
EMBEDDED: dict[str, dict[str, Any]] = {
    family: budget | (_TOY if family == "toy" else {}) for family, budget in implicit_q.EMBEDDED.items()
}
