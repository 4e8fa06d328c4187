"""The neural potentials against the exact plan, and what they refuse."""

from __future__ import annotations

import copy
import re

import numpy as np
import pytest
import torch
from transport_cases import (
    ACTION_DIM,
    HORIZON,
    KEYPOINTS,
    MIXED,
    SIZE,
    GuidedCost,
    SmoothCost,
    draw,
    make,
    metrics_of,
    pickled,
    relative_gap,
    small,
    solve,
)

from otpr.duality import REGULARISERS, effective_share, interaction, marginal_errors, zero_share
from otpr.potentials import TransportSettings
from otpr.transport import cross_cost

CASES = {
    "tenth": (SmoothCost(scale=0.1, offset=30.0), 0, (1.0,), {}),
    "ten": (SmoothCost(scale=10.0), 0, (1.0,), {}),
    "hundred": (SmoothCost(scale=100.0, offset=-1000.0), 0, (1.0,), {}),
    "masked-tenth": (GuidedCost(SmoothCost(scale=0.1, offset=30.0)), KEYPOINTS, MIXED, {}),
    "masked-ten": (GuidedCost(SmoothCost(scale=10.0)), KEYPOINTS, MIXED, {}),
    "masked-hundred": (GuidedCost(SmoothCost(scale=100.0, offset=-1000.0)), KEYPOINTS, MIXED, {}),
    "entropic": (SmoothCost(), 0, (1.0,), {"regulariser": "entropic", "epsilon": 1.0}),
    "entropic-masked": (GuidedCost(), KEYPOINTS, MIXED, {"regulariser": "entropic", "epsilon": 1.0}),
    "relaxed-2": (SmoothCost(), 0, (1.0,), {"action_bound": 2.0}),
    "relaxed-4": (SmoothCost(scale=10.0), 0, (1.0,), {"action_bound": 4.0}),
    "relaxed-4-masked": (GuidedCost(), KEYPOINTS, MIXED, {"action_bound": 4.0}),
    "rows-alone": (SmoothCost(), 0, (1.0,), {"action_bound": float(SIZE)}),
}


@pytest.mark.parametrize("case", list(CASES))
def test_neural_potentials_reach_the_exact_answer(case):
    cost, keypoints, shares, settings = CASES[case]
    transport = make(shares=shares, **settings)
    metrics = metrics_of(transport.fit(*draw(), cost, keypoints))
    density, standardised, exact = solve(transport, cost, keypoints)
    gap = relative_gap(metrics["dual_value"], exact, standardised, transport.settings, keypoints)
    print(
        f"{case}: gap {gap:.5f} rows {metrics['row_marginal_error']:.4f} columns {metrics['column_marginal_error']:.4f}"
    )
    assert gap < 0.01
    assert metrics["row_marginal_error"] < 0.02
    assert metrics["column_marginal_error"] < 0.02
    assert np.abs(density.numpy() - exact.density).mean() < 0.03
    assert np.abs(exact.density - 1).mean() > 0.3  # of which the mean plan would be wrong
    assert metrics["dual_value"] < exact.value + 1e-3  # weak duality, but for the rounding of the cost
    assert density.mean().item() == pytest.approx(1.0, abs=1e-3)

    v = transport.potentials(*draw())[1]
    if transport.settings.action_bound == SIZE:
        assert not v.any()
    elif transport.settings.action_bound > 1:
        assert v.max().item() <= 0
        assert v.min().item() < -0.1
    if keypoints:
        np.testing.assert_array_equal(density[:keypoints, :keypoints].numpy(), SIZE * np.eye(keypoints))
        assert not density[:keypoints, keypoints:].any()
        assert not density[keypoints:, :keypoints].any()


