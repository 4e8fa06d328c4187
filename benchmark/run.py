"""Run what is missing of a suite, then write its report.

    python -m benchmark.run --suite quick
    python -m benchmark.run --suite quick --methods dppo otpr --seeds 5 --out results/mine
    python -m benchmark.run --suite quick --set dppo.clip_coef=0.02 --out results/wide-clip
    python -m benchmark.run --suite quick --dry-run
    python -m benchmark.run --from-spec results/quick/hopper-local/dppo/seed-0/spec.json --out results/again

Exit status 0: everything asked for is done; 1: some run is not; 2: bad input, nothing started.
"""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from benchmark.data.access import data_present, missing_data_message
from benchmark.estimate import run_hours
from benchmark.launch.local import run_inline, run_pool
from benchmark.plan import (
    PlannedRun,
    choose,
    make_specs,
    parse_overrides,
    plan_runs,
    prepare,
    resolve_device,
    startable,
)
from benchmark.policies import policy_path
from benchmark.pretrain import ensure_policy
from benchmark.report import write_report
from benchmark.spec import RunSpec
from benchmark.status import ProgressPrinter
from benchmark.store import read_json
from benchmark.suites import Suite, load_suite
from benchmark.tasks import get_task


@dataclass(frozen=True)
class Arguments:
    """Command line of `benchmark.run`."""

    suite: str | None = None
    """Name of the suite: smoke, quick, hopper-check, ..."""
    methods: tuple[str, ...] = ()
    """Only these methods or arms (default: the suite's)."""
    tasks: tuple[str, ...] = ()
    """Only these tasks (default: the suite's)."""
    seeds: str | None = None
    """N for seeds 0 to N-1, or A-B; 1000 and up are for tuning."""
    out: Path | None = None
    """Output directory (default: results/SUITE)."""
    launcher: Literal["auto", "local", "inline"] = "auto"
    """auto and local: a bounded pool of processes; inline: one run after the other in this process."""
    max_parallel: int | None = None
    """Processes at once (default: cores divided by the threads of a run)."""
    device: str = "auto"
    """auto, cpu or cuda."""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """METHOD.FIELD=VALUE, repeatable."""
    retry_failed: bool = False
    """Also run again what failed or diverged."""
    from_spec: Path | None = None
    """Repeat the one run that this spec.json describes."""
    dry_run: bool = False
    """Print the plan and start nothing."""


