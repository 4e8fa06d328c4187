"""Parsing the files of a run, whatever a kill or a stranger has left in them.

Only text is parsed (JSON, CSV). What cannot be used is left out, and a note says so.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmark.report.records import TIMES, Evaluation
from benchmark.store import OWN_RULE
from benchmark.tables import printable

_REQUIRED = ("iteration", "env_steps", "score")
_OPTIONAL = ("gradient_steps", "wall_seconds", "episodes", "return_mean", "return_std", "success_rate")
_RULE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,39}")
_MAX_BYTES = 64 * 2**20


def _read_text(path: Path) -> str:
    """The text of a regular file of bounded size; raises ValueError in one line, without the path, otherwise."""
    if not path.exists():
        raise ValueError("is missing")
    if not path.is_file():
        raise ValueError("is not a regular file")
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"is larger than {_MAX_BYTES // 2**20} MiB")
    try:
        return path.read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None


def read_object(path: Path, notes: list[str]) -> dict[str, Any]:
    """The JSON object in `path`; an empty one, and a note, where there is none."""
    try:
        value = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        reason = "is not JSON" if isinstance(error, (json.JSONDecodeError, RecursionError)) else str(error)
        notes.append(f"{path.name} {reason}")
        return {}
    if not isinstance(value, dict):
        notes.append(f"{path.name} is not a JSON object")
        return {}
    return value


def _integer(text: str) -> int:
    value = float(text)
    if not math.isfinite(value) or value != int(value) or not 0 <= value <= 2**53:
        raise ValueError(f"{printable(text, 40)!r} is not a count")
    return int(value)


def _evaluation(cells: list[str], header: list[str]) -> Evaluation:
    """One parsed row; raises ValueError in one line where it cannot be used."""
    if len(cells) != len(header):
        raise ValueError(f"{len(cells)} fields instead of {len(header)}")
    row = dict(zip(header, (cell.strip() for cell in cells), strict=True))
    iteration, env_steps = _integer(row["iteration"]), _integer(row["env_steps"])
    score = float(row["score"])
    if not math.isfinite(score):
        raise ValueError(f"score {printable(row['score'], 40)!r} is not finite")
    optional = {name: float(row[name]) if row.get(name) else math.nan for name in _OPTIONAL}
    return Evaluation(iteration=iteration, env_steps=env_steps, score=score, rule=row.get("rule", OWN_RULE), **optional)


def _own_key(row: Evaluation) -> Hashable:
    return row.env_steps


def _rule_key(row: Evaluation) -> Hashable:
    """Raises ValueError in one line where the row has no usable name of a rule."""
    if row.rule == OWN_RULE or not _RULE_NAME.fullmatch(row.rule):
        raise ValueError(f"{printable(row.rule, 40)!r} is not the name of another rule")
    return row.env_steps, row.rule


@dataclass(frozen=True)
class EvaluationTable:
    """A CSV file of evaluations: the columns it must have and what tells its rows apart."""

    name: str
    required: tuple[str, ...]
    key: Callable[[Evaluation], Hashable]

    def parse(self, text: str, finished: bool, notes: list[str]) -> tuple[Evaluation, ...]:
        """The rows that can be used, by env_steps and rule; `notes` get one line on the others."""
        lines = text.split("\n")
        header = [cell.strip() for cell in lines[0].split(",")]
        missing = [name for name in self.required if name not in header]
        if missing:
            notes.append(f"{self.name} has no column {', '.join(missing)}: not used")
            return ()
        found: dict[Hashable, Evaluation] = {}
        ignored: list[str] = []
        for index, line in enumerate(lines[1:], start=2):
            if not line.strip():
                continue
            try:
                # A last line without line break may have lost digits, unless its run says that it is complete.
                if index == len(lines) and not finished:
                    raise ValueError("half-written")
                row = _evaluation(line.split(","), header)
                key = self.key(row)
            except ValueError as error:
                ignored.append(f"line {index}: {printable(str(error), 80)}")
                continue
            if key in found:
                ignored.append(f"line {index}: replaces an earlier evaluation at {row.env_steps} steps")
            found[key] = row
        if ignored:
            more = f" and {len(ignored) - 3} more" if len(ignored) > 3 else ""
            notes.append(f"{self.name}: {len(ignored)} row(s) left out ({'; '.join(ignored[:3])}{more})")
        return tuple(sorted(found.values(), key=lambda row: (row.env_steps, row.rule)))

    def read(self, directory: Path, state: str, notes: list[str]) -> tuple[Evaluation, ...]:
        """Parse the file in `directory`; nothing, and a note where that is not as it should be, without it."""
        try:
            return self.parse(_read_text(directory / self.name), state == "done", notes)
        except ValueError as problem:
            if state != "queued":
                notes.append(f"{self.name} {problem}")
            return ()


CURVE = EvaluationTable("curve.csv", _REQUIRED, _own_key)
RULES = EvaluationTable("evaluations.csv", (*_REQUIRED, "rule"), _rule_key)


def read_seconds(path: Path) -> dict[str, float]:
    """The sums of the columns time/... of a metrics.csv, by name out of `TIMES`; nothing where it cannot be read.

    Rows that are damaged are left out: they are of no more weight than one iteration each.
    """
    try:
        header, *lines = _read_text(path).splitlines()
    except ValueError:
        return {}
    columns = header.split(",")
    wanted = {name: columns.index(f"time/{name}") for name in TIMES if f"time/{name}" in columns}
    rows = [cells for line in lines if len(cells := line.split(",")) == len(columns)]
    return {name: _sum(rows, index) for name, index in wanted.items()}


def _sum(rows: list[list[str]], index: int) -> float:
    """The sum of what is a finite number in column `index`."""
    total = 0.0
    for cells in rows:
        try:
            value = float(cells[index] or 0.0)
        except ValueError:
            continue
        total += value if math.isfinite(value) else 0.0
    return total
