"""Figures of aggregates: intervals of each statistic, who beats whom, and where the time went."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from benchmark.report.cells import Cell, TaskSummary
from benchmark.report.comparisons import Comparison
from benchmark.report.statistics import STATISTICS
from benchmark.report.style import INK, RC, Style, label, lay_out, legend, new_figure
from benchmark.tables import printable

_TITLES = {"iqm": "IQM", "median": "Median", "mean": "Mean", "optimality_gap": "Optimality gap (lower is better)"}
_NAME_CHARACTERS = 22
# Of one hue each in any kind of colour blindness, told apart in grey by their lightness and hatches.
_PARTS = {
    "collect": ("#fdbb63", "", "collecting"),
    "update": ("#5e3c99", "", "updating"),
    "transport": ("#b2abd2", "////", "optimal transport (in updating)"),
    "evaluate": ("#777777", "", "evaluating"),
}
_PANELS_A_ROW = 3
_FEW_METHODS = 5


def _names(axes: Axes, methods: Sequence[str], shown: bool) -> None:
    """Methods from top to bottom along the y axis."""
    axes.set_yticks(range(len(methods)), [label(name, _NAME_CHARACTERS) if shown else "" for name in methods])
    axes.set_ylim(len(methods) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")


def aggregate_figure(cells: Sequence[Cell], looks: Mapping[str, Style], title: str) -> Figure:
    """One panel a statistic, one line a method: the interval as a bar, the estimate as the method's marker."""
    with mpl.rc_context(RC):
        figure = new_figure(9.6, 0.95 + 0.3 * len(cells))
        for index, (axes, name) in enumerate(zip(figure.subplots(1, len(STATISTICS)), STATISTICS, strict=True)):
            for row, cell in enumerate(cells):
                look, estimate = looks[cell.method], cell.scores[name]
                if math.isfinite(estimate.low):
                    width = estimate.high - estimate.low
                    axes.barh(row, width, left=estimate.low, height=0.55, color=look.colour, alpha=0.35, linewidth=0)
                axes.plot(estimate.value, row, color=look.colour, marker=look.marker or "|", markersize=6,
                          markeredgewidth=1.5 if not look.marker else 0.5)  # fmt: skip
            _names(axes, [cell.method for cell in cells], index == 0)
            axes.set_title(_TITLES[name], fontsize=9)
            # Bars otherwise end at the frame.
            axes.use_sticky_edges = False
            axes.margins(x=0.08)
        figure.supxlabel(printable(title, 110), fontsize=8)
        lay_out(figure)
    return figure


def improvement_figure(pairs: Sequence[Comparison], methods: Sequence[str], title: str) -> Figure:
    """A matrix of P(row > column), with intervals where there is room; a star marks those that leave out 1/2."""
    place = {method: index for index, method in enumerate(methods)}
    size = len(methods)
    values = np.full((size, size), np.nan)
    texts: dict[tuple[int, int], str] = {}
    for pair in pairs:
        first, second, p = place[pair.first], place[pair.second], pair.probability
        values[first, second], values[second, first] = p.value, 1.0 - p.value
        texts[first, second] = _probability(p.value, p.low, p.high, size)
        texts[second, first] = _probability(1.0 - p.value, 1.0 - p.high, 1.0 - p.low, size)
    with mpl.rc_context(RC):
        side = 0.95 if size <= _FEW_METHODS else 0.58
        figure = new_figure(max(3.4, 1.8 + side * size), max(2.6, 1.4 + 0.75 * side * size))
        axes = figure.subplots()
        axes.set_facecolor("#d0d0d0")
        colours = mpl.colormaps["PuOr_r"]
        # One patch a cell, not an image: sharp at any size, and small.
        axes.pcolormesh(np.arange(size + 1) - 0.5, np.arange(size + 1) - 0.5, values, cmap=colours, vmin=0, vmax=1,
                        edgecolors="face", linewidth=0.2)  # fmt: skip
        for (row, column), text in texts.items():
            dark = abs(values[row, column] - 0.5) > 0.3
            axes.text(column, row, text, ha="center", va="center", fontsize=8 if size <= _FEW_METHODS else 7,
                      color="#fefefe" if dark else "#121314")  # fmt: skip
        _names(axes, methods, True)
        names = [label(name, _NAME_CHARACTERS) for name in methods]
        # Upright as long as they have room side by side.
        slanted = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"}
        axes.set_xticks(range(size), names, **(slanted if max(map(len, names)) > 11 * side else {}))
        axes.set_xlim(-0.5, size - 0.5)
        axes.tick_params(length=0)
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        axes.set_title("P(row better than column)", fontsize=9)
        figure.supxlabel(printable(title, 60), fontsize=8)
        lay_out(figure)
    return figure


def _probability(value: float, low: float, high: float, size: int) -> str:
    star = "*" if low > 0.5 or high < 0.5 else ""
    if size > _FEW_METHODS or not math.isfinite(low):
        return f"{value:.2f}{star}"
    return f"{value:.2f}{star}\n[{low:.2f}, {high:.2f}]"


def _parts(cell: Cell) -> dict[str, float]:
    """Seconds by part, none counted twice: the transport is part of the update."""
    parts = dict(cell.seconds)
    if "transport" in parts and "update" in parts:
        parts["update"] = max(0.0, parts["update"] - parts["transport"])
    return parts


def timed_cells(task: TaskSummary) -> list[Cell]:
    """The methods whose runs record where their time went."""
    return [cell for cell in task.cells if any(cell.seconds.values())]


def time_figure(shown: Sequence[tuple[str, Sequence[Cell]]]) -> Figure:
    """One panel a task (its name and `timed_cells`), one stacked bar a method: mean minutes of a run."""
    columns = min(_PANELS_A_ROW, len(shown))
    rows = math.ceil(len(shown) / columns)
    most = max(len(cells) for _, cells in shown)
    with mpl.rc_context(RC):
        figure = new_figure(max(5.0, 3.3 * columns), 0.55 + (0.85 + 0.26 * most) * rows)
        grid = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axes, (task, cells) in zip(grid, shown, strict=False):
            for row, cell in enumerate(cells):
                left = 0.0
                for name, seconds in _parts(cell).items():
                    colour, hatch, _ = _PARTS[name]
                    axes.barh(row, seconds / 60.0, left=left, height=0.65, color=colour, hatch=hatch, edgecolor=INK,
                              linewidth=0.3)  # fmt: skip
                    left += seconds / 60.0
            _names(axes, [cell.method for cell in cells], True)
            axes.set_title(printable(task, 34))
        for axes in grid[max(0, len(shown) - columns) : len(shown)]:
            axes.set_xlabel("Minutes a run")
        for axes in grid[len(shown) :]:
            axes.set_axis_off()
        used = {name for _, cells in shown for cell in cells for name in cell.seconds}
        handles = {
            text: Patch(facecolor=colour, hatch=hatch, edgecolor=INK, linewidth=0.3)
            for name, (colour, hatch, text) in _PARTS.items()
            if name in used
        }
        legend(figure, handles, 4 if columns > 1 else 2)
        lay_out(figure)
    return figure
