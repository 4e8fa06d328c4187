"""What the theory promises, on problems small enough to solve outright.

Proposition 4.1 of the OTPR paper, the limit of vanishing regularisation, and what the plan does not depend on.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment, linprog

from otpr.exact import exact_plan

STATES, ACTIONS, DISCOUNT = 6, 4, 0.9
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Tabular:
    """A Markov decision process with transitions (S, A, S), rewards (S, A) and initial states (S,)."""

    transitions: Array
    rewards: Array
    initial: Array

    def optimal_q(self) -> Array:
        """Q* (S, A) by value iteration."""
        q = np.zeros((STATES, ACTIONS))
        for _ in range(1000):
            q = self.rewards + DISCOUNT * self.transitions @ q.max(1)
        return q

    def occupancy(self, policy: Array) -> Array:
        """Discounted occupancy of states (S,), summing to 1, of a policy (S, A)."""
        moves = np.einsum("sa,sat->st", policy, self.transitions)
        return (1 - DISCOUNT) * np.linalg.solve(np.eye(STATES) - DISCOUNT * moves.T, self.initial)

    def performance(self, policy: Array) -> float:
        """Discounted return of a policy (S, A)."""
        return float((self.occupancy(policy)[:, None] * policy * self.rewards).sum() / (1 - DISCOUNT))


def random_mdp(seed: int) -> Tabular:
    generator = np.random.default_rng(seed)
    transitions = generator.dirichlet(np.full(STATES, 0.5), size=(STATES, ACTIONS))
    return Tabular(transitions, generator.normal(size=(STATES, ACTIONS)), generator.dirichlet(np.ones(STATES)))


def transport(cost: Array, rows: Array, columns: Array) -> Array:
    """An optimal plan (n, m) of unregularised transport, by linear programming."""
    n, m = cost.shape
    constraints = np.concatenate([np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))])
    solution = linprog(cost.ravel(), A_eq=constraints, b_eq=np.concatenate([rows, columns]), method="highs")
    assert solution.success
    return solution.x.reshape(n, m)


def read_off(plan: Array) -> Array:
    """The conditional pi(a | s) (S, A) of a plan."""
    return plan / plan.sum(1, keepdims=True)


@pytest.mark.parametrize("seed", range(5))
def test_the_plan_with_the_optimal_marginals_keeps_the_optimal_return(seed: int) -> None:
    """Proposition 4.1: cost -Q*, the marginals of the optimal policy."""
    mdp = random_mdp(seed)
    q = mdp.optimal_q()
    best = np.eye(ACTIONS)[q.argmax(1)]
    states = mdp.occupancy(best)
    policy = read_off(transport(-q, states, states @ best))
    assert mdp.performance(policy) == pytest.approx(mdp.performance(best), abs=1e-7)


def test_a_uniform_action_marginal_loses_return() -> None:
    """The counter-example: the marginal must be the optimal policy's own, "every action equally often" is not it."""
    losses = []
    for seed in range(5):
        mdp = random_mdp(seed)
        q = mdp.optimal_q()
        best = np.eye(ACTIONS)[q.argmax(1)]
        policy = read_off(transport(-q, mdp.occupancy(best), np.full(ACTIONS, 1 / ACTIONS)))
        losses.append(mdp.performance(best) - mdp.performance(policy))
    assert min(losses) > 0.1, losses


def smooth_cost(n: int, seed: int = 0) -> Array:
    generator = np.random.default_rng(seed)
    x, y = generator.normal(size=(n, 3)), generator.normal(size=(n, 3))
    return np.cos(x @ y.T) + 0.3 * x[:, :1]


def test_the_plan_approaches_the_assignment_as_epsilon_falls() -> None:
    cost = smooth_cost(40)
    best = cost[linear_sum_assignment(cost)].mean()
    epsilons = (1.0, 0.3, 0.1, 0.03, 0.01, 1e-3)
    excess = [(exact_plan(cost, epsilon).density * cost).mean() - best for epsilon in epsilons]
    assert all(more > less for more, less in itertools.pairwise(excess))
    assert -1e-4 < excess[-1] < 0.01
    for epsilon, value in zip(epsilons, excess, strict=True):
        assert value <= epsilon * len(cost)  # the assignment has E[H^2] = n


@pytest.mark.parametrize("regulariser", ["l2", "entropic"])
def test_a_function_of_the_state_added_to_the_cost_changes_nothing(regulariser: str) -> None:
    cost = smooth_cost(40)
    shift = 20 * np.random.default_rng(1).normal(size=(40, 1))
    plans = [exact_plan(values, 0.3, regulariser).density for values in (cost, cost + shift)]
    np.testing.assert_allclose(plans[1], plans[0], atol=1e-4)


@pytest.mark.parametrize("action_bound", [1.0, 2.0])
def test_the_advantage_as_a_cost_has_the_plan_of_q(action_bound: float) -> None:
    """V depends on the state alone, so that -(Q - V) and -Q are the same problem, relaxed or not."""
    q = random_mdp(0).optimal_q()
    value = q.max(1, keepdims=True)
    plans = [exact_plan(cost, 0.1, action_bound=action_bound).density for cost in (-q, -(q - value))]
    np.testing.assert_allclose(plans[1], plans[0], atol=1e-4)
