"""Hidden layers on the CPU in few passes over memory: bias, base and activation overwrite the product's result.

PyTorch's Mish, x tanh(log(1 + e^x)) (Misra 2019), takes a logarithm, an exponential and a hyperbolic tangent per
element, in the backward pass once more: on critics with 256 units that is more time than their products. With w = e^x
and n = w (w + 2) it is rational,

    tanh(log(1 + w)) = n / (n + 2)        d/dx tanh(log(1 + w)) = 4 w (1 + w) / (n + 2)^2

so that one compiled pass adds the bias and computes value and derivative. In bfloat16 the passes read and write the
rounded matrices that products take and leave.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from otpr.passes import (
    KINDS,
    mish,
    mish_and_slope,
    partial_sums,
    relu,
    run_pass,
    through,
    through_relu,
)
from otpr.precision import float32_products, product_type

MOST_ENTERING = MOST_PROJECTED = 16  # inputs and outputs of a pass; more take less time as a product


def _activate(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    base: Tensor | None,
    kind: torch.dtype,
    rectified: bool,
    recorded: bool,
    projection: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """ReLU or Mish of x weight' + bias + base in type `kind`, and what `_through` takes for its slope if recorded.

    The value is None where it is projected and not recorded.
    """
    sloped, enters = recorded and not rectified, x.dtype == torch.float32 and x.shape[-1] <= MOST_ENTERING
    shape = (*x.shape[:-1], weight.shape[-2])
    z = x.matmul(weight.mT) if not enters else torch.empty(shape) if sloped else None
    if projection is not None and not recorded:
        value = None
    elif z is not None and z.dtype == kind and not sloped:
        value = z
    else:
        value = torch.empty(shape, dtype=kind)
    row = relu if rectified else mish_and_slope if recorded else mish
    base = None if base is None else base.contiguous()
    entrance = (x.contiguous(), weight.mT.contiguous()) if enters else None
    run_pass(row, bias.contiguous(), z, value, base, entrance=entrance, projection=projection)
    return value, z if sloped else value


def _through(
    gradient: Tensor,
    ctx: Any,
    x: Tensor,
    weight: Tensor,
    slope: Tensor,
    matrix: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """Gradients of x, weight and bias, as far as they are needed, and of what the activation is of.

    ReLU's slope is whether its value is positive.

    Args:
        gradient: of the activation's value, (..., m, n); with a matrix (..., k, n) that of its product, (..., m, k).
        ctx: of a Function whose first three arguments are x, weight and bias.
        x, weight: in the product's type.
        slope: see `_activate`.
        matrix: of `_HiddenOutput`.
    """
    of_x, of_weight, of_bias = ctx.needs_input_grad[:3]
    before = torch.empty(slope.shape, dtype=x.dtype)
    sums = partial_sums(before) if of_bias else None
    gradient = gradient.contiguous()
    incoming, entrance = (gradient, None) if matrix is None else (None, (gradient, matrix))
    run_pass(through_relu if ctx.rectified else through, None, incoming, slope, before, sums=sums, entrance=entrance)
    return (
        before.matmul(weight) if of_x else None,
        _transposed_product(before, x) if of_weight else None,
        None if sums is None else sums.sum(-2),
        before,
    )


def _transposed_product(before: Tensor, x: Tensor) -> Tensor:
    """before' x, (..., out, in); of few inputs its transpose takes less time, even to be copied afterwards."""
    return x.mT.matmul(before).mT if x.shape[-1] < before.shape[-1] // 4 else before.mT.matmul(x)


class _Hidden(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, base: Tensor | None, result: torch.dtype, rectified: bool
    ) -> Tensor:
        """Activation of x (..., B, in) weight' (..., in, out) + bias + base."""
        kind, recorded = product_type("cpu"), ctx is not None
        x, weight = x.to(kind), weight.to(kind)
        value, slope = _activate(x, weight, bias, base, result, rectified, recorded)
        assert value is not None  # nothing is projected
        if recorded:
            ctx.save_for_backward(x, weight, slope)
            ctx.rectified = rectified
        return value

    @staticmethod
    @once_differentiable  # slopes are kept as constants: a second derivative would be wrong, hence is refused
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The chain rule, of what needs it."""
        *found, before = _through(gradients[0], ctx, *ctx.saved_tensors)
        return *found, before if ctx.needs_input_grad[3] else None, None, None


class _HiddenOutput(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, matrix: Tensor, start: Tensor, rectified: bool
    ) -> Tensor:
        """The activation of x weight' + bias, times matrix', plus start."""
        kind, recorded = product_type("cpu"), ctx is not None
        x, weight, matrix = x.to(kind), weight.to(kind), matrix.contiguous()
        outputs = start.clone(memory_format=torch.contiguous_format)
        value, slope = _activate(x, weight, bias, None, torch.float32, rectified, recorded, (matrix, outputs))
        if recorded:
            ctx.save_for_backward(x, weight, slope, value, matrix)
            ctx.rectified = rectified
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The chain rule, of what needs it."""
        x, weight, slope, value, matrix = ctx.saved_tensors
        (gradient,), of_matrix = gradients, ctx.needs_input_grad[3]
        found: list[Tensor | None] = [None] * 3
        if any(ctx.needs_input_grad[:3]):
            *found, _ = _through(gradient, ctx, x, weight, slope, matrix)
        return *found, gradient.mT.matmul(value) if of_matrix else None, gradient, None


