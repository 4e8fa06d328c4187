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
    mish_of,
    partial_sums,
    relu,
    relu_of,
    run_pass,
    through,
    through_relu,
)
from otpr.precision import product_type


def _activate(
    z: Tensor, bias: Tensor, base: Tensor | None, kind: torch.dtype, rectified: bool, recorded: bool
) -> tuple[Tensor, Tensor]:
    """ReLU or Mish of z + bias + base in type `kind`, and what `_through` takes for its slope if it is recorded.

    z is overwritten.
    """
    if recorded and not rectified:
        value = torch.empty(z.shape, dtype=kind)
        run_pass(mish_and_slope, bias, z, value, base)
        return value, z
    if kind == z.dtype:
        run_pass(relu if rectified else mish, bias, z, base)
        return z, z
    value = torch.empty(z.shape, dtype=kind)
    run_pass(relu_of if rectified else mish_of, bias, z, value, base)
    return value, value


def _through(gradient: Tensor, slope: Tensor, product: Tensor, rectified: bool, summed: bool) -> Tensor | None:
    """The gradient (..., m, n) before an activation into `product`, and its sum over rows (..., n) if asked for.

    ReLU's slope is whether its value is positive.
    """
    sums = partial_sums(product) if summed else None
    run_pass(through_relu if rectified else through, None, gradient.contiguous(), slope, product, sums=sums)
    return None if sums is None else sums.sum(-2)


class _Hidden(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, base: Tensor | None, result: torch.dtype, rectified: bool
    ) -> Tensor:
        """Activation of x (..., B, in) weight' (..., in, out) + bias + base."""
        kind, recorded = product_type("cpu"), ctx is not None
        x, weight, base = x.to(kind), weight.to(kind), None if base is None else base.contiguous()
        value, slope = _activate(x.matmul(weight.mT), bias.contiguous(), base, result, rectified, recorded)
        if recorded:
            ctx.save_for_backward(x, weight, slope)
            ctx.rectified = rectified
        return value

    @staticmethod
    @once_differentiable  # slopes are kept as constants: a second derivative would be wrong, hence is refused
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The chain rule, of what needs it."""
        x, weight, slope = ctx.saved_tensors
        of_x, of_weight, of_bias, of_base = ctx.needs_input_grad[:4]
        gradient = torch.empty(slope.shape, dtype=x.dtype)
        sums = _through(gradients[0], slope, gradient, ctx.rectified, of_bias)
        return (
            gradient.matmul(weight) if of_x else None,
            gradient.mT.matmul(x) if of_weight else None,
            sums,
            gradient if of_base else None,
            None,
            None,
        )


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
        base: of the value's shape and the product's type.
        result: type of the value, by default the product's.

    Raises:
        ValueError: a base of another shape or type, on the CPU.
    """
    product = product_type(x.device.type)
    kinds = {x.dtype, result or torch.float32, product}
    known = isinstance(activation, nn.ReLU | nn.Mish) and kinds <= set(KINDS)
    known = known and weight.dtype in (torch.float32, product) and bias.dtype == torch.float32
    known = known and bias.shape == weight.shape[:-1] and x.dim() == weight.dim() in (2, 3)
    if not known or x.device.type != "cpu":
        z = affine(x, weight, bias)
        value = activation(z if base is None else z + base)
        return value if result is None else value.to(result)
    arguments = (x, weight, bias, base, result or product, isinstance(activation, nn.ReLU))
    if torch.is_grad_enabled() and any(isinstance(part, Tensor) and part.requires_grad for part in arguments):
        return _Hidden.apply(*arguments)  # pyright: ignore[reportReturnType]
    return _Hidden.forward(None, *arguments)


def affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x W' + bias of one layer (out, in), or of G layers (G, out, in) and inputs (G, B, in)."""
    if weight.dim() == 2:
        return F.linear(x, weight, bias)
    return torch.baddbmm(bias.unsqueeze(-2), x, weight.mT)
