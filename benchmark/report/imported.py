"""Learning curves from elsewhere: any CSV with the columns task, method, seed, env_steps and score."""

from __future__ import annotations

import csv
import math
import warnings
from pathlib import Path
from typing import Any

from benchmark.report.records import IMPORTED, UNKNOWN, Evaluation, Run
from benchmark.tables import printable

COLUMNS = ("task", "method", "seed", "env_steps", "score")
_KEY = ["task", "method", "seed", "env_steps"]
_COUNTS = {"seed": 2**31, "env_steps": 2**53}
_MAX_BYTES = 512 * 2**20
_NAN = float("nan")


def _check_header(path: Path) -> None:
    """Raises ValueError in one line where `path` cannot be read or lacks a column."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"{path} is larger than {_MAX_BYTES // 2**20} MiB")
        with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
            header = next(csv.reader([file.readline(100_000)]), [])
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except csv.Error as error:
        raise ValueError(f"{path} is not a CSV file: {error}") from None
    missing = [name for name in COLUMNS if name not in header]
    if missing:
        raise ValueError(f"{path} has no column {', '.join(missing)}; needed: {', '.join(COLUMNS)}")


def _read(path: Path) -> Any:
    """The needed columns as a data frame; fields beyond those of the header are ignored like other columns.

    Raises:
        ValueError: as `_check_header`, or where the rest cannot be parsed.
    """
    import pandas as pd  # slow to import, and needed here alone

    _check_header(path)
    with warnings.catch_warnings():
        # Words among the numbers of a long file: what is no number is counted later.
        warnings.simplefilter("ignore", pd.errors.DtypeWarning)
        try:
            return pd.read_csv(
                path,
                usecols=lambda name: name in COLUMNS,
                dtype={"task": "category", "method": "category"},
                keep_default_na=False,
                index_col=False,
                encoding="utf-8-sig",
                encoding_errors="replace",
            )
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is not a CSV file: {printable(str(error), 120)}") from None


def _clean(frame: Any, notes: list[str]) -> Any:
    """The rows that can be used, sorted; `notes` get a line on the others."""
    import pandas as pd

    for name in ("seed", "env_steps", "score"):
        frame[name] = pd.to_numeric(frame[name], errors="coerce")
    for name in ("task", "method"):
        frame[name] = frame[name].map(lambda text: printable(str(text).strip())).astype(str)
    usable = frame["score"].abs().lt(math.inf) & frame["task"].ne("") & frame["method"].ne("")
    for name, limit in _COUNTS.items():
        usable &= frame[name].between(0, limit) & frame[name].mod(1).eq(0)
    if not usable.all():
        first = int(usable.to_numpy().argmin()) + 2
        notes.append(
            f"{int((~usable).sum())} row(s) left out, without a usable number or name (the first near line {first})"
        )
    frame = frame.loc[usable]
    repeated = frame.duplicated(_KEY, keep="last")
    if repeated.any():
        notes.append(f"{int(repeated.sum())} row(s) left out, because a later one is of the same run and env_steps")
    frame = frame.loc[~repeated].astype({"seed": "int64", "env_steps": "int64", "score": "float64"})
    return frame.sort_values(_KEY)


def _run(identity: tuple[str, str, int], rows: Any, source: str) -> Run:
    pairs = zip(rows["env_steps"].tolist(), rows["score"].tolist(), strict=True)
    evaluations = tuple(
        Evaluation(index, steps, _NAN, _NAN, _NAN, _NAN, _NAN, _NAN, score)
        for index, (steps, score) in enumerate(pairs)
    )
    task, method, seed = identity
    return Run(task, method, seed, IMPORTED, "", f"imported: {source}", UNKNOWN, UNKNOWN, evaluations, source=source)


def read_curves(path: Path) -> tuple[list[Run], list[str]]:
    """Read `path`: one row an evaluation, `COLUMNS` alone counting; rows may come in any order.

    Returns:
        The runs, and one line for each kind of rows that were left out.

    Raises:
        ValueError: in one line, where `path` cannot be read, lacks a column or has no row that can be used.
    """
    notes: list[str] = []
    frame = _clean(_read(path), notes)
    if frame.empty:
        raise ValueError(f"{path} has no row that can be used" + (f": {notes[-1]}" if notes else ""))
    source = printable(path.name, 60)
    groups: Any = frame.groupby(_KEY[:3], sort=True)
    runs = [_run((task, method, int(seed)), rows, source) for (task, method, seed), rows in groups]
    return runs, [f"{source}: {note}" for note in notes]
