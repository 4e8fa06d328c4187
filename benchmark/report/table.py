"""A table of the report, and how it reads as Markdown, LaTeX, CSV and HTML."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from benchmark import tables
from benchmark.report.statistics import Estimate


@dataclass(frozen=True)
class Entry:
    """One cell: `text` for human eyes, `number` to sort by, `estimate` if it has an interval, `links` (label, URL)."""

    text: str
    number: float = math.nan
    estimate: Estimate | None = None
    marked: bool = False
    links: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Table:
    """A titled table; `name` is fit for a file or an element's id, `note` is one paragraph of plain text.

    The first `left` columns hold words, the others numbers.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Entry, ...], ...]
    note: str = ""
    left: int = 1


def words(text: str, *links: tuple[str, str]) -> Entry:
    """Plain text, a dash where it is empty."""
    return Entry(text or tables.DASH, links=links)


def amount(estimate: Estimate | None, marked: bool = False) -> Entry:
    """`value [low, high]`, without the bracket where there is no interval, a dash where there is no estimate."""
    if estimate is None:
        return Entry(tables.DASH)
    text = tables.number(estimate.value)
    if _has_interval(estimate):
        text += f" [{tables.number(estimate.low)}, {tables.number(estimate.high)}]"
    return Entry(text, estimate.value, estimate, marked)


def number(value: float) -> Entry:
    """A number, a dash where it is not finite."""
    return Entry(tables.number(value), value)


def whole(value: float) -> Entry:
    """A whole number, a dash where it is not finite."""
    return Entry(tables.count(value), value)


def span(seconds: float) -> Entry:
    """A length of time."""
    return Entry(tables.duration(seconds), seconds)


def _has_interval(estimate: Estimate | None) -> bool:
    return estimate is not None and math.isfinite(estimate.low) and math.isfinite(estimate.high)


def markdown(table: Table) -> str:
    """The table and its note."""
    rows = []
    for row in table.rows:
        # Brackets of an interval are ours.
        shown = [entry.text if entry.estimate else tables.escape_markdown(entry.text) for entry in row]
        rows.append([f"**{text}**" if entry.marked else text for text, entry in zip(shown, row, strict=True)])
    header = [tables.escape_markdown(column) for column in table.columns]
    parts = [tables.markdown_table(header, rows, table.left)]
    if table.note:
        parts.append(tables.escape_markdown(table.note))
    return "\n\n".join(parts)


def csv_text(table: Table) -> str:
    """One row a row: numbers at full precision, with columns for the interval where any row has one."""
    columns: list[str] = []
    with_interval = [any(_has_interval(row[i].estimate) for row in table.rows) for i in range(len(table.columns))]
    for column, wide in zip(table.columns, with_interval, strict=True):
        columns += [column, f"{column} low", f"{column} high"] if wide else [column]
    rows = []
    for row in table.rows:
        values: list[str] = []
        for index, (entry, wide) in enumerate(zip(row, with_interval, strict=True)):
            is_number = index >= table.left and (math.isfinite(entry.number) or entry.text == tables.DASH)
            values.append(tables.csv_number(entry.number) if is_number else tables.printable(entry.text))
            if wide:
                estimate = entry.estimate or Estimate(math.nan, math.nan, math.nan)
                values += [tables.csv_number(estimate.low), tables.csv_number(estimate.high)]
        rows.append(dict(zip(columns, values, strict=True)))
    return tables.csv_table(columns, rows)


def _html_entry(entry: Entry, is_number: bool) -> str:
    shown = tables.escape_html(entry.text)
    if _has_interval(entry.estimate):
        value, bracket = shown.split(" [", 1)
        shown = f'{value} <span class="interval">[{bracket}</span>'
    if entry.marked:
        shown = f"<strong>{shown}</strong>"
    links = " ".join(
        f'<a href="{tables.escape_html(url)}">{tables.escape_html(label)}</a>' for label, url in entry.links
    )
    key = f' data-sort="{entry.number!r}"' if math.isfinite(entry.number) else ""
    kind = ' class="number"' if is_number else ""
    return f"<td{kind}{key}>{shown}{' ' + links if links else ''}</td>"


def html(table: Table) -> str:
    """A `table` element with a caption; its note is not part of it."""
    kinds = [' class="number"' if index >= table.left else "" for index in range(len(table.columns))]
    titles = zip(table.columns, kinds, strict=True)
    head = "".join(f'<th scope="col"{kind}>{tables.escape_html(column)}</th>' for column, kind in titles)
    body = "\n".join(
        "<tr>" + "".join(_html_entry(entry, index >= table.left) for index, entry in enumerate(row)) + "</tr>"
        for row in table.rows
    )
    caption = tables.escape_html(table.title)
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{caption}">'
        f'<table class="sortable" id="table-{table.name}">'
        f"<caption>{caption}</caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def _latex_number(value: float) -> str:
    return f"${tables.number(value).replace(',', '{,}')}$"


def _latex_entry(entry: Entry) -> str:
    if entry.estimate is None:
        shown = tables.escape_latex(entry.text)
        return rf"\textbf{{{shown}}}" if entry.marked else shown
    value = _latex_number(entry.estimate.value)
    shown = rf"\boldmath{value}" if entry.marked else value
    if _has_interval(entry.estimate):
        low, high = _latex_number(entry.estimate.low), _latex_number(entry.estimate.high)
        shown += rf" {{\scriptsize [{low}, {high}]}}"
    return f"{{{shown}}}" if entry.marked else shown


def latex(found: Sequence[Table], caption: str, label: str) -> str:
    """One `table` with booktabs rules; the tables `found` (one or more, equal columns) are its titled groups of rows.

    Args:
        found: the tables.
        caption: plain text.
        label: for `\\ref`.
    """
    columns = "l" * found[0].left + "r" * (len(found[0].columns) - found[0].left)
    header = " & ".join(tables.escape_latex(column) for column in found[0].columns)
    lines = [r"\begin{table}", r"\centering", rf"\caption{{{tables.escape_latex(caption)}}}", rf"\label{{{label}}}"]
    lines += [r"\scriptsize\setlength{\tabcolsep}{4pt}", rf"\begin{{tabular}}{{@{{}}{columns}@{{}}}}"]
    lines += [r"\toprule", header + r" \\"]
    for table in found:
        title = tables.escape_latex(table.title)
        lines += [r"\midrule", rf"\multicolumn{{{len(columns)}}}{{@{{}}l}}{{\textit{{{title}}}}} \\"]
        lines += [" & ".join(_latex_entry(entry) for entry in row) + r" \\" for row in table.rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"]) + "\n"


def latex_file(floats: Sequence[str]) -> str:
    r"""A file to \input into a document with booktabs, which can also be compiled by itself."""
    # Before a class is loaded there is no such environment.
    alone = [r"\ifx\table\undefined", r"\documentclass[10pt,landscape]{article}", r"\usepackage[margin=1cm]{geometry}"]
    alone += [r"\usepackage{booktabs}", r"\begin{document}\def\otprend{\end{document}}", r"\else\let\otprend\relax\fi"]
    return "\n".join(["% \\input this file into a document with booktabs, or compile it as it is", *alone, ""]) + (
        "\n".join(floats) + "\\otprend\n"
    )
