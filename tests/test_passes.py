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


def test_where_nothing_can_be_cached_functions_compile_all_the_same() -> None:
    names: dict[str, Any] = {}
    exec("def double(numbers):\n    numbers *= 2\n", names)  # numba has no folder for what is in no file
    with pytest.raises(RuntimeError, match="cannot cache"):
        numba.njit(cache=True)(names["double"])
    numbers = np.ones(3)
    compiled(names["double"])(numbers)
    assert numbers.tolist() == [2, 2, 2]


def test_a_pass_refuses_what_it_would_misread() -> None:
    z = normal(4, 3)
    for bias, matrix in (
        (z[:, 0], z),
        (torch.zeros(3).double(), z),
        (torch.zeros(3), z.t()),
        (torch.zeros(3), z.half()),
        (torch.zeros(3), torch.zeros(2, 4, 3)),
    ):
        with pytest.raises(ValueError, match="a pass takes contiguous"):
            passes.run_pass(passes.relu, bias, matrix, matrix, None)
    with pytest.raises(ValueError, match="a pass takes contiguous"):
        passes.run_pass(passes.through, None, z, z.clone(), z.clone(), sums=torch.zeros(4, 3))
    for weights, outputs in ((torch.zeros(2, 4), torch.zeros(4, 2)), (torch.zeros(2, 3), torch.zeros(2, 4).t())):
        with pytest.raises(ValueError, match="a pass takes contiguous"):
            passes.run_pass(passes.relu, torch.zeros(3), z, z, None, projection=(weights, outputs))
    with pytest.raises(ValueError, match=r"a pass takes contiguous torch.float32 \(4, 3\), got torch.bfloat16"):
        z = z.bfloat16()
        passes.run_pass(passes.relu, torch.zeros(3), z, z, None, projection=(torch.zeros(2, 3), torch.zeros(4, 2)))


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
