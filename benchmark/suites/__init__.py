"""Suites: named sets of runs, one TOML file each beside this module or anywhere else."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from benchmark.methods import adjust, conform, setting_names

FOLDER = Path(__file__).parent
LARGEST_SEED = 999_999  # a million runs a method are more than anybody plans, and a list of them still fits in memory


@dataclass(frozen=True)
class Suite:
    """What a suite runs: every method on every task with every seed under one protocol, or an experiment instead."""

    name: str
    description: str = ""
    tasks: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    protocol: str = "published"  # which settings tables: "published" or "embedded"
    seeds: str = "0-0"  # "N" for 0..N-1, or "A-B"
    task_seeds: dict[str, str] = field(default_factory=dict)  # per task, instead of `seeds`
    threads: int = 1  # of every run; part of its spec
    precision: str = "float32"  # of every run's matrix products, or "bfloat16"
    loop: dict[str, Any] = field(default_factory=dict)  # what differs from the task's loop sizes
    task_loop: dict[str, dict[str, Any]] = field(default_factory=dict)  # per task, what differs further
    sampler: dict[str, Any] = field(default_factory=dict)  # what differs from the default sampler
    common_settings: dict[str, Any] = field(default_factory=dict)  # of every method that has a setting of this name
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)  # per method, what differs from its tables
    experiment: str = ""  # module whose run(out, progress) -> bool is called instead; then no tasks, no methods
    parts: tuple[str, ...] = ()  # suites that are run together instead


def suite_names() -> list[str]:
    """The names of all suites."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_suite(name: str) -> Suite:
    """The suite called `name`, or the one in the file `name` where that ends in ``.toml``.

    Raises:
        ValueError: unknown name, a file that cannot be read or is not TOML, an unknown key, a value of another type, a
            suite of nothing, or something said for a task that it does not have.
    """
    if not name.endswith(".toml") and name not in suite_names():
        raise ValueError(f"unknown suite {name!r}; valid: {', '.join(suite_names())}, or a file that ends in .toml")
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    try:
        values: dict[str, Any] = tomllib.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"suite {name}: {error.strerror}") from error
    except ValueError as error:  # not UTF-8, or not TOML
        raise ValueError(f"suite {name}: {error}") from error
    suite = adjust(f"suite {name!r}", Suite(path.stem), values)
    _check(suite, f"suite {name!r}")
    return suite


def _check(suite: Suite, owner: str) -> None:
    """Raise ValueError for a suite of nothing, or one that says something of another type or for what it lacks."""
    if not suite.experiment and not suite.parts and not (suite.tasks and suite.methods):
        raise ValueError(f"{owner} has nothing to run: it needs tasks and methods, or parts")
    if suite.parts:
        alone = Suite(suite.name, suite.description, parts=suite.parts)
        said = [name for name, value in vars(suite).items() if value != getattr(alone, name)]
        if said:
            raise ValueError(f"{owner} has parts, which say all: it takes no {said[0]} of its own")
    for item in (*suite.tasks, *suite.methods, *suite.parts):
        conform(f"{owner}: a name", item, "")
    for key, example in (("task_seeds", suite.seeds), ("task_loop", suite.loop)):
        for task, value in getattr(suite, key).items():
            if task not in suite.tasks:
                raise ValueError(f"{owner} says something for {task!r}, not one of its tasks: {', '.join(suite.tasks)}")
            conform(f"{owner}: {key}.{task}", value, example)
    for name in suite.common_settings:
        if not any(name in setting_names(method) for method in suite.methods):
            raise ValueError(f"{owner}: common_settings.{name} is a setting of none of: {', '.join(suite.methods)}")
    for method, value in suite.settings.items():
        names = setting_names(method)
        if method not in suite.methods:
            raise ValueError(f"{owner} sets {method!r}, not one of its methods: {', '.join(suite.methods)}")
        for name in conform(f"{owner}: settings.{method}", value, suite.loop):
            if name not in names:
                raise ValueError(f"{owner}: {method!r} has no setting {name!r}; valid: {', '.join(names) or 'none'}")


def parse_seeds(text: str) -> list[int]:
    """Seed indices of ``"N"`` (0 to N-1) or ``"A-B"`` (A to B).

    Raises:
        ValueError: neither, an empty or negative range, or a seed above `LARGEST_SEED`.
    """
    first, separator, last = text.partition("-")
    try:
        seeds = range(int(first), int(last) + 1) if separator else range(int(first))
    except ValueError:
        seeds = range(0)
    if not seeds or seeds[-1] > LARGEST_SEED:
        raise ValueError(f"seeds must be N (at least 1) or A-B with A <= B <= {LARGEST_SEED}, got {text!r}")
    return list(seeds)
