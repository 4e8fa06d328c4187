"""From a suite and the user's choices to prepared run directories; everything is checked before anything is written."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmark.finetune import demonstrations_of, pretrained_of
from benchmark.launch.lease import Lease, RunBusy, last_status
from benchmark.methods import get_arm, refuse_idle, setting_names, uses_demonstrations
from benchmark.policies import load_pretrained, policy_path
from benchmark.policies.demonstrations import demonstrations_path, load_demonstrations
from benchmark.seeding import TUNING_SEED
from benchmark.spec import RunSpec, load_spec, make_spec
from benchmark.store import ENDED, RunPaths, create_json, read_status, run_paths, write_json
from benchmark.suites import Suite, load_suite, parse_seeds
from benchmark.tasks import get_task

START_DIGESTS = ("policy_digest", "data_digest", "demonstrations_digest")  # of a specification


@dataclass(frozen=True)
class PlannedRun:
    """A run, its place, and what is already there."""

    spec: RunSpec
    paths: RunPaths
    state: str  # of status.json, or "missing"


def parse_overrides(assignments: Sequence[str]) -> dict[str, dict[str, Any]]:
    """``METHOD.FIELD=VALUE`` to values per method; VALUE is read as JSON where it is that, else as text.

    Raises:
        ValueError: not of that form, or an unknown method.
    """
    overrides: dict[str, dict[str, Any]] = {}
    for assignment in assignments:
        target, equals, text = assignment.partition("=")
        method, dot, field = target.partition(".")
        if not (equals and dot and field):
            raise ValueError(f"--set takes METHOD.FIELD=VALUE, got {assignment!r}")
        get_arm(method)
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        overrides.setdefault(method, {})[field] = value
    return overrides


def resolve_device(name: str, job_gpus: int | None = None) -> str:
    """``auto`` to ``cuda`` in jobs with GPUs and to ``cpu`` elsewhere, so that a suite is the same on every machine.

    Args:
        job_gpus: GPUs of the jobs that the runs are put into; None where they run on this machine.

    Raises:
        ValueError: unknown name, or no such device here.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"unknown device {name!r}; valid: auto, cpu, cuda")
    if name == "auto":
        return "cuda" if job_gpus else "cpu"
    if name == "cuda" and not job_gpus and not torch.cuda.is_available():
        raise ValueError("device 'cuda' asked for, but PyTorch sees no GPU; valid here: auto, cpu")
    return name


def choose(suite: Suite, methods: Sequence[str], tasks: Sequence[str], seeds: str | None) -> list[Suite]:
    """The suite, or its parts, with the user's choice of methods, tasks and seeds, each empty or None for its own.

    Of a suite of parts only what a part has itself is chosen; any other suite takes all names.

    Raises:
        ValueError: an unknown name, or a choice that leaves nothing.
    """
    for name in methods:
        get_arm(name)
    for name in tasks:
        get_task(name)
    wanted = {"methods": tuple(dict.fromkeys(methods)), "tasks": tuple(dict.fromkeys(tasks))}
    if not suite.parts:
        return [_with_seeds(replace(suite, **{key: names for key, names in wanted.items() if names}), seeds)]
    chosen = []
    for part in map(load_suite, suite.parts):
        if part.parts or part.experiment:
            raise ValueError(f"suite {suite.name!r}: its part {part.name!r} must have tasks and methods of its own")
        kept = {key: tuple(n for n in getattr(part, key) if n in (names or (n,))) for key, names in wanted.items()}
        if all(kept.values()):
            chosen.append(_with_seeds(replace(part, **kept), seeds))
    if not chosen:
        raise ValueError(f"suite {suite.name!r} has no run of the methods and tasks asked for")
    return chosen


def _with_seeds(suite: Suite, seeds: str | None) -> Suite:
    """The suite with these seeds on every task, or as it is."""
    return suite if seeds is None else replace(suite, seeds=seeds, task_seeds={})


def make_specs(
    suites: Sequence[Suite],
    overrides: dict[str, dict[str, Any]],
    device: str,
    plan_only: bool = False,
    precision: str | None = None,
) -> list[RunSpec]:
    """All specs of the suites: tasks, then seeds, then methods, so that early results compare.

    Args:
        plan_only: accept tasks without policy; `startable` tells which specs can be run.
        precision: of matrix products (default: the suites').

    Raises:
        ValueError: anything unknown or out of range; a mix of tuning and reported seeds; one run asked for twice in
            different ways.
    """
    methods = dict.fromkeys(name for suite in suites for name in suite.methods)
    unused = sorted(set(overrides) - set(methods))
    if unused:
        raise ValueError(f"--set names {unused[0]!r}, which is not run here; methods: {', '.join(methods)}")
    specs: dict[tuple[str, str, int], RunSpec] = {}
    for suite in suites:
        if precision is not None:
            suite = replace(suite, precision=precision)
        for spec in _suite_specs(suite, overrides, device, plan_only):
            held = specs.setdefault((spec.task, spec.method, spec.seed), spec)
            if held.digest != spec.digest:
                raise ValueError(f"two suites ask for {spec.task}/{spec.method} differently: {difference(held, spec)}")
    return list(specs.values())


def startable(spec: RunSpec) -> bool:
    """Whether all that the run starts from is there: a policy and, where it uses them, expert pairs."""
    needs_pairs = uses_demonstrations(spec.method_settings())
    return bool(spec.policy_digest) and (bool(spec.demonstrations_digest) or not needs_pairs)


def start_damage(spec: RunSpec) -> str:
    """Why what is there of what a run starts from cannot be used: one line; '' where it can, or is not there."""
    if startable(spec):
        return ""
    task = get_task(spec.task)
    try:
        if policy_path(task).exists():
            load_pretrained(task, spec.sampler)
        if uses_demonstrations(spec.method_settings()) and demonstrations_path(task).exists():
            load_demonstrations(task)
    except ValueError as error:
        return str(error)
    return ""


