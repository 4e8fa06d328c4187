"""Fitted potentials against the exact plan, as rows of `transport.csv`.

All values are in units of the standardised cost of the fit (`otpr.duality.standardise_cost`), whatever the scale and
the offset of the raw one.

relative_gap = |dual - exact| / |exact - independent|, where `independent` is the value of the plan that is constant
wherever the mask permits: mean(c) + eps (L2) or mean(c) (entropic) without mask. With one, the keypoints' own share,
the same in every plan, drops out of the denominator. marginal_error is the larger of both mean absolute errors.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmark.toy_transport.problems import STREAMS, Problem, plane, smooth
from otpr.duality import REGULARISERS, marginal_errors
from otpr.exact import ExactPlan, exact_plan
from otpr.potentials import TransportSettings
from otpr.transport import Transport

COLUMNS = (
    "problem",
    "size",
    "regulariser",
    "epsilon",
    "masked",
    "cost_scale",
    "cost_offset",
    "solver",
    "points",
    "exact_value",
    "dual_value",
    "relative_gap",
    "marginal_error",
    "seconds",
    "required",
)
SCALES, OFFSETS = (0.1, 1.0, 10.0, 100.0), (0.0, 100.0)
LARGEST_GAP, LARGEST_ERROR = 0.01, 0.02  # that a required row may have
LIMITS = (("entropic", 1.0), ("entropic", 0.5), ("entropic", 0.1), ("l2", 0.01))
# Of the default settings, but for the error at which a fit stops: it keeps the suite short.
SETTINGS = TransportSettings(tolerance=0.015)
PLANE_STEPS = 1000
PLANE_EPSILON = 0.02  # sharper than the default: barycentric maps shrink towards the mean as it grows

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One fit: a problem, the settings, and what is asked of it."""

    problem: Problem
    settings: TransportSettings
    cost_scale: float = 1.0
    cost_offset: float = 0.0
    required: bool = False
    fresh: bool = False  # whether to look at the potentials on new points too


@dataclass(frozen=True)
class Solved:
    """Fitted potentials, the block (b, O), (b, H, A) that they were fitted to, and the rows that say how well."""

    transport: Transport
    observations: Tensor
    chunks: Tensor
    rows: list[Row]


def smooth_cases(settings: TransportSettings) -> list[Case]:
    """The required grid of scales and offsets under `settings`, then what shows a limit."""
    grid = [(masked, scale, offset) for masked in (False, True) for scale in SCALES for offset in OFFSETS]
    required = [
        Case(smooth(scale, offset, masked), settings, scale, offset, True, (scale, offset) == (1.0, 0.0))
        for masked, scale, offset in grid
    ]
    return required + [Case(smooth(), replace(settings, regulariser=r, epsilon=e)) for r, e in LIMITS]


def plane_cases(settings: TransportSettings) -> list[Case]:
    """The Gaussian moved to both shapes, each without and with pairs."""
    sharp = replace(settings, epsilon=PLANE_EPSILON, first_steps=min(settings.first_steps, PLANE_STEPS))
    targets = ("8gaussians", "swiss-roll")
    return [Case(plane(target, paired), sharp, fresh=True) for target in targets for paired in (False, True)]


def solve_case(case: Case) -> Solved:
    """Fit potentials, solve exactly, compare on the fitted block and, where asked, on a fresh one."""
    problem, settings = case.problem, case.settings
    observations, chunks = problem.draw(settings.block_size, STREAMS.torch("points"))
    size = observations.shape[1], chunks[0].numel()
    transport = Transport(settings, *size, STREAMS.torch("potentials"), shares=problem.shares)
    fitted = transport.fit(observations, chunks, problem.cost, problem.pairs)
    rows = _rows(case, transport, (observations, chunks), "fitted", fitted["time/transport"])
    if case.fresh:
        fresh = problem.draw(settings.block_size, STREAMS.torch("fresh-points"))
        rows += _rows(case, transport, fresh, "fresh", None)[:1]  # another exact row would add nothing
    return Solved(transport, observations, chunks, rows)


def _rows(
    case: Case, transport: Transport, block: tuple[Tensor, Tensor], points: str, seconds: float | None
) -> list[Row]:
    """The row of the potentials on a block and that of the exact plan; `seconds` None is the time to evaluate them."""
    pairs = case.problem.pairs
    started = time.perf_counter()
    metrics = transport.diagnose(*block, case.problem.cost, pairs)
    seconds = time.perf_counter() - started if seconds is None else seconds
    error = max(metrics["transport/row_marginal_error"], metrics["transport/column_marginal_error"])
    cost = transport.plan(*block, case.problem.cost, pairs)[1].double()
    started = time.perf_counter()
    exact = exact_plan(cost.numpy(), case.settings.epsilon, case.settings.regulariser, keypoints=pairs)
    exact_seconds = time.perf_counter() - started
    exact_error = max(marginal_errors(torch.from_numpy(exact.density))).item()
    gain = abs(exact.value - independent_value(cost, case.settings, pairs))

    def row(solver: str, dual: float, error: float, seconds: float, required: bool) -> Row:
        values = (exact.value, dual, abs(dual - exact.value) / gain, error, seconds)
        numbers = [f"{value:.6g}" for value in values]
        return dict(zip(COLUMNS, [*_labels(case, solver, points), *numbers, _yes(required)], strict=True))

    return [
        row("neural", metrics["transport/dual_value"], error, seconds, case.required and points == "fitted"),
        row("exact", dual_value(exact, cost, case.settings, pairs), exact_error, exact_seconds, False),
    ]


def _labels(case: Case, solver: str, points: str) -> list[str]:
    """The first cells of a row."""
    settings = case.settings
    numbers = [f"{value:g}" for value in (settings.epsilon, case.cost_scale, case.cost_offset)]
    masked = _yes(case.problem.pairs > 0)
    name = case.problem.name
    return [name, str(settings.block_size), settings.regulariser, numbers[0], masked, *numbers[1:], solver, points]


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def independent_value(cost: Tensor, settings: TransportSettings, pairs: int) -> float:
    """E[c H] + R(H) of the plan on a block (b, b) that is constant wherever the mask permits."""
    rest = len(cost) - pairs
    density = torch.block_diag(
        len(cost) * torch.eye(pairs, dtype=cost.dtype), torch.full((rest, rest), len(cost) / rest, dtype=cost.dtype)
    )
    penalty = REGULARISERS[settings.regulariser].penalty(density, settings.epsilon)
    return ((cost * density).mean() + penalty).item()


def dual_value(exact: ExactPlan, cost: Tensor, settings: TransportSettings, pairs: int) -> float:
    """The dual at the exact potentials; a keypoint counts by the sum of potentials that gives its density, b."""
    regulariser, density = REGULARISERS[settings.regulariser], torch.from_numpy(exact.density)
    free = float(np.nansum(exact.u) + np.nansum(exact.v))
    matched = (regulariser.gap(density.diagonal(), settings.epsilon) + cost.diagonal())[:pairs].sum().item()
    return (free + matched) / len(cost) - regulariser.dual_penalty(density, settings.epsilon).item()


def missed(rows: Sequence[Row]) -> list[Row]:
    """The required rows whose gap or marginal error is too large."""
    return [
        row
        for row in rows
        if row["required"] == "yes"
        and (float(row["relative_gap"]) > LARGEST_GAP or float(row["marginal_error"]) > LARGEST_ERROR)
    ]
