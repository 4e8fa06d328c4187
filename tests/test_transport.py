"""Transport: exact tabular answers, the neural potentials against them, warm starts and resume."""

from __future__ import annotations

import io
import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from otpr.transport import (
    Transport,
    TransportSettings,
    compatibility_l2,
    dual_value_l2,
    effective_share,
    exact_plan_l2,
    level_l2,
    marginal_errors,
    primal_value_l2,
    standardise_cost,
    zero_share,
)

OBSERVATION_DIM, HORIZON, ACTION_DIM = 5, 2, 3
CHUNK_DIM = HORIZON * ACTION_DIM


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class SmoothCost:
    """-Q with Q a random trigonometric sum over (s, a), rotated towards a second one by `drift`."""

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
        """(B, O), (B, S, H, A) -> (B, S)."""
        states = observations[:, None].expand(-1, chunks.shape[1], -1)
        inputs = torch.cat([states, chunks.flatten(2)], dim=-1)
        first, second = [torch.cos(inputs @ w + b) @ a for w, b, a in self.sums]
        total = self.mixture[0] * first + self.mixture[1] * second
        return self.scale * (total + self.per_state * observations[:, :1].sin()) + self.offset


def draw(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    observations = torch.rand(count, OBSERVATION_DIM, generator=generator) * 2 - 1
    return observations, torch.rand(count, HORIZON, ACTION_DIM, generator=generator) * 2 - 1


def cross(cost: SmoothCost, observations: Tensor, chunks: Tensor) -> Tensor:
    return cost(observations, chunks.expand(len(observations), *chunks.shape))


def make(seed: int = 0, **settings) -> Transport:
    defaults = {"block_size": 256, "first_steps": 600, "warm_steps": 100, "hidden_dims": (128, 128)}
    chosen = TransportSettings(**(defaults | settings))
    return Transport(chosen, OBSERVATION_DIM, CHUNK_DIM, torch.Generator().manual_seed(seed))


def random_cost(n: int, m: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    x, y = generator.normal(size=(n, 3)), generator.normal(size=(m, 3))
    return np.cos(x @ y.T + x[:, :1]) + 0.3 * x[:, :1]


def tabular(cost: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Free potentials u (n, 1), v (1, m) by L-BFGS on the dual."""
    u = torch.zeros(cost.shape[0], 1, dtype=torch.float64, requires_grad=True)
    v = torch.zeros(1, cost.shape[1], dtype=torch.float64, requires_grad=True)
    settings = {"tolerance_grad": 1e-10, "tolerance_change": 1e-16, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS([u, v], max_iter=2000, history_size=50, **settings)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -dual_value_l2(u, v, cost, epsilon)
        loss.backward()
        return loss

    optimizer.step(closure)
    return u.detach(), v.detach()


@pytest.mark.parametrize("epsilon", [0.02, 0.1, 1.0])
def test_tabular_primal_equals_dual_and_pot(epsilon):
    cost = random_cost(40, 30)
    plan, value = exact_plan_l2(cost, epsilon)
    tensor = torch.from_numpy(cost)
    u, v = tabular(tensor, epsilon)
    density = compatibility_l2(u, v, tensor, epsilon)
    dual = dual_value_l2(u, v, tensor, epsilon).item()
    assert dual == pytest.approx(value, abs=1e-5)
    assert primal_value_l2(density, tensor, epsilon).item() == pytest.approx(dual, abs=1e-5)
    assert max(marginal_errors(density)).item() < 1e-6
    assert max(marginal_errors(torch.from_numpy(plan))).item() < 1e-6
    np.testing.assert_allclose(density.numpy(), plan, atol=1e-4)


def test_small_epsilon_approaches_the_assignment():
    cost = random_cost(30, 30)
    best = cost[linear_sum_assignment(cost)].mean()
    epsilons = (1.0, 0.1, 0.01, 1e-4)
    excess = [(exact_plan_l2(cost, epsilon)[0] * cost).mean() - best for epsilon in epsilons]
    assert all(a > b > -1e-4 for a, b in itertools.pairwise(excess))
    for epsilon, value in zip(epsilons, excess, strict=True):
        assert value <= epsilon * 30  # the assignment has E[H^2] = n


def test_exact_plan_ignores_main_effects_and_the_unit():
    generator = np.random.default_rng(1)
    cost = random_cost(40, 40)
    plan, value = exact_plan_l2(cost, 0.1)
    shifted = cost + 50 * generator.normal(size=(40, 1)) + 3 * generator.normal(size=(1, 40))
    np.testing.assert_allclose(exact_plan_l2(shifted, 0.1)[0], plan, atol=1e-4)
    plan_in_cents, value_in_cents = exact_plan_l2(100 * cost, 10.0)
    np.testing.assert_allclose(plan_in_cents, plan, atol=1e-4)
    assert value_in_cents == pytest.approx(100 * value, rel=1e-6)


def test_constant_cost_gives_unit_compatibility_exactly():
    plan, value = exact_plan_l2(np.full((20, 30), 4.0), 0.1)
    np.testing.assert_allclose(plan, 1.0, atol=1e-6)
    assert value == pytest.approx(4.1)


def test_exact_plan_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="epsilon must be positive, got 0"):
        exact_plan_l2(random_cost(5, 5), 0.0)
    with pytest.raises(RuntimeError, match="marginal error"):
        exact_plan_l2(random_cost(20, 20), 0.1, tolerance=0.0)


def test_standardised_cost_has_unit_interaction():
    cost = torch.from_numpy(random_cost(50, 60)) * 12 + 100
    standardised, center, scale = standardise_cost(cost)
    centred = standardised - standardised.mean(1, keepdim=True)
    centred = centred - centred.mean(0, keepdim=True)
    assert centred.square().mean().sqrt().item() == pytest.approx(1.0)
    torch.testing.assert_close(standardised * scale + center, cost)
    additive = torch.linspace(0, 1, 50)[:, None] + torch.linspace(0, 3, 60)[None]
    assert standardise_cost(additive)[0].square().mean().sqrt().item() == pytest.approx(5.0, rel=1e-3)
    assert standardise_cost(torch.full((8, 8), 0.1))[0].abs().max().item() < 0.2


def test_level_gives_mean_one():
    gap = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    for epsilon in (0.01, 0.1, 10.0):
        for shifted in (gap, 30 * gap - 100):
            raised = shifted + level_l2(shifted, epsilon)
            assert (raised.relu().mean() / (2 * epsilon)).item() == pytest.approx(1.0, abs=0.02)


def test_diagnostics_of_known_densities():
    density = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    assert [float(x) for x in marginal_errors(density)] == [0.0, 0.0]
    assert float(zero_share(density)) == 0.5
    assert float(effective_share(density)) == 0.5
    assert float(effective_share(torch.zeros(3))) == 0.0
    assert [float(x) for x in marginal_errors(torch.tensor([[2.0, 2.0], [0.0, 0.0]]))] == [1.0, 0.0]


@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (0.1, 30.0), (100.0, -1000.0)])
def test_neural_potentials_reach_the_exact_answer(scale, offset):
    cost = SmoothCost(scale=scale, offset=offset)
    observations, chunks = draw(256)
    transport = make(first_steps=900)
    metrics = transport.fit(observations, chunks, cost)
    assert metrics["transport/row_marginal_error"] < 0.03
    assert metrics["transport/column_marginal_error"] < 0.03

    epsilon = transport.settings.epsilon
    block = cross(cost, observations, chunks)
    standardised = (block.double() - transport.center) / transport.scale
    plan, exact = exact_plan_l2(standardised.numpy(), epsilon)
    gain = abs(exact - standardised.mean().item() - epsilon)  # over the independent plan H = 1
    assert abs(exact - metrics["transport/dual_value"]) / gain < 0.01
    density = transport.compatibility(observations, chunks.expand(256, *chunks.shape), block).numpy()
    assert np.abs(density - plan).mean() < 0.1
    assert metrics["transport/mean_h"] == pytest.approx(density.mean(), rel=1e-4)
    assert metrics["transport/max_abs_cost"] == pytest.approx(block.abs().max().item())


def test_adding_a_function_of_the_state_leaves_the_plan():
    observations, chunks = draw(256)
    plans = []
    for per_state in (0.0, 0.5):
        cost, transport = SmoothCost(per_state=per_state), make()
        transport.fit(observations, chunks, cost)
        block = cross(cost, observations, chunks)
        plans.append(transport.compatibility(observations, chunks.expand(256, *chunks.shape), block))
    assert (plans[0] - plans[1]).abs().mean().item() < 0.1


def test_constant_cost_gives_unit_compatibility():
    observations, chunks = draw(64)
    transport = make(block_size=64, first_steps=300)
    metrics = transport.fit(observations, chunks, lambda s, a: torch.full(a.shape[:2], -3.0))
    assert metrics["transport/mean_h"] == pytest.approx(1.0, abs=0.02)
    assert metrics["transport/row_marginal_error"] < 0.02
    assert metrics["transport/effective_share"] > 0.99


def test_warm_start_follows_drift_in_shape_unit_and_level():
    transport = make()
    transport.fit(*draw(256, 0), SmoothCost())
    for step in range(1, 4):
        cost = SmoothCost(drift=0.1 * step, scale=3.0**step, offset=100.0 * step)
        metrics = transport.fit(*draw(256, step), cost)
        assert metrics["transport/fresh_row_marginal_error"] < 0.5
        assert metrics["transport/row_marginal_error"] < 0.08
        assert metrics["transport/column_marginal_error"] < 0.08
    unseen = transport.diagnose(*draw(256, 99), SmoothCost(drift=0.3, scale=27.0, offset=300.0))
    assert max(unseen["transport/row_marginal_error"], unseen["transport/column_marginal_error"]) < 0.3


def test_potentials_are_kept_between_fits():
    transport = make(block_size=64, first_steps=200, warm_steps=0)
    potentials, points = transport.potentials, draw(64)
    transport.fit(*points, SmoothCost())
    before = {name: value.clone() for name, value in potentials.state_dict().items()}
    metrics = transport.fit(*points, SmoothCost())
    assert transport.potentials is potentials
    assert all(torch.equal(before[name], value) for name, value in potentials.state_dict().items())
    fresh = metrics["transport/fresh_row_marginal_error"]
    assert metrics["transport/row_marginal_error"] == pytest.approx(fresh, abs=1e-5)
    assert fresh < 0.2


def test_diagnose_changes_nothing():
    transport = make(block_size=32, first_steps=5)
    transport.fit(*draw(32), SmoothCost())
    before = transport.state_dict()
    center, scale = before["center"].clone(), before["scale"].clone()
    transport.diagnose(*draw(32, 1), SmoothCost(scale=9.0))
    assert torch.equal(transport.center, center)
    assert torch.equal(transport.scale, scale)
    assert transport.fits == 1


def test_resume_is_bit_equal():
    settings = {"block_size": 32, "blocks": 2, "first_steps": 20, "warm_steps": 15}
    straight = make(**settings)
    straight.fit(*draw(64, 0), SmoothCost())
    buffer = io.BytesIO()
    torch.save(straight.state_dict(), buffer)
    buffer.seek(0)
    resumed = make(seed=5, **settings)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    second = draw(64, 1), SmoothCost(drift=0.1, scale=2.0)
    assert straight.fit(*second[0], second[1]) == resumed.fit(*second[0], second[1])
    observations, chunks = draw(8, 2)
    candidates, cost = chunks[:, None].expand(-1, 3, -1, -1), torch.randn(8, 3)
    expected = straight.compatibility(observations, candidates, cost)
    assert expected.shape == (8, 3)
    assert torch.equal(expected, resumed.compatibility(observations, candidates, cost))


def test_equal_seeds_give_equal_fits():
    runs = [make(seed=3, block_size=32, first_steps=10).fit(*draw(32), SmoothCost()) for _ in range(2)]
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    ("values", "message"),
    [({"epsilon": 0.0}, "epsilon must be positive, got 0.0"), ({"warm_steps": -1}, "warm_steps must not be negative")],
)
def test_settings_are_checked(values, message):
    with pytest.raises(ValueError, match=message):
        TransportSettings(**values)


def test_fit_refuses_another_number_of_points():
    with pytest.raises(ValueError, match="need 256 points, got 10 states, 10 chunks"):
        make().fit(*draw(10), SmoothCost())
