"""Hidden layers in few passes against PyTorch's in double precision: values, gradients, and where they step aside."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmark.speed.measuring import OperationCounter
from otpr import passes
from otpr.hidden import hidden_layer, residual_block
from otpr.networks import linear
from otpr.precision import backward, float32_products, precision_context

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = {"relu": nn.ReLU(), "mish": nn.Mish()}
each_kind = pytest.mark.parametrize("kind", KINDS)
each_layer = pytest.mark.parametrize("number", [1, 2], ids=["hidden", "residual"])


def layers(number: int, width: int = 24) -> list[nn.Linear]:
    """A hidden layer, or the two of a residual block."""
    generator = torch.Generator().manual_seed(0)
    return [linear(width, width, generator) for _ in range(number)]


def normal(*shape: int) -> Tensor:
    """Standard normal numbers, the same at every call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def plain(x: Tensor, linears: list[nn.Linear], kind: str) -> Tensor:
    """What `ours` stands for."""
    act = KINDS[kind]
    return act(linears[0](x)) if len(linears) == 1 else x + linears[1](act(linears[0](act(x))))


def ours(x: Tensor, linears: list[nn.Linear], kind: str) -> Tensor:
    return hidden_layer(x, linears[0], KINDS[kind]) if len(linears) == 1 else residual_block(x, *linears, KINDS[kind])


def identity(width: int) -> nn.Linear:
    """A layer whose output is its input."""
    layer = nn.Linear(width, width)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(width))
        layer.bias.zero_()
    return layer


