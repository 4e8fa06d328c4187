"""Measure the throughput of each part on this machine, beside what a user would otherwise have.

    python -m benchmark.speed
    python -m benchmark.speed --parts physics matmul --threads 2
    python -m benchmark.speed --parts growth profile
    python -m benchmark.speed --parts iteration --compiled
    python -m benchmark.speed --full --json speed.json

Everything that is compared runs in turns (A B A B ...), so that a machine whose speed drifts slows all alike. A figure
is the median over the turns, a ratio the median of the ratios within each turn. Policies are
freshly initialised (`profile` takes the pre-trained ones).

Exit status 0: measured, whether or not the aims are reached; 1: a process died while measuring; 2: bad input.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.table import Table

from benchmark.command_line import refuse_repeated
from benchmark.envs import LOCOMOTION
from benchmark.plan import check_writable
from benchmark.provenance import collect_provenance
from benchmark.speed.growth import growth
from benchmark.speed.iterations import iteration
from benchmark.speed.learning import matmul, sampling, update
from benchmark.speed.measuring import Row, Sizes
from benchmark.speed.physics import physics
from benchmark.speed.profile import profile
from benchmark.speed.robosuite import robosuite
from benchmark.store import write_json
from benchmark.tables import number

FORMAT = 1  # of the JSON file
DEFAULT = Sizes()
FULL = Sizes(
    physics_chunks=250,
    async_tasks=LOCOMOTION,
    kitchen_envs=40,
    robosuite_chunks=40,
    sampling_calls=100,
    update_chunks=500,
    replay_chunks=25,
    iteration_turns=5,
    iteration_chunks=500,
    replay_iteration_chunks=100,
    matmul_size=4096,
)
PARTS: dict[str, Callable[[Sizes, int], list[Row]]] = {
    "physics": physics,
    "robosuite": robosuite,
    "sampling": sampling,
    "update": update,
    "iteration": iteration,
    "matmul": matmul,
    "growth": growth,
    "profile": profile,
}
DEFAULT_PARTS = ("physics", "robosuite", "sampling", "iteration", "matmul")  # under ten minutes on 2 idle cores


def result_table(rows: Sequence[Row], title: str) -> Table:
    """One line a row; what is derived from it, or why it is missing, beside it."""
    table = Table("part", "what", "median", "range", "unit", "that is", box=None, title=title, title_justify="left")
    for row in rows:
        spread = f"{number(min(row.samples))} - {number(max(row.samples))}" if len(row.samples) > 1 else ""
        rate = "" if row.rate is None else number(row.rate)
        table.add_row(row.part, row.name, rate, spread, row.unit, row.note or "\n".join(map(str, row.figures)))
    return table


@dataclass(frozen=True)
class Arguments:
    """Command line of `benchmark.speed`."""

    parts: tuple[str, ...] = ()
    """Only these of physics, robosuite, sampling, iteration, matmul (default: all these), update, growth, profile."""
    full: bool = False
    """Published sizes, 5 turns of iterations (100 of the 500 chunks where there is a replay): 40 minutes on 2 cores."""
    compiled: bool = False
    """Plain methods with torch.compile take turns in `iteration` too, which needs a compiler and some minutes more."""
    threads: int | None = None
    """Threads of physics (not robosuite's) and tensors (default: all cores that this process may use)."""
    json: Path | None = None
    """Also write the result to this file."""


def check(arguments: Arguments) -> tuple[list[str], int]:
    """The parts, in the order of `PARTS`, and the number of threads.

    Raises:
        ValueError: an unknown part, an option that no part takes, fewer than one thread, or no place for the file.
        OSError: the file's directory cannot be made.
    """
    for part in arguments.parts:
        if part not in PARTS:
            raise ValueError(f"unknown part {part!r}; valid: {', '.join(PARTS)}")
    if arguments.compiled and "iteration" not in (arguments.parts or DEFAULT_PARTS):
        raise ValueError(f"--compiled is an option of the part iteration, got --parts {' '.join(arguments.parts)}")
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = available if arguments.threads is None else arguments.threads
    if threads < 1:
        raise ValueError(f"--threads must be at least 1, got {threads}")
    if arguments.json is not None:  # now, not after minutes of measuring
        if arguments.json.is_dir():
            raise ValueError(f"{arguments.json} is a directory")
        check_writable(arguments.json.parent)
        arguments.json.absolute().parent.mkdir(parents=True, exist_ok=True)
    return [part for part in PARTS if part in (arguments.parts or DEFAULT_PARTS)], threads


def main(arguments: Arguments) -> int:
    """Measure, print and write; returns the exit status."""
    try:
        parts, threads = check(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    torch.set_num_threads(threads)
    sizes = replace(FULL if arguments.full else DEFAULT, compiled=arguments.compiled)
    started, rows = time.monotonic(), []
    try:
        for part in parts:
            begun = time.monotonic()
            rows += PARTS[part](sizes, threads)
            print(f"measured {part} in {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
    except BrokenProcessPool:
        print("error: the process that measured an iteration died, perhaps for lack of memory", file=sys.stderr)
        return 1
    seconds = round(time.monotonic() - started, 1)
    machine = {**collect_provenance(), "threads": threads}
    title = f"{machine['cpu']}, {machine['cores']} cores, {threads} threads, {seconds:.0f} s"
    Console(width=None if sys.stdout.isatty() else 160).print(result_table(rows, title))
    if arguments.json is not None:
        content = {"format": FORMAT, "full": arguments.full, "machine": machine, "seconds": seconds}
        write_json(arguments.json, {**content, "rows": [row.as_dict() for row in rows]})
    return 0


if __name__ == "__main__":
    refuse_repeated(sys.argv[1:], ("--parts",))
    sys.exit(main(tyro.cli(Arguments, description=__doc__, prog="python -m benchmark.speed")))
