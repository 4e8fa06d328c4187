"""Hidden layers in few passes against PyTorch's in double precision: values, gradients, and where they step aside."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmark.speed.measuring import OperationCounter
from otpr import passes
from otpr.hidden import MOST_ENTERING, MOST_PROJECTED, hidden_layer, output_layer
from otpr.networks import ResidualMLP, linear
from otpr.precision import backward, float32_products, precision_context, product_type

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = {"relu": nn.ReLU(), "mish": nn.Mish()}
each_kind = pytest.mark.parametrize("kind", KINDS)
each_network = pytest.mark.parametrize("residual", [False, True], ids=["hidden", "residual"])


class Hidden(nn.Module):
    """One hidden layer."""

    def __init__(self, layer: nn.Linear, activation: nn.Module) -> None:
        super().__init__()
        self.layer, self.act = layer, activation

    def forward(self, x: Tensor) -> Tensor:
        return hidden_layer(x, self.layer.weight, self.layer.bias, self.act)


def network(residual: bool, kind: str, width: int = 24) -> nn.Module:
    """A hidden layer, or a residual network with one block: from width to width."""
    generator = torch.Generator().manual_seed(0)
    if residual:
        return ResidualMLP([width] * 5, kind, generator)
    return Hidden(linear(width, width, generator), KINDS[kind])


def normal(*shape: int) -> Tensor:
    """Standard normal numbers, the same at every call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def plain(net: nn.Module, x: Tensor) -> Tensor:
    """Layer by layer, what a network of `network` stands for."""
    if isinstance(net, Hidden):
        return net.act(net.layer(x))
    assert isinstance(net, ResidualMLP)
    z, block = net.first(x), net.block
    return net.last(z + block.l2(block.act(block.l1(block.act(z)))))


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


def gradients(function: Callable[[Tensor], Tensor], x: Tensor, parameters: Iterable[Tensor]) -> list[Tensor]:
    """The value, then the gradients of the sum of its squares by x and by every parameter."""
    x, parameters = x.clone().requires_grad_(), list(parameters)
    value = function(x)
    for parameter in parameters:
        parameter.grad = None
    backward([value.double().square().sum()])
    return [value.detach(), *(p.grad for p in (x, *parameters) if p.grad is not None)]


@each_kind
@each_network
@pytest.mark.parametrize(("precision", "error"), [("float32", 1e-6), ("bfloat16", 2e-2)])
def test_values_and_gradients(kind: str, residual: bool, precision: str, error: float) -> None:
    net, x = network(residual, kind), 3 * normal(200, 24)
    exact = copy.deepcopy(net).double()
    reference = gradients(partial(plain, exact), x.double(), exact.parameters())
    with precision_context(precision, "cpu"):
        found = gradients(net, x, net.parameters())
    assert len(found) == 2 + len(list(net.parameters()))
    for one, other in zip(found, reference, strict=True):
        assert (one - other).norm() <= error * other.norm()
    if precision == "bfloat16":  # else nothing was rounded
        assert (found[2] - reference[2]).norm() > 1e-4 * reference[2].norm()


def test_mish_and_its_slope_are_as_exact_as_pytorchs() -> None:
    x = torch.linspace(-80, 80, 160_002).view(-1, 3).requires_grad_()
    exact, theirs = x.detach().double().requires_grad_(), x.detach().clone().requires_grad_()
    values = [Hidden(identity(3), nn.Mish())(x), F.mish(exact), F.mish(theirs)]
    for value in values:
        value.sum().backward()
    value, reference, other = values
    assert ((value - reference) / reference).nan_to_num().abs().max() < 5e-7  # 0 / 0 at x = 0
    assert x.grad is not None and exact.grad is not None and theirs.grad is not None
    assert (x.grad - exact.grad).abs().max() <= 3 * (theirs.grad - exact.grad).abs().max()
    assert not torch.equal(value, other)  # else the compiled pass was not what was tested


