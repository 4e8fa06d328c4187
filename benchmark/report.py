"""Write tables and plots from whatever runs are in a results directory: `python -m benchmark.report --out DIR`."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from benchmark import ablations, collect, compare, plots, rules, summary, tables
from benchmark.collect import Run
from benchmark.stats import AGGREGATE_REPS, CURVE_REPS, MINIMUM_RUNS
from benchmark.store import CURVE_COLUMNS, write_text
from benchmark.summary import Cell, Summary

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
)
_DEFINITIONS = f"""\
Score: the evaluation at the largest number of environment steps common to all methods of the task, normalised so that 1
is the reference (D4RL score / 100, kitchen return / 4, success rate). One run (seed) is one replication. IQM:
interquartile mean; median: median over tasks of the mean over seeds, hence the mean on one task; optimality gap: how
far scores fall short of 1 on average (lower is better). Brackets: 95 % percentile intervals of a bootstrap over seeds,
stratified by task ({AGGREGATE_REPS:,} resamples; curves {CURVE_REPS:,}, pointwise); none is given where fewer than
{MINIMUM_RUNS} seeds count. Wall-clock and gradient steps are those spent up to the evaluation, the mean over seeds
(over tasks: the sum of these). Offline data: whether expert data takes part in fine-tuning."""


class NoEvaluationError(ValueError):
    """There are runs, but none has an evaluation yet."""


def _data_rows(runs: Sequence[Run]) -> list[dict[str, str]]:
    rows = []
    for run in runs:
        identity = {"task": run.task, "method": run.method, "seed": str(run.seed), "state": run.state}
        identity["offline_data"] = run.offline_data
        for evaluation in run.evaluations:
            values = {name: tables.csv_number(getattr(evaluation, name)) for name in CURVE_COLUMNS}
            rows.append(identity | values)
    return rows


def _write_rules(runs: Sequence[Run], path: Path) -> None:
    """Write rules.csv where any run has other rules, and leave none of an earlier report where none has."""
    rows = rules.csv_rows(runs)
    if rows:
        write_text(path, tables.csv_table(rules.COLUMNS, rows))
    else:
        path.unlink(missing_ok=True)


def _states(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {state}" for state, count in counts.items())


def _runs_cell(cell: Cell) -> str:
    """`3 of 3`, or `2 of 3 (1 failed)`; over tasks, what is wanting in all of them."""
    wanting = f" ({_states(cell.unscored)})" if cell.unscored else ""
    planned = f" of {cell.planned}" if cell.task != summary.ALL_TASKS else ""
    return f"{len(cell.scored)}{planned}{wanting}"


def _markdown_cells(cell: Cell) -> list[str]:
    scores = [tables.with_interval(cell.scores.get(name)) for name in ("iqm", "median", "mean", "optimality_gap")]
    cost = [tables.duration(cell.wall_seconds), tables.count(cell.gradient_steps)]
    returned = [] if cell.task == summary.ALL_TASKS else [tables.with_interval(cell.return_mean)]
    names = [tables.escape_markdown(cell.method), cell.offline_data or tables.DASH]
    return [*names, *scores, *returned, _runs_cell(cell), *cost]


def _markdown_scores(cells: Sequence[Cell], seeds_title: str) -> str:
    returned = [] if cells[0].task == summary.ALL_TASKS else ["Return"]
    costs = ["Wall-clock", "Gradient steps"]
    header = ["Method", "Offline data", "IQM", "Median", "Mean", "Optimality gap", *returned, seeds_title, *costs]
    return tables.markdown_table(header, [_markdown_cells(cell) for cell in cells], 2)


def _markdown_unscored(result: Summary) -> str:
    """The runs that do not count, and those that are not there."""
    rows = []
    for task in result.tasks:
        for run in task.unscored:
            reached = "none" if run.last_step < 0 else f"{run.last_step:,}"
            names = [tables.escape_markdown(text) for text in (run.task, run.method)]
            rows.append([*names, str(run.seed), run.state, reached, tables.escape_markdown(run.error) or tables.DASH])
        for method, seeds in task.missing:
            names = [tables.escape_markdown(text) for text in (task.task, method)]
            rows.append([*names, ", ".join(map(str, seeds)), summary.MISSING, "none", "no run directory"])
    if not rows:
        return "None: every run counts."
    return tables.markdown_table(["Task", "Method", "Seed", "State", "Last evaluation (env steps)", "Error"], rows, 6)


def _markdown_unfinished(result: Summary) -> list[str]:
    """Runs that count though they are not done."""
    found = [run for task in result.tasks for rows in task.scored.values() for run, _ in rows.values()]
    lines = []
    for run in sorted((run for run in found if run.state != "done"), key=lambda run: run.name):
        error = f": {run.error}" if run.error else ""
        lines.append(f"{run.name} counts, but is {run.state} (last evaluation at {run.last_step:,} env steps){error}")
    return lines


def _markdown(runs: Sequence[Run], result: Summary, notes: Sequence[str]) -> str:
    states = _states(dict(sorted(Counter(run.state for run in runs).items())))
    parts = ["# Benchmark report", f"{len(runs)} runs: {states}.", _DEFINITIONS]
    if len(result.tasks) > 1:
        parts.append(f"## Over {len(result.tasks)} tasks")
        if result.aggregates:
            parts.append(_markdown_scores(result.aggregates, "Seeds on every task (runs without score)"))
        else:
            parts.append("No method has a score on every task.")
    for task in result.tasks:
        parts.append(f"## {tables.escape_markdown(task.task)}")
        if task.env_steps is None:
            parts.append("No run of this task has an evaluation.")
        else:
            protocols = ", ".join(sorted({cell.protocol for cell in task.cells if cell.scored}))
            parts.append(f"At {task.env_steps:,} env steps; protocol: {tables.escape_markdown(protocols)}.")
        parts.append(_markdown_scores(task.cells, "Seeds"))
    parts += rules.markdown(result)
    parts += ["## Runs without a score", _markdown_unscored(result)]
    listed = [*notes, *result.notes, *_markdown_unfinished(result)]
    listed += [f"{run.name}: {note}" for run in runs for note in run.notes]
    if listed:
        parts += ["## Notes", "\n".join(f"- {tables.escape_markdown(line)}" for line in listed)]
    return "\n\n".join(parts) + "\n"


def _latex(result: Summary, seed_note: str) -> str:
    """One table: over tasks first (if there are several), then task by task; the caption counts what is wanting."""
    groups = []
    several = len(result.tasks) > 1
    if several and result.aggregates:
        groups.append((f"Over {len(result.tasks)} tasks", result.aggregates))
    for task in result.tasks:
        steps = "no evaluation" if task.env_steps is None else f"{task.env_steps:,} environment steps"
        groups.append((f"{tables.escape_latex(task.task)} ({steps})", task.cells))
    rows = []
    for title, cells in groups:
        body = []
        for cell in cells:
            named = [cell.scores.get(name) for name in ("iqm", "median", "mean", "optimality_gap")]
            values = [tables.with_interval_latex(estimate) for estimate in [*named, cell.return_mean]]
            names = [cell.method, cell.offline_data or tables.DASH]
            body.append([*map(tables.escape_latex, names), *values, tables.escape_latex(_runs_cell(cell))])
        rows.append((title, body))
    wanting = Counter[str]()
    for task in result.tasks:
        for cell in task.cells:
            wanting.update(cell.unscored)
    counted = f"Runs without a score: {_states(dict(sorted(wanting.items())))}." if wanting else "No run is wanting."
    caption = (
        "Normalised scores with 95\\,\\% stratified-bootstrap intervals "
        f"(none below {MINIMUM_RUNS} seeds). {tables.escape_latex(counted)} {tables.escape_latex(seed_note)}"
    )
    header = ["Method", "Offline data", "IQM", "Median", "Mean", "Optimality gap", "Return", "Seeds"]
    return tables.latex_table(header, rows, caption.strip(), "tab:summary")


def _draw_curves(result: Summary, directory: Path) -> None:
    panels = []
    for task in result.tasks:
        quantity = summary.curve_quantity(task)
        panels.append(plots.Panel(task.task, quantity, tuple(summary.curves(task, quantity))))
    shown = sorted({curve.method for panel in panels for curve in panel.curves}, key=summary.method_key)
    plots.save(plots.curve_figure(panels, {method: method for method in shown}), directory, "curves")
    for stem in ablations.ABLATIONS:
        labels = ablations.labels(stem, shown)
        if labels:
            plots.save(plots.curve_figure(ablations.restrict(panels, labels), labels), directory, stem)
        else:
            plots.discard(directory, stem)


def write_report(directory: Path) -> Path:
    """Write tables and plots of all runs below `directory` into `directory`/report, each file atomically.

    Returns:
        The report's directory.

    Raises:
        NoEvaluationError: where there are runs, but no evaluation of any.
        ValueError: where `directory` cannot be read or written, or holds no run.
    """
    found, notes = collect.read_runs(directory)
    runs, seed_note = compare.select_seeds(found)
    if not any(run.evaluations for run in runs):
        states = _states(dict(sorted(Counter(run.state for run in runs).items())))
        raise NoEvaluationError(f"no evaluation in {directory} yet: {len(runs)} run(s), {states}")
    result = summary.summarise(runs)
    report = directory / collect.REPORT
    try:
        report.mkdir(exist_ok=True)
        write_text(report / "data.csv", tables.csv_table(DATA_COLUMNS, _data_rows(runs)))
        rows = summary.csv_rows(result)
        _write_rules(runs, report / "rules.csv")
        write_text(report / "summary.csv", tables.csv_table(summary.COLUMNS, rows))
        lines = [seed_note, *notes] if seed_note else notes
        write_text(report / "summary.md", _markdown(runs, result, lines))
        write_text(report / "summary.tex", _latex(result, seed_note))
        _draw_curves(result, report)
    except OSError as error:
        raise ValueError(f"cannot write {error.filename or report}: {error.strerror}") from None
    return report


@dataclass(frozen=True)
class Arguments:
    """Write tables and plots from whatever runs are in a results directory, into DIR/report.

    Exit status: 0 the report is written; 1 no run has an evaluation yet; 2 there is nothing to read.

    Example: python -m benchmark.report --out results/quick
    """

    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Results directory, with runs in DIR/TASK/METHOD/seed-K."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with `arguments` (default: the process's); returns the exit status."""
    options = tyro.cli(Arguments, prog="python -m benchmark.report", args=arguments)
    try:
        report = write_report(options.out)
    except ValueError as error:
        print(f"benchmark.report: {tables.printable(str(error))}", file=sys.stderr)
        return 1 if isinstance(error, NoEvaluationError) else 2
    print(f"report: {tables.printable(str(report / 'summary.md'))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