def main(arguments: Arguments) -> int:
    """Plan, run, report.

    Returns:
        The exit status.
    """
    try:
        experiment = experiment_suite(arguments)
        runs, out = plan(arguments)
        parallel = pool_size(arguments, runs)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if experiment:
        return run_experiment(experiment, out, arguments.dry_run)
    print(describe(runs, select_pending(runs, arguments.retry_failed), out))
    if arguments.dry_run:
        print(describe_data(runs))
        return 0
    try:
        runs, waiting = make_ready(arguments, runs)
        pending = select_pending(runs, arguments.retry_failed)
        for run in pending:
            prepare(run)
    except OSError as error:
        print(f"error: {error.filename or out}: {error.strerror}", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    roots = [run.paths.root for run in pending]
    try:
        with ProgressPrinter([run.paths for run in runs]) as progress:
            if arguments.launcher == "inline":
                run_inline(roots, progress.update)
            else:
                run_pool(roots, parallel, progress.update)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the checkpoints", file=sys.stderr)
        return 1
    unfinished = finish(runs, out) if runs else 0
    if waiting:
        print(f"{len(waiting)} runs wait for data.\n{missing_data_message(tasks_of(waiting))}", file=sys.stderr)
    return 1 if unfinished or waiting else 0


def select_pending(runs: list[PlannedRun], retry_failed: bool) -> list[PlannedRun]:
    """The runs that are to be started or gone on with."""
    ended = {"done"} if retry_failed else {"done", "failed", "diverged"}
    return [run for run in runs if run.state not in ended]


def tasks_of(runs: list[PlannedRun]) -> list[str]:
    """The names of their tasks, each once."""
    return list(dict.fromkeys(run.spec.task for run in runs))


def make_ready(arguments: Arguments, runs: list[PlannedRun]) -> tuple[list[PlannedRun], list[PlannedRun]]:
    """Train the policies that are missing where there is data to train them on.

    Returns:
        The runs that can be started, and those that wait for data.

    Raises:
        ValueError: damaged data.
        OSError: a policy cannot be written.
    """
    incomplete = tasks_of([run for run in runs if not startable(run.spec)])
    trainable = [name for name in incomplete if data_present(name)]
    for name in trainable:
        print(f"{name}: training its policy", flush=True)
        ensure_policy(get_task(name), lambda step, loss: print(f"  step {step}  loss {loss:.4f}", flush=True))
    if trainable:
        runs, _ = plan(arguments)
    ready = [run for run in runs if startable(run.spec)]
    return ready, [run for run in runs if not startable(run.spec)]


def experiment_suite(arguments: Arguments) -> Suite | None:
    """The suite asked for, where it is an experiment rather than a set of runs.

    Raises:
        ValueError: unknown suite, or an option that only runs have.
    """
    if arguments.suite is None or arguments.from_spec is not None:
        return None
    suite = load_suite(arguments.suite)
    if not suite.experiment:
        return None
    for name in ("methods", "tasks", "seeds", "set", "max_parallel", "retry_failed"):
        if getattr(arguments, name) != getattr(Arguments, name):
            raise ValueError(f"suite {suite.name!r} has no runs and takes no --{name.replace('_', '-')}")
    if arguments.device not in ("auto", "cpu"):
        raise ValueError(f"suite {suite.name!r} runs on the CPU alone, got --device {arguments.device}")
    return suite


def run_experiment(suite: Suite, out: Path, dry_run: bool) -> int:
    """Call the suite's experiment, or say what it would do.

    Returns:
        The exit status.
    """
    print(f"{suite.name}: {suite.description}; files in {out / 'report'}")
    if dry_run:
        return 0
    torch.set_num_threads(suite.threads)
    try:
        reached = importlib.import_module(suite.experiment).run(out, lambda line: print(line, flush=True))
    except KeyboardInterrupt:
        print("stopped; the same command starts again", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {out}: {error.strerror}", file=sys.stderr)
        return 2
    return 0 if reached else 1


def plan(arguments: Arguments) -> tuple[list[PlannedRun], Path]:
    """The runs asked for and the output directory.

    Raises:
        ValueError: bad input.
    """
    if (arguments.suite is None) == (arguments.from_spec is None):
        raise ValueError("give either --suite NAME or --from-spec FILE")
    if arguments.from_spec is not None:
        if arguments.out is None:
            raise ValueError("--from-spec needs --out DIR")
        return plan_runs([RunSpec.from_dict(read_json(arguments.from_spec))], arguments.out), arguments.out
    overrides, device = parse_overrides(arguments.set), resolve_device(arguments.device)
    suite = load_suite(arguments.suite or "")
    suites = choose(suite, arguments.methods, arguments.tasks, arguments.seeds)
    out = arguments.out or Path("results") / suite.name
    return plan_runs(make_specs(suites, overrides, device, plan_only=True), out), out


def pool_size(arguments: Arguments, runs: list[PlannedRun]) -> int:
    """Processes at once.

    Raises:
        ValueError: fewer than one asked for.
    """
    if arguments.max_parallel is None:
        return max((os.cpu_count() or 1) // max((run.spec.threads for run in runs), default=1), 1)
    if arguments.max_parallel < 1:
        raise ValueError(f"--max-parallel must be at least 1, got {arguments.max_parallel}")
    return arguments.max_parallel


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
        if all(startable(run.spec) for run in runs if run.spec.task == name):
            state = f"policy {policy_path(get_task(name))}"
        elif data_present(name):
            state = "its policy is trained first, on the data that is there"
        else:
            state = "no data, no policy"
            missing.append(name)
        lines.append(f"  {name:21} {state}")
    return "\n".join([*lines, *([missing_data_message(missing)] if missing else [])])


def finish(runs: list[PlannedRun], out: Path) -> int:
    """Write the report and say what is not done."""
    try:
        print(f"report: {write_report(out)}")
    except (ValueError, OSError) as error:
        print(f"no report: {error}", file=sys.stderr)
    unfinished = 0
    for run in runs:
        status = read_json(run.paths.status)
        if status["state"] != "done":
            unfinished += 1
            print(f"{run.paths.root}: {status['state']}: {status.get('error')}", file=sys.stderr)
    return 1 if unfinished else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments, description=__doc__, prog="python -m benchmark.run")))
