"""The exact oracle: tabular transport against POT and SciPy, masked, relaxed, and extended to other points."""

from __future__ import annotations

import functools
import itertools
import warnings
from typing import NamedTuple

import numpy as np
import ot
import ot.smooth
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from otpr.duality import REGULARISERS, marginal_errors
from otpr.exact import ExactPlan, ExactTransport, exact_plan
from otpr.transport import cross_cost

COUNT, KEYPOINTS = 40, 6
EPSILONS = (0.01, 0.1, 1.0, 10.0)  # in units of the cost's standard deviation
BOTH = pytest.mark.parametrize("regulariser", list(REGULARISERS))
ALL = pytest.mark.parametrize(("regulariser", "epsilon"), list(itertools.product(REGULARISERS, EPSILONS)))
BOUNDS = (1.001, 1.5, 4.0, 8.0)


def random_cost(n: int = COUNT, m: int = COUNT, seed: int = 1) -> np.ndarray:
    """Smooth in (s, a), with standard deviation 1, an effect of the state and a mean away from zero."""
    generator = np.random.default_rng(seed)
    x, y = generator.normal(size=(n, 3)), generator.normal(size=(m, 3))
    cost = np.cos(x @ y.T + x[:, :1]) + 0.3 * x[:, :1]
    return cost / cost.std() + 2


class Problem(NamedTuple):
    regulariser: str
    epsilon: float
    bound: float = 1.0
    keypoints: int = 0


@functools.cache
def solve(problem: Problem) -> ExactPlan:
    """Solved once for all tests that look at it."""
    return exact_plan(random_cost(), problem.epsilon, problem.regulariser, problem.bound, problem.keypoints)


def dual_value(problem: Problem, plan: ExactPlan) -> float:
    """From the potentials alone, those of the keypoints in closed form."""
    regulariser, k = REGULARISERS[problem.regulariser], problem.keypoints
    cost = random_cost()
    density = np.zeros((COUNT, COUNT))
    gap = torch.from_numpy(plan.u[k:, None] + plan.v[k:] - cost[k:, k:])
    density[k:, k:] = regulariser.density(gap, problem.epsilon).numpy()
    matched = regulariser.gap(torch.full((k,), COUNT, dtype=torch.float64), problem.epsilon).numpy()
    density[:k, :k] = COUNT * np.eye(k)
    linear = plan.u[k:].sum() + problem.bound * plan.v[k:].sum() + (matched + cost.diagonal()[:k]).sum()
    return linear / COUNT - regulariser.dual_penalty(torch.from_numpy(density), problem.epsilon).item()


def largest_errors(density: np.ndarray, bound: float = 1.0) -> tuple[float, float]:
    """Of any row and of any column: stricter than the means of `marginal_errors`."""
    rows, columns = density.mean(1) - 1, density.mean(0) - bound
    return float(np.abs(rows).max()), float((np.abs(columns) if bound == 1 else columns.clip(0)).max())


def pot_density(cost: np.ndarray, epsilon: float, regulariser: str) -> np.ndarray:
    """POT's plan of the whole cost, as a density."""
    n, m = cost.shape
    rows, columns = np.full(n, 1 / n), np.full(m, 1 / m)
    if regulariser == "l2":
        plan = ot.smooth.smooth_ot_dual(
            rows, columns, cost, 2 * epsilon * n * m, "l2", stopThr=1e-14, numItermax=20_000
        )
    elif epsilon >= 0.1:
        plan = ot.sinkhorn(rows, columns, cost, epsilon, "sinkhorn_log", stopThr=1e-11, numItermax=20_000)
    else:  # Sinkhorn's iterations are no contraction to speak of: POT needs its own continuation in epsilon
        plan = ot.sinkhorn(rows, columns, cost, epsilon, "sinkhorn_epsilon_scaling", stopThr=1e-11, numItermax=2000)
    return np.asarray(plan) * n * m