@each_kind
@pytest.mark.parametrize("inputs", [1, 3, 4, MOST_ENTERING, MOST_ENTERING + 1])
@pytest.mark.parametrize("result", [torch.float32, torch.bfloat16])
def test_narrow_first_layers(kind: str, inputs: int, result: torch.dtype) -> None:
    layer, x = linear(inputs, 24, torch.Generator().manual_seed(0)), normal(70, inputs)
    exact = copy.deepcopy(layer).double()
    reference = gradients(lambda x: KINDS[kind](exact(x)), x.double(), exact.parameters())

    def ours(x: Tensor) -> Tensor:
        return hidden_layer(x, layer.weight, layer.bias, KINDS[kind], result=result)

    found = gradients(ours, x, layer.parameters())
    for one, other in zip(found, reference, strict=True):
        assert (one - other).norm() <= (1e-6 if result == torch.float32 else 1e-2) * other.norm()
    with torch.no_grad():
        assert torch.equal(ours(x), found[0])
    events = torch.profiler.profile()
    with torch.no_grad(), events:
        ours(x)
    products = any(event.key == "aten::matmul" for event in events.key_averages())
    assert products == (inputs > MOST_ENTERING)


@each_kind
@each_network
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_without_gradient_the_same_bits_and_x_untouched(kind: str, residual: bool, precision: str) -> None:
    net, x = network(residual, kind), normal(50, 24)
    before = x.clone()
    with precision_context(precision, "cpu"):
        recorded = net(x)
        with torch.no_grad():
            assert torch.equal(net(x), recorded)
    assert recorded.requires_grad
    assert torch.equal(x, before)


@each_kind
def test_extremes(kind: str) -> None:
    values = Hidden(identity(1), KINDS[kind])(torch.tensor([[0.0], [-1e4], [1e4], [-100.0], [torch.inf]]))
    assert values[:, 0].tolist() == [0.0, pytest.approx(0.0, abs=1e-30), 1e4, pytest.approx(0.0, abs=1e-30), torch.inf]
    assert Hidden(identity(3), KINDS[kind])(torch.empty(0, 3)).shape == (0, 3)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@each_kind
def test_a_diverged_network_stays_visible(kind: str, precision: str) -> None:
    net = Hidden(identity(1), KINDS[kind])
    with precision_context(precision, "cpu"):
        value, _, of_weight, of_bias = gradients(net, torch.tensor([[torch.nan]]), net.parameters())
    assert all(found.isnan().all() for found in (value, of_weight, of_bias))


def test_mish_in_bfloat16_is_rounded_to_nearest() -> None:
    x = torch.linspace(-8, 8, 10_001)[:, None].bfloat16().float()
    with precision_context("bfloat16", "cpu"):
        value = Hidden(identity(1), nn.Mish())(x)
    assert value.dtype == torch.bfloat16
    assert (value != F.mish(x.double()).bfloat16()).float().mean() < 1e-3  # half would be, were they cut off


def products(net: nn.Module, x: Tensor) -> tuple[float, float]:
    """Products of numbers per row of `x`, forward and backward, in units of a hidden layer's."""
    counter, found = OperationCounter(), []
    with counter:
        value = net(x).sum()
        found.append(counter.total)
        value.backward()
    unit = 2 * len(x) * x.shape[1] ** 2
    return found[0] / unit, (counter.total - found[0]) / unit


def test_only_what_is_asked_for_is_computed() -> None:
    net, x = network(False, "mish"), normal(5, 24)
    assert products(net, x.clone().requires_grad_()) == (1, 2)
    assert products(net, x) == (1, 1)  # none for x
    assert isinstance(net, Hidden)
    net.layer.weight.requires_grad_(False)
    assert products(net, x.clone().requires_grad_()) == (1, 1)
    net.layer.weight.grad = net.layer.bias.grad = None
    products(net, x)
    assert net.layer.weight.grad is None and net.layer.bias.grad is not None


