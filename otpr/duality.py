"""Regularised optimal transport in its dual form, on discrete points: densities, values, marginals, units of the cost.

With p the distribution of states, q that of action chunks, drawn independently, a cost c(s, a) and H = d pi / d(p x q)
the density of a plan, the problem is

    min_H  E[c H] + R(H)   with  E_a[H(s, a)] = 1 for every s  and  E_s[H(s, a)] <= w for every a,    w >= 1,

all expectations under p x q. With w = 1 the second condition holds with equality (both means are 1): optimal transport.
With w > 1 the action marginal is relaxed (partial transport; Asadulaev et al. 2024). The dual is

    max_{u, v}  E[u(s)] + w E[v(a)] - R*(u + v - c),    v <= 0 where w > 1,

    L2 (Seguy et al. 2018):  R = eps E[H^2],              H = (u + v - c)_+ / (2 eps),    R* = eps E[H^2]
    entropic:                R = eps E[H log H - H + 1],  H = exp((u + v - c) / eps),     R* = eps E[H - 1]

The plan does not change when any f(s) is added to the cost. With w = 1 the same is true of any g(a).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

LARGEST_DEVIATION = 5.0  # of a standardised cost: what u and v learn in a few hundred steps, see `standardise_cost`
LARGEST_EXPONENT = 30.0  # of the entropic density: bounds what a candidate far from the fitted points can get
LEVEL_STEPS = 12  # Newton steps of `L2.level`, which converges from one side in fewer


class Regulariser(Protocol):
    """A convex penalty R on the density H, with epsilon > 0 in the unit of the cost; shapes are free and broadcast."""

    def density(self, gap: Tensor, epsilon: float) -> Tensor:
        """H where u + v - c is `gap`."""
        ...

    def gap(self, density: Tensor, epsilon: float) -> Tensor:
        """The least u + v - c at which H is `density` > 0."""
        ...

    def penalty(self, density: Tensor, epsilon: float) -> Tensor:
        """R, a scalar."""
        ...

    def dual_penalty(self, density: Tensor, epsilon: float) -> Tensor:
        """R* at the gap whose H is `density`, a scalar."""
        ...

    def level(self, gap: Tensor, epsilon: float, mean: float = 1.0) -> Tensor:
        """The constant t (...) with which H of gap + t has the given mean over the last dimension of gap (..., n)."""
        ...


class L2:
    """eps E[H^2]: sparse plans, polynomial densities that networks fit well."""

    def density(self, gap: Tensor, epsilon: float) -> Tensor:
        """(gap)_+ / (2 eps)."""
        return gap.relu() / (2 * epsilon)

    def gap(self, density: Tensor, epsilon: float) -> Tensor:
        """2 eps H."""
        return 2 * epsilon * density

    def penalty(self, density: Tensor, epsilon: float) -> Tensor:
        """eps E[H^2]."""
        return epsilon * density.square().mean()

    def dual_penalty(self, density: Tensor, epsilon: float) -> Tensor:
        """E[(gap)_+^2] / (4 eps) = eps E[H^2]."""
        return self.penalty(density, epsilon)

    def level(self, gap: Tensor, epsilon: float, mean: float = 1.0) -> Tensor:
        """Newton's method: the mean is convex and increasing in t, and from the linear bound above it is monotone."""
        target = 2 * epsilon * mean
        level = target - gap.mean(-1)
        for _ in range(LEVEL_STEPS):
            raised = gap + level[..., None]
            active = (raised > 0).to(gap.dtype).mean(-1).clamp_min(0.5 / gap.shape[-1])
            level = level - (raised.relu().mean(-1) - target) / active
        return level


class Entropic:
    """eps KL: positive plans; networks fit them only where eps is near the deviation of the cost."""

    def density(self, gap: Tensor, epsilon: float) -> Tensor:
        """exp(gap / eps), the exponent capped at `LARGEST_EXPONENT`."""
        return (gap / epsilon).clamp(max=LARGEST_EXPONENT).exp()

    def gap(self, density: Tensor, epsilon: float) -> Tensor:
        """eps log H."""
        return epsilon * density.log()

    def penalty(self, density: Tensor, epsilon: float) -> Tensor:
        """eps E[H log H - H + 1]."""
        return epsilon * (torch.xlogy(density, density) - density + 1).mean()

    def dual_penalty(self, density: Tensor, epsilon: float) -> Tensor:
        """eps E[H - 1]."""
        return epsilon * (density - 1).mean()

    def level(self, gap: Tensor, epsilon: float, mean: float = 1.0) -> Tensor:
        """In closed form."""
        count = torch.full_like(gap[..., 0], gap.shape[-1] * mean)
        return epsilon * (count.log() - (gap / epsilon).logsumexp(-1))


REGULARISERS: dict[str, Regulariser] = {"l2": L2(), "entropic": Entropic()}


def marginal_errors(density: Tensor, action_bound: float = 1.0) -> tuple[Tensor, Tensor]:
    """Mean absolute violation of both marginals of H (..., n, m), two scalars.

    Rows: mean |E_a[H] - 1|. Columns: mean |E_s[H] - 1| where `action_bound` is 1, else mean (E_s[H] - action_bound)_+.
    """
    rows, columns = density.mean(-1) - 1, density.mean(-2) - action_bound
    return rows.abs().mean(), (columns.abs() if action_bound == 1 else columns.relu()).mean()


def effective_share(weights: Tensor) -> Tensor:
    """Effective sample size as a share, mean(w)^2 / mean(w^2) in [0, 1], over all weights >= 0; 0 if all are zero."""
    return weights.mean().square() / weights.square().mean().clamp_min(1e-30)


def zero_share(density: Tensor) -> Tensor:
    """Share of exact zeros in H, a scalar in [0, 1]."""
    return (density == 0).to(density.dtype).mean()


def interaction(cost: Tensor) -> Tensor:
    """The double-centred block (..., n, m): row and column means removed, all of the cost that a plan depends on."""
    rows = cost - cost.mean(-1, keepdim=True)
    return rows - rows.mean(-2, keepdim=True)


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