@ALL
def test_primal_equals_dual(regulariser, epsilon):
    problem = Problem(regulariser, epsilon)
    assert dual_value(problem, solve(problem)) == pytest.approx(solve(problem).value, rel=1e-5)


@ALL
def test_the_value_is_that_of_the_density(regulariser, epsilon):
    plan = solve(Problem(regulariser, epsilon))
    density = torch.from_numpy(plan.density)
    penalty = REGULARISERS[regulariser].penalty(density, epsilon).item()
    assert plan.value == pytest.approx((random_cost() * plan.density).mean() + penalty, rel=1e-9)


@ALL
def test_marginals_are_uniform(regulariser, epsilon):
    assert max(largest_errors(solve(Problem(regulariser, epsilon)).density)) < 1e-6


@ALL
def test_density_is_that_of_pot(regulariser, epsilon):
    ours = solve(Problem(regulariser, epsilon)).density
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = pot_density(random_cost(), epsilon, regulariser)
    # At the smallest epsilon POT's entropic plan keeps column errors of 1e-4 and an entry can be as large as n.
    loosened = regulariser == "entropic" and epsilon < 0.1
    np.testing.assert_allclose(ours, theirs, atol=2e-2 if loosened else 1e-4)
    assert np.abs(ours - theirs).mean() < (1e-3 if loosened else 1e-5)


@BOTH
def test_a_rectangular_cost_is_solved_too(regulariser):
    cost = random_cost(30, 50)
    density = exact_plan(cost, 0.1, regulariser).density
    assert max(largest_errors(density)) < 1e-6
    np.testing.assert_allclose(density, pot_density(cost, 0.1, regulariser), atol=1e-4)


@pytest.mark.parametrize(
    ("regulariser", "epsilons"), [("l2", (1.0, 0.1, 0.01, 1e-4)), ("entropic", (1.0, 0.3, 0.1, 0.04))]
)
def test_small_epsilon_approaches_the_assignment(regulariser, epsilons):
    cost = random_cost()
    best = cost[linear_sum_assignment(cost)].mean()
    plans = [exact_plan(cost, epsilon, regulariser).density for epsilon in epsilons]
    excess = [(density * cost).mean() - best for density in plans]
    assert all(a > b > -1e-5 for a, b in itertools.pairwise(excess))
    assert excess[-1] < 0.01 * np.ptp(cost)
    assignment = np.eye(COUNT)[linear_sum_assignment(cost)[1]] * COUNT
    penalty = REGULARISERS[regulariser].penalty(torch.from_numpy(assignment), 1.0).item()
    for epsilon, value in zip(epsilons, excess, strict=True):
        assert value <= epsilon * penalty  # else the assignment would beat the plan


@BOTH
@pytest.mark.parametrize("bound", [1.0, 1.5])
def test_adding_a_function_of_the_state_leaves_the_plan(regulariser, bound):
    of_state = 50 * np.random.default_rng(1).normal(size=(COUNT, 1))
    shifted = exact_plan(random_cost() + of_state, 0.1, regulariser, bound)
    plan = solve(Problem(regulariser, 0.1, bound))
    np.testing.assert_allclose(shifted.density, plan.density, atol=1e-4)
    assert shifted.value == pytest.approx(plan.value + of_state.mean(), abs=1e-6)


@BOTH
def test_adding_a_function_of_the_chunk_leaves_the_plan_of_strict_transport_alone(regulariser):
    of_chunk = 3 * np.random.default_rng(1).normal(size=(1, COUNT))
    shifted = exact_plan(random_cost() + of_chunk, 0.1, regulariser)
    plan = solve(Problem(regulariser, 0.1))
    np.testing.assert_allclose(shifted.density, plan.density, atol=1e-4)
    assert shifted.value == pytest.approx(plan.value + of_chunk.mean(), abs=1e-6)
    relaxed = exact_plan(random_cost() + of_chunk, 0.1, regulariser, 4.0)
    assert np.abs(relaxed.density - solve(Problem(regulariser, 0.1, 4.0)).density).mean() > 0.1


