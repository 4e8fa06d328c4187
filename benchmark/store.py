"""Files of a run: one object names them all; every write goes to a temporary name and is renamed."""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import json
import os
import re
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CURVE_COLUMNS = (
    "iteration",
    "env_steps",
    "gradient_steps",
    "wall_seconds",
    "episodes",
    "return_mean",
    "return_std",
    "success_rate",
    "score",
)
RULE_COLUMNS = ("iteration", "env_steps", "rule", "episodes", "return_mean", "return_std", "success_rate", "score")
OWN_RULE = "own"  # how the method itself acts in evaluation
ENDED = ("done", "failed", "diverged", "timed-out")  # states that only being asked for again leaves
STATES = ("queued", "running", "done", "failed", "diverged", "timed-out", "cancelled")
SEED_DIRECTORY = re.compile(r"seed-(0|[1-9][0-9]{0,8})")

Guard = Callable[[], None]


def nothing() -> None:
    """The guard of files that only one process ever writes."""


@dataclass(frozen=True)
class RunPaths:
    """The directory of one run and the files in it."""

    root: Path

    @property
    def spec(self) -> Path:
        """Everything that decides the run."""
        return self.root / "spec.json"

    @property
    def curve(self) -> Path:
        """One row per evaluation."""
        return self.root / "curve.csv"

    @property
    def evaluations(self) -> Path:
        """One row per evaluation and other rule of acting, where the loop asks for them."""
        return self.root / "evaluations.csv"

    @property
    def metrics(self) -> Path:
        """One row per iteration."""
        return self.root / "metrics.csv"

    @property
    def status(self) -> Path:
        """State, attempt, heartbeat, error."""
        return self.root / "status.json"

    @property
    def provenance(self) -> Path:
        """Code, versions, machine, command."""
        return self.root / "provenance.json"

    @property
    def checkpoint(self) -> Path:
        """What a resume needs."""
        return self.root / "checkpoint.pt"

    @property
    def previous_checkpoint(self) -> Path:
        """The one before, for when the last is damaged; gone when the run is done."""
        return self.root / "checkpoint-previous.pt"

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is one to go on from."""
        return self.checkpoint.exists() or self.previous_checkpoint.exists()

    @property
    def lock(self) -> Path:
        """Held by the process that executes the run."""
        return self.root / "run.lock"

    def remove_leftovers(self) -> None:
        """Delete what processes that were killed while writing left; only for the holder of the lease."""
        for path in (self.checkpoint, self.curve, self.metrics, self.evaluations, self.status, self.provenance):
            for leftover in self.root.glob(f".{path.name}.*.tmp"):
                leftover.unlink(missing_ok=True)

    @property
    def log(self) -> Path:
        """Output of the process that executes the run."""
        return self.root / "run.log"


def run_paths(out: Path, task: str, method: str, seed: int) -> RunPaths:
    """The run's place below the output directory: TASK/METHOD/seed-K."""
    return RunPaths(out / task / method / f"seed-{seed}")


def write_bytes(path: Path, content: bytes | memoryview, keep: Path | None = None, guard: Guard = nothing) -> None:
    """Write through a temporary file of this process in the same directory, flushed to disk, then renamed.

    Args:
        keep: further name for the file that was there, if any.
        guard: called before the renaming, which it prevents by raising.

    Raises:
        OSError: as the file system says; the old content is then untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        guard()
        if keep is not None and path.exists():
            with contextlib.suppress(FileNotFoundError):
                keep.unlink()
            _link(path, keep)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _link(path: Path, name: Path) -> None:
    """A further name for a file; its new one where the file system knows no hard links."""
    try:
        os.link(path, name)
    except OSError:
        os.replace(path, name)


def write_text(path: Path, text: str, guard: Guard = nothing) -> None:
    """`write_bytes` of UTF-8 text."""
    write_bytes(path, text.encode(), guard=guard)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write an object as indented JSON."""
    write_text(path, _json_text(value))


def _json_text(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def create_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write an object as indented JSON where there is no file yet; one that is there stays, whoever wrote it when."""
    if path.exists():
        return
    fresh = path.with_name(f".{path.name}.{os.getpid()}.new")
    write_text(fresh, _json_text(value))
    try:
        os.link(fresh, path)
    except OSError:  # there is one by now, or the file system knows no hard links
        if not path.exists():
            os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def overwrite_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write an object into an existing file in place, for a full disk: the file's own blocks are used again.

    Raises:
        OSError: there is no such file, or not even this is possible.
    """
    with path.open("r+b") as file:
        file.write(_json_text(value).encode())
        file.truncate()
        file.flush()
        os.fsync(file.fileno())


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: missing file, or no JSON object in it.
    """
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: unreadable ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object")
    return value


def read_status(paths: RunPaths) -> dict[str, Any]:
    """A run's `status.json`, empty where there is none; state ``unknown`` where it stays unreadable for a moment.

    It may be just being replaced on another machine of a shared file system.
    """
    for wait in (0.2, 0.0):
        try:
            return read_json(paths.status) if paths.status.exists() else {}
        except ValueError:
            time.sleep(wait)
    return {"state": "unknown"}


def write_rows(
    path: Path, rows: Sequence[Mapping[str, Any]], columns: Iterable[str] = (), guard: Guard = nothing
) -> None:
    """Write rows as CSV: `columns` first, then whatever else the rows hold, in order of appearance; gaps stay empty."""
    header = dict.fromkeys(columns)
    for row in rows:
        header |= dict.fromkeys(row)
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(header), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue(), guard)


def save_checkpoint(paths: RunPaths, state: dict[str, Any], last: bool = False, guard: Guard = nothing) -> None:
    """Save a state of tensors and plain values, atomically; the checkpoint before it is kept beside it.

    Args:
        last: no further one follows, so that the one before is no longer needed.
        guard: see `write_bytes`.

    Raises:
        OSError: as the file system says; the old checkpoints are then untouched.
    """
    import torch  # here alone: most that reads a run's files needs none

    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_bytes(paths.checkpoint, buffer.getbuffer(), paths.previous_checkpoint, guard)
    if last:
        paths.previous_checkpoint.unlink(missing_ok=True)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Load a state without unpickling objects, after its checksums were compared.

    Raises:
        ValueError: truncated, damaged, or not a checkpoint.
        OSError, MemoryError: it could not be read, which says nothing about it.
    """
    import torch  # as above

    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"checksum of {damaged}")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno != errno.EINVAL):
            raise
        raise ValueError(f"{path}: unreadable checkpoint ({type(error).__name__}); delete it to start over") from error


def load_latest_checkpoint(paths: RunPaths, own: bool = False) -> dict[str, Any] | None:
    """The last checkpoint, or the one before where the last is damaged; None without any.

    Args:
        own: the caller holds the run's lease: a damaged one is deleted, lest the next save keep it as the one before.

    Raises:
        ValueError: there are checkpoints, and none is readable.
    """
    last, previous = paths.checkpoint, paths.previous_checkpoint
    if not previous.exists():
        return load_checkpoint(last) if last.exists() else None
    if not last.exists():  # killed between two renamings
        return load_checkpoint(previous)
    try:
        return load_checkpoint(last)
    except ValueError as error:
        state = load_checkpoint(previous)
        print(f"{error}; going on from {previous.name}")
    if own:
        last.unlink(missing_ok=True)
    return state
