"""Stratified bootstrap of aggregate scores, in batches.

Runs are redrawn with replacement within each task; tasks are not redrawn. A resample is held as how often each run was
drawn: sums are then products with these counts, and the interquartile mean needs no sorting, because the order of the
scores is the same in every resample. Draws come only from the generator that is given, so that equal inputs give equal
digits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

GAMMA = 1.0
# Scores held by one batch of resamples: bounds the memory, and is fixed because it decides how draws are consumed.
_BATCH_SCORES = 1 << 20

# Each maps counts (B, tasks * runs), task by task, to the statistic of these B resamples (B,).
Resampled = Callable[[FloatArray], FloatArray]


def iqm_of(scores: FloatArray) -> Resampled:
    """The interquartile mean of resamples of scores (runs, tasks): of `n` scores, n // 4 are cut off at either end.

    With K_i, clipped to what is kept, of a resample's scores among the i lowest, the sum that is kept is
    sum_i (K_i - K_(i-1)) s_i; summed by parts it needs only the K and the differences of neighbouring scores.
    """
    flat = scores.T.ravel()
    order = np.argsort(flat, kind="stable")
    ranked = flat[order]
    size = flat.size
    cut = size // 4
    ends = (size - cut) * ranked[-1] - cut * ranked[0]
    steps = np.diff(ranked)

    def statistic(counts: FloatArray) -> FloatArray:
        kept = np.cumsum(counts[:, order[:-1]], axis=1)
        return (ends - np.clip(kept, cut, size - cut, out=kept) @ steps) / (size - 2 * cut)

    return statistic


def mean_of(scores: FloatArray) -> Resampled:
    """The mean of resamples of scores (runs, tasks)."""
    flat = scores.T.ravel()
    return lambda counts: counts @ flat / flat.size


def optimality_gap_of(scores: FloatArray) -> Resampled:
    """The mean amount by which resamples of scores (runs, tasks) fall short of `GAMMA`."""
    short = mean_of(np.minimum(scores, GAMMA))
    return lambda counts: GAMMA - short(counts)


def median_of(scores: FloatArray) -> Resampled:
    """The median over tasks of the mean over runs, of resamples of scores (runs, tasks)."""
    runs, tasks = scores.shape
    if tasks == 1:
        return mean_of(scores)

    def statistic(counts: FloatArray) -> FloatArray:
        sums = np.einsum("btr,rt->bt", counts.reshape(-1, tasks, runs), scores)
        return np.median(sums / runs, axis=1)

    return statistic


BUILDERS: dict[str, Callable[[FloatArray], Resampled]] = {
    "iqm": iqm_of,
    "median": median_of,
    "mean": mean_of,
    "optimality_gap": optimality_gap_of,
}


def resample(runs: int, tasks: int, generator: np.random.Generator, reps: int) -> Iterator[FloatArray]:
    """Yield `reps` stratified resamples as counts (B, tasks * runs), task by task; each task's sum is `runs`."""
    batch = max(1, _BATCH_SCORES // (runs * tasks))
    for start in range(0, reps, batch):
        size = min(batch, reps - start)
        drawn = generator.integers(0, runs, size=(size * tasks, runs), dtype=np.int32)
        drawn += np.arange(0, size * tasks * runs, runs, dtype=np.int32)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=size * tasks * runs)
        yield counts.reshape(size, tasks * runs).astype(np.float64)


def bootstrap(
    statistics: Mapping[str, Resampled], shape: tuple[int, int], generator: np.random.Generator, reps: int
) -> dict[str, FloatArray]:
    """Each statistic of the same `reps` resamples of scores of `shape` (runs, tasks): arrays (reps,) by name."""
    found: dict[str, list[FloatArray]] = {name: [] for name in statistics}
    for counts in resample(*shape, generator, reps):
        for name, statistic in statistics.items():
            found[name].append(statistic(counts))
    return {name: np.concatenate(parts) for name, parts in found.items()}
