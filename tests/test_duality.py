"""The two regularisers, the errors of a plan's marginals and the unit of a cost."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from otpr.duality import (
    REGULARISERS,
    effective_share,
    interaction,
    marginal_errors,
    standardise_cost,
    zero_share,
)

BOTH = pytest.mark.parametrize("regulariser", REGULARISERS.values(), ids=list(REGULARISERS))
EPSILON = 0.3


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def positive(*shape: int, seed: int = 0) -> Tensor:
    return normal(*shape, seed=seed).exp()


def test_the_densities_are_those_of_their_formulas():
    gap = torch.tensor([-1.0, 0.0, 0.6, 1.2])
    torch.testing.assert_close(REGULARISERS["l2"].density(gap, EPSILON), torch.tensor([0.0, 0.0, 1.0, 2.0]))
    expected = torch.tensor([-1.0, 0.0, 0.6, 1.2]).div(0.3).exp()
    torch.testing.assert_close(REGULARISERS["entropic"].density(gap, EPSILON), expected)


@BOTH
@pytest.mark.parametrize("epsilon", [0.01, 1.0, 50.0])
def test_gap_is_the_inverse_of_density(regulariser, epsilon):
    density = positive(50)
    torch.testing.assert_close(regulariser.density(regulariser.gap(density, epsilon), epsilon), density)
    gap = epsilon * positive(50, seed=1)
    torch.testing.assert_close(regulariser.gap(regulariser.density(gap, epsilon), epsilon), gap)


@BOTH
def test_penalties_are_convex_conjugates(regulariser):
    """R(H) + R*(x) >= E[x H] for every H >= 0, with equality where H is the density of x."""
    gap, other = normal(400), positive(400, seed=1)
    density = regulariser.density(gap, EPSILON)
    dual = regulariser.dual_penalty(density, EPSILON)
    at_density = regulariser.penalty(density, EPSILON) + dual - (gap * density).mean()
    assert at_density.item() == pytest.approx(0.0, abs=1e-10)
    assert (regulariser.penalty(other, EPSILON) + dual - (gap * other).mean()).item() > 0.1


@BOTH
def test_density_is_the_derivative_of_the_dual_penalty(regulariser):
    gap = normal(20).requires_grad_()
    density = regulariser.density(gap, EPSILON)
    (gradient,) = torch.autograd.grad(regulariser.dual_penalty(density, EPSILON), gap)
    torch.testing.assert_close(gradient * 20, density)


def test_penalties_of_known_densities():
    density = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    assert REGULARISERS["l2"].penalty(density, 0.5).item() == pytest.approx(1.0)
    assert REGULARISERS["entropic"].penalty(density, 0.5).item() == pytest.approx(0.5 * math.log(2))
    for regulariser, independent in (("l2", 0.5), ("entropic", 0.0)):
        assert REGULARISERS[regulariser].penalty(torch.ones(3, 3), 0.5).item() == pytest.approx(independent)
        assert REGULARISERS[regulariser].dual_penalty(torch.ones(3, 3), 0.5).item() == pytest.approx(independent)


@BOTH
@pytest.mark.parametrize("mean", [1.0, 0.25, 4.0])
@pytest.mark.parametrize("epsilon", [0.001, 0.1, 10.0])
def test_level_gives_the_mean_along_the_last_dimension(regulariser, mean, epsilon):
    gap = normal(3, 5, 200) + 100 * normal(3, 5, 1, seed=1)
    level = regulariser.level(gap, epsilon, mean)
    assert level.shape == (3, 5)
    torch.testing.assert_close(
        regulariser.density(gap + level[..., None], epsilon).mean(-1), torch.full((3, 5), mean, dtype=torch.float64)
    )


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_level_copes_with_any_tail_and_offset(regulariser, dtype):
    """Outliers of either sign, and a flattened block with all entries far below zero."""
    heavy = torch.tan(math.pi * (torch.rand(4096, generator=torch.Generator().manual_seed(0)) - 0.5)).clamp(-500, 500)
    steps = -(2.0 ** torch.arange(30))
    for gap in (heavy, steps, 30 * normal(4096) - 100, torch.zeros(7), torch.tensor([5.0])):
        gap = gap.to(dtype)
        mean = regulariser.density(gap + regulariser.level(gap, 0.1), 0.1).mean().item()
        assert mean == pytest.approx(1.0, abs=2e-2 if dtype == torch.float32 else 1e-6)


def test_an_entropic_density_never_overflows():
    for gap in (1e3, 1e30, math.inf):
        density = REGULARISERS["entropic"].density(torch.tensor([gap, -gap]), 0.01)
        assert 1e12 < density[0].item() < 1e14
        assert density[1].item() == 0.0
        assert math.isfinite(density.square().sum().item())  # as in the effective share


@BOTH
def test_marginal_errors_of_the_independent_plan_are_zero(regulariser):
    density = regulariser.density(regulariser.gap(torch.ones(4, 6), EPSILON), EPSILON)
    assert [error.item() for error in marginal_errors(density)] == pytest.approx([0.0, 0.0], abs=1e-6)


def test_marginal_errors_are_mean_absolute_violations():
    density = torch.tensor([[2.0, 2.0], [0.0, 0.0]])
    assert [error.item() for error in marginal_errors(density)] == [1.0, 0.0]
    assert [error.item() for error in marginal_errors(density.T)] == [0.0, 1.0]
    batch = torch.stack([density, torch.ones(2, 2)])
    assert [error.item() for error in marginal_errors(batch)] == [0.5, 0.0]


def test_a_relaxed_column_errs_only_above_the_bound():
    density = torch.tensor([[3.0, 0.0, 0.0], [3.0, 0.0, 0.0]])  # column means 3, 0, 0
    expected = {1.0: 4 / 3, 2.0: 1 / 3, 3.0: 0.0, 10.0: 0.0}
    for bound, error in expected.items():
        assert marginal_errors(density, bound)[1].item() == pytest.approx(error)
        assert marginal_errors(density, bound)[0].item() == 0.0


def test_effective_share_of_known_weights():
    assert effective_share(torch.tensor([[2.0, 0.0], [0.0, 2.0]])).item() == 0.5
    assert effective_share(torch.full((3, 4), 7.0)).item() == pytest.approx(1.0)
    assert effective_share(torch.eye(10)[0]).item() == pytest.approx(0.1)
    assert effective_share(torch.zeros(3)).item() == 0.0


def test_zero_share_counts_exact_zeros():
    assert zero_share(torch.tensor([[2.0, 0.0], [0.0, 2.0]])).item() == 0.5
    assert zero_share(torch.full((3, 3), 1e-30)).item() == 0.0
    assert zero_share(torch.zeros(3, dtype=torch.float64)).dtype == torch.float64


def test_interaction_is_free_of_main_effects():
    cost = normal(2, 30, 40)
    centred = interaction(cost + 5 * normal(2, 30, 1, seed=1) + 9 * normal(2, 1, 40, seed=2))
    torch.testing.assert_close(centred, interaction(cost))
    torch.testing.assert_close(interaction(centred), centred)
    assert max(centred.mean(-1).abs().max(), centred.mean(-2).abs().max()).item() < 1e-12


@pytest.mark.parametrize(("unit", "offset"), [(1.0, 0.0), (12.0, 100.0), (1e-4, 0.0)])
def test_a_standardised_cost_has_unit_interaction_and_no_mean(unit, offset):
    cost = unit * (normal(50, 60) + 2 * normal(50, 1, seed=1)) + offset
    standardised, center, scale = standardise_cost(cost)
    assert interaction(standardised).square().mean().sqrt().item() == pytest.approx(1.0)
    assert standardised.mean().item() == pytest.approx(0.0, abs=1e-9)
    torch.testing.assert_close(standardised * scale + center, cost)
    torch.testing.assert_close(standardised, standardise_cost(cost / unit)[0])  # whatever the unit


def test_standardising_an_additive_cost_bounds_its_deviation():
    additive = torch.linspace(0, 1, 50)[:, None] + torch.linspace(0, 3, 60)[None]
    assert standardise_cost(additive)[0].square().mean().sqrt().item() == pytest.approx(5.0, rel=1e-3)
    nearly = additive + 1e-3 * normal(50, 60).float()
    assert standardise_cost(nearly)[0].square().mean().sqrt().item() <= 5.0


@pytest.mark.parametrize("value", [0.0, 0.1, -1e4])
def test_rounding_errors_of_a_constant_cost_are_not_blown_up(value):
    assert standardise_cost(torch.full((8, 8), value))[0].abs().max().item() < 0.2
    nearly = torch.full((64, 64), value) * (1 + 1e-7 * normal(64, 64).float())
    assert standardise_cost(nearly)[0].abs().max().item() < 1.0
