"""Rules of acting side by side: the method's own, and those that evaluations.csv records of the same episodes."""

from __future__ import annotations

from collections.abc import Sequence

from benchmark import tables
from benchmark.collect import OWN_RULE, Evaluation, Run
from benchmark.stats import Estimate
from benchmark.summary import Cell, Summary, TaskSummary, generator, mean_of

COLUMNS = ("task", "method", "seed", "env_steps", "rule", "episodes", "return_mean", "score")
_ORDER = (OWN_RULE, "actor", "best_q")
_QUANTITIES = {"return_mean": "Return", "score": "Score"}
_NUMBERS = ("env_steps", "episodes", *_QUANTITIES)
_DEFINITIONS = """\
Means over the seeds that count, at the step of the tables above, with the same intervals. Every rule plays the same
episodes: own, as the method acts in the tables above; actor, one sample of the actor alone; best_q, the candidate with
the largest Q. A dash: not recorded."""


def csv_rows(runs: Sequence[Run]) -> list[dict[str, str]]:
    """The rows of rules.csv: all evaluations, the method's own rule first; none where no run has another."""
    rows = []
    if not any(run.rules for run in runs):
        return rows
    for run in runs:
        identity = {"task": run.task, "method": run.method, "seed": str(run.seed)}
        named = [(OWN_RULE, row) for row in run.evaluations] + [(row.rule, row) for row in run.rules]
        for rule, row in sorted(named, key=lambda pair: (pair[1].env_steps, _rank(pair[0]))):
            values = {name: tables.csv_number(getattr(row, name)) for name in _NUMBERS}
            rows.append(identity | {"rule": rule} | values)
    return rows


def _rank(rule: str) -> tuple[int, str]:
    return (_ORDER.index(rule) if rule in _ORDER else len(_ORDER)), rule


def _rows_under(task: TaskSummary, method: str, rule: str) -> list[Evaluation]:
    """One evaluation a counting run that has one under another rule, at the step by which the run counts."""
    return [
        row
        for run, counted in task.scored[method].values()
        for row in run.rules
        if (row.env_steps, row.rule) == (counted.env_steps, rule)
    ]


def _estimate(task: TaskSummary, cell: Cell, rule: str, quantity: str) -> Estimate | None:
    if rule == OWN_RULE:
        # The same numbers, to the digit, as in the task's table.
        return cell.return_mean if quantity == "return_mean" else cell.scores.get("mean")
    return mean_of(_rows_under(task, cell.method, rule), quantity, generator(task.task, cell.method, rule, quantity))


def _wanting(task: TaskSummary, rules: Sequence[str]) -> list[str]:
    """Where a rule's mean is over fewer seeds than the method's own."""
    lines = []
    for cell in task.cells:
        for rule in rules:
            seeds = len(_rows_under(task, cell.method, rule))
            if 0 < seeds < len(cell.scored):
                lines.append(f"{task.task}/{cell.method}: {rule} is recorded for {seeds} of {len(cell.scored)} seeds.")
    return lines


def _task_table(task: TaskSummary) -> str:
    """One line a method, one column a quantity and rule; empty where no counting run has another rule."""
    found = {row.rule for runs in task.scored.values() for run, _ in runs.values() for row in run.rules}
    rules = sorted(found, key=_rank)
    if not rules:
        return ""
    columns = [(quantity, rule) for quantity in _QUANTITIES for rule in (OWN_RULE, *rules)]
    body = []
    for cell in task.cells:
        values = [tables.with_interval(_estimate(task, cell, rule, quantity)) for quantity, rule in columns]
        body.append([tables.escape_markdown(cell.method), *values])
    header = ["Method", *(f"{_QUANTITIES[quantity]}, {tables.escape_markdown(rule)}" for quantity, rule in columns)]
    parts = [f"### {tables.escape_markdown(task.task)}", tables.markdown_table(header, body)]
    parts += [tables.escape_markdown(line) for line in _wanting(task, rules)]
    return "\n\n".join(parts)


def markdown(result: Summary) -> list[str]:
    """The section of summary.md, in parts; nothing where no counting run has another rule."""
    found = [table for task in result.tasks if (table := _task_table(task))]
    return ["## Rules of acting", _DEFINITIONS, *found] if found else []
