"""A cost of two terms: shares, units and masked points."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transport_cases import KEYPOINTS, MIXED, GuidedCost, SmoothCost, draw, small

from otpr.duality import standardise_cost
from otpr.transport import Cost, cross_cost


def only(cost: GuidedCost, term: int) -> Cost:
    return lambda observations, chunks: cost(observations, chunks)[..., term : term + 1]


@pytest.mark.parametrize("term", [0, 1])
def test_a_share_of_one_leaves_that_term_alone(term):
    cost, shares = GuidedCost(size=32), (1.0 - term, float(term))
    mixed, alone, other = small(shares=shares), small(), small()
    mixed.fit(*draw(32), cost)
    alone.fit(*draw(32), only(cost, term))
    other.fit(*draw(32), only(cost, 1 - term))
    plan, standardised = mixed.plan(*draw(32), cost)
    expected, expected_cost = alone.plan(*draw(32), only(cost, term))
    difference = standardised - expected_cost
    assert (difference - difference.mean()).abs().max().item() < 1e-4  # but for the level, which the steps moved
    assert (plan - expected).abs().mean().item() < 0.02
    assert (plan - other.plan(*draw(32), only(cost, 1 - term))[0]).abs().mean().item() > 0.1


def standardised_of(cost: Cost, shares: tuple[float, float]) -> Tensor:
    transport = small(shares=shares, first_steps=0)
    transport.fit(*draw(32), cost)
    return transport.plan(*draw(32), cost)[1]


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.8, 0.2)])
def test_terms_are_mixed_by_their_shares_in_units_of_their_deviation(shares):
    standardised = standardised_of(GuidedCost(size=32), shares)
    terms = cross_cost(*draw(32), GuidedCost(size=32)).double()
    parts = [standardise_cost(terms[..., i])[0] * shares[i] for i in range(2)]
    expected = standardise_cost(parts[0] + parts[1])[0]
    difference = standardised.double() - expected
    assert (difference - difference.mean()).abs().max().item() < 1e-4  # but for the level, which H of mean 1 sets


@pytest.mark.parametrize("units", [(100.0, 1.0), (1.0, 100.0), (1e-3, 1e3)])
def test_the_effect_of_the_shares_does_not_depend_on_the_unit_of_a_term(units):
    cost, rescaled = GuidedCost(size=32), GuidedCost(SmoothCost(offset=2.0), units=units, size=32)
    torch.testing.assert_close(standardised_of(rescaled, MIXED), standardised_of(cost, MIXED), atol=1e-3, rtol=1e-3)
    skewed = standardised_of(cost, (0.8, 0.2)) - standardised_of(cost, MIXED)
    assert skewed.abs().mean().item() > 0.05


def test_masked_points_do_not_move_the_plan_of_the_others():
    """Whatever the keypoint pairs cost, and wherever they lie: they are no part of what the networks fit."""
    observations, chunks = draw(32)
    plans = []
    for shift in (0.0, 3.0):
        states, actions = observations.clone(), chunks.clone()
        states[:KEYPOINTS] += shift
        actions[:KEYPOINTS] -= shift
        transport = small()
        transport.fit(states, actions, SmoothCost(), KEYPOINTS)
        plans.append(transport.plan(states, actions, SmoothCost(), KEYPOINTS)[0])
    torch.testing.assert_close(*plans)
    assert plans[0].mean().item() == pytest.approx(1.0, abs=1e-3)
    assert plans[0][KEYPOINTS:].mean().item() == pytest.approx(1.0, abs=1e-3)
    assert plans[0][KEYPOINTS:, KEYPOINTS:].mean().item() == pytest.approx(32 / 24, abs=1e-3)
