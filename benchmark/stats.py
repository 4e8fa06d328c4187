"""Aggregate scores and their bootstrap intervals.

The definitions are those of Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical Precipice"
(NeurIPS 2021), as implemented by the library rliable; the stratified bootstrap is batched in numpy and draws only from
the generator that it is given, so that equal inputs give equal digits. The replication unit is the run (one seed):
average the episodes of a run before calling anything here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]

MINIMUM_RUNS = 3
AGGREGATE_REPS = 50_000
CURVE_REPS = 2_000
CONFIDENCE = 0.95
GAMMA = 1.0
# Scores held by one batch of resamples: bounds the memory, and is fixed because it decides how draws are consumed.
_BATCH_SCORES = 1 << 20


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


def _iqm(batch: FloatArray) -> FloatArray:
    flat = np.sort(batch.reshape(batch.shape[0], -1), axis=1)
    cut = flat.shape[1] // 4
    return flat[:, cut : flat.shape[1] - cut].mean(axis=1)


def _median(batch: FloatArray) -> FloatArray:
    return np.median(batch.mean(axis=1), axis=1)


def _mean(batch: FloatArray) -> FloatArray:
    return batch.mean(axis=(1, 2))


def _optimality_gap(batch: FloatArray) -> FloatArray:
    return GAMMA - np.minimum(batch, GAMMA).mean(axis=(1, 2))


# Each maps a batch of score arrays (B, runs, tasks) to (B,).
_BATCHED: dict[str, Callable[[FloatArray], FloatArray]] = {
    "iqm": _iqm,
    "median": _median,
    "mean": _mean,
    "optimality_gap": _optimality_gap,
}
STATISTICS: tuple[str, ...] = tuple(_BATCHED)


def iqm(scores: ArrayLike) -> float:
    """Interquartile mean over runs and tasks: the mean without the lowest and the highest floor(n / 4) of all n scores.

    Args:
        scores: (runs, tasks), normalised scores.

    Raises:
        ValueError: as `validate`.
    """
    return float(_iqm(validate(scores, 2)[None])[0])


def median(scores: ArrayLike) -> float:
    """Median over tasks of the mean over runs; scores (runs, tasks). On one task this is the mean."""
    return float(_median(validate(scores, 2)[None])[0])


def mean(scores: ArrayLike) -> float:
    """Mean over runs and tasks; scores (runs, tasks)."""
    return float(_mean(validate(scores, 2)[None])[0])


def optimality_gap(scores: ArrayLike) -> float:
    """Mean amount by which scores (runs, tasks) fall short of gamma = 1; what exceeds gamma does not count."""
    return float(_optimality_gap(validate(scores, 2)[None])[0])


def _resamples(scores: FloatArray, generator: np.random.Generator, reps: int) -> Iterator[FloatArray]:
    """Yield `reps` stratified resamples of (runs, tasks) in batches (B, runs, tasks): runs are redrawn in each task."""
    runs, tasks = scores.shape
    batch = max(1, _BATCH_SCORES // scores.size)
    for start in range(0, reps, batch):
        drawn = generator.integers(0, runs, size=(min(batch, reps - start), runs, tasks))
        yield scores.ravel().take(drawn * tasks + np.arange(tasks))


def _quantiles(samples: FloatArray, confidence: float) -> FloatArray:
    tail = (1.0 - confidence) / 2.0
    return np.quantile(samples, [tail, 1.0 - tail], axis=0)


def _check_bootstrap(reps: int, confidence: float) -> None:
    if reps < 1:
        raise ValueError(f"reps must be at least 1, not {reps}")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must lie between 0 and 1, not {confidence}")


def estimates(
    scores: ArrayLike,
    generator: np.random.Generator,
    statistics: tuple[str, ...] = STATISTICS,
    reps: int = AGGREGATE_REPS,
    confidence: float = CONFIDENCE,
) -> dict[str, Estimate]:
    """Point estimates with percentile intervals of a bootstrap stratified by task (runs are redrawn, tasks are not).

    Args:
        scores: (runs, tasks), one score a run and task.
        generator: source of all draws.
        statistics: names out of `STATISTICS`; all are computed from the same resamples.
        reps: number of resamples.
        confidence: coverage of the interval, in (0, 1).

    Returns:
        One `Estimate` a statistic; without interval (NaN) where there are fewer than `MINIMUM_RUNS` runs.

    Raises:
        ValueError: as `validate`; for an unknown statistic, reps < 1 or confidence outside (0, 1).
    """
    array = validate(scores, 2)
    _check_bootstrap(reps, confidence)
    unknown = [name for name in statistics if name not in _BATCHED]
    if unknown:
        raise ValueError(f"unknown statistic {unknown[0]!r}; known: {', '.join(STATISTICS)}")
    points = {name: float(_BATCHED[name](array[None])[0]) for name in statistics}
    if array.shape[0] < MINIMUM_RUNS:
        return {name: Estimate(point, float("nan"), float("nan")) for name, point in points.items()}
    samples: dict[str, list[FloatArray]] = {name: [] for name in statistics}
    for batch in _resamples(array, generator, reps):
        for name in statistics:
            samples[name].append(_BATCHED[name](batch))
    intervals = {name: _quantiles(np.concatenate(samples[name]), confidence) for name in statistics}
    return {name: Estimate(points[name], float(low), float(high)) for name, (low, high) in intervals.items()}


def _one_task_iqm_samples(scores: FloatArray, generator: np.random.Generator, reps: int) -> FloatArray:
    """IQM resamples (reps, time) of one task's scores (runs, time), by ranks instead of by runs.

    Drawing runs with replacement at a time is drawing ranks of its sorted scores with replacement. The IQM of sorted
    scores is linear in how often each rank falls between the quartiles, so one set of drawn ranks serves every time by
    a matrix product: the law at each time is that of the ordinary bootstrap.
    """
    runs = scores.shape[0]
    cut = runs // 4
    drawn = np.sort(generator.integers(0, runs, size=(reps, runs)), axis=1)[:, cut : runs - cut]
    weights = (drawn[:, :, None] == np.arange(runs)).mean(axis=1)
    return weights @ np.sort(scores, axis=0)


def iqm_curve(
    scores: ArrayLike,
    generator: np.random.Generator,
    reps: int = CURVE_REPS,
    confidence: float = CONFIDENCE,
) -> CurveEstimate:
    """Pointwise IQM over runs and tasks at each time, with pointwise percentile intervals.

    The intervals hold for each time by itself: reduce a run to one number (an area, a time to a threshold) before
    asking about anything that couples times.

    Args:
        scores: (runs, tasks, time).
        generator: source of all draws.
        reps: number of resamples.
        confidence: coverage of the interval, in (0, 1).

    Raises:
        ValueError: as `validate`; for reps < 1 or confidence outside (0, 1).
    """
    array = validate(scores, 3)
    _check_bootstrap(reps, confidence)
    runs, tasks, times = array.shape
    value = _iqm(np.moveaxis(array, 2, 0))
    if runs < MINIMUM_RUNS:
        blank = np.full(times, np.nan)
        return CurveEstimate(value, blank, blank.copy())
    if tasks == 1:
        samples = _one_task_iqm_samples(array[:, 0], generator, reps)
    else:
        columns = (np.concatenate([_iqm(b) for b in _resamples(array[:, :, t], generator, reps)]) for t in range(times))
        samples = np.stack(list(columns), axis=1)
    low, high = _quantiles(samples, confidence)
    return CurveEstimate(value, low, high)