@each_kind
def test_other_parameters_than_contiguous_float32_are_pytorchs_or_copied(kind: str) -> None:
    act, layer, x = KINDS[kind], linear(6, 24, torch.Generator().manual_seed(0)), normal(9, 6)
    strided = normal(24, 2)[:, 1]
    torch.testing.assert_close(hidden_layer(x, layer.weight, strided, act), act(F.linear(x, layer.weight, strided)))
    half = torch.autocast("cpu", torch.float16)
    with half:
        assert torch.equal(hidden_layer(x, layer.weight, layer.bias, act), act(layer(x)))
    rounded = copy.deepcopy(layer).bfloat16()
    found = hidden_layer(x.bfloat16(), rounded.weight, rounded.bias, act)
    assert torch.equal(found, act(rounded(x.bfloat16())))


@each_kind
@pytest.mark.parametrize(("precision", "error"), [("float32", 1e-6), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("rows", [0, 1, 130])  # 130: the last part of the first layer ends before the second layer's
def test_several_layers_at_once(kind: str, precision: str, error: float, rows: int) -> None:
    layers = [linear(6, 24, torch.Generator().manual_seed(seed)) for seed in range(3)]
    x = normal(rows, 6)

    def at_once(x: Tensor) -> Tensor:
        weight, bias = (torch.stack([getattr(layer, name) for layer in layers]) for name in ("weight", "bias"))
        return hidden_layer(x.expand(3, *x.shape), weight, bias, KINDS[kind])

    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    with precision_context(precision, "cpu"):
        found = gradients(at_once, x, parameters)
    reference = gradients(lambda x: torch.stack([KINDS[kind](layer(x)) for layer in layers]), x, parameters)
    assert found[0].shape == (3, rows, 24)
    for one, other in zip(found, reference, strict=True):
        assert (one - other).norm() <= error * other.norm()


def test_gradients_of_biases_are_added_in_float32() -> None:
    """Of a sum over many rows bfloat16 would keep three digits."""
    layer, x = linear(4, 24, torch.Generator().manual_seed(0)), normal(4000, 4)
    with precision_context("bfloat16", "cpu"):
        value = Hidden(layer, nn.ReLU())(x)
        backward([value.sum()])
    assert layer.bias.grad is not None
    assert torch.equal(layer.bias.grad, (value > 0).sum(0).float())


@each_kind
@pytest.mark.parametrize("outputs", [1, 4, 7, MOST_PROJECTED, MOST_PROJECTED + 1])
@pytest.mark.parametrize(("precision", "error"), [("float32", 1e-6), ("bfloat16", 8e-2)])  # some signs are others
@pytest.mark.parametrize("stack", [(), (2,)], ids=["one", "two"])
def test_an_output_layer(kind: str, outputs: int, precision: str, error: float, stack: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((24, 6), (24,), (outputs, 24), (70, outputs))
    weight, bias, matrix, start = (torch.randn(*stack, *shape, generator=generator) for shape in shapes)
    parts = [part.requires_grad_() for part in (weight, bias, matrix, start)]
    x, exact = normal(*stack, 70, 6), [part.detach().double().requires_grad_() for part in parts]
    with precision_context(precision, "cpu"):
        found = gradients(lambda x: output_layer(x, weight, bias, KINDS[kind], matrix, start), x, parts)
        with torch.no_grad():
            assert torch.equal(output_layer(x, weight, bias, KINDS[kind], matrix, start), found[0])
    w, b, m, s = exact
    reference = gradients(lambda x: KINDS[kind](x @ w.mT + b.unsqueeze(-2)) @ m.mT + s, x.double(), exact)
    for one, other in zip(found, reference, strict=True):
        assert one.dtype == torch.float32 and (one - other).norm() <= error * other.norm()


@each_kind
@each_network
def test_a_view_and_an_empty_batch(kind: str, residual: bool) -> None:
    net, x = network(residual, kind), normal(24, 7).t()
    copied = gradients(net, x.contiguous(), net.parameters())
    for one, other in zip(gradients(net, x, net.parameters()), copied, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)
    value, *found = gradients(net, torch.empty(0, 24), net.parameters())
    assert value.shape == (0, 24)
    assert all(not gradient.any() for gradient in found)


@each_kind
@pytest.mark.parametrize("inputs", [6, MOST_ENTERING + 1])
@pytest.mark.parametrize(
    "base",
    [normal(9, 24), normal(24, 9).t(), normal(24).expand(9, 24), normal(3, 24)],
    ids=["", "t", "rows", "shared"],
)
@pytest.mark.parametrize(("precision", "error"), [("float32", 1e-5), ("bfloat16", 3e-2)])
def test_a_base_is_added_before_the_activation(
    kind: str, base: Tensor, inputs: int, precision: str, error: float
) -> None:
    layer, x = linear(inputs, 24, torch.Generator().manual_seed(0)), normal(9, inputs)

    def plain_base(base: Tensor) -> Tensor:
        return KINDS[kind](layer(x) + base.repeat_interleave(9 // len(base), 0))

    reference = gradients(plain_base, base, [*layer.parameters()])

    def ours(base: Tensor) -> Tensor:
        return hidden_layer(x, layer.weight, layer.bias, KINDS[kind], base.to(product_type("cpu")))

    with precision_context(precision, "cpu"):
        found = gradients(ours, base, [*layer.parameters()])
        with torch.no_grad():
            assert torch.equal(ours(base), found[0])
    for one, other in zip(found, reference, strict=True):
        assert (one - other).norm() <= error * other.norm()
    with pytest.raises(ValueError, match=r"a pass takes contiguous .* \(9, 24\), got torch.float32 \(2, 24\)"):
        hidden_layer(x, layer.weight, layer.bias, KINDS[kind], base[:2])
    with torch.no_grad():
        with pytest.raises(ValueError, match="a pass takes contiguous"):
            hidden_layer(x, layer.weight, layer.bias, KINDS[kind], base[0])
        assert hidden_layer(x[:0], layer.weight, layer.bias, KINDS[kind], base[:0]).shape == (0, 24)
        with pytest.raises(ValueError, match="a pass takes contiguous"):
            hidden_layer(x[:0], layer.weight, layer.bias, KINDS[kind], base)


def test_backward_does_not_round_float32_factors() -> None:
    """Autocast rounds those of PyTorch's own layers in a backward pass inside it."""
    layer, x = linear(24, 24, torch.Generator().manual_seed(0)), normal(64, 24)
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


@each_network
def test_a_second_derivative_is_refused(residual: bool) -> None:
    x = normal(5, 24).requires_grad_()
    (slope,) = torch.autograd.grad(network(residual, "mish")(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


@each_kind
def test_what_is_no_matrix_of_float32_is_pytorchs(kind: str) -> None:
    net, x = network(False, kind), normal(2, 3, 24)
    assert torch.equal(net(x), plain(net, x))
    assert torch.equal(net.double()(x.double()), plain(net, x.double()))
    net = network(True, kind)
    torch.testing.assert_close(net(x), plain(net, x), rtol=1e-5, atol=1e-6)


@each_kind
@each_network
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_number_of_threads_changes_no_bit(
    kind: str, residual: bool, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, x = network(residual, kind, width=96), normal(1001, 96)
    assert x.numel() > 2 * passes.LEAST_FOR_THREADS
    assert sys.platform != "linux" or passes._openmp() is not None  # else one thread would be compared with itself
    monkeypatch.setattr(torch.Tensor, "matmul", reproducible_product)
    monkeypatch.setattr(F, "linear", lambda x, weight, bias=0: reproducible_product(x, weight.t()) + bias)
    found = []
    for threads, parallel in ((1, True), (2, True), (5, True), (5, False)):
        torch.set_num_threads(threads)
        if not parallel:
            monkeypatch.setattr(passes, "_openmp", lambda: None)
        with precision_context(precision, "cpu"):
            # PyTorch's linear layers, of which a residual network has some, have a backward pass of their own
            found.append([net(x)] if residual else gradients(net, x, net.parameters()))
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))