@BOTH
@pytest.mark.parametrize("bound", [1.0, 1.5])
def test_the_unit_of_cost_and_epsilon_cancels(regulariser, bound):
    plan = solve(Problem(regulariser, 0.1, bound))
    for unit in (1e-3, 100.0):
        other = exact_plan(unit * random_cost(), 0.1 * unit, regulariser, bound)
        np.testing.assert_allclose(other.density, plan.density, atol=1e-3)
        assert other.value == pytest.approx(unit * plan.value, rel=1e-6)


@BOTH
@pytest.mark.parametrize("bound", [1.0, 2.0, 40.0])
def test_a_constant_cost_gives_unit_compatibility(regulariser, bound):
    plan = exact_plan(np.full((20, 30), 4.0), 0.1, regulariser, bound)
    np.testing.assert_allclose(plan.density, 1.0, atol=1e-6)
    assert plan.value == pytest.approx(4.1 if regulariser == "l2" else 4.0)


@BOTH
@pytest.mark.parametrize("bound", [1.0, 1.5])
@pytest.mark.parametrize("epsilon", [0.1, 1.0])
def test_keypoints_are_matched_with_each_other_alone(regulariser, bound, epsilon):
    problem = Problem(regulariser, epsilon, bound, KEYPOINTS)
    plan, k = solve(problem), KEYPOINTS
    np.testing.assert_array_equal(plan.density[:k, :k], COUNT * np.eye(k))
    assert not plan.density[:k, k:].any()
    assert not plan.density[k:, :k].any()
    assert max(largest_errors(plan.density, bound)) < 1e-6
    assert dual_value(problem, plan) == pytest.approx(plan.value, rel=1e-5)
    assert np.isnan(plan.u[:k]).all()
    assert np.isnan(plan.v[:k]).all()
    assert np.isfinite(plan.u[k:]).all()
    assert np.isfinite(plan.v[k:]).all()


@BOTH
@pytest.mark.parametrize("epsilon", [0.1, 1.0])
def test_the_mask_is_a_prohibitive_cost(regulariser, epsilon):
    cost, k = random_cost(), KEYPOINTS
    forbidden = np.zeros((COUNT, COUNT), dtype=bool)
    forbidden[:k], forbidden[:, :k] = True, True
    np.fill_diagonal(forbidden, False)
    prohibitive = np.where(forbidden, 1000.0, cost)  # the potentials at a keypoint add up to 2 eps n = 80 at most
    masked = solve(Problem(regulariser, epsilon, 1.0, k)).density
    np.testing.assert_allclose(masked, pot_density(prohibitive, epsilon, regulariser), atol=1e-3)


@BOTH
def test_what_masked_pairs_cost_does_not_matter(regulariser):
    cost, k = random_cost(), KEYPOINTS
    other = cost.copy()
    other[:k] += 7 * np.random.default_rng(3).normal(size=(k, COUNT))
    other[:, :k] += 9.0
    plan, changed = solve(Problem(regulariser, 0.1, 1.0, k)), exact_plan(other, 0.1, regulariser, keypoints=k)
    np.testing.assert_array_equal(plan.density, changed.density)
    difference = (other - cost).diagonal()[:k].sum() / COUNT
    assert changed.value == pytest.approx(plan.value + difference, abs=1e-9)


@BOTH
@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("epsilon", [0.01, 0.1, 1.0])
def test_relaxed_transport_is_optimal(regulariser, bound, epsilon):
    """Feasible, with a dual of the same value and multipliers where the bound binds alone: together these prove it."""
    problem = Problem(regulariser, epsilon, bound)
    plan = solve(problem)
    rows, columns = largest_errors(plan.density, bound)
    assert rows < 1e-6
    assert columns < 2e-6
    assert dual_value(problem, plan) == pytest.approx(plan.value, rel=1e-5)
    assert plan.v.max() <= 0
    assert (np.abs(plan.v) * np.abs(plan.density.mean(0) - bound)).max() < 1e-5
    assert np.abs(plan.density.mean(0)[plan.v < -1e-2] - bound).max(initial=0) < 1e-4


