"""From runs to the numbers of a report: estimates per task and over tasks, learning curves, counts of what lacks."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmark.collect import Evaluation, Run
from benchmark.compare import FROZEN, common_step, score_at
from benchmark.stats import MINIMUM_RUNS, CurveEstimate, Estimate, estimates, iqm_curve
from benchmark.tables import csv_number

ALL_TASKS = "all"
MISSING = "missing"
MIXED = "mixed"
# In summary.csv, whose values are numbers; other answers have no row.
_OFFLINE_VALUES = {"yes": 1.0, "no": 0.0}
COLUMNS = ("scope", "task", "method", "statistic", "value", "low", "high", "seeds", "env_steps", "protocol")
_ORDER = ("otpr", "dppo", "idql", "dql", "dql-dppo")
LOCOMOTION = ("hopper", "walker2d", "halfcheetah")


def method_key(method: str) -> tuple[int, str]:
    """Sort key of methods: the known ones, an arm behind its method, others by name, the frozen policy last."""
    if method == FROZEN:
        return len(_ORDER) + 1, method
    base = method if method in _ORDER else method.split("-", 1)[0]
    return (_ORDER.index(base) if base in _ORDER else len(_ORDER)), method


@dataclass(frozen=True)
class Cell:
    """One method on one task, or over all tasks.

    Attributes:
        scored: seeds that count, ascending (over tasks: those that count on every task).
        planned: runs that there should be: one for each seed that any method of the task has (over tasks: the sum).
        unscored: how many of these do not count, by state; `MISSING` are those without a directory.
        env_steps: environment steps of the evaluations; None over tasks whose steps differ, or where none counts.
        scores: `STATISTICS` of the normalised score; empty where no seed counts.
        return_mean: mean over seeds of the mean return, in the task's raw units; None over tasks.
        wall_seconds, gradient_steps: mean over counting seeds (over tasks: the sum of these); NaN where unknown.
        protocol: that of the counting runs, or of all where none counts.
        offline_data: whether these use expert data in fine-tuning: what all say, else `MIXED`; empty without runs.
    """

    task: str
    method: str
    scored: tuple[int, ...]
    planned: int
    unscored: dict[str, int]
    env_steps: int | None
    scores: dict[str, Estimate]
    return_mean: Estimate | None
    wall_seconds: float
    gradient_steps: float
    protocol: str
    offline_data: str


@dataclass(frozen=True)
class Curve:
    """The learning curve of one method on one task: env_steps (time,) and pointwise IQM over `seeds` runs."""

    method: str
    env_steps: np.ndarray
    estimate: CurveEstimate
    seeds: int


@dataclass(frozen=True)
class TaskSummary:
    """One task and all methods on it.

    Attributes:
        env_steps, exact: as `compare.common_step` returns them.
        cells: one a method.
        scored: by method and seed, each run that counts and its evaluation.
        unscored: the runs that do not count.
        missing: methods and the seeds of which they have no directory though another method has.
    """

    task: str
    env_steps: int | None
    exact: bool
    cells: tuple[Cell, ...]
    scored: dict[str, dict[int, tuple[Run, Evaluation]]]
    unscored: tuple[Run, ...]
    missing: tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Summary:
    """A report's numbers; `aggregates` are over all tasks, for the methods that have a score on each."""

    tasks: tuple[TaskSummary, ...]
    aggregates: tuple[Cell, ...]
    notes: tuple[str, ...]


