"""The report as one HTML page that loads nothing else: it opens from disk, sorts by keyboard, in light and dark."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files

from benchmark.report import table
from benchmark.report.table import Table
from benchmark.tables import csv_table, escape_html

# Even a browser that would obey a hostile name may load nothing.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
_PREVIEW_ROWS = 50
_WIDTH = re.compile(r'\bwidth="([0-9.]+)pt"')
# Two figures stand side by side where neither is wider.
_BROAD_POINTS = 450.0


@dataclass(frozen=True)
class Picture:
    """A figure on the page: its vector graphics and the rows behind it, as text by column."""

    stem: str
    title: str
    caption: str
    svg: str
    columns: tuple[str, ...]
    rows: Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Section:
    """A titled part of the page: paragraphs, then tables; `folded` ones open on demand."""

    name: str
    title: str
    paragraphs: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    folded: bool = False


def _download(name: str, label: str, text: str) -> str:
    content = base64.b64encode(text.encode("utf-8")).decode("ascii")
    return f'<a download="{escape_html(name)}" href="data:text/csv;base64,{content}">{escape_html(label)}</a>'


def _table(found: Table) -> str:
    note = f'<p class="muted">{escape_html(found.note)}</p>' if found.note else ""
    download = _download(f"{found.name}.csv", "CSV", table.csv_text(found))
    return f'{table.html(found)}\n{note}<p class="files">{download}</p>'


def _picture(picture: Picture) -> str:
    links = [f'<a href="{picture.stem}.{kind}">{kind.upper()}</a>' for kind in ("png", "pdf")]
    links.append(_download(f"{picture.stem}.csv", "data (CSV)", csv_table(picture.columns, picture.rows)))
    preview = _preview(picture)
    width = _WIDTH.search(picture.svg)
    broad = ' class="broad"' if width and float(width[1]) > _BROAD_POINTS else ""
    return (
        f'<figure id="figure-{picture.stem}"{broad}><h3>{escape_html(picture.title)}</h3>\n{picture.svg}\n'
        f"<figcaption>{escape_html(picture.caption)}</figcaption>"
        f'<p class="files">{" · ".join(links)}</p>{preview}</figure>'
    )


def _shown(text: str) -> table.Entry:
    """A number to four digits, counts whole, anything else as it is."""
    try:
        value = float(text)
    except ValueError:
        return table.words(text)
    return table.Entry(text if value.is_integer() else f"{value:.4g}", value)


def _preview(picture: Picture) -> str:
    """The table behind a figure, folded; of a long one the first rows (all are in the download)."""
    rows = tuple(tuple(_shown(row[name]) for name in picture.columns) for row in picture.rows[:_PREVIEW_ROWS])
    total = len(picture.rows)
    title = picture.title if total <= _PREVIEW_ROWS else f"{picture.title}, rows 1 to {_PREVIEW_ROWS} of {total:,}"
    shown = table.html(Table(f"data-{picture.stem}", title, picture.columns, rows, left=len(picture.columns)))
    return f"<details><summary>Table of this figure</summary>\n{shown}</details>"


def _section(section: Section) -> str:
    body = "\n".join(
        [f"<p>{escape_html(' '.join(text.split()))}</p>" for text in section.paragraphs]
        + [_table(t) for t in section.tables]
    )
    if section.folded:
        body = f"<details><summary>Show</summary>\n{body}</details>"
    return f'<section id="{section.name}"><h2>{escape_html(section.title)}</h2>\n{body}</section>'


def _warnings(lines: Sequence[str]) -> str:
    if not lines:
        return '<section id="warnings"><h2>Warnings</h2><p>None.</p></section>'
    items = "\n".join(f"<li>{escape_html(line)}</li>" for line in lines)
    return f'<section id="warnings"><h2>Warnings</h2><ul class="warnings">\n{items}\n</ul></section>'


def render(
    title: str,
    lead: str,
    warnings: Sequence[str],
    summary: Section,
    pictures: Sequence[Picture],
    rest: Sequence[Section],
) -> str:
    """The whole page as text.

    Args:
        title: plain text, as all that follows but the pictures' graphics.
        lead: one paragraph below the title.
        warnings: a line each.
        summary: comes first.
        pictures: the figures, after the summary and the warnings.
        rest: what comes after them.
    """
    here = files("benchmark.report")
    style, script = ((here / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    parts = [(summary.name, summary.title), ("warnings", "Warnings"), ("figures", "Figures")]
    parts += [(section.name, section.title) for section in rest]
    links = "".join(f'<li><a href="#{name}">{escape_html(text)}</a></li>' for name, text in parts)
    figures = "\n".join(map(_picture, pictures))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<link rel="icon" href="data:,">
<title>{escape_html(title)}</title>
<style>
{style}</style>
</head>
<body>
<a class="skip" href="#{summary.name}">To the summary</a>
<header><h1>{escape_html(title)}</h1><button type="button" id="theme">Light / dark</button></header>
<p>{escape_html(lead)}</p>
<nav aria-label="Sections"><ul>{links}</ul></nav>
<main>
{_section(summary)}
{_warnings(warnings)}
<section id="figures"><h2>Figures</h2>
<div class="figures">
{figures}
</div></section>
{chr(10).join(map(_section, rest))}
</main>
<script>
{script}</script>
</body>
</html>
"""
