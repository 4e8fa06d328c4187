"""Learning curves: one panel a task."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator

from benchmark.report.curves import Curve
from benchmark.report.style import (
    LABEL_CHARACTERS,
    LEGEND_LINE_INCHES,
    RC,
    Style,
    handle,
    label,
    lay_out,
    legend,
    legend_columns,
    new_figure,
)
from benchmark.tables import printable

_PANEL_INCHES = (3.0, 2.4)
_MARKERS_A_LINE = 7
# Bands of more curves than these would hide the curves: they get fainter.
_FULL_BANDS = 5
_BAND_ALPHA = 0.16
LABELS = {
    "return_mean": "Return (IQM)",
    "success_rate": "Success rate (IQM)",
    "score": "Normalised score (IQM)",
    "above": "Share of runs above",
}
STEPS, SECONDS, SHARE, SCORE = "Environment steps", "Wall-clock seconds", "Share of the budget", "Normalised score"
_SMALL = 2.0
_UNIT_QUANTITIES = ("success_rate", "above")


@dataclass(frozen=True)
class Panel:
    """One panel: its title, what it shows (a key of `LABELS`), a curve a method, and published ones behind them."""

    title: str
    quantity: str
    curves: tuple[Curve, ...]
    behind: tuple[Curve, ...] = ()


def _line(axes: Axes, curve: Curve, look: Style, rank: int, last: float, band: float) -> None:
    """Draw one curve; `rank` staggers its markers, a curve of one point without marker becomes a level line to `last`.

    The interval's `band` is the opacity it is drawn with.
    """
    x, y = curve.x, curve.estimate.value
    if len(x) == 1 and not look.marker:
        axes.plot([0, max(last, 1)], [y[0], y[0]], color=look.colour, linestyle=look.line, linewidth=1.5)
        return
    spacing = max(1, math.ceil(len(x) / _MARKERS_A_LINE))
    axes.plot(
        x,
        y,
        color=look.colour,
        linestyle=look.line,
        marker=look.marker or None,
        markersize=4.5,
        markeredgecolor="white",
        markeredgewidth=0.5,
        markevery=(rank % spacing, spacing),
        linewidth=1.5,
        zorder=3,
    )
    if np.isfinite(curve.estimate.low).all():
        low, high = curve.estimate.low, curve.estimate.high
        axes.fill_between(x, low, high, color=look.colour, alpha=band, linewidth=0, zorder=2)


def _panel(axes: Axes, panel: Panel, looks: Mapping[str, Style]) -> None:
    last = max((float(curve.x[-1]) for curve in panel.curves), default=1.0)
    band = _BAND_ALPHA * min(1.0, _FULL_BANDS / max(1, len(panel.curves)))
    for curve in panel.behind:
        axes.plot(curve.x, curve.estimate.value, **_behind(looks[curve.method]))
    for rank, curve in enumerate(panel.curves):
        _line(axes, curve, looks[curve.method], rank, last, band)
    axes.set_title(printable(panel.title, 34))
    if last > _SMALL:
        # 250k and 4M for steps and seconds; shares and scores as they are.
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=last > _SMALL))
    if panel.quantity in _UNIT_QUANTITIES:
        axes.set_ylim(-0.03, 1.03)
    if last <= 0:
        axes.set_xlim(-1, 1)
    if not panel.curves:
        axes.set_xticks([])
        axes.text(0.5, 0.5, "no evaluation", transform=axes.transAxes, ha="center", va="center", color="#777777")


def _behind(look: Style) -> dict[str, Any]:
    return {"color": look.colour, "linestyle": (0, (4, 2)), "linewidth": 1.0, "alpha": 0.8, "zorder": 1}


def _entries(panels: Sequence[Panel], labels: Mapping[str, str], looks: Mapping[str, Style]) -> dict[str, Any]:
    """The legend: every method, then the published curves behind them."""
    entries: dict[str, Any] = {}
    for method, name in labels.items():
        shown = label(name)
        # Names that are alike as far as they are shown are told apart by their lines.
        while shown in entries:
            shown += " "
        entries[shown] = handle(looks[method])
    for curve in (curve for panel in panels for curve in panel.behind):
        entries[label(f"{curve.method}: {curve.source}", LABEL_CHARACTERS)] = Line2D(
            [], [], **_behind(looks[curve.method])
        )
    return entries


def curve_figure(
    panels: Sequence[Panel],
    labels: Mapping[str, str],
    looks: Mapping[str, Style],
    x_label: str = STEPS,
    footnote: str = "",
) -> Figure:
    """One panel a task, pointwise estimates with their intervals as bands, and one legend.

    Args:
        panels: at least one.
        labels: what the legend calls every method that any panel shows, in its order.
        looks: the style of each of these.
        x_label: of all panels.
        footnote: a line above the legend.

    Raises:
        ValueError: without panels.
    """
    if not panels:
        raise ValueError("a figure needs at least one panel")
    columns = min(len(panels), 3 if len(panels) <= 9 else 4)
    rows = math.ceil(len(panels) / columns)
    width, height = (4.8, 3.0) if len(panels) == 1 else _PANEL_INCHES
    entries = _entries(panels, labels, looks)
    fitting = legend_columns(list(entries), width * columns)
    title = "\n".join(textwrap.wrap(footnote, int(19 * width * columns)))
    # Every further line of the legend makes the figure higher, not its panels lower.
    lines = max(1, math.ceil(len(entries) / fitting)) - 1 + (title.count("\n") + 1 if title else 0)
    with mpl.rc_context(RC):
        figure = new_figure(width * columns, height * rows + 0.6 + LEGEND_LINE_INCHES * lines)
        grid = figure.subplots(rows, columns, squeeze=False)
        for index, axes in enumerate(grid.flat):
            if index >= len(panels):
                axes.set_axis_off()
                continue
            _panel(axes, panels[index], looks)
            first = index % columns == 0
            if first or panels[index].quantity != panels[index - 1].quantity:
                axes.set_ylabel(LABELS[panels[index].quantity])
            if index + columns >= len(panels):
                axes.set_xlabel(x_label)
        legend(figure, entries, fitting, title)
        lay_out(figure)
    return figure
