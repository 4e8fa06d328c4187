"""Every pair of methods, on each task and over tasks; and which methods are tied with the best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from benchmark.report import statistics
from benchmark.report.bootstrap import FloatArray
from benchmark.report.cells import ALL_TASKS, Cell, Summary
from benchmark.report.statistics import MINIMUM_RUNS, Estimate
from benchmark.report.summary import generator, iqm_samples, task_names


@dataclass(frozen=True)
class Comparison:
    """`first` held against `second` on one task, or over tasks.

    Attributes:
        task: the task, or `ALL_TASKS`.
        paired: whether both ran the same seeds of the same source, so that a seed gave both the same resets and
            evaluation episodes. Then `difference` and `wins` are over the seeds common to both.
        seeds: how many are common (unpaired: how many the method with fewer has).
        difference: IQM of `first` less IQM of `second`; paired, both are of the same resampled seeds.
        wins: paired runs (seed and task) in which `first` scores higher, ties counted half; NaN where unpaired.
        pairs: how many paired runs there are.
        probability: of improvement of `first` over `second`, runs resampled independently (rliable's definition).
    """

    task: str
    first: str
    second: str
    paired: bool
    seeds: int
    difference: Estimate
    wins: float
    pairs: int
    probability: Estimate


def _rows(cell: Cell, seeds: Sequence[int]) -> FloatArray:
    return cell.matrix[[cell.scored.index(seed) for seed in seeds]]


def _paired_difference(first: Cell, second: Cell, names: Sequence[str], seeds: Sequence[int]) -> Estimate:
    x, y = _rows(first, seeds), _rows(second, seeds)
    value = statistics.iqm(x) - statistics.iqm(y)
    if len(seeds) < MINIMUM_RUNS:
        return statistics.interval(value, None)
    samples = [
        cell.samples
        if cell.samples is not None and len(seeds) == len(cell.scored)
        else iqm_samples(rows, names, seeds, cell.source)
        for cell, rows in ((first, x), (second, y))
    ]
    return statistics.interval(value, samples[0] - samples[1])


def compare_pair(first: Cell, second: Cell, tasks: Sequence[str]) -> Comparison:
    """Hold two cells with at least one seed each against each other; `tasks` are those that both are over."""
    names = task_names(tasks)
    seeds = sorted(set(first.scored) & set(second.scored)) if first.source == second.source else []
    draws = generator(*names, first.method, second.method, "improvement")
    probability = statistics.probability_of_improvement(first.matrix, second.matrix, draws)
    if seeds:
        x, y = _rows(first, seeds), _rows(second, seeds)
        difference = _paired_difference(first, second, names, seeds)
        wins = float(((x > y) + 0.5 * (x == y)).sum())
        pairs, count = x.size, len(seeds)
    else:
        value = statistics.iqm(first.matrix) - statistics.iqm(second.matrix)
        # Independent: other sources, or other seeds, have other draws.
        known = first.samples is not None and second.samples is not None
        difference = statistics.interval(value, first.samples - second.samples if known else None)  # type: ignore[operator]
        wins, pairs, count = float("nan"), 0, min(len(first.scored), len(second.scored))
    return Comparison(first.task, first.method, second.method, bool(seeds), count, difference, wins, pairs, probability)


def compare_all(summary: Summary) -> list[Comparison]:
    """Every pair, in the order of the methods: over tasks (where there are several), then on each task."""
    groups: list[tuple[Sequence[Cell], list[str]]] = []
    if len(summary.pooled) > 1:
        groups.append((summary.aggregates, [task.task for task in summary.pooled]))
    groups += [(task.cells, [task.task]) for task in summary.tasks]
    found = []
    for cells, tasks in groups:
        scored = [cell for cell in cells if cell.scored]
        found += [compare_pair(first, second, tasks) for first, second in combinations(scored, 2)]
    return found


def best_and_tied(cells: Sequence[Cell], comparisons: Sequence[Comparison]) -> frozenset[str]:
    """The methods to mark among `cells` of one task (or over tasks).

    The one with the highest IQM, and each whose difference from it has an interval that holds 0. None where there is
    nothing to compare, or where the best has too few seeds for an interval; nor is a method with too few ever marked.
    """
    scored = [cell for cell in cells if cell.scored]
    if len(scored) < 2:
        return frozenset()
    best = max(scored, key=lambda cell: cell.scores["iqm"].value)
    if best.samples is None:
        return frozenset()
    tied = {best.method}
    for pair in comparisons:
        if pair.task == best.task and best.method in (pair.first, pair.second):
            low, high = pair.difference.low, pair.difference.high
            if np.isfinite([low, high]).all() and low <= 0.0 <= high:
                tied |= {pair.first, pair.second}
    return frozenset(tied)


def tested_pairs(comparisons: Sequence[Comparison]) -> tuple[int, int]:
    """How many differences have an interval, on single tasks and over tasks: the size of the multiple comparison."""
    with_interval = [pair for pair in comparisons if np.isfinite(pair.difference.low)]
    over = sum(pair.task == ALL_TASKS for pair in with_interval)
    return len(with_interval) - over, over
