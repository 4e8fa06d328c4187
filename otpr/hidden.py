"""Hidden layers on the CPU in few passes over memory: bias and activation overwrite the product's result.

PyTorch's Mish, x tanh(log(1 + e^x)) (Misra 2019), takes a logarithm, an exponential and a hyperbolic tangent per
element, in the backward pass once more: on critics with 256 units that is more time than their products. With w = e^x
and n = w (w + 2) it is rational,

    tanh(log(1 + w)) = n / (n + 2)        d/dx tanh(log(1 + w)) = 4 w (1 + w) / (n + 2)^2

so that one compiled pass adds the bias and computes value and derivative.
"""

# ruff: noqa: ANN001, ANN202 - numba infers the types of compiled functions

from __future__ import annotations

from functools import partial
from typing import Any

import numba
import numpy as np
import torch
from numba.extending import overload
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from otpr.compiling import compiled

MOST_THREADS = 4  # the compiled pass takes one thread, and as long as PyTorch's Mish takes with six
# products and sums may be fused, all else is as written
OPTIONS: Any = {"fastmath": {"contract"}, "error_model": "numpy"}

_f, _u32 = np.float32, np.uint32
_LOG2E, _LN2_HIGH, _LN2_LOW = _f(1.44269504), _f(0.693359375), _f(-2.12194440e-4)  # ln 2 in two parts: no cancellation
_LEAST, _MOST = _f(-87.0), _f(20.0)  # of the exponent: float32 has no normal numbers below; Mish is x above
# exp(r) = 1 + r + r^2 p(r) for |r| <= ln(2) / 2: Cephes' minimax polynomial, highest power first
_P5, _P4, _P3, _P2, _P1, _P0 = map(
    _f, (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
)


@numba.njit(inline="always", **OPTIONS)
def _exp(z):
    """exp(z) of a float32 z in [-87, 87], to 1e-7; written out, since LLVM turns no call of exp into vector code."""
    whole = np.floor(z * _LOG2E + _f(0.5))
    r = z - whole * _LN2_HIGH - whole * _LN2_LOW
    p = ((((_P5 * r + _P4) * r + _P3) * r + _P2) * r + _P1) * r + _P0
    power = np.int32((np.int32(whole) + np.int32(127)) << np.int32(23))  # the bits of 2^whole
    return (p * r * r + r + _f(1.0)) * power.view(np.float32)


def _read(array, i, j) -> Any:
    """array[i, j] as float32; bfloat16 comes as its bits in uint16."""


def _write(array, i, j, value):
    """A float32 value into array[i, j], rounded to the nearest bfloat16, ties to even, where it holds those."""


@overload(_read, jit_options=OPTIONS)
def _read_as(array, i, j):
    if array.dtype == numba.uint16:
        return lambda array, i, j: _u32(_u32(array[i, j]) << _u32(16)).view(np.float32)
    return lambda array, i, j: array[i, j]


@overload(_write, jit_options=OPTIONS)
def _write_as(array, i, j, value):
    def rounded(array, i, j, value):
        bits = _f(value).view(np.uint32)
        array[i, j] = np.uint16(_u32(bits + _u32(0x7FFF) + ((bits >> _u32(16)) & _u32(1))) >> _u32(16))

    def whole(array, i, j, value):
        array[i, j] = value

    return rounded if array.dtype == numba.uint16 else whole


@partial(compiled, **OPTIONS)
def _mish(z, bias):
    """Mish of z + bias (n,), in place of z (m, n)."""
    for i in range(z.shape[0]):
        for j in range(z.shape[1]):
            x = _read(z, i, j) + bias[j]
            w = _exp(min(max(x, _LEAST), _MOST))
            n = w * (w + _f(2.0))
            _write(z, i, j, x * (n * (_f(1.0) / (n + _f(2.0)))))


@partial(compiled, **OPTIONS)
def _mish_and_slope(z, bias, value):
    """Mish of z + bias (n,) into value (m, n) and its derivative in place of z (m, n)."""
    for i in range(z.shape[0]):
        for j in range(z.shape[1]):
            x = _read(z, i, j) + bias[j]
            w = _exp(min(max(x, _LEAST), _MOST))
            n = w * (w + _f(2.0))
            inverse = _f(1.0) / (n + _f(2.0))
            t = n * inverse
            _write(value, i, j, x * t)
            _write(z, i, j, t + x * (_f(4.0) * w * (_f(1.0) + w) * (inverse * inverse)))


def _array(x: Tensor) -> np.ndarray:
    """A tensor's memory for the compiled passes: bfloat16 as uint16."""
    x = x.detach()
    return x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy()


def _activate(z: Tensor, bias: Tensor, rectified: bool, recorded: bool) -> tuple[Tensor, Tensor]:
    """ReLU or Mish of z + bias, and what `_through` takes for its slope if it is recorded; z is overwritten."""
    if rectified:
        value = z.add_(bias).relu_()
        return value, value
    if not recorded:
        _mish(_array(z), _array(bias))
        return z, z
    value = torch.empty_like(z)
    _mish_and_slope(_array(z), _array(bias), _array(value))
    return value, z


def _through(gradient: Tensor, slope: Tensor, rectified: bool) -> Tensor:
    """The gradient (m, n) before an activation, in `slope`'s type; ReLU's slope is whether its value is positive."""
    gradient = gradient.to(slope.dtype)
    return torch.ops.aten.threshold_backward(gradient, slope, 0) if rectified else gradient * slope


def _bias_gradient(gradient: Tensor) -> Tensor:
    """Column sums (n,) of (m, n), in float32."""
    return gradient.sum(0, dtype=torch.float32)


def _product_type() -> torch.dtype:
    """The type of factors here: bfloat16 under autocast."""
    return torch.bfloat16 if torch.is_autocast_enabled("cpu") else torch.float32


class _Hidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, rectified: bool) -> Tensor:
        """Activation of x (B, in) weight' (in, out) + bias."""
        x, weight = x.to(_product_type()), weight.to(_product_type())
        value, slopes = _activate(x.mm(weight.t()), bias, rectified, ctx is not None)
        if ctx is not None:
            ctx.save_for_backward(x, weight, slopes)
            ctx.rectified = rectified
        return value

    @staticmethod
    @once_differentiable  # slopes are kept as constants: a second derivative would be wrong, hence is refused
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The chain rule, of what needs it."""
        x, weight, slopes = ctx.saved_tensors
        gradient = _through(gradients[0], slopes, ctx.rectified)
        of_x = gradient.mm(weight) if ctx.needs_input_grad[0] else None
        if not any(ctx.needs_input_grad[1:3]):
            return of_x, None, None, None
        return of_x, gradient.t().mm(x), _bias_gradient(gradient), None


class _Residual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, rectified: bool) -> Tensor:
        """x + act(act(x) w1' + b1) w2' + b2 of x (B, dim)."""
        kind = _product_type()
        if rectified:
            first = first_slopes = x.relu()
        else:
            copy = x.clone(memory_format=torch.contiguous_format)
            first, first_slopes = _activate(copy, torch.zeros(x.shape[1]), rectified, ctx is not None)
        first, w1, w2 = first.to(kind), w1.to(kind), w2.to(kind)
        second, second_slopes = _activate(first.mm(w1.t()), b1, rectified, ctx is not None)
        if ctx is not None:
            ctx.save_for_backward(first, first_slopes, w1, second, second_slopes, w2)
            ctx.rectified = rectified
        return second.mm(w2.t()).to(x.dtype).add_(x).add_(b2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The chain rule, of what needs it."""
        first, first_slopes, w1, second, second_slopes, w2 = ctx.saved_tensors
        of_x, of_weights = None, (None,) * 4
        gradient = gradients[0].to(w2.dtype)
        inner = _through(gradient.mm(w2), second_slopes, ctx.rectified)
        if any(ctx.needs_input_grad[1:5]):
            of_l1, of_l2 = (inner.t().mm(first), _bias_gradient(inner)), (gradient.t().mm(second), gradients[0].sum(0))
            of_weights = (*of_l1, *of_l2)
        if ctx.needs_input_grad[0]:
            of_x = _through(inner.mm(w1), first_slopes, ctx.rectified).add_(gradients[0])
        return of_x, *of_weights, None


def _fits(x: Tensor, activation: nn.Module) -> bool:
    """Whether this input and activation go the way of few passes."""
    known = isinstance(activation, nn.ReLU | nn.Mish) and x.dtype in (torch.float32, torch.bfloat16)
    return known and x.device.type == "cpu" and x.dim() == 2 and torch.get_num_threads() <= MOST_THREADS


def _apply(function: type[torch.autograd.Function], activation: nn.Module, x: Tensor, *parameters: Tensor) -> Tensor:
    """`function`, recorded for a backward pass if there may be one."""
    rectified = isinstance(activation, nn.ReLU)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *parameters)):
        return function.apply(x, *parameters, rectified)  # pyright: ignore[reportReturnType]
    return function.forward(None, x, *parameters, rectified)


def hidden_layer(x: Tensor, layer: nn.Linear, activation: nn.Module) -> Tensor:
    """activation(layer(x)) of x (B, in), (B, out), equal to PyTorch's to about 1e-6.

    In few passes for ReLU and Mish in float32, or under autocast to bfloat16, on the CPU; else by PyTorch's modules.
    """
    if not _fits(x, activation):
        return activation(layer(x))
    return _apply(_Hidden, activation, x, layer.weight, layer.bias)


def residual_block(x: Tensor, l1: nn.Linear, l2: nn.Linear, activation: nn.Module) -> Tensor:
    """x + l2(act(l1(act(x)))) of x (B, dim), same shape, where `hidden_layer` takes few passes in few as well."""
    if not _fits(x, activation):
        return x + l2(activation(l1(activation(x))))
    return _apply(_Residual, activation, x, l1.weight, l1.bias, l2.weight, l2.bias)
