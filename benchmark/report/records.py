"""What the report knows of a run, whether it comes from a directory, an imported table or a publication."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmark.store import OWN_RULE

UNKNOWN = "unknown"
IMPORTED = "imported"
TIMES = ("collect", "update", "transport", "evaluate")


@dataclass(frozen=True, slots=True)
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
    """One run.

    Attributes:
        task, method: all printable.
        state: one of `benchmark.store.STATES`, `IMPORTED` or `UNKNOWN`.
        error: in one line; empty where there is none.
        offline_data: "yes", "no" or, where the spec cannot be read, `UNKNOWN`.
        evaluations: with distinct, ascending env_steps.
        rules: those under other rules of acting, by env_steps and name.
        notes: what was left out.
        source: where an imported or published run comes from; empty for a run of the results directory.
        spec, provenance: the files of these names as they are; empty where they cannot be read.
        folder: the run's directory below the results directory, quoted for a link; empty for a run from elsewhere.
        files: the names of the files in it.
        seconds: by name out of `TIMES`, what metrics.csv says the iterations took; the transport is part of the update.
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
    rules: tuple[Evaluation, ...] = ()
    notes: tuple[str, ...] = ()
    source: str = ""
    folder: str = ""
    files: tuple[str, ...] = ()
    spec: Mapping[str, Any] = field(default_factory=dict, repr=False)
    provenance: Mapping[str, Any] = field(default_factory=dict, repr=False)
    seconds: Mapping[str, float] = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        """TASK/METHOD/seed-K, all printable."""
        return f"{self.task}/{self.method}/seed-{self.seed}"

    @property
    def last_step(self) -> int:
        """Environment steps of the last evaluation; -1 without any."""
        return self.evaluations[-1].env_steps if self.evaluations else -1

    def until(self, env_steps: int) -> tuple[Evaluation, ...]:
        """The evaluations at or before `env_steps`."""
        return self.evaluations[: bisect_right(self.evaluations, env_steps, key=lambda row: row.env_steps)]

    def at(self, env_steps: int) -> Evaluation | None:
        """The evaluation at exactly `env_steps`, or None."""
        last = self.before(env_steps)
        return last if last and last.env_steps == env_steps else None

    def before(self, env_steps: int) -> Evaluation | None:
        """The last evaluation at or before `env_steps`, or None."""
        within = self.until(env_steps)
        return within[-1] if within else None
