"""Aggregate scores and their bootstrap intervals.

The definitions are those of Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical Precipice"
(NeurIPS 2021), as implemented by the library rliable. The replication unit is the run (one seed): average the episodes
of a run before calling anything here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from benchmark.report.bootstrap import BUILDERS, GAMMA, FloatArray, bootstrap, iqm_of, resample

MINIMUM_RUNS = 3
AGGREGATE_REPS = 50_000
CURVE_REPS = 2_000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A point estimate and its percentile interval; `low` and `high` are NaN where no interval is given."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class CurveEstimate:
    """Pointwise estimates, each of shape (time,); `low` and `high` are all NaN where no interval is given."""

    value: FloatArray
    low: FloatArray
    high: FloatArray


def validate(scores: ArrayLike, ndim: int) -> FloatArray:
    """Return `scores` as a float64 array with `ndim` dimensions, the first being runs.

    Raises:
        ValueError: where the array is ragged, not numeric, of another dimension, empty or not finite.
    """
    try:
        array = np.asarray(scores, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"scores must be a rectangular array of numbers: {error}") from None
    if array.ndim != ndim:
        raise ValueError(f"scores must have {ndim} dimensions (runs, tasks[, time]), not shape {array.shape}")
    if array.size == 0:
        raise ValueError(f"scores must not be empty, but have shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"scores must be finite, but {int((~np.isfinite(array)).sum())} of {array.size} are not")
    return array


STATISTICS: tuple[str, ...] = tuple(BUILDERS)


def iqm(scores: ArrayLike) -> float:
    """Interquartile mean over runs and tasks: the mean without the lowest and the highest floor(n / 4) of all n scores.

    Args:
        scores: (runs, tasks), normalised scores.

    Raises:
        ValueError: as `validate`.
    """
    flat = np.sort(validate(scores, 2), axis=None)
    cut = flat.size // 4
    return float(flat[cut : flat.size - cut].mean())


def median(scores: ArrayLike) -> float:
    """Median over tasks of the mean over runs; scores (runs, tasks). On one task this is the mean."""
    return float(np.median(validate(scores, 2).mean(axis=0)))


def mean(scores: ArrayLike) -> float:
    """Mean over runs and tasks; scores (runs, tasks)."""
    return float(validate(scores, 2).mean())


def optimality_gap(scores: ArrayLike) -> float:
    """Mean amount by which scores (runs, tasks) fall short of gamma = 1; what exceeds gamma does not count."""
    return float(GAMMA - np.minimum(validate(scores, 2), GAMMA).mean())


POINTS: dict[str, Callable[[ArrayLike], float]] = {
    "iqm": iqm,
    "median": median,
    "mean": mean,
    "optimality_gap": optimality_gap,
}


def interval(value: float, samples: FloatArray | None) -> Estimate:
    """`value` with the percentile interval of bootstrap `samples` (reps,); without one where these are None."""
    if samples is None:
        return Estimate(value, float("nan"), float("nan"))
    low, high = _quantiles(samples)
    return Estimate(value, float(low), float(high))


def _quantiles(samples: FloatArray) -> FloatArray:
    tail = (1.0 - CONFIDENCE) / 2.0
    return np.quantile(samples, [tail, 1.0 - tail], axis=0)


def _check_bootstrap(reps: int) -> None:
    if reps < 1:
        raise ValueError(f"reps must be at least 1, not {reps}")


def estimates(
    scores: ArrayLike,
    generator: np.random.Generator,
    statistics: tuple[str, ...] = STATISTICS,
    reps: int = AGGREGATE_REPS,
) -> dict[str, Estimate]:
    """Point estimates with percentile intervals of a bootstrap stratified by task (runs are redrawn, tasks are not).

    Args:
        scores: (runs, tasks), one score a run and task.
        generator: source of all draws.
        statistics: names out of `STATISTICS`; all are computed from the same resamples.
        reps: number of resamples.

    Returns:
        One `Estimate` a statistic; without interval (NaN) where there are fewer than `MINIMUM_RUNS` runs.

    Raises:
        ValueError: as `validate`; for an unknown statistic, reps < 1.
    """
    array = validate(scores, 2)
    _check_bootstrap(reps)
    unknown = [name for name in statistics if name not in BUILDERS]
    if unknown:
        raise ValueError(f"unknown statistic {unknown[0]!r}; known: {', '.join(STATISTICS)}")
    samples: dict[str, FloatArray] = {}
    if array.shape[0] >= MINIMUM_RUNS:
        runs, tasks = array.shape
        samples = bootstrap({name: BUILDERS[name](array) for name in statistics}, (runs, tasks), generator, reps)
    return {name: interval(POINTS[name](array), samples.get(name)) for name in statistics}


def iqm_curve(
    scores: ArrayLike,
    generator: np.random.Generator,
    reps: int = CURVE_REPS,
) -> CurveEstimate:
    """Pointwise IQM over runs and tasks at each time, with pointwise percentile intervals; one set of draws for all.

    The intervals hold for each time by itself: reduce a run to one number (an area, a time to a threshold) before
    asking about anything that couples times.

    Args:
        scores: (runs, tasks, time).
        generator: source of all draws.
        reps: number of resamples.

    Raises:
        ValueError: as `validate`; for reps < 1.
    """
    array = validate(scores, 3)
    _check_bootstrap(reps)
    runs, tasks, times = array.shape
    value = np.array([iqm(array[:, :, time]) for time in range(times)])
    if runs < MINIMUM_RUNS:
        return _without_band(value)
    at_time = {str(time): iqm_of(array[:, :, time]) for time in range(times)}
    samples = bootstrap(at_time, (runs, tasks), generator, reps)
    low, high = _quantiles(np.stack(list(samples.values()), axis=1))
    return CurveEstimate(value, low, high)


def _without_band(value: FloatArray) -> CurveEstimate:
    blank = np.full(value.shape, np.nan)
    return CurveEstimate(value, blank, blank.copy())


def performance_profile(
    scores: ArrayLike,
    thresholds: ArrayLike,
    generator: np.random.Generator,
    reps: int = CURVE_REPS,
) -> CurveEstimate:
    """Share of the scores (runs, tasks) above each threshold (T,): the run-score distribution, pointwise intervals.

    Raises:
        ValueError: as `validate`; for reps < 1.
    """
    array, grid = validate(scores, 2), validate(thresholds, 1)
    _check_bootstrap(reps)
    above = (array.T.reshape(-1, 1) > grid).astype(np.float64)
    value = above.mean(axis=0)
    runs, tasks = array.shape
    if runs < MINIMUM_RUNS:
        return _without_band(value)
    samples = [counts @ above / len(above) for counts in resample(runs, tasks, generator, reps)]
    low, high = _quantiles(np.concatenate(samples))
    return CurveEstimate(value, low, high)


def probability_of_improvement(
    first: ArrayLike,
    second: ArrayLike,
    generator: np.random.Generator,
    reps: int = CURVE_REPS,
) -> Estimate:
    """Mean over tasks of P(X > Y) + P(X = Y) / 2, X and Y being runs of `first` (n, tasks) and `second` (m, tasks).

    The runs of both are redrawn independently of each other. No interval where either has fewer than `MINIMUM_RUNS`.

    Raises:
        ValueError: as `validate`; where the numbers of tasks differ; for reps < 1.
    """
    x, y = validate(first, 2), validate(second, 2)
    _check_bootstrap(reps)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"both must have the same tasks, not {x.shape[1]} and {y.shape[1]}")
    tasks = x.shape[1]
    left, right = x.T[:, :, None], y.T[:, None, :]
    wins = (left > right) + 0.5 * (left == right)
    value = float(wins.mean())
    if min(len(x), len(y)) < MINIMUM_RUNS:
        return interval(value, None)
    draws = [
        np.concatenate([c.reshape(-1, tasks, n) for c in resample(n, tasks, generator, reps)]).transpose(1, 0, 2)
        for n in (len(x), len(y))
    ]
    samples = ((draws[0] @ wins) * draws[1]).sum(axis=(0, 2)) / wins.size
    return interval(value, samples)
