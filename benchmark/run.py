"""Run what is missing of a suite, then write its report.

    python -m benchmark.run --suite quick
    python -m benchmark.run --suite quick --methods dppo otpr --seeds 5 --out results/mine
    python -m benchmark.run --suite quick --set dppo.clip_coef=0.02 --out results/wide-clip
    python -m benchmark.run --suite quick --dry-run
    python -m benchmark.run --suite all --launcher slurm --partition gpu --gpus 1 --runs-per-job 4 --detach
    python -m benchmark.run --from-spec results/quick/hopper-local/dppo/seed-0/spec.json --out results/again

Exit status 0: everything asked for is done; 1: some run is not; 2: bad input, nothing started.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from benchmark.command_line import refuse_repeated
from benchmark.describe import describe, describe_data, describe_jobs, describe_waiting, why_waiting
from benchmark.evaluation import Diverged
from benchmark.launch.launcher import Launch, choose_launcher
from benchmark.launch.slurm import SlurmOptions
from benchmark.plan import (
    PlannedRun,
    check_start,
    choose,
    keep_waiting,
    make_specs,
    parse_overrides,
    plan_runs,
    refuse_damaged,
    resolve_device,
    startable,
)
from benchmark.policies import policy_path
from benchmark.pretrain import ensure_policy
from benchmark.report import write_report
from benchmark.spec import load_spec
from benchmark.status import ProgressPrinter
from benchmark.store import ENDED, read_status
from benchmark.suites import Suite, load_suite
from benchmark.tasks import get_task

Look = Callable[..., list[PlannedRun]]
Waiting = list[tuple[PlannedRun, str]]  # with the reason


@dataclass(frozen=True)
class Arguments:
    """Command line of `benchmark.run`."""

    suite: str | None = None
    """Name of the suite: smoke, quick, hopper-check, ..., or a .toml file of your own."""
    methods: tuple[str, ...] = ()
    """Only these methods or arms (default: the suite's)."""
    tasks: tuple[str, ...] = ()
    """Only these tasks (default: the suite's)."""
    seeds: str | None = None
    """N for seeds 0 to N-1, or A-B; 1000 and up are for tuning."""
    out: Path | None = None
    """Output directory (default: results/SUITE)."""
    launcher: Literal["auto", "local", "slurm", "inline"] = "auto"
    """local: a bounded pool of processes; slurm: jobs; inline: one run after the other in this process; auto: slurm
    where its controller answers and this is not a job already, else local."""
    max_parallel: int | None = None
    """Runs at once (default: local, what cores, memory and GPUs hold; slurm, no limit)."""
    device: str = "auto"
    """cpu, cuda, or auto: cuda in SLURM jobs with GPUs, else cpu."""
    precision: str | None = None
    """float32 or bfloat16, of matrix products (default: the suite's, float32 in all that come with this package)."""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """METHOD.FIELD=VALUE, repeatable."""
    retry_failed: bool = False
    """Also run again what failed, diverged or timed out."""
    from_spec: Path | None = None
    """Repeat the one run that this spec.json describes."""
    dry_run: bool = False
    """Print the plan and start nothing."""
    slurm: tyro.conf.OmitArgPrefixes[SlurmOptions] = field(default_factory=SlurmOptions)


def main(arguments: Arguments) -> int:
    """Plan, run, report.

    Returns:
        The exit status.
    """
    try:
        experiment = experiment_suite(arguments)
        launcher = choose_launcher(arguments.launcher, arguments.slurm)
        look, out = plan(arguments, launcher)
        runs = look()
        launch = Launch(launcher, arguments.slurm, arguments.max_parallel, out)
        pending = select_pending(runs, arguments.retry_failed)
        refuse_damaged(runs, pending)
        launch.check(pending)
        jobs = launch.jobs(pending) if launcher == "slurm" else []
    except (ValueError, OSError) as error:  # the latter: a directory that cannot be searched, a name that is too long
        print(f"error: {error}", file=sys.stderr)
        return 2
    if experiment:
        return run_experiment(experiment, out, arguments.dry_run)
    print(describe(runs, pending, out))
    if jobs:
        print(describe_jobs(jobs, arguments.slurm, out, arguments.max_parallel, arguments.dry_run))
    if arguments.dry_run:
        print(describe_data(pending))
        return 0
    return carry_out(arguments, launch, runs, look)


def carry_out(arguments: Arguments, launch: Launch, runs: list[PlannedRun], look: Look) -> int:
    """Train what policies are missing, bring the runs to their ends, and write the report.

    Returns:
        The exit status.
    """
    out = launch.out
    try:
        ready, waiting = start(arguments, launch, runs, look)
    except KeyboardInterrupt:
        print(launch.interrupted, file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        reason = f"{error.filename or out}: {error.strerror}" if isinstance(error, OSError) else error
        print(f"error: {reason}", file=sys.stderr)
        if all(read_status(run.paths).get("state", "queued") in ("queued", run.state) for run in runs):
            return 2
        finish(runs, out)
        return 1
    if waiting:
        print(f"{len(waiting)} runs wait:\n{describe_waiting(waiting)}", file=sys.stderr)
    if arguments.slurm.detach and select_pending(ready, arguments.retry_failed):
        print(f"see python -m benchmark.status --out {out}; the same command without --detach follows the jobs")
        return 1
    result = finish(ready, out)
    return 1 if waiting else result


def start(arguments: Arguments, launch: Launch, runs: list[PlannedRun], look: Look) -> tuple[list[PlannedRun], Waiting]:
    """Start what can be started, then, task by task, what waits for a policy or expert pairs to be made from its data.

    A task for which the latter fails, in whatever way, keeps waiting; the others go on.

    Returns:
        The runs that were started or had ended, with SLURM also followed unless detached, and those that wait.

    Raises:
        ValueError: SLURM refuses.
        OSError: a directory cannot be written.
    """
    pending = {run.paths.root for run in select_pending(runs, arguments.retry_failed)}
    lost = {run.spec.task for run in runs if run.paths.spec.exists() and not startable(run.spec)}
    ready, later, waiting = [], {}, []
    for run in runs:
        reason = why_waiting(run.spec, run.spec.task in lost) if run.paths.root in pending else ""
        if reason:
            waiting.append((run, reason))
            keep_waiting(run, reason)
        elif run.paths.root not in pending or startable(run.spec):
            ready.append(run)
        else:
            later.setdefault(run.spec.task, []).append(run)
    with ProgressPrinter([run.paths for run in (*ready, *itertools.chain(*later.values()))]) as progress:
        launch.start(select_pending(ready, arguments.retry_failed), progress.update)
        for name, members in later.items():
            try:
                make_start(name, members[0].spec.threads)
                renewed = {run.paths.root: run for run in look(name)}
                members = [renewed[run.paths.root] for run in members]
                if not all(startable(run.spec) for run in members):
                    raise ValueError("its policy, or its expert pairs, are gone again")
                launch.start(select_pending(members, arguments.retry_failed), progress.update)
                ready += members
            except (ValueError, OSError, RuntimeError, MemoryError, Diverged) as error:
                reason = " ".join(str(error).split()) or type(error).__name__
                print(f"{name}: {reason}", file=sys.stderr)
                waiting += [(run, reason) for run in members]
                for run in members:
                    keep_waiting(run, reason)
        launch.follow(ready, progress.update)
    return ready, waiting


def select_pending(runs: list[PlannedRun], retry_failed: bool) -> list[PlannedRun]:
    """The runs that are to be started or gone on with."""
    ended = {"done"} if retry_failed else set(ENDED)
    return [run for run in runs if run.state not in ended]


def make_start(name: str, threads: int) -> None:
    """Train the policy of a task that has data, or choose its expert pairs, where they are missing.

    Args:
        threads: not all cores, since their number changes the last bits of the weights.

    Raises:
        ValueError: what there is of the task is damaged.
        Diverged: the trained policy's actions are not finite.
        OSError: a file cannot be written.
    """
    there = policy_path(get_task(name)).exists()
    print(f"{name}: {'choosing its expert pairs' if there else 'training its policy'}", flush=True)
    torch.set_num_threads(threads)
    ensure_policy(get_task(name), lambda step, loss: print(f"  step {step}  loss {loss:.4f}", flush=True))


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
    package = suite.experiment.partition(".")[0]  # which finding a module inside of it imports
    if importlib.util.find_spec(package) is None or importlib.util.find_spec(suite.experiment) is None:
        raise ValueError(f"suite {suite.name!r}: no module {suite.experiment!r}")
    for name in ("methods", "tasks", "seeds", "set", "precision", "max_parallel", "retry_failed"):
        if getattr(arguments, name) != getattr(Arguments, name):
            raise ValueError(f"suite {suite.name!r} has no runs and takes no --{name.replace('_', '-')}")
    if arguments.launcher == "slurm" or arguments.slurm != SlurmOptions():
        raise ValueError(f"suite {suite.name!r} runs in this process and takes none of SLURM's options")
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
    except RuntimeError as error:  # an exact solution that was not reached
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0 if reached else 1


def plan(arguments: Arguments, launcher: str) -> tuple[Look, Path]:
    """What tells the runs asked for, or those of a task, as they stand whenever it is called, and the output directory.

    Raises:
        ValueError: bad input.
    """
    if (arguments.suite is None) == (arguments.from_spec is None):
        raise ValueError("give either --suite NAME or --from-spec FILE")
    if arguments.from_spec is not None:
        if arguments.out is None:
            raise ValueError("--from-spec needs --out DIR")
        for name in ("methods", "tasks", "seeds", "set", "device", "precision"):
            if getattr(arguments, name) != getattr(Arguments, name):
                raise ValueError(f"--from-spec repeats a run as it is, and takes no --{name}")
        spec = load_spec(arguments.from_spec)
        resolve_device(spec.device, job_gpus(arguments, spec.device) if launcher == "slurm" else None)
        place = arguments.out
        if select_pending(plan_runs([spec], place), arguments.retry_failed):
            check_start(spec)
        return lambda task=None: plan_runs([spec], place), place
    device = resolve_device(arguments.device, job_gpus(arguments, arguments.device) if launcher == "slurm" else None)
    overrides = parse_overrides(arguments.set)
    suite = load_suite(arguments.suite or "")
    suites = choose(suite, arguments.methods, arguments.tasks, arguments.seeds)
    out = arguments.out or Path("results") / suite.name

    # The suite's file is not read again: it may be edited in the meantime.
    def look(task: str | None = None) -> list[PlannedRun]:
        specs = make_specs(suites, overrides, device, plan_only=True, precision=arguments.precision)
        return plan_runs([spec for spec in specs if task in (None, spec.task)], out)

    return look, out


def job_gpus(arguments: Arguments, device: str) -> int:
    """GPUs that a SLURM job would have."""
    return arguments.slurm.gpus if arguments.slurm.gpus is not None else int(device == "cuda")


def finish(runs: list[PlannedRun], out: Path) -> int:
    """Write the report and say what is not done; returns the exit status."""
    result = 0
    try:
        print(f"report: {write_report(out)}")
    except (ValueError, OSError) as error:
        result = 1
        print(f"no report: {error}", file=sys.stderr)
    states = set()
    for run in runs:
        status = {"state": "queued"} | read_status(run.paths)
        if status["state"] != "done":
            states.add(status["state"])
            print(": ".join(filter(None, (str(run.paths.root), status["state"], status.get("error")))), file=sys.stderr)
    if states & set(ENDED):
        print("--retry-failed goes on with these from their last checkpoints", file=sys.stderr)
    return 1 if states else result


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupt)
    refuse_repeated(sys.argv[1:], ("--methods", "--tasks"))
    try:
        status = main(tyro.cli(Arguments, description=__doc__, prog="python -m benchmark.run"))
        sys.stdout.flush()
    except KeyboardInterrupt:  # while planning, or while the report is written
        print("stopped; the same command goes on", file=sys.stderr)
        status = 1
    except BrokenPipeError:  # who read the output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    sys.exit(status)
