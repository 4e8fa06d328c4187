"""How figures look: a colour and a marker a method, fonts, legends, files. Matplotlib's global state stays untouched.

In the vector graphics of the page, what is drawn in `INK` takes the page's colour of text, white its background.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmark.store import write_bytes
from benchmark.tables import printable

INK = "#111213"


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
    # Of the published curves.
    "dipo": Style("#88CCEE", "P"),
    "qsm": Style("#332288", "X"),
    "awr": Style("#999933", "<"),
    "rwr": Style("#AA4499", ">"),
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
RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    # Names come from directories: a dollar sign in one is no formula.
    "text.parse_math": False,
    "text.usetex": False,
}
LABEL_CHARACTERS = 48
LEGEND_LINE_INCHES = 0.19
# With what keeps dates and software versions out of the files.
_FORMATS: dict[str, dict[str, None]] = {"png": {"Software": None}, "pdf": {"CreationDate": None}}
_DPI = 140
_IDENTIFIER = re.compile(r'(\bid="|url\(#|href="#)')
# To a hundredth of a point; in attributes of places alone, never in what a text says.
_PLACES = re.compile(r' (?:d|x|y|transform)="[^"]*"')
_LONG_NUMBER = re.compile(r"(-?\d+\.\d\d)\d+")
_GROUP = re.compile(r'<g id="[^"]*"')


def _digest(method: str) -> bytes:
    return hashlib.sha256(method.encode("utf-8", "surrogatepass")).digest()


def style(method: str, taken: Collection[str] = ()) -> Style:
    """The style of `method`; one that is not known gets a style by its name alone, but for colours that are `taken`."""
    if method in _STYLES:
        return _STYLES[method]
    digest = _digest(method)
    turned = [_OTHER_COLOURS[(digest[0] + step) % len(_OTHER_COLOURS)] for step in range(len(_OTHER_COLOURS))]
    return Style(
        next((colour for colour in turned if colour not in taken), turned[0]),
        _OTHER_MARKERS[digest[1] % len(_OTHER_MARKERS)],
        _OTHER_LINES[digest[2] % len(_OTHER_LINES)],
    )


def styles(methods: Iterable[str]) -> dict[str, Style]:
    """The styles of all `methods` of a report; those not known get different colours while there are enough."""
    known = sorted(methods, key=lambda method: (method not in _STYLES, method))
    found: dict[str, Style] = {}
    for method in known:
        found[method] = style(method, [look.colour for look in found.values()])
    return found


def label(method: str, limit: int = LABEL_CHARACTERS) -> str:
    """A method's name in a figure. Matplotlib hides labels that begin with an underscore."""
    shown = printable(method, limit)
    return "\u200b" + shown if shown.startswith("_") else shown


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of a size in inches, to be filled within `mpl.rc_context(RC)`."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def legend_columns(names: Sequence[str], width: float) -> int:
    """The columns of a legend of `names` in as few lines as `width` inches allow, the lines about equally long."""
    for lines in range(1, len(names)):
        columns = math.ceil(len(names) / lines)
        # As matplotlib fills them: about 14.5 characters an inch, and 8 for the line of each entry.
        filled = np.array_split(np.array([len(name) for name in names]), columns)
        if sum(int(column.max()) + 8 for column in filled) <= 14.5 * width:
            return columns
    return 1


def handle(look: Style) -> Line2D:
    """A legend's sample of a method's line."""
    marker = look.marker or None
    return Line2D([], [], color=look.colour, linestyle=look.line, marker=marker, markersize=5, linewidth=1.8)


def legend(figure: Figure, entries: Mapping[str, Any], columns: int, title: str = "") -> None:
    """One legend below all panels; `entries` are handles by label."""
    if not entries:
        return
    box = figure.legend(
        list(entries.values()),
        list(entries),
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        columnspacing=1.4,
        handlelength=2.4,
        title=title or None,
    )
    box.get_title().set_fontsize(7.5)


@contextmanager
def _any_glyph() -> Iterator[None]:
    """Names may hold characters that the font lacks: they become boxes, which are for the eye to see."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        yield


def lay_out(figure: Figure) -> None:
    """Once here, not again for each format that the figure is saved in."""
    engine = figure.get_layout_engine()
    if engine is not None:
        with _any_glyph():
            engine.execute(figure)
    # "none" would leave a placeholder, for whose sake every file is drawn twice.
    figure.set_layout_engine(None)


def _render(figure: Figure, kind: str, metadata: dict[str, None]) -> bytes:
    content = io.BytesIO()
    with mpl.rc_context(RC), _any_glyph():
        figure.savefig(content, format=kind, dpi=_DPI, metadata=metadata)
    return content.getvalue()


def save(figure: Figure, directory: Path, stem: str) -> None:
    """Write `directory`/`stem`.png and .pdf; equal figures give equal bytes (no dates, no software version)."""
    for kind, metadata in _FORMATS.items():
        write_bytes(directory / f"{stem}.{kind}", _render(figure, kind, metadata))


def discard(directory: Path, stem: str) -> None:
    """Remove what an earlier `save` wrote, if anything."""
    for kind in _FORMATS:
        (directory / f"{stem}.{kind}").unlink(missing_ok=True)


def svg(figure: Figure, stem: str, title: str) -> str:
    """The figure as an `svg` element for a page that holds several: its identifiers begin with `stem`."""
    metadata: dict[str, None] = dict.fromkeys(("Date", "Creator", "Format", "Type"), None)
    text = _render(figure, "svg", metadata).decode("utf-8")
    text = text[text.index("<svg") :]
    # Nothing refers to groups.
    text = _GROUP.sub("<g", text)
    text = _PLACES.sub(lambda found: _LONG_NUMBER.sub(r"\1", found[0]), text)
    text = re.sub(r"\n\s+", "\n", text)
    text = _IDENTIFIER.sub(rf"\g<1>{stem}-", text)
    for old, new in (
        (INK, "currentColor"),
        ("fill: #ffffff", "fill: none"),
        ("stroke: #ffffff", "stroke: var(--page)"),
        ("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif"),
    ):
        text = text.replace(old, new)
    return text.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)
