"""Text of tables: numbers for human eyes; names of unknown origin made harmless in CSV, Markdown, LaTeX and HTML."""

from __future__ import annotations

import csv
import html
import io
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

DASH = "\N{EN DASH}"
_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "_": r"\_",
    "%": r"\%",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
    DASH: "--",
    # After the end of a row, a bracket or a star would be taken for an argument of \\.
    "[": "{[}",
    "]": "{]}",
    "*": "{*}",
}


def printable(text: str, limit: int = 0) -> str:
    """Return `text` with every unprintable character (line breaks, lone surrogates) written as an escape.

    With `limit` > 0 the result is cut to that many characters, the last being an ellipsis.
    """
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    return shown if not limit or len(shown) <= limit else shown[: limit - 1] + "…"


def escape_latex(text: str) -> str:
    """Escape LaTeX's special characters in plain text, and keep double hyphens from becoming a dash.

    What pdfTeX's default fonts lack (all but ASCII and Latin letters with accents) becomes its code point.
    """
    escaped = "".join(_latex_character(c) for c in re.sub(r"-(?=-)", "-\0", printable(text)))
    return escaped.replace("\0", "{}")


def _latex_character(character: str) -> str:
    if character in _LATEX:
        return _LATEX[character]
    letter = unicodedata.normalize("NFD", character)[0]
    known = character.isascii() or (character <= "\u00ff" and letter.isascii() and letter.isalpha())
    return character if known else f"U+{ord(character):04X}"


def escape_html(text: str) -> str:
    """Plain text as text or as a quoted attribute of HTML."""
    return html.escape(printable(text))


def escape_markdown(text: str) -> str:
    """Escape what Markdown or HTML would interpret in plain text; the result is safe in a table cell."""
    escaped = re.sub(r"([\\`*_\[\]|~$#!])", r"\\\1", printable(text))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def number(value: float) -> str:
    """A value for human eyes: three decimals below 100, fewer above, a dash where it is not finite."""
    if not math.isfinite(value):
        return DASH
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.3f}"


def count(value: float) -> str:
    """A whole number for human eyes, a dash where it is not finite."""
    return f"{value:,.0f}" if math.isfinite(value) else DASH


def duration(seconds: float) -> str:
    """A length of time in seconds, minutes or hours."""
    if not math.isfinite(seconds):
        return DASH
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def csv_number(value: float) -> str:
    """A value that reads back to the same float; blank where it is not finite."""
    if not math.isfinite(value):
        return ""
    return str(int(value)) if value == int(value) and abs(value) < 2**53 else repr(float(value))


def csv_table(columns: Sequence[str], rows: Iterable[Mapping[str, str]]) -> str:
    """CSV text with a header and one line a row.

    Raises:
        ValueError: where a row has a column that `columns` has not.
    """
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(columns), lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table of cells that are already escaped; the first `left` columns are left-aligned, others right."""
    rule = [":--" if index < left else "--:" for index in range(len(header))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *rows])
