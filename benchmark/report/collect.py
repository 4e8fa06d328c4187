"""Reading run directories `DIR/TASK/METHOD/seed-K/`, whatever state a run, a kill or a stranger has left them in.

A directory that looks like a run is never dropped: what cannot be used of it is said in the run's notes.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

from benchmark.report.parsing import CURVE, RULES, read_object, read_seconds
from benchmark.report.records import UNKNOWN, Run
from benchmark.store import SEED_DIRECTORY, STATES, RunPaths
from benchmark.tables import printable

REPORT = "report"


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
    match = SEED_DIRECTORY.fullmatch(directory.name)
    if not match:
        raise ValueError(f"run directory {printable(directory.name)!r} is not named seed-K")
    seed = int(match.group(1))
    task, method = directory.parent.parent.name, directory.parent.name
    notes: list[str] = []
    paths = RunPaths(directory)
    about_status: list[str] = []
    status = read_object(paths.status, about_status)
    waits = status.get("state") == "queued" and not paths.spec.exists()  # for data, which its spec will name
    spec = read_object(paths.spec, [] if waits else notes)
    for key, value in (("task", task), ("method", method), ("seed", seed)):
        if spec and spec.get(key) != value:
            notes.append(f"spec.json says {key} {printable(repr(spec.get(key)), 60)}")
    notes += about_status
    state, error = _state(status, notes)
    evaluations = CURVE.read(directory, state, notes)
    # Optional: written only where the loop asks for it, and not before the first update.
    rules = RULES.read(directory, state, notes) if paths.evaluations.exists() else ()
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
        folder="/".join(quote(os.fsencode(part)) for part in directory.parts[-3:]),
        files=tuple(sorted(os.listdir(directory))),
        spec=spec,
        # Runs of other programs may have none, which is no damage.
        provenance=read_object(paths.provenance, []),
        seconds=read_seconds(paths.metrics),
    )


def _subdirectories(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.is_dir() and not path.name.startswith("."))


def read_runs(directory: Path) -> tuple[list[Run], list[str]]:
    """Read every run below `directory`, in the order of task, method and seed.

    Returns:
        The runs, and one line for each directory in a run's place that is no run.

    Raises:
        ValueError: where `directory` does not exist or cannot be read.
    """
    runs: list[Run] = []
    notes: list[str] = []
    try:
        if not directory.is_dir():
            raise ValueError(f"{directory} is not a directory")
        for task in (path for path in _subdirectories(directory) if path.name != REPORT):
            for path in (path for method in _subdirectories(task) for path in _subdirectories(method)):
                if SEED_DIRECTORY.fullmatch(path.name):
                    runs.append(read_run(path))
                else:
                    notes.append(printable(f"{task.name}/{path.parent.name}/{path.name} is not named seed-K: left out"))
    except OSError as error:
        raise ValueError(f"cannot read {error.filename or directory}: {error.strerror}") from None
    return sorted(runs, key=lambda run: (run.task, run.method, run.seed)), notes
