"""Reading run directories `DIR/TASK/METHOD/seed-K/`, whatever state a run, a kill or a stranger has left them in.

Only text is parsed (JSON, CSV). What cannot be used is left out and said so in the run's notes; a directory that looks
like a run is never dropped.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmark.store import STATES
from benchmark.tables import printable

UNKNOWN = "unknown"
REPORT = "report"
# The rule of acting that is the method's own: that of curve.csv.
OWN_RULE = "own"
_REQUIRED = ("iteration", "env_steps", "score")
_OPTIONAL = ("gradient_steps", "wall_seconds", "episodes", "return_mean", "return_std", "success_rate")
_RULE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,39}")
_SEED_DIRECTORY = re.compile(r"seed-(0|[1-9][0-9]{0,8})")
_MAX_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Evaluation:
    """One row of curve.csv or evaluations.csv. Counts are from the start of the run; what a row leaves blank is NaN."""

    iteration: int
    env_steps: int
    gradient_steps: float
    wall_seconds: float
    episodes: float
    return_mean: float
    return_std: float
    success_rate: float
    score: float
    rule: str = OWN_RULE


@dataclass(frozen=True)
class Run:
    """One run as its directory tells it.

    `evaluations` have distinct, ascending env_steps; `rules` are those under other rules of acting, by env_steps and
    name; `notes` say what was left out; `state` is one of `STATES` or `UNKNOWN`; `error` is empty where there is none;
    `offline_data` is "yes", "no" or, where the spec cannot be read, `UNKNOWN`.
    """

    task: str
    method: str
    seed: int
    state: str
    error: str
    protocol: str
    threads: str
    offline_data: str
    evaluations: tuple[Evaluation, ...]
    rules: tuple[Evaluation, ...]
    notes: tuple[str, ...]

    @property
    def name(self) -> str:
        """TASK/METHOD/seed-K, all printable."""
        return f"{self.task}/{self.method}/seed-{self.seed}"

    @property
    def last_step(self) -> int:
        """Environment steps of the last evaluation; -1 without any."""
        return self.evaluations[-1].env_steps if self.evaluations else -1

    def at(self, env_steps: int) -> Evaluation | None:
        """The evaluation at exactly `env_steps`, or None."""
        return next((e for e in self.evaluations if e.env_steps == env_steps), None)

    def before(self, env_steps: int) -> Evaluation | None:
        """The last evaluation at or before `env_steps`, or None."""
        return next((e for e in reversed(self.evaluations) if e.env_steps <= env_steps), None)


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


def _read_object(path: Path, notes: list[str]) -> dict[str, Any]:
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
class _Table:
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


_CURVE = _Table("curve.csv", _REQUIRED, _own_key)
_RULES = _Table("evaluations.csv", (*_REQUIRED, "rule"), _rule_key)


def _state(status: dict[str, Any], notes: list[str]) -> tuple[str, str]:
    state = status.get("state", UNKNOWN)
    if not isinstance(state, str) or state not in STATES:
        if status:
            notes.append(f"status.json has the unknown state {printable(str(state), 40)!r}")
        state = UNKNOWN
    error = status.get("error")
    return state, printable(str(error), 200) if error else ""


def _offline_data(spec: dict[str, Any]) -> str:
    """Whether expert data takes part in fine-tuning; specs from before it could do not have the key."""
    if not spec:
        return UNKNOWN
    return "yes" if spec.get("demonstrations_digest") else "no"


def read_run(directory: Path) -> Run:
    """Read one run directory `…/TASK/METHOD/seed-K`; its identity is its path, and a spec that differs is noted.

    Raises:
        ValueError: where the directory is not named seed-K.
    """
    match = _SEED_DIRECTORY.fullmatch(directory.name)
    if not match:
        raise ValueError(f"run directory {printable(directory.name)!r} is not named seed-K")
    seed = int(match.group(1))
    task, method = directory.parent.parent.name, directory.parent.name
    notes: list[str] = []
    spec = _read_object(directory / "spec.json", notes)
    for key, value in (("task", task), ("method", method), ("seed", seed)):
        if spec and spec.get(key) != value:
            notes.append(f"spec.json says {key} {printable(repr(spec.get(key)), 60)}")
    state, error = _state(_read_object(directory / "status.json", notes), notes)
    evaluations = _CURVE.read(directory, state, notes)
    # Optional: written only where the loop asks for it, and not before the first update.
    rules = _RULES.read(directory, state, notes) if (directory / _RULES.name).exists() else ()
    protocol = spec.get("protocol", UNKNOWN)
    return Run(
        task=printable(task),
        method=printable(method),
        seed=seed,
        state=state,
        error=error,
        protocol=printable(protocol if isinstance(protocol, str) else json.dumps(protocol, sort_keys=True), 200),
        threads=printable(str(spec.get("threads", UNKNOWN)), 40),
        offline_data=_offline_data(spec),
        evaluations=evaluations,
        rules=rules,
        notes=tuple(printable(note) for note in notes),
    )


def _subdirectories(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.is_dir() and not path.name.startswith("."))


def read_runs(directory: Path) -> tuple[list[Run], list[str]]:
    """Read every run below `directory`, in the order of task, method and seed.

    Returns:
        The runs, and one line for each directory in a run's place that is no run.

    Raises:
        ValueError: where `directory` does not exist, cannot be read or holds no run.
    """
    runs: list[Run] = []
    notes: list[str] = []
    try:
        if not directory.is_dir():
            raise ValueError(f"{directory} is not a directory")
        for task in (path for path in _subdirectories(directory) if path.name != REPORT):
            for path in (path for method in _subdirectories(task) for path in _subdirectories(method)):
                if _SEED_DIRECTORY.fullmatch(path.name):
                    runs.append(read_run(path))
                else:
                    notes.append(printable(f"{task.name}/{path.parent.name}/{path.name} is not named seed-K: left out"))
    except OSError as error:
        raise ValueError(f"cannot read {error.filename or directory}: {error.strerror}") from None
    if not runs:
        raise ValueError(f"no run in {directory}: expected {directory}/TASK/METHOD/seed-K/")
    return sorted(runs, key=lambda run: (run.task, run.method, run.seed)), notes
