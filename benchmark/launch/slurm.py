"""Put runs through SLURM: submit what is missing, follow it, and start again what was lost on the way."""

from __future__ import annotations

import math
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from benchmark.estimate import run_hours, run_memory
from benchmark.launch import cluster
from benchmark.launch.execute import ENDED
from benchmark.launch.lease import Lease, RunBusy, held
from benchmark.launch.local import last_line, mark_dead
from benchmark.plan import PlannedRun, prepare
from benchmark.store import read_json, write_json

FOLDER = ".slurm"  # below the output directory: batch scripts, output of the jobs, which job has which runs
POLL_SECONDS = 2.0  # between looks at the runs' files
CHECK_SECONDS = 10.0  # between questions to SLURM
FRUITLESS_JOBS = 3  # in a row that ended without an iteration, after which a run has failed
SLOWER = 3.0  # how much slower than estimated a core may be
MAX_MINUTES = 24 * 60  # asked for at most by default; longer runs go on by requeueing
_HARD = ("FAILED", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL")


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


class Sweep:
    """The runs of one output directory on the cluster.

    Args:
        out: the directory, shared by all nodes.
        runs: all runs asked for.
        options: checked.
        max_parallel: runs at once; None for no limit.
    """

    def __init__(
        self, out: Path, runs: Sequence[PlannedRun], options: SlurmOptions, max_parallel: int | None = None
    ) -> None:
        self.folder, self.runs, self.options = out.absolute() / FOLDER, list(runs), options
        self.max_parallel = max_parallel
        self._fruitless: dict[Path, int] = {}
        self._given_up: set[Path] = set()

    def submit(self, runs: Sequence[PlannedRun]) -> list[str]:
        """Submit the runs that no job of this directory has, and that nobody executes.

        Returns:
            The ids of the new jobs; of an array, its one id.

        Raises:
            SlurmError: SLURM does not answer, or refuses; what was submitted before stays.
            OSError: the directory cannot be written.
        """
        submitted: list[str] = []
        self.folder.mkdir(parents=True, exist_ok=True)
        with waited_for(self.folder / "submit.lock"):
            states, places = cluster.job_states(), self._places()
            alive = {root for root, place in places.items() if states.get(place[:2], ("", ""))[0] in cluster.LIVE}
            missing = [r for r in runs if r.paths.root.absolute() not in alive and not held(r.paths.lock)]
            for run in missing:
                prepare(run)
            after = {place[2] for root, place in places.items() if root in alive} if self.max_parallel else set()
            for array in arrays(missing, self.options, cluster.array_cap()):
                job = self._submit_array(array, sorted(after))
                submitted.append(job)
                if self.max_parallel:
                    after = {job}  # one array after the other, so that the limit is one of all
        return submitted

    def _submit_array(self, array: Array, after: list[str]) -> str:
        from benchmark.launch.job import Pack

        name = f"otpr-bench-{uuid.uuid4().hex[:8]}"
        folder, resources = self.folder / name, array.resources
        packs = [[str(run.paths.root.absolute()) for run in pack] for pack in array.packs]
        # Before the jobs: they are found by their name if this process ends before it has learnt their id.
        plan = {"name": name, "created": time.time(), "packs": packs, "iterations": self._iterations(array)}
        write_json(folder / "plan.json", plan)
        executor = make_executor(folder, name, array, self.options, self.max_parallel, after)
        on_gpu = array.packs[0][0].spec.device == "cuda"
        try:
            with executor.batch():
                jobs = [executor.submit(Pack(p, 60.0 * resources.minutes, resources.warning, on_gpu)) for p in packs]
        except Exception as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise cluster.SlurmError(
                f"SLURM refuses the jobs: {lines[-1] if lines else type(error).__name__}"
            ) from error
        job = str(jobs[0].job_id).split("_")[0]
        write_json(folder / "plan.json", plan | {"job_id": job})
        return job

    @staticmethod
    def _iterations(array: Array) -> dict[str, int]:
        runs = [run for pack in array.packs for run in pack]
        return {str(run.paths.root.absolute()): int(read_status_file(run).get("iteration", 0)) for run in runs}

    def _places(self) -> dict[Path, tuple[str, int, str, int]]:
        """The job that had each run last: name, array index, id, and the run's iteration when it was submitted."""
        plans = sorted((read_json(path) for path in self.folder.glob("*/plan.json")), key=lambda plan: plan["created"])
        return {
            Path(root): (plan["name"], index, plan.get("job_id", ""), plan["iterations"][root])
            for plan in plans
            for index, pack in enumerate(plan["packs"])
            for root in pack
        }

    def follow(self, on_progress: Callable[[], None]) -> None:
        """Wait until every run has ended or was cancelled; what was lost is submitted again."""
        checked = 0.0
        while True:
            on_progress()
            if time.monotonic() - checked >= CHECK_SECONDS:
                if not self.check():
                    return
                checked = time.monotonic()
            time.sleep(POLL_SECONDS)

    def check(self) -> bool:
        """Look after every run once; whether any is still open. No answer from SLURM leaves all as it is."""
        unsettled = [run for run in self.runs if self._open(run)]
        try:
            states, places = cluster.job_states(), self._places()
            lost = []
            for run in unsettled:
                place = places.get(run.paths.root.absolute())
                dead = place is None or states.get(place[:2], ("", ""))[0] not in cluster.LIVE
                if dead and not held(run.paths.lock) and self._open(run) and self._is_lost(run, place, states):
                    lost.append(run)
            if lost:
                print(f"{len(lost)} runs lost their job; submitted again: {', '.join(self.submit(lost))}", flush=True)
        except cluster.SlurmError as error:
            print(f"SLURM does not answer, waiting: {error}", flush=True)
        return any(self._open(run) for run in self.runs)

    def _open(self, run: PlannedRun) -> bool:
        return run.paths.root not in self._given_up and read_status_file(run).get("state") not in ENDED

    def _is_lost(self, run: PlannedRun, place: tuple[str, int, str, int] | None, states: dict[Any, Any]) -> bool:
        """Whether a run without a job is to be submitted again; if not, it gets the state that its job's end means."""
        if place is None:
            return True
        name, index, _, iteration = place
        ended = states.get((name, index), ("", ""))[0] or cluster.ended_state(name, index)
        status = read_status_file(run)
        if ended == "CANCELLED" or status.get("state") == "cancelled":
            self._given_up.add(run.paths.root)
            if status.get("state") != "cancelled":
                mark_dead(run.paths, f"cancelled in SLURM (job {name})", "cancelled")
            return False
        root = run.paths.root
        gained = int(status.get("iteration", 0)) > iteration
        self._fruitless[root] = 0 if gained else self._fruitless.get(root, 0) + 1
        if (ended in _HARD and status.get("state") == "running") or self._fruitless[root] >= FRUITLESS_JOBS:
            output = [line for path in self.folder.glob(f"{name}/*_{index}_0_log.err") if (line := last_line(path))]
            reason = f"its job ended as {ended or 'unknown'}" + (f" ({output[-1]})" if output else "")
            mark_dead(run.paths, reason)
            return False
        return True


def read_status_file(run: PlannedRun) -> dict[str, Any]:
    """The run's status, empty where there is none."""
    return read_json(run.paths.status) if run.paths.status.exists() else {}


@contextmanager
def waited_for(path: Path) -> Iterator[None]:
    """Hold the lease of `path`, after whoever holds it."""
    lease = Lease(path)
    while True:
        try:
            lease.acquire()
            break
        except RunBusy:
            time.sleep(1.0)
    try:
        yield
    finally:
        lease.release()
