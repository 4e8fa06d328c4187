"""One number a run: what stratified bootstraps are made of, beside the final score."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from benchmark.report.records import Evaluation, Run

# Normalised scores whose first crossing is reported.
THRESHOLDS = (0.25, 0.5, 0.75, 0.9)


@dataclass(frozen=True)
class Scored:
    """A run that counts, reduced to numbers within the budget at which its task is compared.

    Attributes:
        run: the run.
        evaluation: the one by which it counts.
        best: its highest score; the evaluation is chosen by the score that it reports, hence optimistic.
        area: mean of the piecewise linear learning curve over the steps from its first to its last evaluation.
        reached: by threshold, the first evaluation at or above it, or None.
    """

    run: Run
    evaluation: Evaluation
    best: float
    area: float
    reached: dict[float, Evaluation | None]


def reduce_run(run: Run, evaluation: Evaluation, env_steps: int) -> Scored:
    """Reduce `run`, which counts by `evaluation`, to numbers within `env_steps`."""
    rows = run.until(env_steps) or (evaluation,)
    reached = {level: next((row for row in rows if row.score >= level), None) for level in THRESHOLDS}
    return Scored(run, evaluation, max(row.score for row in rows), _area(rows), reached)


def _area(rows: tuple[Evaluation, ...]) -> float:
    """The area under the scores by the trapezoidal rule, divided by the steps that it spans."""
    steps = np.array([row.env_steps for row in rows], dtype=np.float64)
    scores = np.array([row.score for row in rows])
    span = steps[-1] - steps[0]
    if not span:
        return float(scores[-1])
    return float(((scores[1:] + scores[:-1]) / 2.0 * np.diff(steps)).sum() / span)


@dataclass(frozen=True)
class Reached:
    """How soon the counting runs of a method reach a threshold.

    `env_steps` and `wall_seconds` are medians over all counting runs, infinite where half or more never reach it
    (wall-clock: NaN where a run that does has none recorded); `runs` is how many do.
    """

    threshold: float
    runs: int
    env_steps: float
    wall_seconds: float


def reached_by(scored: list[Scored], threshold: float) -> Reached:
    """Sum up when the runs `scored` (at least one) reach `threshold`."""
    rows = [item.reached[threshold] for item in scored]
    steps = [math.inf if row is None else float(row.env_steps) for row in rows]
    seconds = [math.inf if row is None else row.wall_seconds for row in rows]
    return Reached(threshold, sum(row is not None for row in rows), _median(steps), _median(seconds))


def _median(values: list[float]) -> float:
    """The median of values that may be infinite: two infinite middles have one for their mean."""
    ordered = sorted(values)
    if any(math.isnan(value) for value in values):
        return math.nan
    low, high = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
    return low if low == high else (low + high) / 2.0
