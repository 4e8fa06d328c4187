"""Published learning curves, carried as data (`data/`), as runs like any other; single runs whose ends alone are known.

A published `dql` regularises towards the policy's own actions, as DPPO's repository runs it: here that is `dql-dppo`.
The published OTPR-M is what the suites call `otpr`.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files

from benchmark.report.records import IMPORTED, UNKNOWN, Evaluation, Run
from benchmark.tasks import get_task

_NAN = float("nan")
_METHODS = {"dql": "dql-dppo", "otpr-m": "otpr"}
# Every tenth iteration only evaluates: iteration i stands at i times 0.9 of an iteration's environment steps. The steps
# of the image tasks are not stated.
_STEPS_PER_ITERATION = {
    "hopper-medium-v2": 72_000,
    "walker2d-medium-v2": 72_000,
    "halfcheetah-medium-v2": 72_000,
    "kitchen-complete-v0": 10_080,
    "kitchen-partial-v0": 10_080,
    "kitchen-mixed-v0": 10_080,
}
# Tasks on embedded data with the physics, horizon and score of a published one, but other demonstrations.
_COUNTERPARTS = {f"{name}-local": f"{name}-medium-v2" for name in ("hopper", "walker2d", "halfcheetah")}


@dataclass(frozen=True)
class Source:
    """Where published curves come from, and how their protocol differs from the one here."""

    label: str
    origin: str
    differences: str


REINFLOW = Source(
    "ReinFlow authors' re-run",
    "curves published with the code of ReinFlow (github.com/ReinFlow/ReinFlow, branch visualize, MIT licence): DPPO's "
    "code from DPPO's checkpoints and settings, 3 to 5 seeds",
    "D4RL's data and mujoco-py 2.1 (here gymnasium's v4 physics); time limits are terminal; only the episodes that end "
    "within the iteration count, so that short ones are over-represented; IDQL's first point acts by an untrained Q; "
    "dql regularises on the policy's own actions and stands beside dql-dppo",
)
SUPPLEMENT = Source(
    "OTPR supplement",
    "figures of the supplement of OTPR, read by eye to 0.01",
    "seeds, averaging and evaluation episodes are not stated; robomimic's data; one curve a method",
)
SOURCES = (REINFLOW, SUPPLEMENT)
RERUN = Source(
    "Single runs",
    "one seed of DPPO's code v0.6 with its configurations and checkpoints, by a third party "
    "(github.com/canimiliya/DPPO_mine; RTX 5060 Ti)",
    "the protocol of DPPO's code; one seed decides nothing, and the best evaluation was chosen by its own value",
)


@dataclass(frozen=True)
class Rerun:
    """The ends of one published run: returns, or success rates on robomimic, and what it took."""

    task: str
    method: str
    initial: float
    final: float
    best: float
    best_iteration: float  # NaN where it is not told
    env_steps: float
    hours: float


def read_reruns() -> list[Rerun]:
    """The published single runs of which only the ends are known."""
    rows = _rows("dppo_rerun.csv")
    return [
        Rerun(row.pop("task"), row.pop("method"), **{key: float(value or "nan") for key, value in row.items()})
        for row in rows
    ]


def _rows(name: str) -> Iterator[dict[str, str]]:
    text = (files("benchmark.report") / "data" / name).read_text(encoding="utf-8")
    return csv.DictReader(text.splitlines())


def _point(task: str, iteration: int, env_steps: int, metric: str, value: float) -> Evaluation:
    is_return = metric == "episode_return"
    score = get_task(task).score(value, None) if is_return else value
    mean, success = (value, _NAN) if is_return else (_NAN, value)
    return Evaluation(iteration, env_steps, _NAN, _NAN, _NAN, mean, _NAN, success, score)


def read_published() -> list[Run]:
    """Every published curve whose environment steps are known, in the order of task, method and seed."""
    found: dict[tuple[str, str, int, Source], list[Evaluation]] = {}
    for row in _rows("reinflow.csv"):
        task, iteration = row["task"], int(row["iteration"])
        if task in _STEPS_PER_ITERATION:
            point = _point(task, iteration, iteration * _STEPS_PER_ITERATION[task], row["metric"], float(row["value"]))
            found.setdefault((task, row["method"], int(row["seed"]), REINFLOW), []).append(point)
    for row in _rows("otpr_supplement.csv"):
        if row["metric"] == "success_rate":
            points = found.setdefault((row["task"], row["method"], 0, SUPPLEMENT), [])
            points.append(_point(row["task"], len(points), int(row["env_steps"]), row["metric"], float(row["value"])))
    runs = []
    for (task, method, seed, source), points in found.items():
        name = _METHODS.get(method, method)
        protocol = f"published: {source.label}"
        runs.append(Run(task, name, seed, IMPORTED, "", protocol, UNKNOWN, UNKNOWN, tuple(points), source=source.label))
    return sorted(runs, key=lambda run: (run.task, run.method, run.seed))


def counterpart(task: str) -> str:
    """The published task whose curves may be drawn behind those of `task`: itself, or that of the same physics."""
    return _COUNTERPARTS.get(task, task)
