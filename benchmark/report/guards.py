"""What a reader must be told before comparing: everything in which the runs of a report are not alike."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from benchmark.report.cells import Summary, TaskSummary
from benchmark.report.compare import FROZEN
from benchmark.report.records import Run
from benchmark.report.sections import family
from benchmark.report.settings import differing_settings
from benchmark.report.statistics import MINIMUM_RUNS

_LISTED = 6
T = TypeVar("T")


def _listed(values: Iterable[str]) -> str:
    shown = sorted(values)
    return ", ".join(shown[:_LISTED]) + (f" and {len(shown) - _LISTED} more" if len(shown) > _LISTED else "")


def _nested(value: Any, *keys: str) -> Any:
    """`value[key][key]…`, or None where there is no such thing: the files may hold anything."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def _differing(items: Iterable[T], read: Callable[[T], Any]) -> list[str]:
    """The distinct values, where there is more than one; items without one have no say."""
    values = {_shown(value)[:60] for item in items if (value := read(item)) is not None}
    return sorted(values) if len(values) > 1 else []


def _budgets(task: TaskSummary, runs: Sequence[Run]) -> list[str]:
    notes = []
    if not task.exact:
        notes.append(
            f"{task.task}: the evaluations of the methods never meet; scores are each run's last within "
            f"{task.env_steps} env steps."
        )
    learning = [run.last_step for run in runs if run.method != FROZEN]
    longest = max(learning or [run.last_step for run in runs], default=-1)
    if task.env_steps is not None and longest > task.env_steps:
        notes.append(
            f"{task.task}: unequal budgets, compared at {task.env_steps} env steps; the longest run has "
            f"reached {longest}."
        )
    return notes


def _seeds(task: TaskSummary) -> list[str]:
    few = [cell.method for cell in task.cells if 0 < len(cell.scored) < MINIMUM_RUNS]
    if not few:
        return []
    return [f"{task.task}: no interval where fewer than {MINIMUM_RUNS} seeds count ({_listed(few)})."]


def _protocols(task: TaskSummary, runs: Sequence[Run]) -> list[str]:
    """Runs of one task put side by side though something that decides scores differs."""
    known = [run for run in runs if run.spec]
    found: list[tuple[str, list[str]]] = [
        ("protocols", _differing([run for run in runs if run.spec or run.state != "queued"], lambda run: run.protocol)),
        ("thread counts", _differing(known, lambda run: run.threads)),
        ("data", _differing(known, lambda run: run.spec.get("data_digest"))),
        ("pre-trained policies", _differing(known, lambda run: run.spec.get("policy_digest"))),
        ("samplers", _differing(known, lambda run: run.spec.get("sampler"))),
        ("devices", _differing(known, lambda run: run.spec.get("device"))),
        ("precisions", _differing(known, lambda run: run.spec.get("precision", "float32"))),  # older specs have none
    ]
    for name in ("n_envs", "n_steps", "eval_episodes", "reset_at_iteration", "success_rule"):
        found.append((f"loop.{name}", _differing(known, lambda run, name=name: _nested(run.spec, "loop", name))))
    return [f"{task.task}: runs with different {what} are put together ({_listed(values)})." for what, values in found
            if values]  # fmt: skip


def _settings(task: TaskSummary, runs: Sequence[Run]) -> list[str]:
    """Runs of one method, taken for repetitions of each other, that have different settings."""
    notes = []
    for cell in task.cells:
        differing = differing_settings([run for run in runs if run.method == cell.method])
        if differing:
            shown = _listed(f"{name} {values}" for name, values in differing.items())
            notes.append(f"{task.task}: the seeds of {cell.method} have different settings ({shown}).")
    return notes


def _starts(task: TaskSummary, runs: Sequence[Run]) -> list[str]:
    """Row 0 is the pre-trained policy, evaluated alike: for one seed all methods must have the same score there."""
    starts: dict[int, dict[float, str]] = {}
    for run in runs:
        first = run.at(0)
        if first and not run.source:
            starts.setdefault(run.seed, {}).setdefault(first.score, run.method)
    unlike = {seed: found for seed, found in starts.items() if len(found) > 1}
    if not unlike:
        return []
    seed, found = next(iter(sorted(unlike.items())))
    shown = _listed(f"{method} {score:.9g}" for score, method in found.items())
    return [
        f"{task.task}: the score at step 0 is not the same for all methods on {len(unlike)} seed(s) "
        f"(seed {seed}: {shown})."
    ]


