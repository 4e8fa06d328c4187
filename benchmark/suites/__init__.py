"""Suites: named sets of runs, one TOML file each beside this module."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Suite:
    """What a suite runs: every method on every task with every seed under one protocol, or an experiment instead."""

    name: str
    description: str
    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    protocol: str = "published"  # which settings tables: "published" or "embedded"
    seeds: str = "0-0"  # "N" for 0..N-1, or "A-B"
    task_seeds: dict[str, str] = field(default_factory=dict)  # per task, instead of `seeds`
    threads: int = 1  # of every run; part of its spec
    precision: str = "float32"  # of every run's matrix products, or "bfloat16"
    loop: dict[str, Any] = field(default_factory=dict)  # what differs from the task's loop sizes
    task_loop: dict[str, dict[str, Any]] = field(default_factory=dict)  # per task, what differs further
    sampler: dict[str, Any] = field(default_factory=dict)  # what differs from the default sampler
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)  # per method, what differs from its tables
    experiment: str = ""  # module whose run(out, progress) -> bool is called instead; then no tasks, no methods
    parts: tuple[str, ...] = ()  # suites that are run together instead


def suite_names() -> list[str]:
    """The names of all suites."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_suite(name: str) -> Suite:
    """The suite called `name`.

    Raises:
        ValueError: unknown name, or something said for a task that it does not have.
    """
    if name not in suite_names():
        raise ValueError(f"unknown suite {name!r}; valid: {', '.join(suite_names())}")
    values: dict[str, Any] = tomllib.loads((FOLDER / f"{name}.toml").read_text())
    for key in ("tasks", "methods", "parts"):
        values[key] = tuple(values.get(key, ()))
    suite = Suite(name=name, **values)
    for task in (*suite.task_seeds, *suite.task_loop):
        if task not in suite.tasks:
            raise ValueError(
                f"suite {name!r} says something for {task!r}, not one of its tasks: {', '.join(suite.tasks)}"
            )
    return suite


def parse_seeds(text: str) -> list[int]:
    """Seed indices of ``"N"`` (0 to N-1) or ``"A-B"`` (A to B).

    Raises:
        ValueError: neither, or an empty or negative range.
    """
    first, separator, last = text.partition("-")
    try:
        seeds = list(range(int(first), int(last) + 1) if separator else range(int(first)))
    except ValueError:
        seeds = []
    if not seeds:
        raise ValueError(f"seeds must be N (at least 1) or A-B with A <= B, got {text!r}")
    return seeds
