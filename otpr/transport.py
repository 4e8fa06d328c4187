"""Regularised optimal transport between states and action chunks with cost -Q: dual potentials and compatibility H.

With p the distribution of states, q that of chunks, drawn independently, and c(s, a) = -(Q(s, a) - V(s)), the plan
solves

    min_pi  E_pi[c] + eps E_{p x q}[H^2],    H = d pi / d(p x q),

whose dual is a concave problem in two functions (Seguy et al. 2018, large-scale optimal transport)

    max_{u, v}  E_p[u(s)] + E_q[v(a)] - E_{p x q}[(u(s) + v(a) - c(s, a))_+^2] / (4 eps),
    H(s, a) = (u(s) + v(a) - c(s, a))_+ / (2 eps).

At the optimum H has unit marginals, E_a[H(s, a)] = 1 and E_s[H(s, a)] = 1. The plan does not change when any f(s) is
added to the cost, so Q may be centred by V. The mean of H is no test of
convergence: it is 1 long before the marginals are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from otpr.networks import MLP

CostFunction = Callable[[Tensor, Tensor], Tensor]  # observations (B, O), chunks (B, S, H, A) -> costs (B, S)

LARGEST_DEVIATION = 5.0  # of a standardised cost: what u and v learn in a few hundred steps, see `standardise_cost`
PAIRS_PER_CALL = 16_384  # cost evaluations in one call: bounds the memory of a cross block
LEVEL_STEPS = 12  # Newton steps of `level_l2`, which converges from one side in fewer


def compatibility_l2(u: Tensor, v: Tensor, cost: Tensor, epsilon: float) -> Tensor:
    """H = (u + v - c)_+ / (2 eps); u, v and cost broadcast, for a cross block (..., n, 1), (..., 1, m), (..., n, m)."""
    return (u + v - cost).relu() / (2 * epsilon)


def dual_value_l2(u: Tensor, v: Tensor, cost: Tensor, epsilon: float) -> Tensor:
    """The dual E[u] + E[v] - eps E[H^2] on cross blocks u (..., n, 1), v (..., 1, m), cost (..., n, m); a scalar."""
    return u.mean() + v.mean() - epsilon * compatibility_l2(u, v, cost, epsilon).square().mean()


def primal_value_l2(density: Tensor, cost: Tensor, epsilon: float) -> Tensor:
    """The primal E[c H] + eps E[H^2] of a density H (..., n, m); a scalar, and no less than the dual if H is a plan."""
    return (cost * density).mean() + epsilon * density.square().mean()


def marginal_errors(density: Tensor) -> tuple[Tensor, Tensor]:
    """Mean absolute deviation from 1 of the row means and of the column means of H (..., n, m), two scalars."""
    return (density.mean(-1) - 1).abs().mean(), (density.mean(-2) - 1).abs().mean()


def effective_share(weights: Tensor) -> Tensor:
    """Effective sample size as a share, mean(w)^2 / mean(w^2) in [0, 1], over all weights >= 0; 0 if all are zero."""
    return weights.mean().square() / weights.square().mean().clamp_min(1e-30)


def zero_share(density: Tensor) -> Tensor:
    """Share of exact zeros in H, a scalar in [0, 1]."""
    return (density == 0).to(density.dtype).mean()


def interaction(cost: Tensor) -> Tensor:
    """The double-centred block (..., n, m): row and column means removed, all of the cost that the plan depends on."""
    rows = cost - cost.mean(-1, keepdim=True)
    return rows - rows.mean(-2, keepdim=True)


def level_l2(gap: Tensor, epsilon: float) -> Tensor:
    """The constant t for which H = (gap + t)_+ / (2 eps) has mean 1, where gap = u + v - c of any shape; a scalar.

    It maximises the dual over constants added to u + v. The mean is convex and increasing in t, so Newton's method from
    above, where the linear bound mean(gap) + t meets 2 eps, is monotone.
    """
    level = 2 * epsilon - gap.mean()
    for _ in range(LEVEL_STEPS):
        raised = gap + level
        level = level - (raised.relu().mean() - 2 * epsilon) / (raised > 0).to(gap.dtype).mean()
    return level


def standardise_cost(cost: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Shift by the mean and divide by the standard deviation of the interaction of states and chunks.

    The overall deviation would be the wrong scale: it is dominated by what u and v absorb, and leaves H near 1
    everywhere. Where the interaction is next to nothing (a constant or additive cost) the scale is bounded from below:
    the standardised cost has a standard deviation of at most `LARGEST_DEVIATION`, and rounding errors do not count.

    Args:
        cost: (..., n, m) cross blocks in any unit.

    Returns:
        (standardised cost, center, scale), the last two scalars: standardised = (cost - center) / scale.
    """
    center = cost.mean()
    centred = cost - center
    scale = interaction(centred).square().mean().sqrt()
    lowest = centred.square().mean().sqrt() / LARGEST_DEVIATION + 1e-6 * cost.abs().max() + 1e-12
    scale = torch.maximum(scale, lowest)
    return centred / scale, center, scale