def reproducible_product(one: Tensor, other: Tensor) -> Tensor:
    """Their matrix product, whose bits do not depend on the number of threads, unlike those of a BLAS."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    product = torch.matmul(one, other)
    torch.set_num_threads(threads)
    return product


def gradients(function: Callable[..., Tensor], x: Tensor, linears: list[nn.Linear], kind: str) -> list[Tensor]:
    """The value, then the gradients of the sum of its squares by x and by every parameter."""
    x = x.clone().requires_grad_()
    value = function(x, linears, kind)
    backward([value.double().square().sum()])
    found = [x.grad, *(p.grad for layer in linears for p in layer.parameters())]
    return [value.detach(), *(gradient for gradient in found if gradient is not None)]


@each_kind
@each_layer
@pytest.mark.parametrize(("precision", "error"), [("float32", 1e-6), ("bfloat16", 2e-2)])
def test_values_and_gradients(kind: str, number: int, precision: str, error: float) -> None:
    linears = layers(number)
    exact = [copy.deepcopy(layer).double() for layer in linears]
    x = 3 * normal(200, 24)
    reference = gradients(plain, x.double(), exact, kind)
    with precision_context(precision, "cpu"):
        found = gradients(ours, x, linears, kind)
    assert len(found) == 2 + 2 * number
    for one, other in zip(found, reference, strict=True):
        assert (one - other).norm() <= error * other.norm()
    if precision == "bfloat16":  # else nothing was rounded
        assert (found[2] - reference[2]).norm() > 1e-4 * reference[2].norm()


def test_mish_and_its_slope_are_as_exact_as_pytorchs() -> None:
    x = torch.linspace(-80, 80, 160_002).view(-1, 3).requires_grad_()
    exact, theirs = x.detach().double().requires_grad_(), x.detach().clone().requires_grad_()
    values = [hidden_layer(x, identity(3), nn.Mish()), F.mish(exact), F.mish(theirs)]
    for value in values:
        value.sum().backward()
    value, reference, other = values
    assert ((value - reference) / reference).nan_to_num().abs().max() < 5e-7  # 0 / 0 at x = 0
    assert x.grad is not None and exact.grad is not None and theirs.grad is not None
    assert (x.grad - exact.grad).abs().max() <= 3 * (theirs.grad - exact.grad).abs().max()
    assert not torch.equal(value, other)  # else the compiled pass was not what was tested


@each_kind
@each_layer
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_without_gradient_the_same_bits_and_x_untouched(kind: str, number: int, precision: str) -> None:
    linears, x = layers(number), normal(50, 24)
    before = x.clone()
    with precision_context(precision, "cpu"):
        recorded = ours(x, linears, kind)
        with torch.no_grad():
            assert torch.equal(ours(x, linears, kind), recorded)
    assert recorded.requires_grad
    assert torch.equal(x, before)


@each_kind
def test_extremes(kind: str) -> None:
    values = hidden_layer(torch.tensor([[0.0], [-1e4], [1e4], [-100.0], [torch.inf]]), identity(1), KINDS[kind])
    assert values[:, 0].tolist() == [0.0, pytest.approx(0.0, abs=1e-30), 1e4, pytest.approx(0.0, abs=1e-30), torch.inf]
    assert hidden_layer(torch.empty(0, 3), identity(3), KINDS[kind]).shape == (0, 3)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@each_kind
def test_a_diverged_network_stays_visible(kind: str, precision: str) -> None:
    with precision_context(precision, "cpu"):
        assert hidden_layer(torch.tensor([[torch.nan]]), identity(1), KINDS[kind]).isnan().all()


def test_mish_in_bfloat16_is_rounded_to_nearest() -> None:
    x = torch.linspace(-8, 8, 10_001)[:, None].bfloat16().float()
    with precision_context("bfloat16", "cpu"):
        value = hidden_layer(x, identity(1), nn.Mish())
    assert value.dtype == torch.bfloat16
    assert (value != F.mish(x.double()).bfloat16()).float().mean() < 1e-3  # half would be, were they cut off


@each_layer
def test_only_what_is_asked_for_is_computed(number: int) -> None:
    def products(x: Tensor, linears: list[nn.Linear]) -> float:
        value, counter = ours(x, linears, "mish").sum(), OperationCounter()
        with counter:
            value.backward()
        return counter.total / (2 * 5 * 24 * 24)

    linears, x = layers(number), normal(5, 24)
    assert products(x.clone().requires_grad_(), linears) == 2 * number
    assert products(x, linears) == 2 * number - 1  # none for x
    for layer in linears:
        layer.requires_grad_(False)
    assert products(x.clone().requires_grad_(), linears) == number
    linears[-1].requires_grad_(True)
    products(x, linears)
    assert all((p.grad is not None) == p.requires_grad for p in linears[-1].parameters())


@each_kind
@each_layer
def test_a_view_and_an_empty_batch(kind: str, number: int) -> None:
    linears, x = layers(number), normal(24, 7).t()
    copied = gradients(ours, x.contiguous(), linears, kind)
    for layer in linears:
        layer.zero_grad()
    for one, other in zip(gradients(ours, x, linears, kind), copied, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)
    value, *found = gradients(ours, torch.empty(0, 24), layers(number), kind)
    assert value.shape == (0, 24)
    assert all(not gradient.any() for gradient in found)


def test_backward_does_not_round_float32_factors() -> None:
    """Autocast rounds those of PyTorch's own layers in a backward pass inside it."""
    layer, x = layers(1)[0], normal(64, 24)
    found = []
    for run in (lambda loss: loss.backward(), lambda loss: backward([loss])):
        layer.zero_grad()
        with precision_context("bfloat16", "cpu"):
            with float32_products("cpu"):
                loss = layer(x).square().sum()
            run(loss)
        found.append(layer.weight.grad)
    layer.zero_grad()
    layer(x).square().sum().backward()
    assert torch.equal(found[1], layer.weight.grad)
    assert not torch.equal(found[0], layer.weight.grad)


@each_layer
def test_a_second_derivative_is_refused(number: int) -> None:
    x = normal(5, 24).requires_grad_()
    (slope,) = torch.autograd.grad(ours(x, layers(number), "mish").square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


@each_kind
@each_layer
@pytest.mark.parametrize("shape", [(4, 24), (2, 3, 24)], ids=["double", "three dimensions"])
def test_what_is_no_matrix_of_float32_is_pytorchs(kind: str, number: int, shape: tuple[int, ...]) -> None:
    linears, x = layers(number), normal(*shape)
    if len(shape) == 2:
        linears, x = [layer.double() for layer in linears], x.double()
    assert torch.equal(ours(x, linears, kind), plain(x, linears, kind))


@each_kind
@each_layer
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_number_of_threads_changes_no_bit(
    kind: str, number: int, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    linears, x = layers(number, width=96), normal(1001, 96)
    assert x.numel() > 5 * passes.LEAST_PER_THREAD
    assert sys.platform != "linux" or passes._openmp() is not None  # else one thread would be compared with itself
    monkeypatch.setattr(torch.Tensor, "mm", reproducible_product)
    found = []
    for threads, parallel in ((1, True), (2, True), (5, True), (5, False)):
        torch.set_num_threads(threads)
        if not parallel:
            monkeypatch.setattr(passes, "_openmp", lambda: None)
        for layer in linears:
            layer.zero_grad()
        with precision_context(precision, "cpu"):
            found.append(gradients(ours, x, linears, kind))
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))
