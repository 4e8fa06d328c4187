"""The runs of a directory on a cluster: submit what is missing, follow it, start again what was lost on the way."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmark.launch import cluster
from benchmark.launch.execute import ENDED
from benchmark.launch.lease import Lease, RunBusy, held
from benchmark.launch.local import last_line, mark_dead
from benchmark.launch.slurm import FOLDER, Array, SlurmOptions, arrays, make_executor
from benchmark.plan import PlannedRun, prepare
from benchmark.store import read_json, write_json

POLL_SECONDS = 2.0  # between looks at the runs' files
CHECK_SECONDS = 10.0  # between questions to SLURM
FRUITLESS_JOBS = 3  # in a row that ended without an iteration, after which a run has failed
_HARD = ("FAILED", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL")


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
