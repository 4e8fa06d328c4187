"""The compiled Mish against PyTorch's in double precision: values, slopes, extremes, and where it steps aside."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from otpr.mish import MOST_THREADS, Mish, mish

pytestmark = pytest.mark.usefixtures("one_thread")


def test_values_and_slopes_are_as_exact_as_pytorchs() -> None:
    x = torch.linspace(-80, 80, 160_002).view(-1, 3).requires_grad_()
    exact = x.detach().double().requires_grad_()
    theirs = x.detach().clone().requires_grad_()
    values = [mish(x), F.mish(exact), F.mish(theirs)]
    for value in values:
        value.sum().backward()
    ours, reference, other = values
    assert ((ours - reference) / reference).nan_to_num().abs().max() < 5e-7  # 0 / 0 at x = 0
    assert x.grad is not None and exact.grad is not None and theirs.grad is not None
    assert (x.grad - exact.grad).abs().max() <= 3 * (theirs.grad - exact.grad).abs().max()
    assert not torch.equal(ours, other)  # else the compiled pass was not what was tested


def test_without_gradient_the_same_bits() -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Mish()(x), Mish()(x.clone().requires_grad_()).detach())


def test_extremes() -> None:
    values = mish(torch.tensor([0.0, -1e4, 1e4, torch.inf, -100.0]))
    assert values.tolist() == [0.0, pytest.approx(0.0, abs=1e-30), 1e4, torch.inf, pytest.approx(0.0, abs=1e-30)]
    assert mish(torch.tensor([torch.nan])).isnan().all()  # a diverged network stays visible
    assert mish(torch.empty(0, 3)).shape == (0, 3)


@pytest.mark.parametrize(
    "x",
    [torch.randn(4, 6).double(), torch.randn(4, 6).bfloat16(), torch.randn(6, 4).t()],
    ids=["double", "bf16", "view"],
)
def test_what_is_not_contiguous_float32_is_pytorchs(x: torch.Tensor) -> None:
    assert torch.equal(mish(x), F.mish(x))


def test_many_threads_are_pytorchs() -> None:
    x = torch.randn(64)
    torch.set_num_threads(MOST_THREADS + 1)
    assert torch.equal(mish(x), F.mish(x))
