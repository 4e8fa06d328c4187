"""What a summary consists of: a method on a task or over tasks, a task, and all of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from benchmark.report.bootstrap import FloatArray
from benchmark.report.compare import FROZEN
from benchmark.report.records import Run
from benchmark.report.scalars import Reached, Scored
from benchmark.report.statistics import Estimate

ALL_TASKS = "all"
MISSING = "missing"
MIXED = "mixed"
_ORDER = ("otpr", "dppo", "idql", "dql", "dql-dppo")


def method_key(method: str) -> tuple[int, str]:
    """Sort key of methods: the known ones, an arm behind its method, others by name, the frozen policy last."""
    if method == FROZEN:
        return len(_ORDER) + 1, method
    base = method if method in _ORDER else arm_of(method)
    return (_ORDER.index(base) if base in _ORDER else len(_ORDER)), method


def arm_of(method: str) -> str:
    """The method that an arm is one of, by its name."""
    return method.split("-", 1)[0]


@dataclass(frozen=True)
class Cell:
    """One method on one task, or over all tasks.

    Attributes:
        scored: seeds that count, ascending (over tasks: those that count on every task).
        planned: runs that there should be: one for each seed that any method of the task has (over tasks: the sum).
        unscored: how many of these do not count, by state; `MISSING` are those without a directory.
        env_steps: environment steps of the evaluations; None over tasks whose steps differ, or where none counts.
        scores: `STATISTICS` of the normalised score, and the IQM of the runs' `best` and `area`; empty without a seed.
        return_mean: mean over seeds of the mean return, in the task's raw units; None over tasks.
        wall_seconds, gradient_steps: mean over counting seeds (over tasks: the sum of these); NaN where unknown.
        protocol: that of the counting runs, or of all where none counts.
        offline_data: whether these use expert data in fine-tuning: what all say, else `MIXED`; empty without runs.
        source: where these come from, empty for runs of the results directory.
        reached: one a threshold; empty over tasks.
        seconds: mean over counting seeds of the time spent in each of `TIMES`; without those that are not recorded.
        matrix: the normalised scores, (seeds, tasks).
        samples: bootstrap of their IQM, None where there is no interval. Cells with the same task, seeds and source
            have it from the same resamples, so that differences are paired.
    """

    task: str
    method: str
    scored: tuple[int, ...]
    planned: int
    unscored: dict[str, int]
    env_steps: int | None
    scores: dict[str, Estimate]
    return_mean: Estimate | None
    wall_seconds: float
    gradient_steps: float
    protocol: str
    offline_data: str
    source: str = ""
    reached: tuple[Reached, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    matrix: FloatArray = field(default_factory=lambda: np.empty((0, 0)), repr=False, compare=False)
    samples: FloatArray | None = field(default=None, repr=False, compare=False)

    @property
    def steps_per_second(self) -> float:
        """Environment steps of the budget per second of wall-clock.

        NaN where unknown, for the frozen policy, and over tasks, where steps are of one task and seconds of all.
        """
        known = self.wall_seconds and self.method != FROZEN and self.task != ALL_TASKS
        return self.env_steps / self.wall_seconds if self.env_steps and known else float("nan")


@dataclass(frozen=True)
class TaskSummary:
    """One task and all methods on it.

    Attributes:
        env_steps, exact: as `compare.common_step` returns them.
        cells: one a method.
        scored: by method and seed, each run that counts.
        unscored: the runs that do not count.
        missing: methods and the seeds of which they have no directory though another method has.
    """

    task: str
    env_steps: int | None
    exact: bool
    cells: tuple[Cell, ...]
    scored: dict[str, dict[int, Scored]]
    unscored: tuple[Run, ...]
    missing: tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Summary:
    """A report's numbers; `aggregates` are over `pooled` tasks, for the methods that have a score on each."""

    tasks: tuple[TaskSummary, ...]
    pooled: tuple[TaskSummary, ...]
    aggregates: tuple[Cell, ...]
    notes: tuple[str, ...]
