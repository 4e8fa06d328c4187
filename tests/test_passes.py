"""Compiled passes by themselves: sums, threads, what they refuse, and compiling where nothing can be kept."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import pytest
import torch
from test_hidden import normal

from otpr import passes
from otpr.compiling import compiled

pytestmark = pytest.mark.usefixtures("one_thread")


def test_sums_are_of_what_is_not_rounded() -> None:
    gradient, slope, product = normal(1, 24), normal(1, 24) + 1, torch.empty(1, 24, dtype=torch.bfloat16)
    sums = passes.partial_sums(product)
    passes.run_pass(passes.through, None, gradient, slope, product, sums=sums)
    assert torch.equal(sums, gradient * slope)
    assert torch.equal(product, sums.bfloat16()) and not torch.equal(product.float(), sums)


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("stack", [(), (3,)])
@pytest.mark.parametrize("inputs", [1, 4, 7])
def test_what_enters_is_a_product(kept: bool, stack: tuple[int, ...], inputs: int) -> None:
    x, weights, slope = normal(*stack, 70, inputs), normal(*stack, inputs, 24), normal(*stack, 70, 24) + 1
    product = torch.full((*stack, 70, 24), torch.nan)
    first = torch.full_like(product, torch.nan) if kept else None
    passes.run_pass(passes.through, None, first, slope, product, entrance=(x, weights))
    torch.testing.assert_close(product, (x @ weights) * slope, rtol=1e-5, atol=1e-5)
    assert first is None or torch.allclose(first, x @ weights, atol=1e-5)


@pytest.mark.parametrize("kind", passes.KINDS)
def test_without_a_matrix_for_it_a_value_is_projected_all_the_same(kind: torch.dtype) -> None:
    z, bias, weights = normal(2, 70, 24).to(kind), normal(2, 24), normal(2, 5, 24)
    value, found = torch.empty(2, 70, 24), [torch.zeros(2, 70, 5) for _ in range(2)]
    for matrix, outputs in zip((value, None), found, strict=True):
        before = z.clone()
        passes.run_pass(passes.mish, bias, z, matrix, None, projection=(weights, outputs))
        assert torch.equal(z, before)
    assert torch.equal(*found)
    torch.testing.assert_close(found[0], value @ weights.mT, rtol=1e-4, atol=1e-4)


def test_rows_share_a_base() -> None:
    z, base = normal(2, 70, 24), normal(2, 10, 24)
    passes.run_pass(passes.relu, torch.zeros(2, 24), z, z, base)
    assert torch.equal(z, (normal(2, 70, 24) + base.repeat_interleave(7, 1)).relu())


def test_where_nothing_can_be_cached_functions_compile_all_the_same() -> None:
    names: dict[str, Any] = {}
    exec("def double(numbers):\n    numbers *= 2\n", names)  # numba has no folder for what is in no file
    with pytest.raises(RuntimeError, match="cannot cache"):
        numba.njit(cache=True)(names["double"])
    numbers = np.ones(3)
    compiled(names["double"])(numbers)
    assert numbers.tolist() == [2, 2, 2]


def test_what_differs_is_kept_under_names_that_differ() -> None:
    """numba's index of a name is written without a lock: two processes must not add different code to one index."""
    kinds = (torch.float32, torch.bfloat16)
    makings = [
        (row, (in_place, False, False, False), kind, kind, None)
        for row in (passes.relu, passes.mish)
        for in_place in (False, True)
        for kind in kinds
    ]
    names = {passes._compiled(*making).__wrapped__.__qualname__ for making in makings}
    assert len(names) == len(makings)


def test_a_pass_refuses_what_it_would_misread() -> None:
    z = normal(4, 3)
    for bias, matrix in (
        (z[:, 0], z),
        (torch.zeros(3).double(), z),
        (torch.zeros(3), z.t()),
        (torch.zeros(3), z.half()),
        (torch.zeros(3), torch.zeros(2, 4, 3)),
        (torch.zeros(3, device="meta"), z),
    ):
        with pytest.raises(ValueError, match="a pass takes contiguous"):
            passes.run_pass(passes.relu, bias, matrix, matrix, None)
    with pytest.raises(ValueError, match="a pass takes contiguous"):
        passes.run_pass(passes.through, None, z, z.clone(), z.clone(), sums=torch.zeros(4, 3))
    for weights, outputs in ((torch.zeros(2, 4), torch.zeros(4, 2)), (torch.zeros(2, 3), torch.zeros(2, 4).t())):
        with pytest.raises(ValueError, match="a pass takes contiguous"):
            passes.run_pass(passes.relu, torch.zeros(3), z, z, None, projection=(weights, outputs))
    for inputs, weights in ((torch.zeros(4, 2), torch.zeros(3, 3)), (torch.zeros(5, 2), torch.zeros(2, 3))):
        with pytest.raises(ValueError, match="a pass takes contiguous"):
            passes.run_pass(passes.relu, torch.zeros(3), z, z, None, entrance=(inputs, weights))
    with pytest.raises(ValueError, match=r"\(4, 3\), got torch.float32 \(3, 3\)"):
        passes.run_pass(passes.relu, torch.zeros(3), z, z, torch.zeros(3, 3))
    with pytest.raises(ValueError, match=r"\(70, 24\), got torch.float32 \(1, 24\)"):  # only a base is shared
        passes.run_pass(passes.through, None, normal(70, 24), normal(70, 24), normal(1, 24))
    for row, third in ((passes.relu, None), (passes.through, z)):
        with pytest.raises(ValueError, match="needs a second matrix"):
            passes.run_pass(row, torch.zeros(3), z, None, third)
    rounded = z.bfloat16()
    for features in (
        {"projection": (torch.zeros(2, 3), torch.zeros(4, 2))},
        {"entrance": (torch.zeros(4, 2), torch.zeros(2, 3))},
    ):
        with pytest.raises(ValueError, match=r"a pass takes contiguous torch.float32 \(4, 3\), got torch.bfloat16"):
            passes.run_pass(passes.relu, torch.zeros(3), rounded, rounded, None, **features)


def test_a_gradient_may_be_its_own_slope() -> None:
    gradient, product = normal(4, 24), torch.empty(4, 24)
    passes.run_pass(passes.through, None, gradient, gradient, product)
    assert torch.equal(product, gradient**2)


def test_the_number_of_threads_changes_no_bit_of_what_enters_shares_and_leaves() -> None:
    x, weights, base = normal(2, 4002, 7), normal(2, 7, 96), normal(2, 2001, 96)
    leaving, found = normal(2, 5, 96), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        outputs = torch.zeros(2, 4002, 5)
        exits = {"entrance": (x, weights), "projection": (leaving, outputs)}
        passes.run_pass(passes.mish, torch.zeros(2, 96), None, None, base, **exits)
        found.append(outputs)
    expected = torch.nn.functional.mish(x @ weights + base.repeat_interleave(2, 1)) @ leaving.mT
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-3)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_the_number_of_threads_changes_no_bit_of_stacks() -> None:
    gradient, slope, found = normal(3, 1001, 96), normal(3, 1001, 96) + 1, []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        product, sums = torch.empty(3, 1001, 96), passes.partial_sums(gradient)
        passes.run_pass(passes.through, None, gradient, slope, product, sums=sums)
        found.append((product, sums))
    assert torch.equal(found[0][0], gradient * slope)
    torch.testing.assert_close(found[0][1].sum(1), found[0][0].sum(1), rtol=1e-4, atol=1e-3)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))
