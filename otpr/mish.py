"""Mish, x tanh(log(1 + e^x)) (Misra 2019), in one compiled pass on the CPU.

PyTorch's own takes a logarithm, an exponential and a hyperbolic tangent per element, in the backward pass once more: on
two-layer critics with 256 units that is more time than their matrix products. With e = exp(-|x|) all of it is rational,

    x > 0:  tanh(log(1 + e^x)) = (1 + 2e) / (1 + 2e + 2e^2)        x <= 0:  (2e + e^2) / (2 + 2e + e^2)

and the derivative needs nothing further, so that it is computed with the value and the backward pass is one product.
"""

# ruff: noqa: ANN001, ANN202 - numba infers the types of compiled functions

from __future__ import annotations

from functools import partial
from typing import Any

import numba
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from otpr.compiling import compiled

CONTRACT = {"contract"}  # products and sums may be fused, all else is as written
MOST_THREADS = 4  # the compiled pass takes one thread, and as long as PyTorch's own takes with six

_f = np.float32
_LOG2E, _LN2_HIGH, _LN2_LOW = _f(1.44269504), _f(0.693359375), _f(-2.12194440e-4)  # ln 2 in two parts: no cancellation
_SMALLEST = _f(-87.0)  # of the exponent: float32 has no normal numbers below
# exp(r) = 1 + r + r^2 p(r) for |r| <= ln(2) / 2: Cephes' minimax polynomial, highest power first
_P5, _P4, _P3, _P2, _P1, _P0 = map(
    _f, (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
)


@numba.njit(error_model="numpy", fastmath=CONTRACT, inline="always")
def _exp(z):
    """exp(z) of a float32 z in [-87, 0], to 1e-7; written out, since LLVM turns no call of exp into vector code."""
    whole = np.floor(z * _LOG2E + _f(0.5))
    r = z - whole * _LN2_HIGH - whole * _LN2_LOW
    p = ((((_P5 * r + _P4) * r + _P3) * r + _P2) * r + _P1) * r + _P0
    power = np.int32((np.int32(whole) + np.int32(127)) << np.int32(23))  # the bits of 2^whole
    return (p * r * r + r + _f(1.0)) * power.view(np.float32)


@partial(compiled, fastmath=CONTRACT)
def _value(x, value):
    """Mish of x (n,) into value (n,)."""
    for i in range(x.size):
        positive, e = x[i] > _f(0.0), _exp(max(-abs(x[i]), _SMALLEST))
        inner = (_f(1.0) + _f(2.0) * e) if positive else e * (_f(2.0) + e)
        outer = _f(1.0) / (inner + (_f(2.0) * e * e if positive else _f(2.0)))
        value[i] = x[i] * (inner * outer)


@partial(compiled, fastmath=CONTRACT)
def _value_and_slope(x, value, slope):
    """Mish of x (n,) into value (n,) and its derivative, t + x (1 - t^2) sigmoid(x), into slope (n,)."""
    for i in range(x.size):
        positive, e = x[i] > _f(0.0), _exp(max(-abs(x[i]), _SMALLEST))
        inner = (_f(1.0) + _f(2.0) * e) if positive else e * (_f(2.0) + e)
        outer = _f(1.0) / (inner + (_f(2.0) * e * e if positive else _f(2.0)))
        t = inner * outer
        value[i] = x[i] * t
        slope[i] = t + x[i] * _f(4.0) * e * (e if positive else _f(1.0)) * (_f(1.0) + e) * outer * outer


class _Mish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Mish of float32 x of any shape on the CPU."""
        value, slope = torch.empty_like(x), torch.empty_like(x)
        _value_and_slope(*(part.detach().view(-1).numpy() for part in (x, value, slope)))
        ctx.save_for_backward(slope)
        return value

    @staticmethod
    @once_differentiable  # the slope is kept as a constant: a second derivative would be wrong, hence is refused
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The chain rule."""
        return gradients[0] * ctx.saved_tensors[0]


def mish(x: Tensor) -> Tensor:
    """Mish of x (...), same shape: compiled for contiguous float32 on the CPU, else PyTorch's, equal to about 1e-6.

    In bfloat16 on the CPU it is the float32 one, rounded.
    """
    if x.device.type == "cpu" and x.dtype == torch.bfloat16:
        return mish(x.float()).to(x.dtype)
    fits = x.device.type == "cpu" and x.dtype == torch.float32 and x.is_contiguous()
    if not fits or torch.get_num_threads() > MOST_THREADS:
        return F.mish(x)
    if torch.is_grad_enabled() and x.requires_grad:
        return _Mish.apply(x)
    value = torch.empty_like(x)
    _value(x.detach().view(-1).numpy(), value.view(-1).numpy())
    return value


class Mish(nn.Module):
    """`mish` as a module."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (...) to (...)."""
        return mish(x)
