"""Transport problems with known points and costs: a smooth random cost, and a Gaussian moved to shapes of the plane.

A problem draws states and chunks independently of each other; keypoint pairs, where it has any, come first in a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmark.seeding import BASE_SEED, Streams
from otpr.keypoints import Keypoints
from otpr.transport import Cost

STREAMS = Streams(BASE_SEED, "toy-transport", 0)
OBSERVATION_DIM, CHUNK_SHAPE = 5, (2, 3)  # of the smooth cost
FREQUENCIES = 64  # terms of its trigonometric sum
KEYPOINTS = 16  # of the smooth cost; the plane has 8
TEMPERATURE = 0.1  # of the guide, as in KPG-RL and OTCS
SPREAD = 0.9  # standard deviation of the Gaussian source
RADIUS = 2.0  # of the ring of Gaussians and of the roll
EXTENT = 2.75  # no point of a target is further from 0
TURN = math.pi / 2  # the pairs turn the ring by so much, which no squared distance would

Draw = Callable[[int, torch.Generator], Tensor]  # count, generator -> (count, ...)


@dataclass(frozen=True)
class Problem:
    """Marginals, a cost of C terms and their shares, and what is known of the pairing."""

    name: str
    states: Draw  # (n, O)
    chunks: Draw  # (n, H, A)
    cost: Cost
    shares: tuple[float, ...] = (1.0,)
    keypoints: Keypoints | None = None

    @property
    def pairs(self) -> int:
        """The number of keypoints."""
        return len(self.keypoints) if self.keypoints else 0

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A block of `count` states (count, O) and chunks (count, H, A): the keypoints, then independent draws."""
        states, chunks = (side(count - self.pairs, generator) for side in (self.states, self.chunks))
        if self.keypoints is None:
            return states, chunks
        return torch.cat([self.keypoints.observations, states]), torch.cat([self.keypoints.chunks, chunks])


class SmoothCost:
    """scale * -Q(s, a) + offset, with Q a random trigonometric sum over (s, a)."""

    def __init__(self, scale: float, offset: float) -> None:
        generator = STREAMS.torch("cost")
        inputs = OBSERVATION_DIM + math.prod(CHUNK_SHAPE)
        self.weights = 0.6 * torch.randn(inputs, FREQUENCIES, generator=generator)
        self.phases = 2 * math.pi * torch.rand(FREQUENCIES, generator=generator)
        self.amplitudes = torch.randn(FREQUENCIES, generator=generator) / math.sqrt(FREQUENCIES)
        self.scale, self.offset = scale, offset

    def __call__(self, observations: Tensor, chunks: Tensor) -> Tensor:
        """(B, O), (B, S, H, A) -> (B, S, 1)."""
        states = observations[:, None].expand(-1, chunks.shape[1], -1)
        inputs = torch.cat([states, chunks.flatten(2)], dim=-1)
        q = torch.cos(inputs @ self.weights + self.phases) @ self.amplitudes
        return (self.offset - self.scale * q)[..., None]


def squared_distance(observations: Tensor, chunks: Tensor) -> Tensor:
    """|x - y|^2 of points x (B, 2) as states and y (B, S, 1, 2) as chunks; (B, S, 1)."""
    return (observations[:, None] - chunks.flatten(2)).square().sum(-1, keepdim=True)


def guided(cost: Cost, keypoints: Keypoints) -> Cost:
    """The cost with the guide of the keypoints as a second term, (B, S, 2)."""
    return lambda observations, chunks: torch.cat(
        [cost(observations, chunks), keypoints.guide(observations, chunks)[..., None]], dim=-1
    )


def smooth(scale: float = 1.0, offset: float = 0.0, masked: bool = False) -> Problem:
    """The smooth random cost; masked: with random keypoint pairs, and half of the cost their guide."""

    def uniform(*shape: int) -> Draw:
        return lambda count, generator: 2 * torch.rand(count, *shape, generator=generator) - 1

    problem = Problem("smooth", uniform(OBSERVATION_DIM), uniform(*CHUNK_SHAPE), SmoothCost(scale, offset))
    if not masked:
        return problem
    pairs = Keypoints(*problem.draw(KEYPOINTS, STREAMS.torch("keypoints")), TEMPERATURE)
    return Problem(problem.name, problem.states, problem.chunks, guided(problem.cost, pairs), (0.5, 0.5), pairs)


def gaussian(count: int, generator: torch.Generator) -> Tensor:
    """The source of the plane, (count, 2)."""
    return SPREAD * torch.randn(count, 2, generator=generator)


def circle(angles: Tensor, radius: Tensor | float) -> Tensor:
    """Points (..., 2) at angles (...) and radii."""
    return torch.stack([angles.cos(), angles.sin()], dim=-1) * torch.as_tensor(radius)[..., None]


def eight_gaussians(count: int, generator: torch.Generator) -> Tensor:
    """Eight narrow Gaussians on a ring, (count, 1, 2)."""
    index = torch.randint(8, (count,), generator=generator)
    return (circle(index * math.pi / 4, RADIUS) + 0.1 * torch.randn(count, 2, generator=generator))[:, None]


def roll(along: Tensor) -> Tensor:
    """Points (..., 2) of the Swiss roll at shares (...) in [0, 1] of its parameter."""
    angle = 1.5 * math.pi * (1 + 2 * along)
    return circle(angle, RADIUS * angle / (4.5 * math.pi))


def swiss_roll(count: int, generator: torch.Generator) -> Tensor:
    """The Swiss roll with a little noise, (count, 1, 2)."""
    points = roll(torch.rand(count, generator=generator))
    return (points + 0.05 * torch.randn(count, 2, generator=generator))[:, None]


def plane(target: str, paired: bool) -> Problem:
    """The Gaussian moved to "8gaussians" or "swiss-roll" by the squared distance, or by eight pairs alone.

    The pairs are what no squared distance asks for: the ring is turned by `TURN`, the roll follows the source's angle.
    Their cost is the guide, share 1, as in OTCS's semi-paired case; the distance has no share.
    """
    chunks = {"8gaussians": eight_gaussians, "swiss-roll": swiss_roll}[target]
    problem = Problem(target, gaussian, chunks, squared_distance)
    if not paired:
        return problem
    angles = (torch.arange(8) + (0.5 if target == "swiss-roll" else 0.0)) * math.pi / 4
    ends = circle(angles + TURN, RADIUS) if target == "8gaussians" else roll(angles / (2 * math.pi))
    pairs = Keypoints(circle(angles, 1.25 * SPREAD), ends[:, None], TEMPERATURE)
    return Problem(f"{target}-paired", gaussian, chunks, guided(squared_distance, pairs), (0.0, 1.0), pairs)