def exact_plan_l2(cost: np.ndarray, epsilon: float, tolerance: float = 1e-4) -> tuple[np.ndarray, float]:
    """Solve the discrete problem on uniform points to high accuracy with POT (L-BFGS on the dual; Blondel et al. 2018).

    POT's penalty reg / 2 |T|^2 on the plan T = H / (n m) is eps E[H^2] for reg = 2 eps n m. It is given the
    double-centred cost in units of its deviation, which has the same plan and is better conditioned.

    Args:
        cost: (n, m), finite.
        epsilon: regularisation in the unit of the cost, positive.
        tolerance: largest accepted mean absolute error of a marginal of H.

    Returns:
        H (n, m) float64 and the optimal value E[c H] + eps E[H^2] in the unit of the cost.

    Raises:
        ValueError: epsilon is not positive.
        RuntimeError: the solver did not reach `tolerance` (epsilon too small for the spread of the cost).
    """
    import ot.smooth  # here, since importing POT takes seconds and training does not need it

    if not epsilon > 0:
        raise ValueError(f"epsilon must be positive, got {epsilon}")
    cost = np.asarray(cost, dtype=np.float64)
    n, m = cost.shape
    centred = interaction(torch.from_numpy(cost)).numpy()
    unit = max(float(centred.std()), 1e-9 * float(np.abs(cost).max()), 1e-12)
    rows, columns = np.full(n, 1 / n), np.full(m, 1 / m)
    reg = 2 * epsilon / unit * n * m
    plan: Any = ot.smooth.smooth_ot_dual(rows, columns, centred / unit, reg, "l2", stopThr=1e-14, numItermax=20_000)
    density = np.asarray(plan) * (n * m)
    error = max(np.abs(density.mean(1) - 1).mean(), np.abs(density.mean(0) - 1).mean())
    if error > tolerance:
        raise RuntimeError(f"exact transport at epsilon {epsilon} left a marginal error of {error:.2g} > {tolerance}")
    return density, float((cost * density).mean() + epsilon * (density**2).mean())


