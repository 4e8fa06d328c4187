"""Hidden layers on the CPU in few passes over memory: bias and activation overwrite the product's result.

PyTorch's Mish, x tanh(log(1 + e^x)) (Misra 2019), takes a logarithm, an exponential and a hyperbolic tangent per
element, in the backward pass once more: on critics with 256 units that is more time than their products. With w = e^x
and n = w (w + 2) it is rational,

    tanh(log(1 + w)) = n / (n + 2)        d/dx tanh(log(1 + w)) = 4 w (1 + w) / (n + 2)^2

so that one compiled pass adds the bias and computes value and derivative. In bfloat16 the passes read and write the
rounded matrices that products take, without copies in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from otpr.passes import mish, mish_and_slope, mish_and_slope_of, mish_of, plus, plus_of, relu, relu_of, run_pass


def _activate(z: Tensor, bias: Tensor, rectified: bool, recorded: bool) -> tuple[Tensor, Tensor]:
    """ReLU or Mish of z + bias, and what `_through` takes for its slope if it is recorded; z is overwritten."""
    if rectified or not recorded:
        run_pass(relu if rectified else mish, bias, z)
        return z, z
    value = torch.empty_like(z)
    run_pass(mish_and_slope, bias, z, value)
    return value, z


def _activate_first(x: Tensor, kind: torch.dtype, rectified: bool, recorded: bool) -> tuple[Tensor, Tensor]:
    """The same of x (m, n) alone, in type `kind`."""
    bias, value = torch.zeros(x.shape[1]), torch.empty(x.shape, dtype=kind)
    if rectified or not recorded:
        run_pass(relu_of if rectified else mish_of, bias, x, value)
        return value, value
    slope = torch.empty_like(value)
    run_pass(mish_and_slope_of, bias, x, value, slope)
    return value, slope


def _through(gradient: Tensor, slope: Tensor, rectified: bool) -> Tensor:
    """The gradient (m, n) before an activation, in place; ReLU's slope is whether its value is positive."""
    if rectified:
        return torch.ops.aten.threshold_backward.grad_input(gradient, slope, 0, grad_input=gradient)
    return gradient.mul_(slope)


def _bias_gradient(gradient: Tensor) -> Tensor:
    """Column sums (n,) of (m, n), in float32."""
    return gradient.sum(0, dtype=torch.float32)


def _product_type() -> torch.dtype:
    """The type of factors here: bfloat16 under autocast."""
    return torch.bfloat16 if torch.is_autocast_enabled("cpu") else torch.float32


def _plus(product: Tensor, x: Tensor, bias: Tensor) -> Tensor:
    """product + x + bias in float32, in place of a product in float32."""
    if product.dtype == torch.float32:
        run_pass(plus, bias, product, x)
        return product
    value = torch.empty(product.shape)
    run_pass(plus_of, bias, product, x, value)
    return value


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
        gradient = gradients[0].to(slopes.dtype)
        gradient = torch.ops.aten.threshold_backward(gradient, slopes, 0) if ctx.rectified else gradient * slopes
        of_x = gradient.mm(weight) if ctx.needs_input_grad[0] else None
        if not any(ctx.needs_input_grad[1:3]):
            return of_x, None, None, None
        return of_x, gradient.t().mm(x), _bias_gradient(gradient), None


class _Residual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, rectified: bool) -> Tensor:
        """x + act(act(x) w1' + b1) w2' + b2 of x (B, dim)."""
        x, w1, w2 = x.contiguous(), w1.to(_product_type()), w2.to(_product_type())
        first, first_slopes = _activate_first(x, w1.dtype, rectified, ctx is not None)
        second, second_slopes = _activate(first.mm(w1.t()), b1, rectified, ctx is not None)
        if ctx is not None:
            ctx.save_for_backward(first, first_slopes, w1, second, second_slopes, w2)
            ctx.rectified = rectified
        return _plus(second.mm(w2.t()), x, b2)

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
            before = _through(inner.mm(w1), first_slopes, ctx.rectified)
            of_x = _plus(before, gradients[0].contiguous(), torch.zeros(before.shape[1]))
        return of_x, *of_weights, None


def _fits(x: Tensor, activation: nn.Module) -> bool:
    """Whether this input and activation go the way of few passes."""
    known = isinstance(activation, nn.ReLU | nn.Mish) and x.dtype in (torch.float32, torch.bfloat16)
    return known and x.device.type == "cpu" and x.dim() == 2


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