def hidden_layer(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    activation: nn.Module,
    base: Tensor | None = None,
    result: torch.dtype | None = None,
) -> Tensor:
    """activation(x W' + bias + base), (B, out), equal to PyTorch's to about 1e-6; of several layers (G, B, out).

    In few passes for ReLU and Mish of float32 biases, alone or under autocast to bfloat16, on the CPU; else by
    PyTorch's modules.

    Args:
        x: (B, in), or (G, B, in) for G layers at once.
        weight, bias: W (out, in) and (out,), or (G, out, in) and (G, out); W may be rounded to the product's type.
        activation: a module that works element by element.
        base: of the value's shape, or a row of it for as many that follow each other, in the product's type.
        result: type of the value, by default the product's.

    Raises:
        ValueError: a base of another shape or type, on the CPU.
    """
    known = _is_known(x, weight, bias, activation, result or torch.float32)
    if base is not None and (torch.is_grad_enabled() or not known):
        base = _repeat_rows(base, x.shape[-2])
    if not known:
        z = affine(x, weight, bias)
        value = activation(z if base is None else z + base)
        return value if result is None else value.to(result)
    rounded = result or product_type("cpu")
    return _apply(_Hidden, x, weight, bias, base, rounded, isinstance(activation, nn.ReLU))


def output_layer(
    x: Tensor, weight: Tensor, bias: Tensor, activation: nn.Module, matrix: Tensor, start: Tensor
) -> Tensor:
    """activation(x W' + bias) M' + start, (B, k) or (G, B, k), the second product in float32.

    Where `hidden_layer` takes few passes and M has few rows one of them does the second product too.

    Args:
        x, weight, bias, activation: as in `hidden_layer`.
        matrix: M (k, out) or (G, k, out), float32.
        start: of the result's shape, float32.
    """
    same = matrix.dtype == start.dtype == torch.float32 and matrix.shape[-2] <= MOST_PROJECTED
    if same and _is_known(x, weight, bias, activation, torch.float32):
        return _apply(_HiddenOutput, x, weight, bias, matrix, start, isinstance(activation, nn.ReLU))
    value = hidden_layer(x, weight, bias, activation, result=matrix.dtype)
    with float32_products(x.device.type):
        return value.matmul(matrix.mT) + start


def _is_known(x: Tensor, weight: Tensor, bias: Tensor, activation: nn.Module, result: torch.dtype) -> bool:
    """Whether there are passes for a layer."""
    product = product_type(x.device.type)
    return (
        x.device.type == "cpu"
        and isinstance(activation, nn.ReLU | nn.Mish)
        and {x.dtype, result, product} <= set(KINDS)
        and weight.dtype in (torch.float32, product)
        and bias.dtype == torch.float32
        and bias.shape == weight.shape[:-1]
        and x.dim() == weight.dim() in (2, 3)
    )


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    """The function's value, recorded only where a gradient is asked for."""
    if torch.is_grad_enabled() and any(isinstance(part, Tensor) and part.requires_grad for part in arguments):
        return function.apply(*arguments)  # pyright: ignore[reportReturnType]
    return function.forward(None, *arguments)


def _repeat_rows(matrix: Tensor, rows: int) -> Tensor:
    """Each row of (..., m, n) as often as makes `rows` of them, those of one following each other, (..., rows, n)."""
    count = matrix.shape[-2] if matrix.dim() > 1 else rows
    shared = count not in (0, rows) and rows % count == 0
    return matrix.repeat_interleave(rows // count, -2) if shared else matrix


def affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x W' + bias of one layer (out, in), or of G layers (G, out, in) and inputs (G, B, in)."""
    if weight.dim() == 2:
        return F.linear(x, weight, bias)
    return torch.baddbmm(bias.unsqueeze(-2), x, weight.mT)