def refuse_damaged(runs: Sequence[PlannedRun], pending: Sequence[PlannedRun]) -> None:
    """Raise ValueError where what all runs start from is damaged and some are pending; else those that need it wait."""
    damages = [start_damage(run.spec) for run in runs]
    if pending and all(damages):
        raise ValueError(damages[0])


def _suite_specs(suite: Suite, overrides: dict[str, dict[str, Any]], device: str, plan_only: bool) -> list[RunSpec]:
    seeds = {task: parse_seeds(suite.task_seeds.get(task, suite.seeds)) for task in suite.tasks}
    for text in (suite.seeds, *suite.task_seeds.values()):
        if min(parse_seeds(text)) < TUNING_SEED <= max(parse_seeds(text)):
            raise ValueError(f"seeds {text} mix tuning seeds ({TUNING_SEED} and up) with reported ones")
    first: dict[tuple[str, str], RunSpec] = {}
    for task, method in itertools.product(suite.tasks, suite.methods):
        own = suite.settings.get(method, {}) | overrides.get(method, {})
        spec = first[task, method] = make_spec(
            task,
            method,
            seeds[task][0],
            suite.protocol,
            suite.loop | suite.task_loop.get(task, {}),
            suite.sampler,
            _common_settings(suite, method) | own,
            suite.threads,
            device,
            plan_only,
            suite.precision,
        )
        refuse_idle(method, spec.method_settings(), own)
    pairs = [(task, seed, method) for task in suite.tasks for seed in seeds[task] for method in suite.methods]
    return [replace(first[task, method], seed=seed) for task, seed, method in pairs]


def _common_settings(suite: Suite, method: str) -> dict[str, Any]:
    """What the suite changes of all methods that have such settings, as far as this one has them."""
    names = setting_names(method)
    return {name: value for name, value in suite.common_settings.items() if name in names}


def check_start(spec: RunSpec) -> None:
    """Look whether a specification from elsewhere has here what it starts from.

    Raises:
        ValueError: an unknown task, or a policy or expert pairs that are missing, damaged or others.
    """
    pretrained_of(spec)
    demonstrations_of(spec)


def plan_runs(specs: Sequence[RunSpec], out: Path) -> list[PlannedRun]:
    """Look at what each run's directory holds.

    Raises:
        ValueError: a directory holds a run with other settings, or `out` cannot be written.
    """
    check_writable(out)
    planned = []
    for spec in specs:
        paths, state = run_paths(out, spec.task, spec.method, spec.seed), "missing"
        if paths.spec.exists():
            check_held(spec, paths)
            state = read_status(paths).get("state", "queued")
        planned.append(PlannedRun(spec, paths, state))
    return planned


def check_held(spec: RunSpec, paths: RunPaths) -> None:
    """Raise ValueError unless the directory's specification is this one, apart from a policy that is not here."""
    held = load_spec(paths.spec)
    if not startable(spec):
        missing = [name for name in START_DIGESTS if not getattr(spec, name)]
        spec = replace(spec, **{name: getattr(held, name) for name in missing})
    if held.digest != spec.digest:
        raise ValueError(
            f"{paths.root} holds a run with other settings: {difference(held, spec)}; choose another --out"
        )


def tasks_of(runs: Sequence[PlannedRun]) -> list[str]:
    """The names of their tasks, each once."""
    return list(dict.fromkeys(run.spec.task for run in runs))


def difference(held: RunSpec, asked: RunSpec) -> str:
    """The first setting in which two specs differ, for a message."""
    ours, theirs = flatten(asked.as_dict()), flatten(held.as_dict())
    for key in sorted(ours | theirs):
        if key != "digest" and ours.get(key) != theirs.get(key):
            return f"{key} is {theirs.get(key)!r} there and {ours.get(key)!r} here"
    return "digests differ"


def flatten(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= flatten(item, f"{prefix}{key}.") if isinstance(item, dict) else {f"{prefix}{key}": item}
    return flat


def check_writable(out: Path) -> None:
    """Raise ValueError unless `out`, or the nearest existing folder above it, is a writable directory."""
    nearest = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not nearest.is_dir():
        raise ValueError(f"output {out}: {nearest} is not a directory")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"output {out}: {nearest} is not writable")


def keep_waiting(run: PlannedRun, reason: str) -> None:
    """Say in the directory of a run that cannot start yet why not: state ``queued``, and no spec, which is not known.

    Raises:
        OSError: the run's directory cannot be written.
    """
    if not run.paths.spec.exists():
        status = {"state": "queued", "error": reason, "iterations": run.spec.loop.iterations}
        write_json(run.paths.status, status)


def prepare(run: PlannedRun) -> None:
    """Write the spec, unless an equal one is there, and the state ``queued``.

    A run that another process executes stays as it is, and so does one that has ended since it was planned.

    Raises:
        ValueError: another command has begun a run with other settings there since it was planned.
        OSError: the run's directory cannot be written.
    """
    create_json(run.paths.spec, run.spec.as_dict())
    check_held(run.spec, run.paths)
    try:
        with Lease(run.paths.lock) as lease:
            status = last_status(run.paths, lease)
            if status.get("state") in ENDED and (status["state"] == "done" or status["state"] != run.state):
                return
            if status.get("state") in ENDED:  # asked for again: its attempts count anew
                status = {
                    key: value for key, value in status.items() if key not in ("fruitless_attempts", "checkpointed")
                }
            write_json(
                run.paths.status, status | {"state": "queued", "error": None, "iterations": run.spec.loop.iterations}
            )
    except RunBusy:
        return
