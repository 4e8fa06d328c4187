"""What a plan says before anything is started: runs, steps, rough hours, data, and what SLURM would be given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmark.data.access import data_present, missing_data_message
from benchmark.data.registry import DATASETS
from benchmark.envs import why_not_here
from benchmark.estimate import run_hours
from benchmark.launch.slurm import Array, SlurmOptions, batch_text, too_short
from benchmark.plan import PlannedRun, start_damage, startable, tasks_of
from benchmark.policies import policy_path
from benchmark.spec import RunSpec
from benchmark.tasks import get_task


def describe(runs: list[PlannedRun], pending: list[PlannedRun], out: Path) -> str:
    """The plan in a few lines: one per task and method, with the rough hours of a run."""
    hours, devices = sum(run_hours(run.spec) for run in pending), {run.spec.device for run in pending}
    rough = f", about {hours:,.1f} hours one after the other on {pending[0].spec.threads} CPU cores" if pending else ""
    if devices - {"cpu"}:
        rough += " (with a GPU: less, not measured)"
    lines = [f"{len(runs)} runs in {out}, {len(pending)} to do{rough}"]
    groups: dict[tuple[str, str], list[PlannedRun]] = {}
    for run in runs:
        groups.setdefault((run.spec.task, run.spec.method), []).append(run)
    for (task, method), members in groups.items():
        loop = members[0].spec.loop
        seeds = ", ".join(str(run.spec.seed) for run in members)
        steps = loop.iterations * loop.n_envs * loop.n_steps * get_task(task).action_horizon
        rough = f"{run_hours(members[0].spec):,.2f} h"
        lines.append(
            f"  {task:21} {method:15} seeds {seeds}; {loop.iterations} iterations, {steps:,} steps, {rough} a run"
        )
    return "\n".join(lines)


def describe_data(runs: list[PlannedRun]) -> str:
    """What each task starts from, and what is missing."""
    lines, missing = [], []
    for name in tasks_of(runs):
        specs = [run.spec for run in runs if run.spec.task == name]
        lack = why_not_here(get_task(name).environment) or next(filter(None, map(start_damage, specs)), "")
        if lack:
            state = lack
        elif all(map(startable, specs)):
            state = f"policy {policy_path(get_task(name))}"
        elif data_present(name):
            made = "expert pairs are chosen" if policy_path(get_task(name)).exists() else "policy is trained"
            state = f"its {made} first, from the data that is there"
        else:
            state = "no data, no policy" if not policy_path(get_task(name)).exists() else "no data, no expert pairs"
            missing.append(name)
        lines.append(f"  {name:21} {state}")
    return "\n".join([*lines, *([missing_data_message(missing)] if missing else [])])


def why_waiting(spec: RunSpec, begun: bool = False) -> str:
    """Why a run cannot start, also not after what it starts from is made: one line with what to do; '' where it can.

    Args:
        spec: of the run.
        begun: runs of its task began with a policy or expert pairs that are no longer there.
    """
    name, task = spec.task, get_task(spec.task)
    lack = why_not_here(task.environment) or start_damage(spec)
    if lack or startable(spec):
        return lack
    policy = policy_path(task)
    what = "expert pairs" if policy.exists() else "policy"
    if begun:
        return f"runs here began with its {what}, since gone: bring the file back, or choose another --out"
    if data_present(name):
        return ""
    if name in DATASETS:
        return _data_wanted(name)
    return f"{policy}: no {what}; python -m benchmark.pretrain --task {name} --data FILE --out {policy} makes both"


def _data_wanted(name: str) -> str:
    return f"its data is not there: python -m benchmark.data get {name}"


def describe_waiting(waiting: Sequence[tuple[PlannedRun, str]]) -> str:
    """Why each task's runs wait, and how missing data is fetched."""
    reasons = {run.spec.task: reason for run, reason in waiting}
    lines = [f"  {name:21} {reason}" for name, reason in reasons.items()]
    missing = [name for name, reason in reasons.items() if reason == _data_wanted(name)]
    return "\n".join([*lines, *([missing_data_message(missing)] if missing else [])])


def describe_jobs(
    jobs: Sequence[Array], options: SlurmOptions, out: Path, max_parallel: int | None, whole: bool = False
) -> str:
    """What is submitted, one line an array, and what may not fit; `whole` adds the batch scripts."""
    lines = []
    for array in jobs:
        resources, runs = array.resources, sum(map(len, array.packs))
        gpus = f", {resources.gpus} GPUs" if resources.gpus else ""
        lines.append(
            f"SLURM: {len(array.packs)} jobs with {runs} runs, each {resources.cpus} cores{gpus}, "
            f"{resources.memory / 1024:.1f} GiB, {resources.minutes} minutes"
        )
        lines += too_short(array)
        if whole:
            lines.append(batch_text(array, options, out, max_parallel))
    return "\n".join(lines)
