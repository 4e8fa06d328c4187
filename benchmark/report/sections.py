"""The tables of a report, from its numbers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from benchmark import tables
from benchmark.envs import LOCOMOTION
from benchmark.report.cells import ALL_TASKS, Cell, Summary, TaskSummary
from benchmark.report.comparisons import Comparison, best_and_tied, tested_pairs
from benchmark.report.curves import published_at
from benchmark.report.published import Rerun, counterpart
from benchmark.report.records import Run
from benchmark.report.scalars import THRESHOLDS, Reached
from benchmark.report.table import Entry, Table, amount, number, span, whole, words

MARKING = (
    "Bold: the highest IQM, and every method whose difference from it has a 95 % interval that holds 0 (paired by seed "
    "where both ran the same seeds). Nothing is marked where the best has fewer than 3 seeds."
)


def states(counts: dict[str, int]) -> str:
    """`2 failed, 1 missing`."""
    return ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))


def lacking(cells: Sequence[Cell]) -> str:
    """What is wanting in a table of `cells`, in one sentence."""
    total: Counter[str] = Counter()
    for cell in cells:
        total.update(cell.unscored)
    return f"Runs without a score: {states(total)}." if total else "No run is wanting."


def _seeds(cell: Cell) -> Entry:
    """`3 of 3`, or `2 of 3 (1 failed)`; over tasks, what is wanting in all of them."""
    wanting = f" ({states(cell.unscored)})" if cell.unscored else ""
    planned = f" of {cell.planned}" if cell.task != ALL_TASKS else ""
    return Entry(f"{len(cell.scored)}{planned}{wanting}", len(cell.scored))


def over_title(summary: Summary) -> str:
    """Names what is pooled: how many tasks, of which families."""
    families = sorted({family(task.task) for task in summary.pooled})
    of = f" of {len(families)} families pooled ({', '.join(families)})" if len(families) > 1 else f" ({families[0]})"
    return f"Over {len(summary.pooled)} tasks{of}"


def family(task: str) -> str:
    """What kind of score a task's is, by its name."""
    if task.startswith(LOCOMOTION):
        return "locomotion: D4RL score / 100"
    if task.startswith("kitchen"):
        return "kitchen: return / 4"
    if task.startswith(("lift", "can", "square", "transport")):
        return "robomimic: success rate"
    return f"{task}: score as it is"


def _groups(summary: Summary) -> list[tuple[str, str, Sequence[Cell]]]:
    """(name, title, cells): over tasks, where there are several, then each task."""
    groups: list[tuple[str, str, Sequence[Cell]]] = []
    if len(summary.pooled) > 1 and summary.aggregates:
        groups.append(("over", over_title(summary), summary.aggregates))
    for index, task in enumerate(summary.tasks):
        steps = "no evaluation" if task.env_steps is None else f"{task.env_steps:,} env steps"
        groups.append((f"task{index}", f"{task.task} ({steps})", task.cells))
    return groups


def score_tables(summary: Summary, comparisons: Sequence[Comparison]) -> list[Table]:
    """Final scores, beside area under the curve and best checkpoint."""
    columns = ("Method", "Offline data", "IQM", "Median", "Mean", "Optimality gap", "Return", "Area under curve",
               "Best checkpoint", "Seeds")  # fmt: skip
    found = []
    for name, title, cells in _groups(summary):
        marked = best_and_tied(cells, comparisons)
        rows = tuple(
            (
                words(cell.method),
                words(cell.offline_data),
                amount(cell.scores.get("iqm"), cell.method in marked),
                *(amount(cell.scores.get(key)) for key in ("median", "mean", "optimality_gap")),
                amount(cell.return_mean),
                *(amount(cell.scores.get(key)) for key in ("area_under_curve", "best_checkpoint")),
                _seeds(cell),
            )
            for cell in cells
        )
        found.append(Table(f"scores-{name}", title, columns, rows, lacking(cells), 2))
    return found


def _reached(cell: Cell, level: Reached, value: float, shown: str) -> Entry:
    return Entry(f"{shown} ({level.runs}/{len(cell.scored)})", value if math.isfinite(value) else math.nan)


def cost_tables(summary: Summary) -> list[Table]:
    """What the scores cost: wall-clock, steps per second, gradient steps, and how soon thresholds were reached."""
    levels = [f"{level:g}" for level in THRESHOLDS]
    columns = ("Method", "Wall-clock", "Env steps/s", "Gradient steps", *(f"Steps to {level}" for level in levels),
               *(f"Time to {level}" for level in levels), "Seeds")  # fmt: skip
    found = []
    for index, task in enumerate(summary.tasks):
        rows = []
        for cell in task.cells:
            blank = [Entry(tables.DASH)] * (0 if cell.reached else len(THRESHOLDS))
            steps = [_reached(cell, row, row.env_steps, tables.count(row.env_steps)) for row in cell.reached] or blank
            times = [_reached(cell, row, row.wall_seconds, tables.duration(row.wall_seconds)) for row in cell.reached]
            costs = (span(cell.wall_seconds), number(cell.steps_per_second), whole(cell.gradient_steps))
            rows.append((words(cell.method), *costs, *steps, *(times or blank), _seeds(cell)))
        found.append(Table(f"costs-{index}", task.task, columns, tuple(rows), lacking(task.cells)))
    return found


