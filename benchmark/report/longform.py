"""The report's numbers as long tables: every evaluation, every estimate, every pair."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from benchmark.report.cells import ALL_TASKS, Cell, Summary
from benchmark.report.comparisons import Comparison, best_and_tied
from benchmark.report.records import Run
from benchmark.report.statistics import Estimate
from benchmark.store import CURVE_COLUMNS
from benchmark.tables import csv_number

DATA_COLUMNS = (
    "task",
    "method",
    "seed",
    "env_steps",
    "iteration",
    "wall_seconds",
    "gradient_steps",
    "episodes",
    "return_mean",
    "return_std",
    "success_rate",
    "score",
    "state",
    "offline_data",
    "source",
)
SUMMARY_COLUMNS = ("scope", "task", "method", "statistic", "value", "low", "high", "seeds", "env_steps", "protocol")
PAIR_COLUMNS = ("scope", "task", "first", "second", "statistic", "value", "low", "high", "paired", "seeds")
# In summary.csv, whose values are numbers; other answers have no row.
_OFFLINE_VALUES = {"yes": 1.0, "no": 0.0}


def data_rows(runs: Sequence[Run]) -> Iterator[dict[str, str]]:
    """One row an evaluation, columns `DATA_COLUMNS`."""
    for run in runs:
        identity = {"task": run.task, "method": run.method, "seed": str(run.seed), "state": run.state}
        identity |= {"offline_data": run.offline_data, "source": run.source}
        for evaluation in run.evaluations:
            yield identity | {name: csv_number(getattr(evaluation, name)) for name in CURVE_COLUMNS}


def _scope(task: str) -> str:
    return "aggregate" if task == ALL_TASKS else "task"


def _numbers(cell: Cell, marked: bool) -> dict[str, float]:
    """What has no interval: costs, how soon thresholds were reached, how many runs there should be and lack."""
    found = {"wall_seconds": cell.wall_seconds, "gradient_steps": cell.gradient_steps}
    found["env_steps_per_second"] = cell.steps_per_second
    for row in cell.reached:
        level = f"{row.threshold:g}"
        found |= {f"steps_to_{level}": row.env_steps, f"wall_seconds_to_{level}": row.wall_seconds}
        found[f"runs_reaching_{level}"] = row.runs
    found |= {"runs_planned": cell.planned, "runs_without_score": sum(cell.unscored.values())}
    return found | {"offline_data": _OFFLINE_VALUES.get(cell.offline_data, math.nan), "best_or_tied": float(marked)}


def summary_rows(summary: Summary, pairs: Sequence[Comparison]) -> list[dict[str, str]]:
    """A cell's statistics, then its numbers without intervals, as far as they are finite; columns `SUMMARY_COLUMNS`."""
    rows = []
    for cells in [*(task.cells for task in summary.tasks), summary.aggregates]:
        marked = best_and_tied(cells, pairs)
        for cell in cells:
            named = dict(cell.scores) | ({"return_mean": cell.return_mean} if cell.return_mean else {})
            numbers = _numbers(cell, cell.method in marked)
            named |= {
                name: Estimate(value, math.nan, math.nan) for name, value in numbers.items() if math.isfinite(value)
            }
            rows += [_summary_row(cell, name, estimate) for name, estimate in named.items()]
    return rows


def _summary_row(cell: Cell, statistic: str, estimate: Estimate) -> dict[str, str]:
    values = (
        _scope(cell.task),
        cell.task,
        cell.method,
        statistic,
        *map(csv_number, (estimate.value, estimate.low, estimate.high)),
        str(len(cell.scored)),
        "" if cell.env_steps is None else str(cell.env_steps),
        cell.protocol,
    )
    return dict(zip(SUMMARY_COLUMNS, values, strict=True))


def pair_rows(pairs: Sequence[Comparison]) -> list[dict[str, str]]:
    """Three rows a pair: difference, probability of improvement, share of paired runs that score higher."""
    rows = []
    for pair in pairs:
        share = Estimate(pair.wins / pair.pairs if pair.pairs else math.nan, math.nan, math.nan)
        named = {
            "iqm_difference": pair.difference,
            "probability_of_improvement": pair.probability,
            "share_higher": share,
        }
        for name, estimate in named.items():
            numbers = map(csv_number, (estimate.value, estimate.low, estimate.high))
            fixed = (_scope(pair.task), pair.task, pair.first, pair.second, name)
            paired = "yes" if pair.paired else "no"
            rows.append(dict(zip(PAIR_COLUMNS, (*fixed, *numbers, paired, str(pair.seeds)), strict=True)))
    return rows
