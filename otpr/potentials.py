"""The networks u(s) and v(a) that `otpr.transport` fits, and the settings of both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from otpr.checks import check_choice, check_range
from otpr.duality import REGULARISERS
from otpr.networks import MLP
from otpr.precision import float32_products


class _NonPositive(torch.autograd.Function):
    """min(x, 0) whose gradient also reaches an x > 0 that descent would lower: a projected gradient step.

    A smooth parametrisation of v <= 0 saturates where the bound is slack, and cannot come back when it binds.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """min(x, 0)."""
        ctx.save_for_backward(x)
        return x.clamp(max=0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """Nothing where x > 0 and descent would raise it."""
        (x,), (gradient,) = ctx.saved_tensors, gradients
        return gradient * ((x < 0) | (gradient > 0))


@dataclass(frozen=True)
class TransportSettings:
    """Settings of the problem, of the potentials and of one fit.

    Raises:
        ValueError: a value outside its range.
    """

    regulariser: str = "l2"  # or "entropic"
    epsilon: float = 0.1  # strength of the regulariser, in units of the standardised cost
    action_bound: float = 1.0  # w: largest marginal density of a chunk; 1 is transport, block_size or more drops v
    hidden_dims: tuple[int, ...] = (256, 256)  # of u and of v
    learning_rate: float = 3e-3  # Adam; the released 1e-5 leaves marginal errors of 40 to 50 %
    first_steps: int = 2000  # largest number of gradient steps of the first fit
    warm_steps: int = 200  # of each later fit, which starts from the potentials of the one before
    tolerance: float = 0.01  # a fit stops when both marginal errors are this small; 0 never stops it early
    block_size: int = 512  # states, and chunks, in a fit: a gradient step sees block_size^2 pairs

    def __post_init__(self) -> None:
        """Check the values."""
        check_choice(self, "regulariser", tuple(REGULARISERS))
        check_range(self, ("epsilon", "learning_rate"), 0, float("inf"), open_ends=True)
        check_range(self, ("action_bound", "block_size"), 1, float("inf"))
        check_range(self, ("first_steps", "warm_steps", "tolerance"), 0, float("inf"))

    @property
    def uses_v(self) -> bool:
        """Whether the bound on the action marginal can bind: no column mean of a block exceeds its size."""
        return self.action_bound < self.block_size


class Potentials(nn.Module):
    """u(s) and v(a), two SiLU networks, in units of the standardised cost."""

    def __init__(
        self, observation_dim: int, chunk_dim: int, settings: TransportSettings, generator: torch.Generator
    ) -> None:
        """`chunk_dim` is H * A; `generator` (CPU) initialises the weights.

        Hidden layers get He et al.'s (2015) initialisation; the smaller default one leaves about twice the error
        after as many steps.
        """
        super().__init__()
        self.uses_v, self.bounded = settings.uses_v, settings.action_bound > 1
        self.u = MLP([observation_dim, *settings.hidden_dims, 1], "silu", generator)
        self.v = MLP([chunk_dim, *settings.hidden_dims, 1], "silu", generator)
        for weight in self.parameters():
            if weight.ndim == 2 and len(weight) > 1:  # the last layers have one output and stay small
                nn.init.kaiming_uniform_(weight, nonlinearity="relu", generator=generator)

    def forward(self, observations: Tensor, chunks: Tensor) -> tuple[Tensor, Tensor]:
        """u of observations (..., O) as (...) and v of chunks (..., H, A) as (...); v <= 0 where it is a multiplier."""
        with float32_products(observations.device.type):
            u = self.u(observations).squeeze(-1)
            if not self.uses_v:
                return u, torch.zeros_like(chunks[..., 0, 0])
            v = self.v(chunks.flatten(-2)).squeeze(-1)
        return u, _NonPositive.apply(v) if self.bounded else v
