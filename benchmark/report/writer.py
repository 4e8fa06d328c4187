"""Reading runs, imported and published curves, and writing the report about them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmark.report import collect, compare, guards, longform, page, published, rules, sections, style, texts
from benchmark.report.comparisons import compare_all
from benchmark.report.drawings import STEMS, drawings
from benchmark.report.exports import EXPORTS, check_exports
from benchmark.report.imported import read_curves
from benchmark.report.records import Run
from benchmark.report.summary import summarise
from benchmark.report.texts import Report
from benchmark.store import write_text
from benchmark.tables import csv_table, escape_html


class NoEvaluationError(ValueError):
    """There are runs, but none has an evaluation yet."""


@dataclass(frozen=True)
class Options:
    """What goes into a report beside the runs of its directory.

    Attributes:
        imports: CSV files with anybody's curves.
        published: whether published curves are drawn behind, or stand alone where there is no run.
        exports: further formats, names out of `EXPORTS`.
    """

    imports: tuple[Path, ...] = ()
    published: bool = False
    exports: tuple[str, ...] = ()


def _unique(runs: Sequence[Run]) -> None:
    """Raises ValueError where two runs have the same task, method and seed."""
    seen: dict[tuple[str, str, int], Run] = {}
    for run in runs:
        other = seen.setdefault((run.task, run.method, run.seed), run)
        if other is not run:
            places = " and ".join(repr(one.source or "the results directory") for one in (other, run))
            raise ValueError(f"{run.name} is in {places}: give one of them another method name")


def gather(directory: Path, options: Options) -> tuple[list[Run], list[Run], list[str]]:
    """The runs to report, the published ones to draw behind them, and notes on what was left out.

    Raises:
        ValueError: where `directory` or an imported file cannot be read, or there is no run at all.
    """
    runs: list[Run] = []
    notes: list[str] = []
    alone = bool(options.imports) or options.published
    if directory.exists() or not alone:
        runs, notes = collect.read_runs(directory)
    for path in options.imports:
        more, about = read_curves(path)
        runs, notes = runs + more, notes + about
    behind = published.read_published() if options.published else []
    if behind and not runs:
        runs, behind = behind, []
    if not runs:
        raise ValueError(f"no run in {directory}: expected {directory}/TASK/METHOD/seed-K/")
    _unique(runs)
    return sorted(runs, key=lambda run: (run.task, run.method, run.seed)), behind, notes


def make_report(directory: Path, options: Options) -> Report:
    """Read everything and reduce it to numbers; nothing is written.

    Raises:
        NoEvaluationError: where there are runs, but no evaluation of any.
        ValueError: as `gather`, or an export whose package is missing.
    """
    check_exports(options.exports)
    found, behind, notes = gather(directory, options)
    runs, seed_note = compare.select_seeds(found)
    if not any(run.evaluations for run in runs):
        states = sections.states(Counter(run.state for run in runs))
        raise NoEvaluationError(f"no evaluation in {directory} yet: {len(runs)} run(s), {states}")
    summary = summarise(runs)
    warnings = [seed_note] if seed_note else []
    warnings += [*guards.warnings(summary, runs), *notes]
    warnings += [f"{run.name}: {note}" for run in runs for note in run.notes]
    reruns = published.read_reruns() if options.published else []
    return Report(runs, summary, compare_all(summary), warnings, behind, reruns)


def _write_tables(report: Report, folder: Path) -> None:
    summary = report.summary
    write_text(folder / "data.csv", csv_table(longform.DATA_COLUMNS, longform.data_rows(report.runs)))
    csv_files = {
        "summary.csv": (longform.SUMMARY_COLUMNS, longform.summary_rows(summary, report.pairs)),
        "comparisons.csv": (longform.PAIR_COLUMNS, longform.pair_rows(report.pairs)),
        "settings.csv": (("task", "setting", "method", "value"), texts.settings_rows(report)),
        "rules.csv": (rules.COLUMNS, rules.csv_rows(report.runs)),
    }
    for name, (columns, rows) in csv_files.items():
        # None of an earlier report is left where this one has none.
        if rows:
            write_text(folder / name, csv_table(columns, rows))
        else:
            (folder / name).unlink(missing_ok=True)
    write_text(folder / "summary.md", texts.markdown(report))
    write_text(folder / "summary.tex", texts.latex(report))
    for name, text in (("settings.md", texts.settings_markdown), ("settings.tex", texts.settings_latex)):
        if csv_files["settings.csv"][1]:
            write_text(folder / name, text(report))
        else:
            (folder / name).unlink(missing_ok=True)


def _draw(report: Report, folder: Path) -> list[page.Picture]:
    """Write every figure and return them for the page."""
    pictures = []
    for one in drawings(report.summary, report.pairs, report.published):
        style.save(one.figure, folder, one.stem)
        graphics = style.svg(one.figure, one.stem, escape_html(one.title))
        pictures.append(page.Picture(one.stem, one.title, one.caption, graphics, one.columns, one.rows))
    for stem in set(STEMS) - {picture.stem for picture in pictures}:
        style.discard(folder, stem)
    return pictures


def write_report(directory: Path, options: Options | None = None) -> Path:
    """Write tables, plots and page of all runs below `directory` into `directory`/report, each file atomically.

    Returns:
        The report's directory.

    Raises:
        NoEvaluationError: where there are runs, but no evaluation of any.
        ValueError: where something cannot be read or written, or there is no run; before anything is written.
    """
    options = options or Options()
    report = make_report(directory, options)
    folder = directory / collect.REPORT
    try:
        folder.mkdir(exist_ok=True, parents=True)
        _write_tables(report, folder)
        pictures = _draw(report, folder)
        write_text(folder / "index.html", texts.html(report, pictures))
        for name in options.exports:
            EXPORTS[name].write(report.runs, folder)
    except OSError as error:
        raise ValueError(f"cannot write {error.filename or folder}: {error.strerror}") from None
    return folder
