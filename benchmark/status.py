"""Where the runs of a directory stand.

    python -m benchmark.status --out results/quick
    python -m benchmark.status --out results/quick --watch
    python -m benchmark.status --out results/quick --json

Exit status 0: every run is done; 1: some run is not; 2: no runs there.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from benchmark.launch.lease import STALE_SECONDS
from benchmark.store import SEED_DIRECTORY, STATES, RunPaths, read_json

STYLES = {
    "done": "green", "running": "cyan", "failed": "red", "diverged": "magenta", "timed-out": "red",
    "cancelled": "yellow",
}  # fmt: skip
WATCH_SECONDS = 2.0
FEW_RUNS = 30  # of which each gets a line while they are followed
SAY_SECONDS = 60.0  # between lines of progress where there is no terminal


def find_runs(out: Path) -> list[RunPaths]:
    """All runs below a directory, those that wait for data included, sorted."""
    files = [path for name in ("spec", "status") for path in out.glob(f"*/*/seed-*/{name}.json")]
    found = sorted({path.parent for path in files})
    return [RunPaths(folder) for folder in found if SEED_DIRECTORY.fullmatch(folder.name)]


def status_row(paths: RunPaths) -> dict[str, Any]:
    """Task, method, seed and the contents of `status.json`; a damaged file shows as state ``unknown``.

    A run that says it is running without a sign of life for `STALE_SECONDS` says so in its error.
    """
    task, method, seed = paths.root.parts[-3:]
    place = {"task": task, "method": method, "seed": int(seed.removeprefix("seed-")), "state": "unknown"}
    try:
        row = place | read_json(paths.status)
    except ValueError as error:
        return place | {"error": str(error)} | ({} if paths.status.exists() else {"state": "queued"})
    if row["state"] == "queued" and not paths.spec.exists():
        row["waits"] = True  # for data, a policy or a simulator
    if row["state"] == "running":
        silent = time.time() - max(row.get("heartbeat", 0.0), _heartbeat(paths.lock))
        if silent > STALE_SECONDS:
            row["silent"] = True
            row["error"] = f"no sign of life for {duration(silent)}; run the same command again to go on"
    return row


def _heartbeat(lock: Path) -> float:
    """When the holder of the lease said last that it is alive."""
    try:
        return lock.stat().st_mtime
    except OSError:
        return 0.0


def duration(seconds: float | None) -> str:
    """Seconds as h:mm:ss, or nothing."""
    if seconds is None:
        return ""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def status_table(rows: Sequence[dict[str, Any]]) -> Table:
    """One line a run."""
    table = Table("task", "method", "seed", "state", "progress", "steps", "score", "ETA", "error", box=None)
    for row in rows:
        score = row.get("score")
        table.add_row(
            row["task"],
            row["method"],
            str(row["seed"]),
            f"[{STYLES.get(row['state'], 'default')}]{row['state']}[/]",
            f"{row.get('iteration', 0)}/{row.get('iterations', '?')}",
            f"{row.get('env_steps') or 0:,}",
            "" if score is None else f"{score:.3f}",
            duration(row.get("eta_seconds")) if row["state"] == "running" else "",
            escape((row.get("error") or "")[:80]),
        )
    return table


def overview(rows: Sequence[dict[str, Any]]) -> Group:
    """What fits on a screen: one line a run for a few, else one a task and method and what went wrong."""
    if len(rows) <= FEW_RUNS:
        return Group(status_table(rows))
    wrong = [row for row in rows if row.get("error")]
    return Group(summary_table(rows), *([status_table(wrong[:FEW_RUNS])] if wrong else []))


def summary_table(rows: Sequence[dict[str, Any]]) -> Table:
    """One line a task and method: how many runs are in which state, their mean progress and score, the longest ETA."""
    present = [state for state in (*STATES, "unknown") if any(row["state"] == state for row in rows)]
    table = Table("task", "method", *present, "progress", "score", "ETA", box=None)
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["task"], row["method"]), []).append(row)
    for (task, method), members in groups.items():
        counts = [sum(row["state"] == state for row in members) for state in present]
        shares = [(row.get("iteration") or 0) / (row.get("iterations") or 1) for row in members]
        scores = [row["score"] for row in members if row.get("score") is not None]
        etas = [row["eta_seconds"] for row in members if row["state"] == "running" and row.get("eta_seconds")]
        table.add_row(
            task,
            method,
            *(f"[{STYLES.get(state, 'default')}]{n}[/]" if n else "" for state, n in zip(present, counts, strict=True)),
            f"{sum(shares) / len(shares):.0%}",
            f"{sum(scores) / len(scores):.3f}" if scores else "",
            duration(max(etas, default=None)),
        )
    return table


class ProgressPrinter:
    """Follows a set of runs with an estimate of the time left: a live table on a terminal, lines elsewhere.

    Elsewhere a line is printed per change of state, and one a minute. Use as a context manager.
    """

    def __init__(self, runs: Sequence[RunPaths]) -> None:
        self.runs, self.console = runs, Console()
        self.live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None
        self.states: dict[Path, str] = {}
        self.started = self.shown = self.said = time.monotonic()
        self.first_share: float | None = None

    def __enter__(self) -> ProgressPrinter:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shown = 0.0
        self.update()
        if self.live:
            self.live.stop()

    def update(self) -> None:
        """Show what changed since the last call, at most once a second."""
        now = time.monotonic()
        if now - self.shown < 1.0 or not self.runs:
            return
        self.shown = now
        rows = [status_row(paths) for paths in self.runs]
        summary = self._summary(rows, now)
        if self.live:
            self.live.update(Group(overview(rows), summary), refresh=True)
            return
        for paths, row in zip(self.runs, rows, strict=True):
            if self.states.get(paths.root, "queued") != row["state"]:
                score = "" if row.get("score") is None else f", score {row['score']:.3f}"
                error = f" ({row['error']})" if row.get("error") else ""
                name = f"{row['task']} {row['method']} seed {row['seed']}"
                self.console.print(f"{name}: {row['state']}{score}{error}", soft_wrap=True, markup=False)
                self.said = 0.0
            self.states[paths.root] = row["state"]
        if now - self.said >= SAY_SECONDS:
            self.console.print(summary, highlight=False)
            self.said = now

    def _summary(self, rows: Sequence[dict[str, Any]], now: float) -> str:
        """Runs done, and the time left at the mean pace of iterations so far."""
        total = sum(row.get("iterations") or 1 for row in rows)
        share = sum((row.get("iteration") or 0) for row in rows) / total
        done = f"{sum(row['state'] == 'done' for row in rows)} of {len(rows)} runs done"
        if self.first_share is None:
            self.first_share = share
        gained = share - self.first_share
        if gained <= 0:
            return done
        return f"{done}, about {duration((now - self.started) * (1 - share) / gained)} left"


@dataclass(frozen=True)
class Arguments:
    """Command line of `benchmark.status`."""

    out: Path
    """Directory of the runs."""
    watch: bool = False
    """Refresh until every run has ended."""
    json: bool = False
    """Print a JSON list instead of a table."""


def _goes_on(row: dict[str, Any]) -> bool:
    """Whether a run has not ended and somebody seems to execute it, or may soon."""
    return row["state"] in ("running", "queued") and not row.get("silent") and not row.get("waits")


def watch(runs: Sequence[RunPaths], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Show the runs, of which `rows` is the state, until every one has ended or Ctrl-C; returns their last state."""
    with Live(overview(rows), refresh_per_second=1) as live, suppress(KeyboardInterrupt):
        while any(_goes_on(row) for row in rows):
            time.sleep(WATCH_SECONDS)
            rows = [status_row(paths) for paths in runs]
            live.update(overview(rows))
    return rows


def main(arguments: Arguments) -> int:
    """Print the status; returns the exit status."""
    try:
        if arguments.watch and arguments.json:
            raise ValueError("--watch shows a table; --json is for a single look")
        runs = find_runs(arguments.out)
        if not runs:
            raise ValueError(f"no runs in {arguments.out}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = [status_row(paths) for paths in runs]
    if arguments.watch:
        rows = watch(runs, rows)
    elif arguments.json:
        print(json.dumps(rows, indent=2))
    else:
        console = Console(width=None if sys.stdout.isatty() else 160)
        console.print(summary_table(rows))
        console.print()
        console.print(status_table(rows))
    return 0 if all(row["state"] == "done" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments, description=__doc__, prog="python -m benchmark.status")))
