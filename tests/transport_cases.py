"""Costs, blocks and potentials for the tests of the transport."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from torch import Tensor

from otpr.duality import REGULARISERS
from otpr.exact import ExactPlan, exact_plan
from otpr.keypoints import Keypoints
from otpr.potentials import TransportSettings
from otpr.transport import Cost, Transport

OBSERVATION_DIM, HORIZON, ACTION_DIM = 5, 2, 3
CHUNK_DIM = HORIZON * ACTION_DIM
SIZE, KEYPOINTS = 128, 8
MIXED = (0.5, 0.5)


class SmoothCost:
    """One term: a random trigonometric sum over (s, a), rotated towards a second one by `drift`."""

    def __init__(self, drift: float = 0.0, scale: float = 1.0, offset: float = 0.0, per_state: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(7)
        self.sums = [
            (
                torch.randn(OBSERVATION_DIM + CHUNK_DIM, 64, generator=generator) * 0.6,
                6.3 * torch.rand(64, generator=generator),
                torch.randn(64, generator=generator) / 8,
            )
            for _ in range(2)
        ]
        self.mixture = (np.cos(drift), np.sin(drift))
        self.scale, self.offset, self.per_state = scale, offset, per_state

    def __call__(self, observations: Tensor, chunks: Tensor) -> Tensor:
        """(B, O), (B, S, H, A) -> (B, S, 1)."""
        states = observations[:, None].expand(-1, chunks.shape[1], -1)
        inputs = torch.cat([states, chunks.flatten(2)], dim=-1)
        first, second = [torch.cos(inputs @ w + b) @ a for w, b, a in self.sums]
        total = self.mixture[0] * first + self.mixture[1] * second
        total = self.scale * (total + self.per_state * observations[:, :1].sin()) + self.offset
        return total[..., None]


class GuidedCost:
    """Two terms: a smooth one and the guide of the first points of `draw(size)`, (B, S, 2)."""

    def __init__(self, first: Cost | None = None, units: tuple[float, float] = (1.0, 1.0), size: int = SIZE) -> None:
        observations, chunks = draw(size)
        self.keypoints = Keypoints(observations[:KEYPOINTS], chunks[:KEYPOINTS], 0.1)
        self.first, self.units = first or SmoothCost(), torch.tensor(units)

    def __call__(self, observations: Tensor, chunks: Tensor) -> Tensor:
        guide = self.keypoints.guide(observations, chunks)[..., None]
        return torch.cat([self.first(observations, chunks), guide], -1) * self.units


def draw(count: int = SIZE, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    observations = torch.rand(count, OBSERVATION_DIM, generator=generator) * 2 - 1
    return observations, torch.rand(count, HORIZON, ACTION_DIM, generator=generator) * 2 - 1


def make(seed: int = 0, shares: tuple[float, ...] = (1.0,), **settings: Any) -> Transport:
    defaults = {"block_size": SIZE, "first_steps": 500, "warm_steps": 100, "hidden_dims": (128, 128), "tolerance": 0.0}
    chosen = TransportSettings(**(defaults | settings))
    return Transport(chosen, OBSERVATION_DIM, CHUNK_DIM, torch.Generator().manual_seed(seed), shares=shares)


def small(seed: int = 0, **settings: Any) -> Transport:
    """Far from converged, for what does not depend on convergence."""
    defaults = {"block_size": 32, "first_steps": 20, "warm_steps": 15, "hidden_dims": (32, 32)}
    return make(seed, **(defaults | settings))


def metrics_of(fit: dict[str, float]) -> dict[str, float]:
    """All but the time."""
    assert fit["time/transport"] > 0
    return {name.removeprefix("transport/"): value for name, value in fit.items() if name != "time/transport"}


def solve(transport: Transport, cost: Cost, keypoints: int = 0) -> tuple[Tensor, Tensor, ExactPlan]:
    """The neural plan, the standardised cost of its block, and the exact plan."""
    settings = transport.settings
    density, standardised = transport.plan(*draw(settings.block_size), cost, keypoints)
    block = standardised.double().numpy()
    exact = exact_plan(block, settings.epsilon, settings.regulariser, settings.action_bound, keypoints)
    return density, standardised, exact


def relative_gap(dual: float, exact: ExactPlan, cost: Tensor, settings: TransportSettings, keypoints: int = 0) -> float:
    """|dual - exact| in units of what the exact plan gains over the independent one of the same mask.

    Without a mask the latter is H = 1, of value mean c + R(1), where R(1) is epsilon for L2 and 0 for entropic.
    """
    size = len(cost)
    independent = torch.full((size, size), size / (size - keypoints), dtype=torch.float64)
    independent[:keypoints], independent[:, :keypoints] = 0.0, 0.0
    independent[range(keypoints), range(keypoints)] = float(size)
    penalty = REGULARISERS[settings.regulariser].penalty(independent, settings.epsilon)
    return abs(dual - exact.value) / abs(exact.value - ((cost * independent).mean() + penalty).item())


def pickled(transport: Transport) -> bytes:
    buffer = io.BytesIO()
    torch.save(transport.state_dict(), buffer)
    return buffer.getvalue()
