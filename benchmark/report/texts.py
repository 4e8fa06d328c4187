"""The report as Markdown and LaTeX, and the parts of its page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from benchmark import tables
from benchmark.report import page, rules, sections, table
from benchmark.report.cells import Summary
from benchmark.report.comparisons import Comparison
from benchmark.report.published import RERUN, SOURCES, Rerun, Source
from benchmark.report.records import Run
from benchmark.report.settings import settings_table
from benchmark.report.statistics import AGGREGATE_REPS, CURVE_REPS, MINIMUM_RUNS
from benchmark.report.table import Table, words

DEFINITIONS = f"""\
Score: the evaluation at the largest number of environment steps common to all methods of the task, normalised so that 1
is the reference (D4RL score / 100, kitchen return / 4, success rate). One run (seed) is one replication. IQM:
interquartile mean; median: median over tasks of the mean over seeds, hence the mean on one task; optimality gap: how
far scores fall short of 1 on average (lower is better). Area under curve: IQM of the mean of each run's learning curve
up to there; best checkpoint: IQM of each run's highest evaluation up to there, chosen by the number that it reports,
hence optimistic. Brackets: 95 % percentile intervals of a bootstrap over seeds, stratified by task
({AGGREGATE_REPS:,} resamples; curves and probabilities {CURVE_REPS:,}, curves pointwise); none is given where fewer
than {MINIMUM_RUNS} seeds count, and with few seeds they are too narrow. Offline data: whether expert data takes part in
fine-tuning."""
_COSTS = """\
Wall-clock and gradient steps are those spent up to the evaluation that counts, the mean over seeds; wall-clock includes
evaluations, also those by other rules where they are recorded. Steps and time to a
score: the median over seeds of the first evaluation at or above it, a dash where half or more never reach it; in
brackets how many do."""
_PAIRS = """\
Difference of IQM: the first less the second; on the same seeds both are of the same resampled seeds (paired), and
"higher in" counts the paired runs in which the first scores higher (ties half). Probability of improvement: that a run
of the first scores higher than one of the second, resampled independently, the mean over tasks."""
# Of a landscape page.
_PAGE_ROWS = 40
_RUN_COLUMNS = (
    "Task",
    "Method",
    "Seed",
    "State",
    "Source",
    "Env steps",
    "Score",
    "Wall-clock",
    "Error, notes",
    "Files",
)


@dataclass(frozen=True)
class Report:
    """All that a report says: the runs, their numbers, what a reader must know first, published runs to hold beside."""

    runs: Sequence[Run]
    summary: Summary
    pairs: Sequence[Comparison]
    warnings: Sequence[str]
    published: Sequence[Run]
    reruns: Sequence[Rerun] = ()

    @property
    def lead(self) -> str:
        """`4 runs: 3 done, 1 failed.`"""
        return f"{len(self.runs)} runs: {sections.states(Counter(run.state for run in self.runs))}."


def _settings(report: Report) -> list[Table]:
    found = (settings_table(report.runs, task.task, index) for index, task in enumerate(report.summary.tasks))
    return [one for one in found if one]


def settings_markdown(report: Report) -> str:
    """The settings of every method, task by task."""
    parts = ["# Settings", "From the specifications of the runs; where runs of a method differ, every value is listed."]
    for found in _settings(report):
        parts += [f"## {tables.escape_markdown(found.title)}", table.markdown(found)]
    return "\n\n".join(parts) + "\n"


def settings_latex(report: Report) -> str:
    """The settings as one LaTeX table a task."""
    caption = "Settings of every method, from the specifications of the runs."
    floats = [table.latex([found], caption, f"tab:{found.name}") for found in _settings(report)]
    return table.latex_file(floats)


def settings_rows(report: Report) -> list[dict[str, str]]:
    """The settings as rows of task, setting, method and value."""
    return [
        {"task": task.task, "setting": row[0].text, "method": method, "value": entry.text}
        for task, index in ((task, index) for index, task in enumerate(report.summary.tasks))
        if (found := settings_table(report.runs, task.task, index))
        for row in found.rows
        for method, entry in zip(found.columns[1:], row[1:], strict=True)
    ]


def markdown(report: Report) -> str:
    """summary.md."""
    summary = report.summary
    parts = ["# Benchmark report", report.lead]
    if report.warnings:
        shown = [f"- {tables.escape_markdown(line)}" for line in report.warnings]
        parts += ["## Warnings", "\n".join(shown)]
    parts += ["## Scores", DEFINITIONS, sections.MARKING]
    if len(summary.tasks) > 1 and not summary.aggregates:
        parts.append("No method has a score on every task.")
    blocks = [("", sections.score_tables(summary, report.pairs))]
    blocks.append((f"## Costs\n\n{_COSTS}", sections.cost_tables(summary)))
    several = sections.comparison_tables(summary, report.pairs)
    if several:
        blocks.append((f"## Pairs\n\n{_PAIRS}\n\n{sections.multiple_comparisons(report.pairs)}", several))
    for title, found in blocks:
        parts += [title] if title else []
        for one in found:
            parts += [f"### {tables.escape_markdown(one.title)}", table.markdown(one)]
    for found, origins in _published(report):
        parts += [f"## {found.title}", *origins, table.markdown(found)]
    parts += rules.markdown(summary)
    unscored = sections.unscored_table(summary)
    parts += ["## Runs without a score", table.markdown(unscored) if unscored else "None: every run counts."]
    return "\n\n".join(parts) + "\n"


def _published(report: Report) -> list[tuple[Table, tuple[str, ...]]]:
    """The tables of what was published, each with where it comes from."""
    found = [
        (sections.published_table(report.summary, report.published), SOURCES),
        (sections.rerun_table(report.summary, report.reruns), (RERUN,)),
    ]
    return [(one, _origins(sources)) for one, sources in found if one]


def _origins(sources: Sequence[Source]) -> tuple[str, ...]:
    return tuple(f"{one.label}: {one.origin}. Differences: {one.differences}." for one in sources)


def _floats(found: Sequence[Table], caption: str, label: str) -> list[str]:
    """As few LaTeX tables as hold `found` with at most `_PAGE_ROWS` rows each, but for a single one that has more."""
    pages: list[list[Table]] = []
    for one in found:
        if pages and sum(len(other.rows) + 1 for other in pages[-1]) + len(one.rows) <= _PAGE_ROWS:
            pages[-1].append(one)
        else:
            pages.append([one])
    parts = [f" Part {index} of {len(pages)}." if len(pages) > 1 else "" for index in range(1, len(pages) + 1)]
    labels = [label, *(f"{label}-{index}" for index in range(2, len(pages) + 1))]
    return [table.latex(page_, caption + part, name) for page_, part, name in zip(pages, parts, labels, strict=True)]


def latex(report: Report) -> str:
    """summary.tex: scores, costs and pairs, one table each."""
    summary = report.summary
    cells = [cell for task in summary.tasks for cell in task.cells]
    caption = (
        f"Normalised scores with 95 % stratified-bootstrap intervals (none below {MINIMUM_RUNS} seeds). "
        f"{sections.MARKING} {sections.lacking(cells)}"
    )
    floats = _floats(sections.score_tables(summary, report.pairs), caption, "tab:scores")
    caption = f"{_COSTS} {sections.lacking(cells)}".replace("\n", " ")
    floats += _floats(sections.cost_tables(summary), caption, "tab:costs")
    # All pairs on all tasks would not fit on a page: with several tasks, those over tasks alone.
    several = sections.comparison_tables(summary, report.pairs)[:1]
    if several:
        caption = f"{_PAIRS} {sections.multiple_comparisons(report.pairs)}".replace("\n", " ")
        floats += _floats(several, caption, "tab:pairs")
    return table.latex_file(floats)


def _run_table(runs: Sequence[Run]) -> Table:
    """Every run with links to its files, for a page that lies in the results directory's folder `report`."""
    rows = []
    for run in runs:
        wanted = ("run.log", "spec.json", "status.json", "curve.csv", "metrics.csv", "provenance.json")
        links = [(name, f"../{run.folder}/{name}") for name in wanted if name in run.files]
        last = run.evaluations[-1] if run.evaluations else None
        reached = (
            (table.whole(run.last_step), table.number(last.score), table.span(last.wall_seconds))
            if last
            else ((words(""),) * 3)
        )
        told = words("; ".join([*filter(None, [run.error]), *run.notes]))
        seed = table.Entry(str(run.seed), run.seed)
        names = (words(run.task), words(run.method), seed, words(run.state), words(run.source or "here"))
        rows.append((*names, *reached, told, table.Entry("", links=tuple(links))))
    return Table("runs", "Every run", _RUN_COLUMNS, tuple(rows), left=5)


