"""From fit to fit: warm starts on a moving cost, what is kept, resumed and stopped early."""

from __future__ import annotations

import copy
import io

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
    small,
)


def test_warm_start_follows_drift_in_shape_unit_and_level():
    transport, cold = make(first_steps=400), make(first_steps=100)
    metrics = metrics_of(transport.fit(*draw(), SmoothCost()))
    for step in range(1, 4):
        cost = SmoothCost(drift=0.1 * step, scale=3.0**step, offset=100.0 * step)
        points = draw(SIZE, step)
        metrics = metrics_of(transport.fit(*points, cost))
        assert metrics["steps"] == 100
        assert metrics["fresh_row_marginal_error"] < 0.5
        assert metrics["row_marginal_error"] < 0.5 * metrics["fresh_row_marginal_error"]
        assert metrics["row_marginal_error"] < 0.06
        assert metrics["column_marginal_error"] < 0.06
    from_scratch = metrics_of(cold.fit(*draw(SIZE, 3), SmoothCost(drift=0.3, scale=27.0, offset=300.0)))
    for name in ("row_marginal_error", "column_marginal_error"):
        assert metrics[name] < from_scratch[name]


def test_a_cost_of_another_unit_and_level_keeps_the_plan_it_had():
    transport = make(first_steps=300, warm_steps=0)
    transport.fit(*draw(), SmoothCost())
    before = transport.plan(*draw(), SmoothCost())[0]
    cost = SmoothCost(scale=50.0, offset=-700.0)
    metrics = metrics_of(transport.fit(*draw(), cost))
    torch.testing.assert_close(transport.plan(*draw(), cost)[0], before, atol=2e-2, rtol=1e-2)
    assert metrics["fresh_row_marginal_error"] == pytest.approx(metrics["row_marginal_error"], abs=1e-3)


def test_potentials_are_kept_between_fits():
    transport = small(warm_steps=0)
    potentials = transport.potentials
    first = metrics_of(transport.fit(*draw(32), SmoothCost()))
    before = copy.deepcopy(potentials.state_dict())
    second = metrics_of(transport.fit(*draw(32), SmoothCost()))
    assert transport.potentials is potentials
    assert all(torch.equal(before[name], value) for name, value in potentials.state_dict().items())
    assert "fresh_row_marginal_error" not in first
    assert "fresh_column_marginal_error" not in first
    for name in ("row_marginal_error", "column_marginal_error"):
        assert second[name] == pytest.approx(second[f"fresh_{name}"], abs=1e-5)
        assert second[name] == pytest.approx(first[name], abs=1e-4)
    assert (first["steps"], second["steps"], transport.fits) == (20, 0, 2)


def test_fresh_errors_are_those_before_the_gradient_steps():
    transport = make(first_steps=300, warm_steps=300)
    first = metrics_of(transport.fit(*draw(), SmoothCost()))
    second = metrics_of(transport.fit(*draw(SIZE, 1), SmoothCost()))
    assert second["fresh_row_marginal_error"] > 3 * first["row_marginal_error"]
    assert second["row_marginal_error"] < second["fresh_row_marginal_error"] / 3
    assert second["column_marginal_error"] < second["fresh_column_marginal_error"] / 3


@pytest.mark.parametrize("keypoints", [0, KEYPOINTS])
def test_diagnose_changes_nothing_and_says_what_fit_said(keypoints):
    transport, cost = small(shares=MIXED), GuidedCost(size=32)
    fitted = metrics_of(transport.fit(*draw(32), cost, keypoints))
    before = pickled(transport)
    transport.diagnose(*draw(32, 1), GuidedCost(SmoothCost(scale=9.0, offset=3.0), size=32))
    said = transport.diagnose(*draw(32), cost, keypoints)
    assert pickled(transport) == before
    expected = {f"transport/{name}": value for name, value in fitted.items() if name != "steps"}
    assert said == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("action_bound", [1.0, 4.0])
def test_resume_is_bit_equal(action_bound):
    settings = {"shares": (0.3, 0.7), "action_bound": action_bound}
    straight = small(**settings)
    straight.fit(*draw(32), GuidedCost(SmoothCost(offset=4.0), size=32), KEYPOINTS)
    resumed = small(seed=5, **settings)
    resumed.load_state_dict(torch.load(io.BytesIO(pickled(straight)), weights_only=True))
    assert torch.equal(straight.factors, resumed.factors)
    assert torch.equal(straight.center, resumed.center)
    assert resumed.fits == 1
    observations, chunks = draw(9, 2)
    candidates, terms = chunks.view(3, 3, HORIZON, ACTION_DIM), torch.randn(3, 3, 2)
    assert torch.equal(
        straight.compatibility(observations[:3], candidates, terms),
        resumed.compatibility(observations[:3], candidates, terms),
    )
    cost = GuidedCost(SmoothCost(drift=0.1, scale=2.0), size=32)
    fits = [metrics_of(each.fit(*draw(32, 1), cost, KEYPOINTS)) for each in (straight, resumed)]
    assert fits[0] == fits[1]
    assert fits[0]["steps"] == 15
    assert torch.equal(straight.factors, resumed.factors)
    assert torch.equal(straight.center, resumed.center)
    plans = [each.plan(*draw(32, 1), cost, KEYPOINTS)[0] for each in (straight, resumed)]
    assert torch.equal(*plans)
    assert plans[0].std().item() > 0.1


def test_a_state_outlives_later_fits_when_copied():
    transport = small()
    transport.fit(*draw(32), SmoothCost())
    state, before = copy.deepcopy(transport.state_dict()), transport.plan(*draw(32), SmoothCost())[0]
    transport.fit(*draw(32, 1), SmoothCost(scale=5.0, drift=1.0))
    assert not torch.equal(transport.plan(*draw(32), SmoothCost())[0], before)
    transport.load_state_dict(state)
    assert torch.equal(transport.plan(*draw(32), SmoothCost())[0], before)


def test_equal_seeds_give_equal_fits_and_others_do_not():
    runs = [metrics_of(small(seed=seed).fit(*draw(32), SmoothCost())) for seed in (3, 3, 4)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


@pytest.mark.parametrize("action_bound", [1.0, 2.0])
def test_a_tolerance_stops_a_fit_early(action_bound):
    transport = make(tolerance=0.1, first_steps=1000, action_bound=action_bound)
    metrics = metrics_of(transport.fit(*draw(), SmoothCost()))
    assert 0 < metrics["steps"] < 1000
    assert metrics["row_marginal_error"] < 0.105
    assert metrics["column_marginal_error"] < 0.105
    again = metrics_of(transport.fit(*draw(), SmoothCost()))
    assert again["steps"] == 0  # it has converged to the tolerance before the first step


def test_a_tolerance_of_zero_never_stops_a_fit():
    transport = small(first_steps=60, warm_steps=45, action_bound=32.0)  # with no column error
    constant = lambda s, a: torch.zeros(*a.shape[:2], 1)  # noqa: E731
    for parameter in transport.potentials.parameters():
        parameter.data.zero_()  # so that both errors are zero from the start
    assert metrics_of(transport.fit(*draw(32), constant))["steps"] == 60
    assert metrics_of(transport.fit(*draw(32), constant))["steps"] == 45
    tolerant = small(first_steps=60, action_bound=32.0, tolerance=0.01)
    for parameter in tolerant.potentials.parameters():
        parameter.data.zero_()
    assert metrics_of(tolerant.fit(*draw(32), constant))["steps"] == 0
