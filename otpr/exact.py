"""Exact regularised transport on a batch of points, in float64: the oracle of the neural potentials.

Transport proper is solved by POT (Flamary et al. 2021). POT has no solver for a one-sided bound on a marginal: with
w > 1 the concave dual is maximised by L-BFGS-B (SciPy). Keypoint pairs are taken out and put back in closed form, see
`otpr.transport`. The conditions of optimality extend the potentials to any other point.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from otpr.duality import REGULARISERS, interaction, marginal_errors
from otpr.transport import Cost, cross_cost

Array = NDArray[np.float64]


@dataclass(frozen=True)
class ExactPlan:
    """A solution on n states and m chunks.

    Attributes:
        density: H (n, m).
        u, v: (n,), (m,), with H = density(u + v - c); nan at keypoints, of whose potentials only the sum is determined.
        value: the optimal E[c H] + R(H) in the unit of the cost.
    """

    density: Array
    u: Array
    v: Array
    value: float


def exact_plan(
    cost: Array,
    epsilon: float,
    regulariser: str = "l2",
    action_bound: float = 1.0,
    keypoints: int = 0,
    tolerance: float = 1e-4,
) -> ExactPlan:
    """Solve the problem of `otpr.duality` on uniform points.

    Args:
        cost: (n, m), finite; keypoints need n = m.
        epsilon: regularisation in the unit of the cost, positive.
        regulariser: "l2" or "entropic".
        action_bound: w >= 1.
        keypoints: the first so many rows and columns are keypoint pairs, matched with each other alone.
        tolerance: largest accepted mean absolute error of a marginal of H.

    Raises:
        ValueError: a value outside its range.
        RuntimeError: the solver did not reach `tolerance` (epsilon too small for the spread of the cost).
    """
    if not epsilon > 0:
        raise ValueError(f"epsilon must be positive, got {epsilon}")
    if not action_bound >= 1:
        raise ValueError(f"action_bound must be at least 1, got {action_bound}")
    if regulariser not in REGULARISERS:
        raise ValueError(f"unknown regulariser {regulariser!r}; valid: {', '.join(REGULARISERS)}")
    cost = np.asarray(cost, dtype=np.float64)
    n, m = cost.shape
    if not 0 <= keypoints < min(n, m) or (keypoints and n != m):
        raise ValueError(f"keypoints must be fewer than the points of a square cost {cost.shape}, got {keypoints}")
    scale = n / (n - keypoints)  # mean of H over the rest: a row of n means counts the keypoints' zeros
    rest = cost[keypoints:, keypoints:]
    solve = _solve_pot if action_bound == 1 else _solve_bounded
    u, v = solve(rest, epsilon, regulariser, scale, action_bound)
    regulariser_ = REGULARISERS[regulariser]
    inner = regulariser_.density(torch.from_numpy(u[:, None] + v[None] - rest), epsilon)
    density = torch.block_diag(n * torch.eye(keypoints, dtype=torch.float64), inner)
    error = max(marginal_errors(density, action_bound)).item()
    if not error <= tolerance:
        raise RuntimeError(f"exact transport at epsilon {epsilon} left a marginal error of {error:.2g} > {tolerance}")
    value = (torch.from_numpy(cost) * density).mean() + regulariser_.penalty(density, epsilon)
    missing = np.full(keypoints, np.nan)
    return ExactPlan(density.numpy(), np.append(missing, u), np.append(missing, v), value.item())


def _solve_pot(cost: Array, epsilon: float, regulariser: str, scale: float, _: float) -> tuple[Array, Array]:
    """Potentials of unmasked transport whose density has mean `scale`, by POT (Blondel et al. 2018; Cuturi 2013).

    POT's plan is T = H / (scale n m). Its penalty reg / 2 |T|^2 is R / scale for reg = 2 eps scale n m, and reg times
    the negative entropy of T is it, but for constants, for reg = eps. It is given the double-centred cost, which has
    the same plan and is better conditioned, and its L-BFGS, which converges where Sinkhorn's iterations take minutes.
    What its tolerance leaves, a few parts in a million at small eps, is climbed from there.
    """
    import ot.smooth  # here, since importing POT takes seconds and training does not need it

    n, m = cost.shape
    centred = interaction(torch.from_numpy(cost)).numpy()
    unit = max(float(centred.std()), 1e-9 * float(np.abs(cost).max()), 1e-12)
    rows, columns = np.full(n, 1 / n), np.full(m, 1 / m)
    reg, kind = (2 * epsilon / unit * scale * n * m, "l2") if regulariser == "l2" else (epsilon / unit, "kl")
    solution: tuple[Any, dict[str, Any]] = ot.smooth.smooth_ot_dual(
        rows, columns, centred / unit, reg, kind, stopThr=1e-14, numItermax=20_000, log=True
    )
    v = solution[1]["beta"] * unit
    shift = cost - centred  # rows + columns: put back into the potentials
    return _climb(cost, epsilon, regulariser, scale, 1.0, v + shift[0])


def _solve_bounded(cost: Array, epsilon: float, regulariser: str, scale: float, bound: float) -> tuple[Array, Array]:
    """Potentials of partial transport, for which POT has no solver."""
    return _climb(cost, epsilon, regulariser, scale, bound, np.zeros(cost.shape[1]))


def _climb(
    cost: Array, epsilon: float, regulariser: str, scale: float, bound: float, start: Array
) -> tuple[Array, Array]:
    """Maximise the dual over v from `start`, v <= 0 where bound > 1, each u being solved for: L-BFGS-B."""
    from scipy.optimize import minimize

    penalties, matrix = REGULARISERS[regulariser], torch.from_numpy(cost)

    def solve_u(v: Array) -> Tensor:
        return penalties.level(torch.from_numpy(v) - matrix, epsilon, scale)

    def negative_dual(v: Array) -> tuple[float, Array]:
        u, column = solve_u(v), torch.from_numpy(v)
        density = penalties.density(u[:, None] + column - matrix, epsilon)
        quadratic = penalties.dual_penalty(density, epsilon).item() / scale
        value = u.mean() + bound * column.mean()
        return quadratic - value.item(), ((density.mean(0) / scale - bound) / len(v)).numpy()

    bounds = [(None, 0.0 if bound > 1 else None)] * len(start)
    options = {"maxiter": 5000, "maxfun": 20_000, "ftol": 1e-16, "gtol": 1e-10}
    v = minimize(negative_dual, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options).x
    return solve_u(v).numpy(), v


class ExactTransport:
    """The exact solution on a block of points, extended to other states and chunks by the conditions of optimality.

    A chunk's v is the value with which its own column condition holds over the block's states; a state's u then that
    with which its row condition holds over the block's chunks. On the block itself both are the solution.
    """

    def __init__(
        self,
        observations: Tensor,
        chunks: Tensor,
        cost: Cost,
        epsilon: float,
        regulariser: str = "l2",
        action_bound: float = 1.0,
    ) -> None:
        """Solve on every one of (b, O) observations with every one of (b, H, A) chunks.

        `cost` gives one term, standardised: (B, O), (B, S, H, A) -> (B, S, 1). Raises as `exact_plan` does.
        """
        self.observations, self.chunks, self.cost = observations, chunks, cost
        self.epsilon, self.regulariser, self.action_bound = epsilon, REGULARISERS[regulariser], action_bound
        block = cross_cost(observations, chunks, cost)[..., 0]  # (b, b)
        self.plan = exact_plan(block.double().cpu().numpy(), epsilon, regulariser, action_bound)
        self.u, self.v = (torch.from_numpy(p).to(block) for p in (self.plan.u, self.plan.v))

    @torch.no_grad()
    def compatibility(self, observations: Tensor, chunks: Tensor, terms: Tensor) -> Tensor:
        """H of observations (B, O) with chunks (B, S, H, A) of cost terms (B, S, 1); (B, S)."""
        level = self.regulariser.level
        u = level(self.v - cross_cost(observations, self.chunks, self.cost)[..., 0], self.epsilon)  # (B,)
        back = cross_cost(self.observations, chunks.flatten(0, 1), self.cost)[..., 0]  # (b, B * S)
        v = level((self.u[:, None] - back).T, self.epsilon, self.action_bound)  # (B * S,)
        if self.action_bound > 1:
            v = v.clamp(max=0.0)
        return self.regulariser.density(u[:, None] + v.view(terms.shape[:2]) - terms[..., 0], self.epsilon)
