"""From runs to the numbers of a report: estimates per task and over tasks, and counts of what lacks."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence

import numpy as np

from benchmark.report import bootstrap, statistics
from benchmark.report.bootstrap import FloatArray
from benchmark.report.cells import ALL_TASKS, MISSING, MIXED, Cell, Summary, TaskSummary, arm_of, method_key
from benchmark.report.compare import common_step, score_at
from benchmark.report.records import TIMES, Evaluation, Run
from benchmark.report.scalars import THRESHOLDS, Scored, reached_by, reduce_run
from benchmark.report.statistics import Estimate


def generator(*names: str) -> np.random.Generator:
    """The generator of one set of intervals, seeded by its names alone: other methods or tasks do not change it."""
    digest = hashlib.sha256(json.dumps(["report", *names]).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big"))


def iqm_samples(matrix: FloatArray, names: Sequence[str], seeds: Sequence[int], source: str) -> FloatArray:
    """Bootstrap of the IQM of scores (seeds, tasks); equal `names` (tasks), seeds and source give equal resamples."""
    return _bootstrap({"iqm": bootstrap.iqm_of(matrix)}, matrix, names, seeds, source)["iqm"]


def _bootstrap(
    wanted: dict[str, bootstrap.Resampled],
    matrix: FloatArray,
    names: Sequence[str],
    seeds: Sequence[int],
    source: str,
) -> dict[str, FloatArray]:
    """Samples of the `wanted` statistics; none where too few runs count."""
    runs, tasks = matrix.shape
    if runs < statistics.MINIMUM_RUNS:
        return {}
    draws = generator(*names, *map(str, seeds), source)
    return bootstrap.bootstrap(wanted, (runs, tasks), draws, statistics.AGGREGATE_REPS)


def _estimates(
    scored: Sequence[Sequence[Scored]], names: Sequence[str], source: str
) -> tuple[dict[str, Estimate], FloatArray, FloatArray | None]:
    """Estimates of runs `scored` (seeds, tasks), the matrix of their scores and the samples of its IQM."""
    matrix = np.array([[item.evaluation.score for item in row] for row in scored])
    best = np.array([[item.best for item in row] for row in scored])
    area = np.array([[item.area for item in row] for row in scored])
    returns = np.array([[item.evaluation.return_mean for item in row] for row in scored])
    others = {"best_checkpoint": best, "area_under_curve": area}
    values = {name: point(matrix) for name, point in statistics.POINTS.items()}
    values |= {name: statistics.iqm(array) for name, array in others.items()}
    wanted = {name: build(matrix) for name, build in bootstrap.BUILDERS.items()}
    wanted |= {name: bootstrap.iqm_of(array) for name, array in others.items()}
    if len(names) == 1 and np.isfinite(returns).all():
        values["return_mean"] = statistics.mean(returns)
        wanted["return_mean"] = bootstrap.mean_of(returns)
    samples = _bootstrap(wanted, matrix, names, [row[0].run.seed for row in scored], source)
    found = {name: statistics.interval(value, samples.get(name)) for name, value in values.items()}
    return found, matrix, samples.get("iqm")


def _mean_of(values: Sequence[float]) -> float:
    array = np.asarray(values, dtype=np.float64)
    return float(array.mean()) if array.size and np.isfinite(array).all() else float("nan")


def mean_of(rows: Sequence[Evaluation], quantity: str, draws: np.random.Generator) -> Estimate | None:
    """The mean of a column over runs (one row each) with its interval; None without rows or where one lacks it."""
    values = np.array([[getattr(row, quantity)] for row in rows])
    if not rows or not np.isfinite(values).all():
        return None
    return statistics.estimates(values, draws, ("mean",))["mean"]


def _joined(values: Sequence[str]) -> str:
    return " + ".join(sorted(set(values)))


def _agreed(values: Sequence[str]) -> str:
    """The one value that all have (empty ones have no say), `MIXED`, or nothing."""
    distinct = set(values) - {""}
    return MIXED if len(distinct) > 1 else "".join(distinct)


def _seconds(runs: Sequence[Run]) -> dict[str, float]:
    """Mean time spent in each of `TIMES` that every run has recorded."""
    return {name: _mean_of([run.seconds[name] for run in runs]) for name in TIMES
            if runs and all(name in run.seconds for run in runs)}  # fmt: skip


def _cell(
    task: str, method: str, runs: Sequence[Run], found: dict[int, Scored], seeds: set[int], env_steps: int | None
) -> Cell:
    items = list(found.values())
    unscored = Counter(run.state for run in runs if run.seed not in found)
    unscored[MISSING] += len(seeds) - len(runs)
    counting = [item.run for item in items]
    telling = counting or runs
    source = _joined([run.source for run in telling])
    scores, matrix, samples = _estimates([[item] for item in items], (task,), source) if items else ({}, None, None)
    return Cell(
        task=task,
        method=method,
        scored=tuple(found),
        planned=len(seeds),
        unscored={state: count for state, count in sorted(unscored.items()) if count},
        env_steps=env_steps if items else None,
        return_mean=scores.pop("return_mean", None),
        scores=scores,
        wall_seconds=_mean_of([item.evaluation.wall_seconds for item in items]),
        gradient_steps=_mean_of([item.evaluation.gradient_steps for item in items]),
        protocol=_joined([run.protocol for run in telling]),
        offline_data=_agreed([run.offline_data for run in telling]),
        source=source,
        reached=tuple(reached_by(items, level) for level in THRESHOLDS) if items else (),
        seconds=_seconds(counting),
        matrix=np.empty((0, 1)) if matrix is None else matrix,
        samples=samples,
    )


def summarise_task(task: str, runs: Sequence[Run], methods: Sequence[str]) -> TaskSummary:
    """Compare `methods` on one task by the `runs` of that task."""
    env_steps, exact = common_step(runs)
    seeds = {run.seed for run in runs}
    cells: list[Cell] = []
    scored: dict[str, dict[int, Scored]] = {}
    unscored: list[Run] = []
    missing: list[tuple[str, tuple[int, ...]]] = []
    for method in methods:
        members = sorted((run for run in runs if run.method == method), key=lambda run: run.seed)
        rows = {run.seed: reduce_run(run, row, env_steps or 0)
                for run in members if (row := score_at(run, env_steps, exact))}  # fmt: skip
        scored[method] = rows
        unscored += [run for run in members if run.seed not in rows]
        # Seeds from elsewhere are another set: a method that has none of them misses nothing.
        wanted = _seeds_of({run.source for run in members} or {""}, runs) or seeds
        absent = sorted(wanted - {run.seed for run in members})
        missing += [(method, tuple(absent))] if absent else []
        cells.append(_cell(task, method, members, rows, wanted, env_steps))
    return TaskSummary(task, env_steps, exact, tuple(cells), scored, tuple(unscored), tuple(missing))


def _seeds_of(sources: set[str], runs: Sequence[Run]) -> set[int]:
    return {run.seed for run in runs if run.source in sources}


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
    return _over_tasks(method, cells, [[task.scored[method][seed] for task in tasks] for seed in seeds])


def task_names(tasks: Sequence[str]) -> tuple[str, ...]:
    """What seeds the draws over `tasks`: of one task, the same as for that task alone, hence the same digits."""
    return (tasks[0],) if len(tasks) == 1 else (ALL_TASKS, *tasks)


def _over_tasks(method: str, cells: Sequence[Cell], scored: Sequence[Sequence[Scored]]) -> Cell:
    unscored: Counter[str] = Counter()
    for cell in cells:
        unscored.update(cell.unscored)
    steps = {cell.env_steps for cell in cells}
    source = _joined([item.run.source for row in scored for item in row])
    scores, matrix, samples = _estimates(scored, task_names([cell.task for cell in cells]), source)
    scores.pop("return_mean", None)
    return Cell(
        task=ALL_TASKS,
        method=method,
        scored=tuple(row[0].run.seed for row in scored),
        planned=sum(cell.planned for cell in cells),
        unscored=dict(sorted(unscored.items())),
        env_steps=steps.pop() if len(steps) == 1 else None,
        scores=scores,
        return_mean=None,
        wall_seconds=sum(cell.wall_seconds for cell in cells),
        gradient_steps=sum(cell.gradient_steps for cell in cells),
        protocol=_joined([cell.protocol for cell in cells]),
        offline_data=_agreed([cell.offline_data for cell in cells]),
        source=source,
        matrix=matrix,
        samples=samples,
    )


def summarise(runs: Sequence[Run]) -> Summary:
    """Compare all methods on all tasks that `runs` (seeds already selected) hold.

    Beside other tasks, those on which arms of one method alone were run are compared for themselves.
    """
    by_task: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.task):
        by_task.setdefault(run.task, []).append(run)
    arms = {task for task, members in by_task.items() if _compares_arms({run.method for run in members})}
    alone = arms if len(arms) < len(by_task) else set()
    pooled_methods = {run.method for run in runs if run.task not in alone}
    tasks = {}
    for task, members in by_task.items():
        methods = {run.method for run in members} if task in alone else pooled_methods
        tasks[task] = summarise_task(task, members, sorted(methods, key=method_key))
    pooled = [summary for task, summary in tasks.items() if task not in alone]
    notes = [f"{', '.join(sorted(alone))}: arms of one method alone, left out over tasks."] if alone else []
    found = (_aggregate(method, pooled, notes) for method in sorted(pooled_methods, key=method_key))
    return Summary(tuple(tasks.values()), tuple(pooled), tuple(cell for cell in found if cell), tuple(notes))


def _compares_arms(methods: set[str]) -> bool:
    """Whether arms of one method alone were run: an ablation, which no other method misses."""
    return len(methods) > 1 and len({arm_of(method) for method in methods}) == 1
