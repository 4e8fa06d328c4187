"""Figures. A method has one colour and one marker everywhere; nothing here touches matplotlib's global state."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator

from benchmark.store import write_bytes
from benchmark.summary import Curve
from benchmark.tables import printable


@dataclass(frozen=True)
class Style:
    """How a method is drawn: colour, marker ("" for none) and line style."""

    colour: str
    marker: str
    line: Literal["-", "--", "-.", ":"] = "-"


# Okabe and Ito's palette: distinct with any common colour blindness, and in print by the markers.
_STYLES = {
    "otpr": Style("#D55E00", "o"),
    "dppo": Style("#0072B2", "s"),
    "idql": Style("#009E73", "^"),
    "dql": Style("#CC79A7", "D"),
    "dql-dppo": Style("#E69F00", "v"),
    "frozen": Style("#7F7F7F", "", "--"),
    "otpr-u": Style("#56B4E9", "P"),
    "otpr-m": Style("#882255", "X"),
    "otpr-u-expert": Style("#661100", "P", "--"),
    "otpr-relaxed": Style("#332288", "<"),
    "otpr-conditional": Style("#CCAA33", "<", "--"),
    "otpr-released": Style("#000000", ">"),
    "otpr-q": Style("#999933", "p"),
    "otpr-advantage": Style("#AA4499", "h"),
    "otpr-weighting": Style("#44AA99", "*"),
    "otpr-selection": Style("#117733", "d"),
}
# Paul Tol's muted palette, for methods from elsewhere.
_OTHER_COLOURS = ("#332288", "#88CCEE", "#44AA99", "#117733", "#999933", "#DDCC77", "#CC6677", "#882255", "#AA4499")
_OTHER_MARKERS = ("P", "X", "<", ">", "p", "h", "*", "d")
_OTHER_LINES: tuple[Literal["-", "-.", ":"], ...] = ("-", "-.", ":")
_RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "pdf.fonttype": 42,
    # Names come from directories: a dollar sign in one is no formula.
    "text.parse_math": False,
    "text.usetex": False,
}
_PANEL_INCHES = (3.0, 2.4)
_LEGEND_LINE_INCHES = 0.19
_LABEL_CHARACTERS = 36
_MARKERS_A_LINE = 7
# Bands of more curves than these would hide the curves: they get fainter.
_FULL_BANDS = 5
_BAND_ALPHA = 0.16
LABELS = {
    "return_mean": "Return",
    "success_rate": "Success rate",
    "score": "Normalised score",
}
# With what keeps dates and software versions out of the files.
_FORMATS: dict[str, dict[str, None]] = {"png": {"Software": None}, "pdf": {"CreationDate": None}}
_UNIT_QUANTITIES = ("success_rate",)


def style(method: str) -> Style:
    """The style of `method`; one that is not known gets a style by its name alone, the same in every report."""
    if method in _STYLES:
        return _STYLES[method]
    digest = hashlib.sha256(method.encode("utf-8", "surrogatepass")).digest()
    return Style(
        _OTHER_COLOURS[digest[0] % len(_OTHER_COLOURS)],
        _OTHER_MARKERS[digest[1] % len(_OTHER_MARKERS)],
        _OTHER_LINES[digest[2] % len(_OTHER_LINES)],
    )


@dataclass(frozen=True)
class Panel:
    """One task of a figure: its title, the column that it shows (a key of `LABELS`) and a curve a method."""

    title: str
    quantity: str
    curves: tuple[Curve, ...]


def _line(axes: Axes, curve: Curve, rank: int, last_step: float, band: float) -> None:
    """Draw one curve; `rank` staggers its markers, a curve of one point becomes a level line to `last_step`.

    The interval's `band` is the opacity it is drawn with.
    """
    look = style(curve.method)
    x, y = curve.env_steps, curve.estimate.value
    if len(x) == 1 and not look.marker:
        axes.plot([0, max(last_step, 1)], [y[0], y[0]], color=look.colour, linestyle=look.line, linewidth=1.5)
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
    axes.fill_between(x, curve.estimate.low, curve.estimate.high, color=look.colour, alpha=band, linewidth=0, zorder=2)


def _panel(axes: Axes, panel: Panel) -> None:
    last_step = max((float(curve.env_steps[-1]) for curve in panel.curves), default=1.0)
    band = _BAND_ALPHA * min(1.0, _FULL_BANDS / max(1, len(panel.curves)))
    for rank, curve in enumerate(panel.curves):
        _line(axes, curve, rank, last_step, band)
    axes.set_title(printable(panel.title, 34))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if panel.quantity in _UNIT_QUANTITIES:
        axes.set_ylim(-0.03, 1.03)
    if last_step < 1:
        axes.set_xlim(-1, 1)
    if not panel.curves:
        axes.set_xticks([])
        axes.text(0.5, 0.5, "no evaluation", transform=axes.transAxes, ha="center", va="center", color="#555555")


def _legend_columns(names: Sequence[str], width: float) -> int:
    """The columns of a legend of `names` in as few lines as `width` inches allow, the lines about equally long."""
    for lines in range(1, len(names)):
        columns = math.ceil(len(names) / lines)
        # As matplotlib fills them: about 14.5 characters an inch, and 8 for the line of each entry.
        filled = np.array_split(np.array([len(name) for name in names]), columns)
        if sum(int(column.max()) + 8 for column in filled) <= 14.5 * width:
            return columns
    return 1


def _legend(figure: Figure, names: Mapping[str, str], columns: int) -> None:
    if not names:
        return
    handles = []
    for method in names:
        look = style(method)
        marker = look.marker or None
        handles.append(
            Line2D([], [], color=look.colour, linestyle=look.line, marker=marker, markersize=5, linewidth=1.8)
        )
    figure.legend(
        handles,
        # Matplotlib hides labels that begin with an underscore.
        ["\u200b" + name if name.startswith("_") else name for name in names.values()],
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        columnspacing=1.4,
        handlelength=2.4,
    )


def _lay_out(figure: Figure) -> None:
    """Once here, not again for each format that the figure is saved in."""
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
    figure.set_layout_engine("none")


def curve_figure(panels: Sequence[Panel], labels: Mapping[str, str]) -> Figure:
    """One panel a task, pointwise IQM with its interval as a band, over environment steps, and one legend.

    Args:
        panels: at least one.
        labels: what the legend calls every method that any panel shows, in its order.

    Raises:
        ValueError: without panels.
    """
    if not panels:
        raise ValueError("a figure needs at least one panel")
    columns = min(len(panels), 3 if len(panels) <= 9 else 4)
    rows = math.ceil(len(panels) / columns)
    width, height = (4.8, 3.0) if len(panels) == 1 else _PANEL_INCHES
    names = {method: printable(label, _LABEL_CHARACTERS) for method, label in labels.items()}
    entries = _legend_columns(list(names.values()), width * columns)
    # Every further line of the legend makes the figure higher, not its panels lower.
    legend = 0.6 + _LEGEND_LINE_INCHES * (max(1, math.ceil(len(names) / entries)) - 1)
    with mpl.rc_context(_RC):
        figure = Figure(figsize=(width * columns, height * rows + legend), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(rows, columns, squeeze=False)
        for index, axes in enumerate(grid.flat):
            if index >= len(panels):
                axes.set_axis_off()
                continue
            _panel(axes, panels[index])
            first = index % columns == 0
            if first or panels[index].quantity != panels[index - 1].quantity:
                axes.set_ylabel(f"{LABELS[panels[index].quantity]} (IQM)")
            if index + columns >= len(panels):
                axes.set_xlabel("Environment steps")
        _legend(figure, names, entries)
        _lay_out(figure)
    return figure


def save(figure: Figure, directory: Path, stem: str) -> None:
    """Write `directory`/`stem`.png and .pdf; equal figures give equal bytes (no dates, no software version)."""
    for kind, metadata in _FORMATS.items():
        content = io.BytesIO()
        with mpl.rc_context(_RC):
            figure.savefig(content, format=kind, dpi=200, metadata=metadata)
        write_bytes(directory / f"{stem}.{kind}", content.getvalue())


def discard(directory: Path, stem: str) -> None:
    """Remove what an earlier `save` wrote, if anything."""
    for kind in _FORMATS:
        (directory / f"{stem}.{kind}").unlink(missing_ok=True)