@BOTH
def test_the_bound_binds_in_these_problems(regulariser):
    """Otherwise the tests of relaxed transport would prove nothing."""
    for bound in BOUNDS[:3]:
        plan = solve(Problem(regulariser, 0.01, bound))
        assert plan.v.min() < -1e-2
        assert (plan.v == 0).any() or bound < 1.01
        assert plan.density.mean(0).max() == pytest.approx(bound, abs=1e-5)


@BOTH
@pytest.mark.parametrize("epsilon", [0.1, 1.0])
def test_a_bound_just_above_one_is_strict_transport(regulariser, epsilon):
    strict, nearly = solve(Problem(regulariser, epsilon)), solve(Problem(regulariser, epsilon, 1 + 1e-6))
    assert nearly.value == pytest.approx(strict.value, abs=1e-4)
    np.testing.assert_allclose(nearly.density, strict.density, atol=1e-3)


@BOTH
@pytest.mark.parametrize("keypoints", [0, KEYPOINTS])
def test_a_looser_bound_costs_less(regulariser, keypoints):
    values = [solve(Problem(regulariser, 0.01, bound, keypoints)).value for bound in (1.001, 1.2, 1.5, 2.0)]
    assert all(a > b + 1e-4 for a, b in itertools.pairwise(values))
    loose = [solve(Problem(regulariser, 0.01, bound, keypoints)).value for bound in (2.0, 4.0, 8.0, 40.0, 100.0)]
    assert all(a >= b - 1e-8 for a, b in itertools.pairwise(loose))


@BOTH
@pytest.mark.parametrize("bound", [COUNT, 1000.0, float("inf")])
def test_a_bound_of_the_block_size_solves_every_row_alone(regulariser, bound):
    plan, penalties = solve(Problem(regulariser, 0.1, bound)), REGULARISERS[regulariser]
    assert not plan.v.any()
    gap = -torch.from_numpy(random_cost())
    rows = penalties.density(gap + penalties.level(gap, 0.1)[:, None], 0.1)
    np.testing.assert_allclose(plan.density, rows.numpy(), atol=1e-9)
    if regulariser == "entropic":
        softmax = (-random_cost() / 0.1) - (-random_cost() / 0.1).max(1, keepdims=True)
        weights = np.exp(softmax)
        np.testing.assert_allclose(plan.density, COUNT * weights / weights.sum(1, keepdims=True), atol=1e-9)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epsilon": 0.0}, "epsilon must be positive, got 0.0"),
        ({"epsilon": -0.1}, "epsilon must be positive, got -0.1"),
        ({"epsilon": float("nan")}, "epsilon must be positive, got nan"),
        ({"action_bound": 0.5}, "action_bound must be at least 1, got 0.5"),
        ({"regulariser": "kl"}, "unknown regulariser 'kl'; valid: l2, entropic"),
        ({"keypoints": -1}, "keypoints must be fewer .* got -1"),
        ({"keypoints": 5}, "keypoints must be fewer .* got 5"),
        ({"keypoints": 2, "cost": np.zeros((5, 6))}, r"keypoints must be fewer .* square cost \(5, 6\), got 2"),
    ],
)
def test_arguments_out_of_range_are_refused_by_name_and_value(values, message):
    arguments = {"cost": random_cost(5, 5), "epsilon": 0.1} | values
    with pytest.raises(ValueError, match=f"^{message}$"):
        exact_plan(**arguments)


