"""What figures draw: learning curves per task, sample efficiency over tasks, performance profiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmark.envs import LOCOMOTION
from benchmark.report.bootstrap import FloatArray
from benchmark.report.cells import Summary, TaskSummary, method_key
from benchmark.report.published import counterpart
from benchmark.report.records import Run
from benchmark.report.statistics import CurveEstimate, iqm_curve, performance_profile
from benchmark.report.summary import generator

# A curve with more evaluations is drawn at this many of them, its first and last included.
MAXIMUM_POINTS = 200
# Of the common budget, in sample efficiency over tasks.
SHARES = np.linspace(0.0, 1.0, 41)
PROFILE_POINTS = 101


@dataclass(frozen=True)
class Curve:
    """A line of a figure: `x` (points,), pointwise estimates over `seeds` runs, for published ones their source."""

    method: str
    x: FloatArray
    estimate: CurveEstimate
    seeds: int
    source: str = ""


def curve_quantity(task: TaskSummary) -> str:
    """The column that a task's curve shows: raw return for locomotion, score for kitchen, else success rate.

    Where a counting run lacks that column, the score.
    """
    if task.task.startswith("kitchen"):
        return "score"
    wanted = "return_mean" if task.task.startswith(LOCOMOTION) else "success_rate"
    rows = [e for found in task.scored.values() for item in found.values() for e in item.run.evaluations]
    return wanted if all(np.isfinite(getattr(row, wanted)) for row in rows) else "score"


def _drawn_steps(runs: Sequence[Run]) -> list[int]:
    """The steps that all `runs` share, thinned to `MAXIMUM_POINTS`."""
    steps = sorted(set.intersection(*({e.env_steps for e in run.evaluations} for run in runs)))
    if len(steps) <= MAXIMUM_POINTS:
        return steps
    return [steps[index] for index in np.linspace(0, len(steps) - 1, MAXIMUM_POINTS).round().astype(int)]


def _columns(runs: Sequence[Run], steps: Sequence[int], quantity: str) -> FloatArray:
    """A column of curve.csv at `steps`, of each run: (runs, time)."""
    wanted = set(steps)
    return np.array([[getattr(e, quantity) for e in run.evaluations if e.env_steps in wanted] for run in runs])


def curves(task: TaskSummary, quantity: str) -> list[Curve]:
    """One curve a method over environment steps: its counting runs, at the steps that all of these share.

    Args:
        task: the task.
        quantity: column of curve.csv, finite in every run that counts.
    """
    found = []
    for method, scored in task.scored.items():
        runs = [item.run for item in scored.values()]
        steps = _drawn_steps(runs) if runs else []
        if steps:
            values = _columns(runs, steps, quantity)[:, None, :]
            estimate = iqm_curve(values, generator(task.task, method, "curve", quantity))
            found.append(Curve(method, np.array(steps, dtype=np.float64), estimate, len(runs)))
    return found


def by_wall_clock(task: TaskSummary, drawn: Sequence[Curve]) -> list[Curve]:
    """The same curves over the mean wall-clock seconds of their evaluations, where these are recorded."""
    found = []
    for curve in drawn:
        runs = [item.run for item in task.scored[curve.method].values()]
        seconds = _columns(runs, [int(step) for step in curve.x], "wall_seconds").mean(axis=0)
        if np.isfinite(seconds).all():
            found.append(Curve(curve.method, seconds, curve.estimate, curve.seeds))
    return found


def behind(task: TaskSummary, published: Sequence[Run], quantity: str) -> list[Curve]:
    """Published curves of the methods of `task`, up to its longest run: plain means over seeds, without a band."""
    last = max((item.run.last_step for found in task.scored.values() for item in found.values()), default=0)
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in published:
        if run.task == counterpart(task.task) and run.method in task.scored and last > 0:
            groups.setdefault((run.method, run.source), []).append(run)
    found = []
    for (method, source), runs in sorted(groups.items()):
        steps = [step for step in _drawn_steps(runs) if step <= last]
        values = _columns(runs, steps, quantity)
        if len(steps) > 1 and np.isfinite(values).all():
            mean = values.mean(axis=0)
            blank = np.full(len(steps), np.nan)
            estimate = CurveEstimate(mean, blank, blank)
            found.append(Curve(method, np.array(steps, dtype=np.float64), estimate, len(runs), source))
    return found


def sample_efficiency(summary: Summary) -> list[Curve]:
    """IQM over tasks and seeds against the share of each task's common budget, scores interpolated linearly."""
    found = []
    for cell in summary.aggregates:
        values = np.empty((len(cell.scored), len(summary.pooled), len(SHARES)))
        for column, task in enumerate(summary.pooled):
            for row, seed in enumerate(cell.scored):
                evaluations = task.scored[cell.method][seed].run.evaluations
                steps = [e.env_steps for e in evaluations]
                values[row, column] = np.interp(SHARES * (task.env_steps or 0), steps, [e.score for e in evaluations])
        draws = generator(*(task.task for task in summary.pooled), cell.method, "efficiency")
        found.append(Curve(cell.method, SHARES, iqm_curve(values, draws), len(cell.scored)))
    return found


def profiles(summary: Summary) -> list[Curve]:
    """Share of the runs of all tasks above each score, for every method that has a score on each task."""
    if not summary.aggregates:
        return []
    everything = np.concatenate([cell.matrix.ravel() for cell in summary.aggregates])
    low, high = min(0.0, float(everything.min())), max(1.0, float(everything.max()))
    levels = np.linspace(low, high, PROFILE_POINTS)
    found = []
    for cell in summary.aggregates:
        draws = generator(*(task.task for task in summary.pooled), cell.method, "profile")
        found.append(Curve(cell.method, levels, performance_profile(cell.matrix, levels, draws), len(cell.scored)))
    return found


@dataclass(frozen=True)
class PublishedMean:
    """Means over the `seeds` of a published method at `env_steps`; `return_mean` is NaN where only scores are known."""

    method: str
    source: str
    seeds: int
    env_steps: int
    score: float
    return_mean: float


def published_at(task: TaskSummary, published: Sequence[Run]) -> list[PublishedMean]:
    """Published means beside a task's own, at the last published step within the budget at which it is compared."""
    rows = []
    for curve in behind(task, published, "score"):
        within = [int(step) for step in curve.x if step <= (task.env_steps or 0)]
        if not within:
            continue
        runs = [run for run in published if (run.task, run.method, run.source)
                == (counterpart(task.task), curve.method, curve.source)]  # fmt: skip
        found = [row for run in runs if (row := run.at(within[-1]))]
        score, returned = (float(np.mean([getattr(row, name) for row in found])) for name in ("score", "return_mean"))
        rows.append(PublishedMean(curve.method, curve.source, len(runs), within[-1], score, returned))
    return sorted(rows, key=lambda row: (method_key(row.method), row.source))