@dataclass(frozen=True)
class TransportSettings:
    """Settings of the potentials and of one fit.

    Raises:
        ValueError: a value that is not positive, or a negative number of steps.
    """

    epsilon: float = 0.1  # L2 regularisation, in units of the standardised cost
    hidden_dims: tuple[int, ...] = (256, 256)  # of u and of v
    learning_rate: float = 3e-3  # Adam; the released 1e-5 leaves marginal errors of 40 to 50 %
    first_steps: int = 1000  # gradient steps of the first fit
    warm_steps: int = 200  # gradient steps of each later fit, from the potentials of the one before
    block_size: int = 512  # states, and chunks, in one cross block: a gradient step sees block_size^2 pairs
    blocks: int = 1  # blocks per fit, visited in turn: blocks * block_size^2 evaluations of the cost

    def __post_init__(self) -> None:
        """Check the values."""
        for name in ("epsilon", "learning_rate", "block_size", "blocks"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("first_steps", "warm_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")

    @property
    def points(self) -> int:
        """Observations, and as many chunks, that one fit needs."""
        return self.blocks * self.block_size


class Potentials(nn.Module):
    """u(s) and v(a), two SiLU networks, in units of the standardised cost."""

    def __init__(
        self, observation_dim: int, chunk_dim: int, hidden_dims: tuple[int, ...], generator: torch.Generator
    ) -> None:
        """`chunk_dim` is H * A; `generator` (CPU) initialises the weights.

        Hidden layers get He et al.'s (2015) initialisation; the smaller default one leaves about twice the error
        after as many steps.
        """
        super().__init__()
        self.u = MLP([observation_dim, *hidden_dims, 1], "silu", generator)
        self.v = MLP([chunk_dim, *hidden_dims, 1], "silu", generator)
        for weight in self.parameters():
            if weight.ndim == 2 and len(weight) > 1:  # the last layers have one output and stay small
                nn.init.kaiming_uniform_(weight, nonlinearity="relu", generator=generator)

    def forward(self, observations: Tensor, chunks: Tensor) -> tuple[Tensor, Tensor]:
        """u of observations (..., O) as (...) and v of chunks (..., H, A) as (...)."""
        return self.u(observations).squeeze(-1), self.v(chunks.flatten(-2)).squeeze(-1)


class Transport:
    """Potentials fitted again and again to a moving cost, warm-started every time.

    Each fit measures center and scale of the cost on its own cross blocks; until the next fit every compatibility uses
    these. As the potentials live in units of the standardised cost, a Q that grows or shifts keeps the plan it had, and
    only a change of its shape is left to learn. The center is solved for, before and after the gradient steps, so that
    H has a mean of 1: the mean cost of a block varies from draw to draw by enough to undo a warm start.
    """

    def __init__(
        self,
        settings: TransportSettings,
        observation_dim: int,
        chunk_dim: int,
        generator: torch.Generator,
        device: torch.device | str = "cpu",
    ) -> None:
        """`chunk_dim` is H * A; `generator` (CPU) initialises the networks, which then move to `device`."""
        self.settings = settings
        self.potentials = Potentials(observation_dim, chunk_dim, settings.hidden_dims, generator).to(device)
        self.optimizer = torch.optim.Adam(self.potentials.parameters(), lr=settings.learning_rate, fused=True)
        self.center = torch.zeros((), device=device)
        self.scale = torch.ones((), device=device)
        self.fits = 0  # completed fits; before the first one H means nothing

    def fit(self, observations: Tensor, chunks: Tensor, cost: CostFunction) -> dict[str, float]:
        """Ascend the dual on cross blocks of independent draws of states and chunks.

        Point k of a block is paired with all chunks of that block, so the caller may pass states and chunks of the same
        transitions in the same order: of a block's pairs only 1 / block_size are then the data's own.

        Args:
            observations: (n, O), n = settings.points.
            chunks: (n, H, A).
            cost: c(s, a) = -(Q - V) of observations (B, O) and chunks (B, S, H, A) as (B, S), called without gradients.

        Returns:
            Metrics of `diagnose` after the fit, and under "transport/fresh_..." the marginal errors before it: those of
            the previous potentials on points and a cost that they have not seen (absent in the first fit).

        Raises:
            ValueError: n differs from settings.points.
        """
        states, actions, costs = self._cross_blocks(observations, chunks, cost)
        standardised, self.center, self.scale = standardise_cost(costs)
        standardised = self._level(states, actions, standardised)
        metrics: dict[str, Tensor] = {}
        if self.fits:
            rows, columns = marginal_errors(self._cross_density(states, actions, standardised))
            metrics = {"fresh_row_marginal_error": rows, "fresh_column_marginal_error": columns}
        steps = self.settings.warm_steps if self.fits else self.settings.first_steps
        self._ascend(states, actions, standardised, steps)
        self._level(states, actions, standardised)
        self.fits += 1
        metrics |= self._metrics(states, actions, costs)
        return _to_floats(metrics)

    def diagnose(self, observations: Tensor, chunks: Tensor, cost: CostFunction) -> dict[str, float]:
        """Metrics of the current potentials on given points (arguments as in `fit`), changing nothing.

        Returns:
            "transport/..." row_marginal_error, column_marginal_error (mean |mean H - 1|), mean_h, zero_share,
            effective_share, dual_value (standardised units), cost_scale, cost_center, max_abs_cost (units of the cost).
        """
        return _to_floats(self._metrics(*self._cross_blocks(observations, chunks, cost)))

    @torch.no_grad()
    def compatibility(self, observations: Tensor, chunks: Tensor, cost: Tensor) -> Tensor:
        """H of observations (B, O) with chunks (B, S, H, A) of cost (B, S), the same function as in `fit`; (B, S)."""
        u, v = self.potentials(observations, chunks)  # (B,), (B, S)
        return self._density(u[:, None], v, (cost - self.center) / self.scale)

    def state_dict(self) -> dict[str, Any]:
        """Potentials, optimiser, unit of the cost and the number of fits."""
        return {
            "potentials": self.potentials.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "center": self.center,
            "scale": self.scale,
            "fits": self.fits,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        self.potentials.load_state_dict(state["potentials"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.center, self.scale = state["center"].to(self.center), state["scale"].to(self.scale)
        self.fits = state["fits"]

    def _density(self, u: Tensor, v: Tensor, cost: Tensor) -> Tensor:
        """H of broadcasting potentials and standardised cost."""
        return compatibility_l2(u, v, cost, self.settings.epsilon)

    @torch.no_grad()
    def _level(self, states: Tensor, actions: Tensor, standardised: Tensor) -> Tensor:
        """Move the center so that H of the blocks has mean 1; returns the moved standardised costs (G, b, b)."""
        u, v = self.potentials(states, actions)
        level = level_l2(u[..., :, None] + v[..., None, :] - standardised, self.settings.epsilon)
        self.center = self.center + level * self.scale
        return standardised - level

    @torch.no_grad()
    def _cross_density(self, states: Tensor, actions: Tensor, standardised: Tensor) -> Tensor:
        """H (G, b, b) of states (G, b, O), chunks (G, b, H, A) and standardised cost (G, b, b)."""
        u, v = self.potentials(states, actions)
        return self._density(u[..., :, None], v[..., None, :], standardised)

    @torch.no_grad()
    def _cross_blocks(self, observations: Tensor, chunks: Tensor, cost: CostFunction) -> tuple[Tensor, Tensor, Tensor]:
        """States (G, b, O), chunks (G, b, H, A) and all costs between the two of each block (G, b, b)."""
        settings, size = self.settings, self.settings.block_size
        if not len(observations) == len(chunks) == settings.points:
            raise ValueError(f"need {settings.points} points, got {len(observations)} states, {len(chunks)} chunks")
        states, actions = observations.unflatten(0, (-1, size)), chunks.unflatten(0, (-1, size))
        rows = max(1, PAIRS_PER_CALL // size)
        costs = [
            torch.cat([cost(part, targets.expand(len(part), *targets.shape)) for part in block.split(rows)])
            for block, targets in zip(states, actions, strict=True)
        ]
        return states, actions, torch.stack(costs)

    def _ascend(self, states: Tensor, actions: Tensor, costs: Tensor, steps: int) -> None:
        """Take Adam steps on the dual, one block (see `_cross_blocks`; `costs` standardised) each, in turn.

        The gradient of the dual in u(s) is (1 - E_a[H(s, a)]) / n, in v(a) likewise, whatever the regularisation: it is
        handed to the networks directly, so that nothing is differentiated on the block_size^2 pairs.
        """
        blocks, size = costs.shape[:2]
        for step in range(steps):
            i = step % blocks
            u, v = self.potentials(states[i], actions[i])
            with torch.no_grad():
                density = self._density(u[:, None], v[None, :], costs[i])
                gradients = [(density.mean(1) - 1) / size, (density.mean(0) - 1) / size]
            self.optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward([u, v], gradients)
            self.optimizer.step()

    @torch.no_grad()
    def _metrics(self, states: Tensor, actions: Tensor, costs: Tensor) -> dict[str, Tensor]:
        """What `diagnose` lists, as scalars on the device, from blocks of raw costs."""
        standardised = (costs - self.center) / self.scale
        u, v = self.potentials(states, actions)
        u, v = u[..., :, None], v[..., None, :]
        density = self._density(u, v, standardised)
        rows, columns = marginal_errors(density)
        return {
            "row_marginal_error": rows,
            "column_marginal_error": columns,
            "mean_h": density.mean(),
            "zero_share": zero_share(density),
            "effective_share": effective_share(density),
            "dual_value": dual_value_l2(u, v, standardised, self.settings.epsilon),
            "cost_scale": self.scale,
            "cost_center": self.center,
            "max_abs_cost": costs.abs().max(),
        }


def _to_floats(metrics: dict[str, Tensor]) -> dict[str, float]:
    """Prefix the names with "transport/" and bring all values to the host in one transfer."""
    values = torch.stack(list(metrics.values())).tolist()
    return {f"transport/{name}": value for name, value in zip(metrics, values, strict=True)}
