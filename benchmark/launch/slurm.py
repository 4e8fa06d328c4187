"""What SLURM is asked for: the user's options, resources by estimate, runs packed into jobs and jobs into arrays."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from benchmark.estimate import run_hours, run_memory
from benchmark.launch import cluster
from benchmark.plan import PlannedRun

FOLDER = ".slurm"  # below the output directory: batch scripts, output of the jobs, which job has which runs
SLOWER = 3.0  # how much slower than estimated a core may be
MAX_MINUTES = 24 * 60  # asked for at most by default; longer runs go on by requeueing


@dataclass(frozen=True)
class SlurmOptions:
    """What the user asks of SLURM; None leaves it to the estimates or to the site."""

    partition: str | None = None
    """SLURM: partition."""
    account: str | None = None
    """SLURM: account."""
    time: str | None = None
    """SLURM: time limit of a job, in minutes or as D-HH:MM:SS (default: three times the estimate, at most a day)."""
    mem: str | None = None
    """SLURM: memory of a job, such as 4G (default: the estimate)."""
    cpus: int | None = None
    """SLURM: cores of a job (default: the threads of its runs)."""
    gpus: int | None = None
    """SLURM: GPUs of a job (default: 1 with --device cuda, else 0)."""
    runs_per_job: int = 1
    """SLURM: runs side by side in a job, for networks too small to fill a GPU."""
    sbatch: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """SLURM: KEY=VALUE, any other option of sbatch; repeatable."""
    detach: bool = False
    """SLURM: return once all is submitted."""

    def check(self) -> None:
        """Look at every value that can be judged without SLURM.

        Raises:
            ValueError: one is out of range or not of its form.
        """
        for name, least in (("cpus", 1), ("gpus", 0), ("runs_per_job", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
        if self.time is not None:
            cluster.parse_minutes(self.time)
        if self.mem is not None:
            cluster.parse_memory(self.mem)
        for item in self.sbatch:
            if not re.fullmatch(r"[a-z][a-z-]*(=.*)?", item):
                raise ValueError(f"--sbatch takes KEY=VALUE with an option of sbatch without its dashes, got {item!r}")


@dataclass(frozen=True)
class Resources:
    """Of one job."""

    minutes: int
    memory: int  # MiB
    cpus: int
    gpus: int

    @property
    def warning(self) -> int:
        """Seconds before the end at which SLURM warns the job: time to finish an iteration and write a checkpoint."""
        return int(min(max(self.minutes * 6, 20), 300))


@dataclass(frozen=True)
class Array:
    """Jobs of equal resources, submitted together: a list of runs for each."""

    resources: Resources
    packs: tuple[tuple[PlannedRun, ...], ...]


def job_resources(runs: Sequence[PlannedRun], options: SlurmOptions) -> Resources:
    """What a job with these runs gets: as asked for, else estimated with room.

    Raises:
        ValueError: fewer cores asked for than the runs' specifications say.
    """
    threads = sum(run.spec.threads for run in runs)
    if options.cpus is not None and options.cpus < threads:
        raise ValueError(f"--cpus {options.cpus} is less than the {threads} threads of {len(runs)} runs in a job")
    minutes = 30 * math.ceil((10 + SLOWER * 60 * max(run_hours(run.spec) for run in runs)) / 30)
    memory = 1024 * math.ceil(sum(run_memory(run.spec) for run in runs))
    return Resources(
        cluster.parse_minutes(options.time) if options.time else min(minutes, MAX_MINUTES),
        cluster.parse_memory(options.mem) if options.mem else memory,
        options.cpus or threads,
        options.gpus if options.gpus is not None else int(runs[0].spec.device == "cuda"),
    )


def arrays(runs: Sequence[PlannedRun], options: SlurmOptions, cap: int) -> list[Array]:
    """Runs packed into jobs, each of one task and method; jobs of equal resources as arrays of at most `cap`."""
    groups: dict[tuple[str, str], list[PlannedRun]] = {}
    for run in runs:
        groups.setdefault((run.spec.task, run.spec.method), []).append(run)
    by_resources: dict[Resources, list[tuple[PlannedRun, ...]]] = {}
    for members in groups.values():
        packs = [tuple(members[i : i + options.runs_per_job]) for i in range(0, len(members), options.runs_per_job)]
        by_resources.setdefault(job_resources(packs[0], options), []).extend(packs)  # a smaller last pack as the others
    return [
        Array(resources, tuple(packs[first : first + cap]))
        for resources, packs in by_resources.items()
        for first in range(0, len(packs), cap)
    ]


def too_short(array: Array) -> list[str]:
    """A line for each task and method of which an iteration is not expected to fit into the time limit twice."""
    lines = {}
    for spec in (run.spec for pack in array.packs for run in pack):
        seconds, limit = 3600 * run_hours(spec) / spec.loop.iterations, array.resources.minutes * 60
        if 2 * seconds + array.resources.warning > limit:
            lines[spec.task, spec.method] = (
                f"warning: an iteration of {spec.task}/{spec.method} takes about {seconds:.0f} s here, a time limit of "
                f"{limit} s may not do: --time {-(-int(3 * seconds) // 60)} (minutes) would"
            )
    return list(lines.values())


def make_executor(
    folder: Path, name: str, array: Array, options: SlurmOptions, max_parallel: int | None, after: Iterable[str] = ()
) -> Any:
    """submitit's executor with everything set but the jobs.

    Args:
        max_parallel: runs at once; None for no limit.
        after: ids of jobs that have to end first.
    """
    from submitit.slurm.slurm import SlurmExecutor  # an extra

    from benchmark.launch.job import MAX_REQUEUES

    resources, dependency = array.resources, ":".join(["afterany", *after])
    executor = SlurmExecutor(folder=folder, max_num_timeout=MAX_REQUEUES)
    extra = {key: value if equals else True for key, equals, value in (i.partition("=") for i in options.sbatch)}
    executor.update_parameters(
        job_name=name,
        time=resources.minutes,
        mem=f"{resources.memory}MB",
        cpus_per_task=resources.cpus,
        signal_delay_s=resources.warning,
        array_parallelism=max((max_parallel or 1_000_000) // options.runs_per_job, 1),
        srun_args=["--cpus-per-task", str(resources.cpus)],  # not inherited since SLURM 22.05
        additional_parameters={"requeue": True, **extra},
        **({"dependency": dependency} if ":" in dependency else {}),
        **({"gpus_per_node": resources.gpus} if resources.gpus else {}),
        **({"partition": options.partition} if options.partition else {}),
        **({"account": options.account} if options.account else {}),
    )
    return executor


def batch_text(array: Array, options: SlurmOptions, out: Path, max_parallel: int | None) -> str:
    """The batch script of an array, as submitit writes it; nothing is written."""
    name = "otpr-bench"
    executor = make_executor(out.absolute() / FOLDER / name, name, array, options, max_parallel)
    executor.parameters["map_count"] = len(array.packs)
    return executor._make_submission_file_text(executor._submitit_command_str, name)