def _attempts(run: Run) -> list[Mapping[str, Any]]:
    """Where a run was begun and what went on with it, which may be other code on another machine."""
    attempts = run.provenance.get("attempts")
    later = attempts if isinstance(attempts, list) else []
    return [run.provenance, *({**run.provenance, **attempt} for attempt in later if isinstance(attempt, dict))]


def _code(runs: Sequence[Run]) -> list[str]:
    """Commits, uncommitted changes, package versions and machines of the runs of the results directory."""
    known = [run for run in runs if run.provenance]
    places = [place for run in known for place in _attempts(run)]
    notes = []
    commits = {commit for place in places if isinstance(commit := _nested(place, "git", "commit"), str)}
    if len(commits) > 1:
        notes.append(f"The runs were made at {len(commits)} commits ({_listed(commit[:9] for commit in commits)}).")
    dirty = sum(any(_nested(place, "git", "dirty") for place in _attempts(run)) for run in known)
    if dirty:
        notes.append(f"{dirty} of {len(known)} runs were made with uncommitted changes.")
    packages = {name for place in places for name in (_nested(place, "packages") or ()) if isinstance(name, str)}
    for name in sorted(packages):
        versions = _differing(places, lambda place, name=name: _nested(place, "packages", name))
        if versions:
            notes.append(f"The runs used different versions of {name} ({_listed(versions)}).")
    for what, key in (("processors", "cpu"), ("GPUs", "gpu"), ("Python versions", "python")):
        values = _differing(places, lambda place, key=key: place.get(key))
        if values:
            timing = "" if key == "python" else ": wall-clock times do not compare"
            notes.append(f"The runs used different {what} ({_listed(values)}){timing}.")
    return notes


def _pooling(summary: Summary) -> list[str]:
    """What pooling over tasks mixes, and sources side by side."""
    notes = []
    names = [task.task for task in summary.tasks]
    local = [name for name in names if name.endswith("-local")]
    if local and len(local) < len(names):
        notes.append(
            f"Tasks on embedded data ({_listed(local)}) and others ({_listed(set(names) - set(local))}) are in one "
            "report: scores of a -local task are not D4RL's or robomimic's."
        )
    families = {family(task.task) for task in summary.pooled}
    if len(families) > 1 and summary.aggregates:
        notes.append(
            f"The numbers over tasks pool scores of {len(families)} families ({_listed(families)}), whose units "
            "differ: read them task by task first."
        )
    return notes


def _sources(task: TaskSummary, runs: Sequence[Run]) -> list[str]:
    """Runs from elsewhere beside ours, or put together with them under one name."""
    elsewhere = {run.source for run in runs if run.source}
    notes = []
    if elsewhere and any(not run.source for run in runs):
        notes.append(f"{task.task}: curves from elsewhere ({_listed(elsewhere)}) are not paired with ours by seed.")
    for cell in task.cells:
        found = {run.source or "here" for run in runs if run.method == cell.method}
        if len(found) > 1:
            notes.append(f"{task.task}: {cell.method} puts runs of different origin together ({_listed(found)}).")
    return notes


def _ends(runs: Sequence[Run]) -> list[str]:
    """Runs that count though they are not done."""
    lines = []
    for run in runs:
        if run.state not in ("done", "imported"):
            error = f": {run.error}" if run.error else ""
            lines.append(
                f"{run.name} counts, but is {run.state} (last evaluation at {run.last_step:,} env steps){error}"
            )
    return lines


def warnings(summary: Summary, runs: Sequence[Run]) -> list[str]:
    """One line each, the general ones first; `runs` are all that the summary was made from."""
    notes = [*_pooling(summary), *_code([run for run in runs if not run.source])]
    by_task: dict[str, list[Run]] = {}
    for run in runs:
        by_task.setdefault(run.task, []).append(run)
    for task in summary.tasks:
        members = by_task[task.task]
        for check in (_budgets, _protocols, _settings, _starts, _sources):
            notes += check(task, members)
        notes += _seeds(task)
    counting = [item.run for task in summary.tasks for found in task.scored.values() for item in found.values()]
    return [*notes, *summary.notes, *_ends(sorted(counting, key=lambda run: run.name))]