@pytest.mark.parametrize("keypoints", [0, KEYPOINTS])
def test_metrics_are_those_of_the_plan_and_the_cost(keypoints):
    transport, cost = small(action_bound=2.0, shares=MIXED), GuidedCost(SmoothCost(scale=7.0, offset=-5.0), size=32)
    metrics = metrics_of(transport.fit(*draw(32), cost, keypoints))
    density, standardised = transport.plan(*draw(32), cost, keypoints)
    rows, columns = marginal_errors(density, 2.0)
    rest = density[keypoints:, keypoints:]
    terms = cross_cost(*draw(32), cost)[keypoints:, keypoints:]
    expected = {
        "row_marginal_error": rows.item(),
        "column_marginal_error": columns.item(),
        "column_deviation": marginal_errors(density)[1].item(),
        "mean_h": density.mean().item(),
        "zero_share": zero_share(rest).item(),
        "effective_share": effective_share(rest).item(),
        "max_abs_cost": terms[..., 0].abs().max().item(),
        "steps": 20,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert metrics["column_marginal_error"] < metrics["column_deviation"]
    assert metrics["cost_scale"] > 0
    assert set(metrics) == {*expected, "cost_scale", "dual_value"}
    assert interaction(standardised[keypoints:, keypoints:]).square().mean().sqrt().item() == pytest.approx(1, rel=1e-3)


def test_cost_scale_is_in_the_unit_of_the_cost():
    scales = [small().fit(*draw(32), SmoothCost(scale=scale))["transport/cost_scale"] for scale in (1.0, 10.0)]
    assert scales[1] == pytest.approx(10 * scales[0], rel=1e-4)
    terms = cross_cost(*draw(32), SmoothCost())[..., 0]
    assert scales[0] == pytest.approx(interaction(terms).square().mean().sqrt().item(), rel=1e-4)


@pytest.mark.parametrize("action_bound", [1.0, 4.0, 32.0])
def test_compatibility_of_all_pairs_is_the_plan(action_bound):
    transport, cost = small(action_bound=action_bound), SmoothCost(scale=3.0)
    observations, chunks = draw(32)
    transport.fit(observations, chunks, cost)
    candidates = chunks.expand(32, *chunks.shape)
    terms = cost(observations, candidates)
    density = transport.compatibility(observations, candidates, terms)
    torch.testing.assert_close(density, transport.plan(observations, chunks, cost)[0])
    one = transport.compatibility(observations[4:5], chunks[9:10, None].transpose(0, 1), terms[4:5, 9:10])
    assert one.item() == pytest.approx(density[4, 9].item(), abs=1e-5)


@pytest.mark.parametrize("regulariser", list(REGULARISERS))
def test_conditional_solves_the_row_condition_over_the_candidates(regulariser):
    transport, cost = small(regulariser=regulariser, epsilon=0.5), SmoothCost(scale=3.0)
    observations, chunks = draw(32)
    transport.fit(observations, chunks, cost)
    candidates = chunks.view(8, 4, HORIZON, ACTION_DIM)
    terms = cost(observations[:8], candidates)
    density = transport.conditional(observations[:8], candidates, terms)
    torch.testing.assert_close(density.mean(1), torch.ones(8))
    assert density.std(1).min().item() > 1e-3
    shifted = transport.conditional(observations[:8], candidates, terms + 5 * observations[:8, :1, None])
    torch.testing.assert_close(shifted, density, atol=1e-3, rtol=1e-3)
    if regulariser == "entropic":  # where u is a factor of each row
        full = transport.compatibility(observations[:8], candidates, terms)
        torch.testing.assert_close(density, full / full.mean(1, keepdim=True), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("bound", [float(SIZE), 1e6, float("inf")])
def test_a_bound_of_the_block_size_drops_v(bound):
    transport = make(action_bound=bound, first_steps=30)
    before = copy.deepcopy(transport.potentials.v.state_dict())
    u_before = copy.deepcopy(transport.potentials.u.state_dict())
    metrics = metrics_of(transport.fit(*draw(), SmoothCost()))
    assert not transport.potentials(*draw())[1].any()
    assert all(torch.equal(before[name], value) for name, value in transport.potentials.v.state_dict().items())
    assert not all(torch.equal(u_before[name], value) for name, value in transport.potentials.u.state_dict().items())
    assert metrics["column_marginal_error"] == 0
    assert np.isfinite(list(metrics.values())).all()


def test_a_constant_cost_gives_unit_compatibility():
    transport = make(block_size=64, first_steps=300)
    metrics = transport.fit(*draw(64), lambda s, a: torch.full((*a.shape[:2], 1), -3.0))
    density, standardised = transport.plan(*draw(64), lambda s, a: torch.full((*a.shape[:2], 1), -3.0))
    assert (density - 1).abs().mean().item() < 0.02
    assert standardised.std().item() < 1e-6
    assert metrics["transport/mean_h"] == pytest.approx(1.0, abs=1e-3)
    assert metrics["transport/effective_share"] > 0.99


def test_adding_a_function_of_the_state_leaves_the_plan():
    plans = []
    for per_state in (0.0, 0.5):
        cost, transport = SmoothCost(per_state=per_state), make()
        transport.fit(*draw(), cost)
        plans.append(transport.plan(*draw(), cost)[0])
    assert (plans[0] - plans[1]).abs().mean().item() < 0.03
    assert (plans[0] - 1).abs().mean().item() > 0.5


def test_cross_cost_pairs_every_state_with_every_chunk(monkeypatch):
    cost, (observations, _), (_, chunks) = SmoothCost(), draw(7), draw(11, 1)
    expected = cost(observations, chunks.expand(7, *chunks.shape))
    for pairs in (1, 30, 10_000):  # in parts of 1, 2 and all states
        monkeypatch.setattr("otpr.transport.PAIRS_PER_CALL", pairs)
        table = cross_cost(observations, chunks, cost)
        assert table.shape == (7, 11, 1)
        torch.testing.assert_close(table, expected)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"regulariser": "kl"}, "unknown regulariser 'kl'; valid: l2, entropic"),
        ({"epsilon": 0.0}, "epsilon must be in (0, inf), got 0.0"),
        ({"epsilon": -0.1}, "epsilon must be in (0, inf), got -0.1"),
        ({"epsilon": float("nan")}, "epsilon must be in (0, inf), got nan"),
        ({"epsilon": float("inf")}, "epsilon must be in (0, inf), got inf"),
        ({"learning_rate": 0.0}, "learning_rate must be in (0, inf), got 0.0"),
        ({"action_bound": 0.99}, "action_bound must be in [1, inf], got 0.99"),
        ({"block_size": 0}, "block_size must be in [1, inf], got 0"),
        ({"first_steps": -1}, "first_steps must be in [0, inf], got -1"),
        ({"warm_steps": -1}, "warm_steps must be in [0, inf], got -1"),
        ({"tolerance": -0.01}, "tolerance must be in [0, inf], got -0.01"),
    ],
)
def test_settings_out_of_range_are_refused_in_one_line(values, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        TransportSettings(**values)


@pytest.mark.parametrize(
    "values", [{"action_bound": 1.0}, {"action_bound": float("inf")}, {"tolerance": 0.0}, {"warm_steps": 0}]
)
def test_settings_at_the_ends_of_their_range_are_accepted(values):
    assert TransportSettings(**values).uses_v == (values.get("action_bound", 1.0) < 512)


def test_fit_refuses_another_number_of_points():
    observations, chunks = draw(32)
    with pytest.raises(ValueError, match=r"^need 32 points, got 10 states, 10 chunks$"):
        small().fit(*draw(10), SmoothCost())
    with pytest.raises(ValueError, match=r"^need 32 points, got 32 states, 31 chunks$"):
        small().fit(observations, chunks[:31], SmoothCost())


@pytest.mark.parametrize("keypoints", [-1, 32, 40])
def test_fit_refuses_keypoints_that_leave_nothing_to_transport(keypoints):
    transport = small()
    before = pickled(transport)
    with pytest.raises(
        ValueError, match=f"^keypoints must be at least 0 and fewer than the 32 points, got {keypoints}$"
    ):
        transport.fit(*draw(32), SmoothCost(), keypoints)
    assert pickled(transport) == before
