"""The neural potentials against the exact plan, on a moving cost, and their state."""

from __future__ import annotations

import copy
import io
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from otpr.duality import REGULARISERS, effective_share, interaction, marginal_errors, standardise_cost, zero_share
from otpr.exact import ExactPlan, exact_plan
from otpr.keypoints import Keypoints
from otpr.transport import Cost, Transport, TransportSettings, cross_cost

OBSERVATION_DIM, HORIZON, ACTION_DIM = 5, 2, 3
CHUNK_DIM = HORIZON * ACTION_DIM
SIZE, KEYPOINTS = 128, 8
MIXED = (0.5, 0.5)


class SmoothCost:
    """One term: a random trigonometric sum over (s, a), rotated towards a second one by `drift`."""

    def __init__(self, drift: float = 0.0, scale: float = 1.0, offset: float = 0.0, per_state: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(7)
        self.sums = [
            (
                torch.randn(OBSERVATION_DIM + CHUNK_DIM, 64, generator=generator) * 0.6,
                6.3 * torch.rand(64, generator=generator),
                torch.randn(64, generator=generator) / 8,
            )
            for _ in range(2)
        ]
        self.mixture = (np.cos(drift), np.sin(drift))
        self.scale, self.offset, self.per_state = scale, offset, per_state

    def __call__(self, observations: Tensor, chunks: Tensor) -> Tensor:
        """(B, O), (B, S, H, A) -> (B, S, 1)."""
        states = observations[:, None].expand(-1, chunks.shape[1], -1)
        inputs = torch.cat([states, chunks.flatten(2)], dim=-1)
        first, second = [torch.cos(inputs @ w + b) @ a for w, b, a in self.sums]
        total = self.mixture[0] * first + self.mixture[1] * second
        total = self.scale * (total + self.per_state * observations[:, :1].sin()) + self.offset
        return total[..., None]


class GuidedCost:
    """Two terms: a smooth one and the guide of the first points of `draw(size)`, (B, S, 2)."""

    def __init__(self, first: Cost | None = None, units: tuple[float, float] = (1.0, 1.0), size: int = SIZE) -> None:
        observations, chunks = draw(size)
        self.keypoints = Keypoints(observations[:KEYPOINTS], chunks[:KEYPOINTS], 0.1)
        self.first, self.units = first or SmoothCost(), torch.tensor(units)

    def __call__(self, observations: Tensor, chunks: Tensor) -> Tensor:
        guide = self.keypoints.guide(observations, chunks)[..., None]
        return torch.cat([self.first(observations, chunks), guide], -1) * self.units


def draw(count: int = SIZE, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    observations = torch.rand(count, OBSERVATION_DIM, generator=generator) * 2 - 1
    return observations, torch.rand(count, HORIZON, ACTION_DIM, generator=generator) * 2 - 1


def make(seed: int = 0, shares: tuple[float, ...] = (1.0,), **settings: Any) -> Transport:
    defaults = {"block_size": SIZE, "first_steps": 500, "warm_steps": 100, "hidden_dims": (128, 128), "tolerance": 0.0}
    chosen = TransportSettings(**(defaults | settings))
    return Transport(chosen, OBSERVATION_DIM, CHUNK_DIM, torch.Generator().manual_seed(seed), shares=shares)


def small(seed: int = 0, **settings: Any) -> Transport:
    """Far from converged, for what does not depend on convergence."""
    defaults = {"block_size": 32, "first_steps": 20, "warm_steps": 15, "hidden_dims": (32, 32)}
    return make(seed, **(defaults | settings))


def metrics_of(fit: dict[str, float]) -> dict[str, float]:
    """All but the time."""
    assert fit["time/transport"] > 0
    return {name.removeprefix("transport/"): value for name, value in fit.items() if name != "time/transport"}


def solve(transport: Transport, cost: Cost, keypoints: int = 0) -> tuple[Tensor, Tensor, ExactPlan]:
    """The neural plan, the standardised cost of its block, and the exact plan."""
    settings = transport.settings
    density, standardised = transport.plan(*draw(settings.block_size), cost, keypoints)
    block = standardised.double().numpy()
    exact = exact_plan(block, settings.epsilon, settings.regulariser, settings.action_bound, keypoints)
    return density, standardised, exact


def relative_gap(dual: float, exact: ExactPlan, cost: Tensor, settings: TransportSettings, keypoints: int = 0) -> float:
    """|dual - exact| in units of what the exact plan gains over the independent one of the same mask.

    Without a mask the latter is H = 1, of value mean c + R(1), where R(1) is epsilon for L2 and 0 for entropic.
    """
    size = len(cost)
    independent = torch.full((size, size), size / (size - keypoints), dtype=torch.float64)
    independent[:keypoints], independent[:, :keypoints] = 0.0, 0.0
    independent[range(keypoints), range(keypoints)] = float(size)
    penalty = REGULARISERS[settings.regulariser].penalty(independent, settings.epsilon)
    return abs(dual - exact.value) / abs(exact.value - ((cost * independent).mean() + penalty).item())


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


def pickled(transport: Transport) -> bytes:
    buffer = io.BytesIO()
    torch.save(transport.state_dict(), buffer)
    return buffer.getvalue()


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