@BOTH
@pytest.mark.parametrize("bound", [1.0, 1.5])
def test_a_plan_short_of_the_tolerance_is_not_returned(regulariser, bound):
    with pytest.raises(RuntimeError, match=r"at epsilon 0\.1 left a marginal error of"):
        exact_plan(random_cost(20, 20), 0.1, regulariser, bound, tolerance=0.0)
    with pytest.raises(RuntimeError, match="marginal error of nan"):
        exact_plan(np.where(np.eye(20) > 0, np.nan, random_cost(20, 20)), 0.1, regulariser, bound)


def smooth_cost(observations: Tensor, chunks: Tensor) -> Tensor:
    """One term, (B, O), (B, S, H, A) -> (B, S, 1), of standard deviation near 1."""
    actions = chunks.flatten(2)
    total = torch.cos(3 * observations[:, None] * actions[..., :3]).sum(-1) + 0.5 * actions[..., 3:].sum(-1)
    return total[..., None] + observations[:, None, :1]


def points(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    observations = torch.rand(count, 3, generator=generator) * 2 - 1
    return observations, torch.rand(count, 2, 3, generator=generator) * 2 - 1


@functools.cache
def extended(regulariser: str, bound: float) -> ExactTransport:
    return ExactTransport(*points(COUNT, 0), smooth_cost, 0.1, regulariser, bound)


def compatibility(transport: ExactTransport, observations: Tensor, chunks: Tensor) -> Tensor:
    """H of every state with every chunk."""
    terms = cross_cost(observations, chunks, smooth_cost)
    return transport.compatibility(observations, chunks.expand(len(observations), *chunks.shape), terms)


@BOTH
@pytest.mark.parametrize("bound", [1.0, 1.5, 4.0])
def test_compatibility_of_the_blocks_own_points_is_the_plan(regulariser, bound):
    transport = extended(regulariser, bound)
    block = compatibility(transport, *points(COUNT, 0)).double().numpy()
    np.testing.assert_allclose(block, transport.plan.density, atol=2e-3)
    assert np.ptp(block) > 1


@BOTH
@pytest.mark.parametrize("bound", [1.0, 1.5, 4.0])
def test_new_points_meet_the_conditions_of_optimality_on_the_block(regulariser, bound):
    transport = extended(regulariser, bound)
    states, chunks = points(30, 1)
    rows = compatibility(transport, states, transport.chunks).mean(1)
    torch.testing.assert_close(rows, torch.ones(30), atol=2e-3, rtol=0)
    columns = compatibility(transport, transport.observations, chunks).mean(0)
    assert columns.max().item() <= bound + 2e-3
    if bound == 1:
        torch.testing.assert_close(columns, torch.ones(30), atol=2e-3, rtol=0)
    fresh = compatibility(transport, states, chunks)
    assert fresh.shape == (30, 30)
    assert fresh.isfinite().all()
    assert fresh.min().item() >= 0
    assert 0.5 < fresh.mean().item() < 2


@BOTH
def test_exact_compatibility_of_far_points_is_finite(regulariser):
    states, chunks = points(5, 2)
    assert compatibility(extended(regulariser, 1.0), 1e4 * states, 1e4 * chunks).isfinite().all()


def test_candidates_may_differ_from_state_to_state():
    transport = extended("l2", 1.0)
    states, chunks = points(6, 3)
    candidates = chunks.view(2, 3, 2, 3)
    density = transport.compatibility(states[:2], candidates, smooth_cost(states[:2], candidates))
    expected = compatibility(transport, states[:2], chunks)
    torch.testing.assert_close(density, torch.stack([expected[0, :3], expected[1, 3:]]))


def test_exact_transport_refuses_what_the_plan_refuses():
    with pytest.raises(ValueError, match=r"action_bound must be at least 1, got 0\.0"):
        ExactTransport(*points(5, 0), smooth_cost, 0.1, "l2", 0.0)
    assert max(marginal_errors(torch.from_numpy(extended("l2", 1.0).plan.density))).item() < 1e-6