def comparison_tables(summary: Summary, comparisons: Sequence[Comparison]) -> list[Table]:
    """Every pair of methods, one table over tasks and one a task."""
    columns = ("Method", "Against", "Difference of IQM", "Probability of improvement", "Higher in", "Paired", "Seeds")
    titles = {ALL_TASKS: over_title(summary)} | {task.task: task.task for task in summary.tasks}
    cells = {ALL_TASKS: summary.aggregates} | {task.task: task.cells for task in summary.tasks}
    found = []
    for index, (task, title) in enumerate(titles.items()):
        rows = tuple(
            (
                words(pair.first),
                words(pair.second),
                amount(pair.difference),
                amount(pair.probability),
                Entry(f"{pair.wins:g} of {pair.pairs}" if pair.pairs else tables.DASH, pair.wins),
                Entry("yes" if pair.paired else "no"),
                whole(pair.seeds),
            )
            for pair in comparisons
            if pair.task == task
        )
        if rows:
            found.append(Table(f"pairs-{index}", title, columns, rows, lacking(cells[task]), 2))
    return found


def multiple_comparisons(comparisons: Sequence[Comparison]) -> str:
    """How many pairs were tested, and what that means for a single interval."""
    single, over = tested_pairs(comparisons)
    if not single + over:
        return "No pair has an interval: too few seeds."
    total = single + over
    return (
        f"{total} differences have an interval ({single} on single tasks, {over} over tasks). Each is a 95 % interval "
        f"by itself: with no difference at all, about {0.05 * total:.1f} of {total} would still leave out 0, and more "
        "with few seeds, where percentile intervals are too narrow. Nothing is adjusted for this."
    )


def published_table(summary: Summary, published: Sequence[Run]) -> Table | None:
    """Published means beside ours, or None where there is none for these tasks and methods."""
    columns = ("Task", "Published task", "Method", "Source", "Published score", "Published return", "At env steps",
               "Published seeds", "Our score", "Our return", "At our env steps")  # fmt: skip
    rows = []
    for task in summary.tasks:
        cells = {cell.method: cell for cell in task.cells}
        for row in published_at(task, published):
            cell = cells[row.method]
            names = (words(task.task), words(counterpart(task.task)), words(row.method), words(row.source))
            theirs = (number(row.score), number(row.return_mean), whole(row.env_steps), whole(row.seeds))
            ours = (amount(cell.scores.get("mean")), amount(cell.return_mean), whole(cell.env_steps or math.nan))
            rows.append((*names, *theirs, *ours))
    note = "Published: plain means over seeds at the last published evaluation within our common budget."
    return Table("published", "Beside published curves", columns, tuple(rows), note, 4) if rows else None


def rerun_table(summary: Summary, reruns: Sequence[Rerun]) -> Table | None:
    """The ends of published single runs on these tasks, or None where there is none."""
    columns = ("Task", "Published task", "Method", "Start", "End", "Best", "at iteration", "Env steps", "Hours")
    rows = [
        (*map(words, (task.task, one.task, one.method)), *map(number, (one.initial, one.final, one.best)),
         *map(whole, (one.best_iteration, one.env_steps)), number(one.hours))
        for task in summary.tasks
        for one in reruns
        if one.task == counterpart(task.task)
    ]  # fmt: skip
    note = "Returns; success rates on robomimic. IDQL's start acts by an untrained Q."
    return Table("reruns", "Published single runs", columns, tuple(rows), note, 3) if rows else None


def unscored_table(summary: Summary) -> Table | None:
    """The runs that do not count, and those that are not there; None where every run counts."""
    rows = []
    for task in summary.tasks:
        for run in task.unscored:
            reached = "none" if run.last_step < 0 else f"{run.last_step:,}"
            rows.append(tuple(map(words, (run.task, run.method, str(run.seed), run.state, reached, run.error))))
        rows += [_missing_row(task, method, seeds) for method, seeds in task.missing]
    columns = ("Task", "Method", "Seed", "State", "Last evaluation (env steps)", "Error")
    return Table("unscored", "Runs without a score", columns, tuple(rows), left=6) if rows else None


def _missing_row(task: TaskSummary, method: str, seeds: Sequence[int]) -> tuple[Entry, ...]:
    listed = ", ".join(map(str, seeds[:20])) + (f" and {len(seeds) - 20} more" if len(seeds) > 20 else "")
    return tuple(map(words, (task.task, method, listed, "missing", "none", "no run directory")))
