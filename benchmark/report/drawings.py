"""Every figure of a report: what it shows, in words, as a picture and as the table behind it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from matplotlib.figure import Figure

from benchmark import tables
from benchmark.report import ablations, charts, curves, published
from benchmark.report.cells import ALL_TASKS, Summary, method_key
from benchmark.report.comparisons import Comparison
from benchmark.report.curves import Curve
from benchmark.report.figures import SCORE, SECONDS, SHARE, STEPS, Panel, curve_figure
from benchmark.report.records import Run
from benchmark.report.statistics import MINIMUM_RUNS, STATISTICS, Estimate
from benchmark.report.style import Style, styles

STEMS = (
    "curves",
    "curves_wall_clock",
    "sample_efficiency",
    "aggregates",
    "performance_profiles",
    "probability_of_improvement",
    "wall_clock",
    *ablations.ABLATIONS,
)
_BAND = f"Bands: pointwise 95 % bootstrap intervals over seeds, none under {MINIMUM_RUNS} seeds."
_CURVE_COLUMNS = ("panel", "method", "x", "value", "low", "high", "seeds", "quantity", "source")
_AGGREGATE_COLUMNS = ("method", "statistic", "value", "low", "high", "seeds")
_PAIR_COLUMNS = ("first", "second", "value", "low", "high")
_TIME_COLUMNS = ("task", "method", "part", "seconds", "seeds")
Rows = list[dict[str, str]]


@dataclass(frozen=True)
class Drawing:
    """One figure and the `rows` that it shows, as text by column; `stem` names its files."""

    stem: str
    title: str
    caption: str
    figure: Figure
    columns: tuple[str, ...]
    rows: Rows


def _row(columns: Sequence[str], *values: str) -> dict[str, str]:
    return dict(zip(columns, values, strict=True))


def _interval(estimate: Estimate) -> tuple[str, str, str]:
    return tables.csv_number(estimate.value), tables.csv_number(estimate.low), tables.csv_number(estimate.high)


def _curves(stem: str, title: str, caption: str, panels: Sequence[Panel], x: str, figure: Figure) -> Drawing:
    """A figure of curves and its points; `x` is the name of the column that holds their x."""
    columns = tuple(x if column == "x" else column for column in _CURVE_COLUMNS)
    rows: Rows = []
    for panel in panels:
        for curve in [*panel.curves, *panel.behind]:
            shown = curve.estimate
            for point in zip(curve.x, shown.value, shown.low, shown.high, strict=True):
                numbers = map(tables.csv_number, point)
                about = (str(curve.seeds), panel.quantity, curve.source)
                rows.append(_row(columns, panel.title, curve.method, *numbers, *about))
    return Drawing(stem, title, caption, figure, columns, rows)


def _labels(panels: Sequence[Panel]) -> dict[str, str]:
    shown = sorted({curve.method for panel in panels for curve in panel.curves}, key=method_key)
    return {method: method for method in shown}


def _footnote(panels: Sequence[Panel]) -> str:
    """Where the published curves of `panels` come from, and how their protocol differs."""
    notes = []
    for source in published.SOURCES:
        tasks = {published.counterpart(panel.title) for panel in panels for curve in panel.behind
                 if curve.source == source.label}  # fmt: skip
        if tasks:
            listed = ", ".join(sorted(tasks))
            notes.append(f"Dashed: published means on {listed} ({source.label}; {source.differences}).")
    return " ".join(notes)


def _learning(summary: Summary, behind: Sequence[Run], looks: Mapping[str, Style]) -> Iterator[Drawing]:
    """Learning curves by steps and by wall-clock, and those of each ablation."""
    panels, timed = [], []
    for task in summary.tasks:
        quantity = curves.curve_quantity(task)
        drawn = curves.curves(task, quantity)
        panels.append(Panel(task.task, quantity, tuple(drawn), tuple(curves.behind(task, behind, quantity))))
        timed.append(replace(panels[-1], curves=tuple(curves.by_wall_clock(task, drawn)), behind=()))
    note = _footnote(panels)
    text = f"Interquartile mean over the seeds that count, evaluated at the same steps. {_BAND} {note}".strip()
    figure = curve_figure(panels, _labels(panels), looks, STEPS, note)
    yield _curves("curves", "Learning curves", text, panels, "env_steps", figure)
    timed = [panel for panel in timed if panel.curves]
    if timed:
        text = f"The same against the mean wall-clock time of each evaluation, as recorded on the machine used. {_BAND}"
        figure = curve_figure(timed, _labels(timed), looks, SECONDS)
        yield _curves("curves_wall_clock", "Learning curves by wall-clock", text, timed, "wall_seconds", figure)
    for stem in ablations.ABLATIONS:
        labels = ablations.labels(stem, _labels(panels))
        if labels:
            kept = [replace(panel, behind=()) for panel in ablations.restrict(panels, labels)]
            title = stem.replace("_", ": ", 1).capitalize()
            text = f"The arms of one ablation alone. {_BAND}"
            yield _curves(stem, title, text, kept, "env_steps", curve_figure(kept, labels, looks))


def _where(summary: Summary) -> str:
    """The task, or how many there are."""
    if len(summary.pooled) == 1:
        return f"{summary.pooled[0].task}, {summary.pooled[0].env_steps or 0:,} env steps"
    return f"over {len(summary.pooled)} tasks"


def _over(summary: Summary) -> str:
    """The task, or all of them by name."""
    if len(summary.pooled) == 1:
        return f"on {_where(summary)}"
    return f"{_where(summary)}: {', '.join(task.task for task in summary.pooled)}"


def _distributions(summary: Summary, looks: Mapping[str, Style]) -> Iterator[Drawing]:
    """Sample efficiency and performance profiles over tasks (of one task: on it)."""
    over = _over(summary)

    def draw(stem: str, text: str, quantity: str, drawn: Sequence[Curve], x: str, x_label: str) -> Drawing:
        panels = [Panel(_where(summary), quantity, tuple(drawn))]
        figure = curve_figure(panels, _labels(panels), looks, x_label)
        return _curves(stem, stem.replace("_", " ").capitalize(), f"{text} {_BAND}", panels, x, figure)

    text = (
        f"Interquartile mean {over}. Scores between evaluations are interpolated linearly; x is the share of the "
        "budget at which each task is compared."
    )
    yield draw("sample_efficiency", text, "score", curves.sample_efficiency(summary), "share", SHARE)
    text = f"Share of all runs whose final score is above x ({over}). Higher is better everywhere."
    yield draw("performance_profiles", text, "above", curves.profiles(summary), "score", SCORE)


def _aggregates(summary: Summary, looks: Mapping[str, Style]) -> Drawing:
    over, cells = _over(summary), summary.aggregates
    rows = [_row(_AGGREGATE_COLUMNS, cell.method, name, *_interval(cell.scores[name]), str(len(cell.scored)))
            for cell in cells for name in STATISTICS]  # fmt: skip
    text = f"Final scores {over}. Bars: 95 % stratified-bootstrap intervals, none under {MINIMUM_RUNS} seeds."
    figure = charts.aggregate_figure(cells, looks, _where(summary))
    return Drawing("aggregates", "Aggregate scores", text, figure, _AGGREGATE_COLUMNS, rows)


def _improvement(summary: Summary, pairs: Sequence[Comparison]) -> Drawing:
    methods = [cell.method for cell in summary.aggregates]
    rows = [_row(_PAIR_COLUMNS, pair.first, pair.second, *_interval(pair.probability)) for pair in pairs]
    text = (
        f"Probability that a run of the row's method scores higher than one of the column's, mean over tasks "
        f"({_over(summary)}). "
        "Brackets: 95 % bootstrap intervals; a star: the interval leaves out 1/2 (unadjusted for the number of pairs)."
    )
    figure = charts.improvement_figure(pairs, methods, _where(summary))
    return Drawing("probability_of_improvement", "Probability of improvement", text, figure, _PAIR_COLUMNS, rows)


def _times(summary: Summary) -> Iterator[Drawing]:
    timed = [(task, cells) for task in summary.tasks if (cells := charts.timed_cells(task))]
    if not timed:
        return
    rows = [
        _row(_TIME_COLUMNS, task.task, cell.method, part, tables.csv_number(seconds), str(len(cell.scored)))
        for task, cells in timed
        for cell in cells
        for part, seconds in cell.seconds.items()
    ]
    text = "What the iterations of a whole run took, the mean over the seeds that count; start-up and saving left out."
    figure = charts.time_figure([(task.task, cells) for task, cells in timed])
    yield Drawing("wall_clock", "Where the time went", text, figure, _TIME_COLUMNS, rows)


def drawings(summary: Summary, pairs: Sequence[Comparison], behind: Sequence[Run]) -> Iterator[Drawing]:
    """Every figure that the runs have data for, one at a time.

    Args:
        summary: the numbers.
        pairs: as `comparisons.compare_all` returns them.
        behind: published runs to draw behind those of the summary.
    """
    looks = styles({method for task in summary.tasks for method in task.scored})
    yield from _learning(summary, behind, looks)
    if summary.aggregates:
        yield _aggregates(summary, looks)
        yield from _distributions(summary, looks)
    if len(summary.aggregates) > 1:
        scope = summary.pooled[0].task if len(summary.pooled) == 1 else ALL_TASKS
        yield _improvement(summary, [pair for pair in pairs if pair.task == scope])
    yield from _times(summary)
