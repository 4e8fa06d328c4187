"""Rules of acting side by side: the method's own, and those that evaluations.csv records of the same episodes."""

from __future__ import annotations

from collections.abc import Sequence

from benchmark import tables
from benchmark.report.cells import Cell, Summary, TaskSummary
from benchmark.report.records import Evaluation, Run
from benchmark.report.statistics import Estimate
from benchmark.report.summary import generator, mean_of
from benchmark.report.table import Table, amount, words
from benchmark.report.table import markdown as as_markdown
from benchmark.store import OWN_RULE

COLUMNS = ("task", "method", "seed", "env_steps", "rule", "episodes", "return_mean", "score")
_ORDER = (OWN_RULE, "actor", "best_q")
_QUANTITIES = {"return_mean": "Return", "score": "Score"}
_NUMBERS = ("env_steps", "episodes", *_QUANTITIES)
DEFINITIONS = """\
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
        for item in task.scored[method].values()
        for row in item.run.rules
        if (row.env_steps, row.rule) == (item.evaluation.env_steps, rule)
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


def _task_table(task: TaskSummary, index: int) -> Table | None:
    """One line a method, one column a quantity and rule; None where no counting run has another rule."""
    found = {row.rule for runs in task.scored.values() for item in runs.values() for row in item.run.rules}
    rules = sorted(found, key=_rank)
    if not rules:
        return None
    columns = [(quantity, rule) for quantity in _QUANTITIES for rule in (OWN_RULE, *rules)]
    body = tuple(
        (words(cell.method), *(amount(_estimate(task, cell, rule, quantity)) for quantity, rule in columns))
        for cell in task.cells
    )
    header = ("Method", *(f"{_QUANTITIES[quantity]}, {rule}" for quantity, rule in columns))
    return Table(f"rules-{index}", task.task, header, body, " ".join(_wanting(task, rules)))


def found_tables(result: Summary) -> list[Table]:
    """One table for each task on which a counting run has another rule."""
    found = (_task_table(task, index) for index, task in enumerate(result.tasks))
    return [table for table in found if table]


def markdown(result: Summary) -> list[str]:
    """The section of summary.md, in parts; nothing where no counting run has another rule."""
    found = found_tables(result)
    parts = ["## Rules of acting", DEFINITIONS] if found else []
    for table in found:
        parts += [f"### {tables.escape_markdown(table.title)}", as_markdown(table)]
    return parts
