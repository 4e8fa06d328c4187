"""Tables as CSV, Markdown and LaTeX text, with names of unknown origin made harmless."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence

from benchmark.stats import Estimate

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
    '"': r"\textquotedbl{}",
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
    """Escape LaTeX's special characters in plain text, and keep double hyphens from becoming a dash."""
    escaped = "".join(_LATEX.get(c, c) for c in re.sub(r"-(?=-)", "-\0", printable(text)))
    return escaped.replace("\0", "{}")


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


def with_interval(estimate: Estimate | None) -> str:
    """`value [low, high]`, without the bracket where there is no interval, a dash where there is no estimate."""
    if estimate is None:
        return DASH
    if not (math.isfinite(estimate.low) and math.isfinite(estimate.high)):
        return number(estimate.value)
    return f"{number(estimate.value)} [{number(estimate.low)}, {number(estimate.high)}]"


def with_interval_latex(estimate: Estimate | None) -> str:
    """As `with_interval`, in LaTeX: numbers in mathematics mode, the interval smaller."""

    def mathematics(value: float) -> str:
        return f"${number(value).replace(',', '{,}')}$" if math.isfinite(value) else "--"

    if estimate is None:
        return "--"
    if not (math.isfinite(estimate.low) and math.isfinite(estimate.high)):
        return mathematics(estimate.value)
    return f"{mathematics(estimate.value)} {{\\scriptsize [{mathematics(estimate.low)}, {mathematics(estimate.high)}]}}"


def csv_number(value: float) -> str:
    """A value that reads back to the same float; blank where it is not finite."""
    if not math.isfinite(value):
        return ""
    return str(int(value)) if value == int(value) and abs(value) < 2**53 else repr(float(value))


def csv_table(columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> str:
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


def latex_table(
    header: Sequence[str], groups: Sequence[tuple[str, Sequence[Sequence[str]]]], caption: str, label: str
) -> str:
    """A `table` with booktabs rules: one titled group of rows after another.

    Args:
        header: column titles, already escaped.
        groups: (title, rows of cells), already escaped; an empty title prints no title line.
        caption: already escaped.
        label: for `\\ref`.
    """
    columns = "l" + "r" * (len(header) - 1)
    lines = [r"\begin{table}", r"\centering", f"\\caption{{{caption}}}", f"\\label{{{label}}}", r"\small"]
    lines += [f"\\begin{{tabular}}{{{columns}}}", r"\toprule", " & ".join(header) + r" \\"]
    for title, rows in groups:
        lines.append(r"\midrule")
        if title:
            lines.append(f"\\multicolumn{{{len(header)}}}{{l}}{{\\textit{{{title}}}}} \\\\")
        lines += [" & ".join(cells) + r" \\" for cells in rows]
    lines += [r"\bottomrule", r"\end{tabular}", r"\end{table}"]
    return "% needs \\usepackage{booktabs}\n" + "\n".join(lines) + "\n"