def _provenance_table(runs: Sequence[Run]) -> Table | None:
    """How many runs share a commit, versions, a machine and a command."""
    groups: Counter[tuple[str, ...]] = Counter()
    for run in runs:
        if run.provenance:
            git, packages = run.provenance.get("git"), run.provenance.get("packages")
            git, packages = git if isinstance(git, dict) else {}, packages if isinstance(packages, dict) else {}
            command = run.provenance.get("command")
            shown = " ".join(map(str, command)) if isinstance(command, list) else ""
            versions = ", ".join(f"{name} {version}" for name, version in sorted(packages.items()) if version)
            commit = f"{str(git.get('commit'))[:12]}{' + changes' if git.get('dirty') else ''}"
            machine = [str(run.provenance.get(name) or "") for name in ("python", "cpu", "gpu", "platform")]
            groups[(commit, shown, versions, *machine)] += 1
    columns = ("Commit", "Command", "Packages", "Python", "Processor", "GPU", "Platform", "Runs")
    rows = tuple((*map(words, group), table.whole(count)) for group, count in sorted(groups.items()))
    return Table("provenance", "Where the runs come from", columns, rows, left=7) if rows else None


def html(report: Report, pictures: Sequence[page.Picture]) -> str:
    """index.html."""
    summary, pairs = report.summary, report.pairs
    scores = page.Section("summary", "Summary", (), tuple(sections.score_tables(summary, pairs)))
    rest = [page.Section("definitions", "What the numbers mean", (DEFINITIONS, sections.MARKING))]
    rest.append(page.Section("costs", "Costs", (_COSTS,), tuple(sections.cost_tables(summary))))
    several = tuple(sections.comparison_tables(summary, pairs))
    if several:
        rest.append(page.Section("pairs", "Pairs", (_PAIRS, sections.multiple_comparisons(pairs)), several))
    for found, origins in _published(report):
        rest.append(page.Section(f"{found.name}-section", found.title, origins, (found,)))
    acting = tuple(rules.found_tables(summary))
    if acting:
        rest.append(page.Section("rules", "Rules of acting", (rules.DEFINITIONS,), acting))
    unscored = sections.unscored_table(summary)
    if unscored:
        rest.append(page.Section("unscored", "Runs without a score", (), (unscored,)))
    rest.append(page.Section("runs-list", "Runs", (), (_run_table(report.runs),), folded=len(report.runs) > 30))
    settings = tuple(_settings(report))
    if settings:
        rest.append(page.Section("settings", "Settings", (), settings, folded=True))
    provenance = _provenance_table(report.runs)
    if provenance:
        rest.append(page.Section("provenance-section", "Provenance", (), (provenance,), folded=True))
    return page.render("Benchmark report", report.lead, report.warnings, scores, pictures, rest)