def generator(*names: str) -> np.random.Generator:
    """The generator of one set of intervals, seeded by its names alone: other methods or tasks do not change it."""
    digest = hashlib.sha256(json.dumps(["report", *names]).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big"))


def _mean_of(values: Sequence[float]) -> float:
    array = np.asarray(values, dtype=np.float64)
    return float(array.mean()) if array.size and np.isfinite(array).all() else float("nan")


def mean_of(rows: Sequence[Evaluation], quantity: str, draws: np.random.Generator) -> Estimate | None:
    """The mean of a column over runs (one row each) with its interval; None without rows or where one lacks it."""
    values = np.array([[getattr(row, quantity)] for row in rows])
    if not rows or not np.isfinite(values).all():
        return None
    return estimates(values, draws, ("mean",))["mean"]


def _joined(values: Sequence[str]) -> str:
    return " + ".join(sorted(set(values)))


def _agreed(values: Sequence[str]) -> str:
    """The one value that all have (empty ones have no say), `MIXED`, or nothing."""
    distinct = set(values) - {""}
    return MIXED if len(distinct) > 1 else "".join(distinct)


def _cell(task: str, method: str, runs: Sequence[Run], found: dict[int, tuple[Run, Evaluation]], seeds: set[int],
          env_steps: int | None) -> Cell:  # fmt: skip
    rows = [row for _, row in found.values()]
    unscored = Counter(run.state for run in runs if run.seed not in found)
    unscored[MISSING] += len(seeds) - len(runs)
    telling = [run for run, _ in found.values()] or runs
    return Cell(
        task=task,
        method=method,
        scored=tuple(found),
        planned=len(seeds),
        unscored={state: count for state, count in sorted(unscored.items()) if count},
        env_steps=env_steps if rows else None,
        scores=estimates([[row.score] for row in rows], generator(task, method)) if rows else {},
        return_mean=mean_of(rows, "return_mean", generator(task, method, "return_mean")),
        wall_seconds=_mean_of([row.wall_seconds for row in rows]),
        gradient_steps=_mean_of([row.gradient_steps for row in rows]),
        protocol=_joined([run.protocol for run in telling]),
        offline_data=_agreed([run.offline_data for run in telling]),
    )


def summarise_task(task: str, runs: Sequence[Run], methods: Sequence[str]) -> TaskSummary:
    """Compare `methods` on one task by the `runs` of that task."""
    env_steps, exact = common_step(runs)
    seeds = {run.seed for run in runs}
    cells: list[Cell] = []
    scored: dict[str, dict[int, tuple[Run, Evaluation]]] = {}
    unscored: list[Run] = []
    missing: list[tuple[str, tuple[int, ...]]] = []
    for method in methods:
        members = sorted((run for run in runs if run.method == method), key=lambda run: run.seed)
        rows = {run.seed: (run, row) for run in members if (row := score_at(run, env_steps, exact))}
        scored[method] = rows
        unscored += [run for run in members if run.seed not in rows]
        absent = sorted(seeds - {run.seed for run in members})
        missing += [(method, tuple(absent))] if absent else []
        cells.append(_cell(task, method, members, rows, seeds, env_steps))
    return TaskSummary(task, env_steps, exact, tuple(cells), scored, tuple(unscored), tuple(missing))


def _aggregate(method: str, tasks: Sequence[TaskSummary], notes: list[str]) -> Cell | None:
    """One method over all tasks, from the seeds that count on each: estimates need a rectangular array."""
    cells = [cell for task in tasks for cell in task.cells if cell.method == method]
    without = [cell.task for cell in cells if not cell.scored]
    if without:
        notes.append(f"{method}: not in the table over tasks, no score on {', '.join(without)}.")
        return None
    seeds = sorted(set.intersection(*(set(cell.scored) for cell in cells)))
    if not seeds:
        notes.append(f"{method}: not in the table over tasks, no seed has a score on every task.")
        return None
    extra = sum(len(cell.scored) - len(seeds) for cell in cells)
    if extra:
        notes.append(f"{method}: {extra} score(s) not used over tasks, because their seed lacks one on another task.")
    unscored: Counter[str] = Counter()
    for cell in cells:
        unscored.update(cell.unscored)
    scores = np.array([[task.scored[method][seed][1].score for task in tasks] for seed in seeds])
    # One task: the same numbers, to the digit, as that task's own.
    names = (cells[0].task, method) if len(cells) == 1 else (ALL_TASKS, *(cell.task for cell in cells), method)
    steps = {cell.env_steps for cell in cells}
    return Cell(
        task=ALL_TASKS,
        method=method,
        scored=tuple(seeds),
        planned=sum(cell.planned for cell in cells),
        unscored=dict(sorted(unscored.items())),
        env_steps=steps.pop() if len(steps) == 1 else None,
        scores=estimates(scores, generator(*names)),
        return_mean=None,
        wall_seconds=sum(cell.wall_seconds for cell in cells),
        gradient_steps=sum(cell.gradient_steps for cell in cells),
        protocol=_joined([cell.protocol for cell in cells]),
        offline_data=_agreed([cell.offline_data for cell in cells]),
    )


def _comparison_notes(task: TaskSummary, runs: Sequence[Run]) -> list[str]:
    """What a reader must know before comparing the methods of one task."""
    notes = []
    if not task.exact:
        notes.append(
            f"{task.task}: the evaluations of the methods never meet; scores are each run's last within "
            f"{task.env_steps} env steps."
        )
    longest = max((run.last_step for run in runs), default=-1)
    if task.env_steps is not None and longest > task.env_steps:
        notes.append(f"{task.task}: compared at {task.env_steps} env steps; the longest run has reached {longest}.")
    for what, values in (("protocols", {r.protocol for r in runs}), ("thread counts", {r.threads for r in runs})):
        if len(values) > 1:
            notes.append(f"{task.task}: runs with different {what} are put together ({', '.join(sorted(values))}).")
    if any(0 < len(cell.scored) < MINIMUM_RUNS for cell in task.cells):
        notes.append(f"{task.task}: no interval where fewer than {MINIMUM_RUNS} seeds count.")
    return notes


def summarise(runs: Sequence[Run]) -> Summary:
    """Compare all methods on all tasks that `runs` (seeds already selected) hold."""
    methods = sorted({run.method for run in runs}, key=method_key)
    tasks, notes = [], []
    for name in sorted({run.task for run in runs}):
        members = [run for run in runs if run.task == name]
        tasks.append(summarise_task(name, members, methods))
        notes += _comparison_notes(tasks[-1], members)
    aggregates = [cell for method in methods if (cell := _aggregate(method, tasks, notes))]
    return Summary(tuple(tasks), tuple(aggregates), tuple(notes))


def curve_quantity(task: TaskSummary) -> str:
    """The column that a task's curve shows: raw return for locomotion, score for kitchen, else success rate.

    Where a counting run lacks that column, the score.
    """
    if task.task.startswith("kitchen"):
        return "score"
    wanted = "return_mean" if task.task.startswith(LOCOMOTION) else "success_rate"
    rows = [e for found in task.scored.values() for run, _ in found.values() for e in run.evaluations]
    return wanted if all(np.isfinite(getattr(row, wanted)) for row in rows) else "score"


def curves(task: TaskSummary, quantity: str) -> list[Curve]:
    """One curve a method: its counting runs, at the steps that all of these share.

    Args:
        task: the task.
        quantity: column of curve.csv, finite in every run that counts.
    """
    found = []
    for cell in task.cells:
        runs = [run for run, _ in task.scored[cell.method].values()]
        if not runs:
            continue
        steps = sorted(set.intersection(*({e.env_steps for e in run.evaluations} for run in runs)))
        rows = [{e.env_steps: getattr(e, quantity) for e in run.evaluations} for run in runs]
        if steps:
            values = [[[row[step] for step in steps]] for row in rows]
            estimate = iqm_curve(values, generator(task.task, cell.method, "curve", quantity))
            found.append(Curve(cell.method, np.array(steps), estimate, len(runs)))
    return found


def _row(scope: str, cell: Cell, statistic: str, estimate: Estimate) -> dict[str, str]:
    values = (
        scope,
        cell.task,
        cell.method,
        statistic,
        csv_number(estimate.value),
        csv_number(estimate.low),
        csv_number(estimate.high),
        str(len(cell.scored)),
        "" if cell.env_steps is None else str(cell.env_steps),
        cell.protocol,
    )
    return dict(zip(COLUMNS, values, strict=True))


def csv_rows(summary: Summary) -> list[dict[str, str]]:
    """The rows of summary.csv: a cell's statistics, then its cost, then how many runs it should have and lacks."""
    nan = float("nan")
    rows = []
    cells = [("task", cell) for task in summary.tasks for cell in task.cells]
    for scope, cell in [*cells, *(("aggregate", cell) for cell in summary.aggregates)]:
        named = dict(cell.scores)
        if cell.return_mean:
            named["return_mean"] = cell.return_mean
        counts = {
            "wall_seconds": cell.wall_seconds,
            "gradient_steps": cell.gradient_steps,
            "runs_planned": cell.planned,
            "runs_without_score": sum(cell.unscored.values()),
            "offline_data": _OFFLINE_VALUES.get(cell.offline_data, nan),
        }
        named |= {name: Estimate(value, nan, nan) for name, value in counts.items() if not np.isnan(value)}
        rows += [_row(scope, cell, name, estimate) for name, estimate in named.items()]
    return rows
