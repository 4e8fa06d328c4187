"""The runs of a directory on a cluster: submit what is missing, follow it, start again what was lost on the way."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any

from benchmark.launch import cluster
from benchmark.launch.lease import LeaseLost, held, waited_for
from benchmark.launch.local import last_line, mark_dead
from benchmark.launch.slurm import FOLDER, Array, SlurmOptions, arrays, make_executor
from benchmark.plan import PlannedRun, prepare
from benchmark.provenance import own_command
from benchmark.store import ENDED, read_json, read_status, write_json

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
        self._counted: dict[Path, tuple[str, int]] = {}
        self._given_up: set[Path] = set()

    def submit(self, runs: Sequence[PlannedRun]) -> list[str]:
        """Submit the runs that no job of this directory has, and that nobody executes.

        Returns:
            The ids of the new jobs; of an array, its one id.

        Raises:
            SlurmError: SLURM does not answer or refuses the first of the jobs, or another call took over.
            ValueError: a directory holds a run with other settings by now.
            OSError: the directory cannot be written.
        """
        submitted: list[str] = []
        self.folder.mkdir(parents=True, exist_ok=True)
        with waited_for(self.folder / "submit.lock") as lease:
            states, places = cluster.job_states(), self._places()
            alive = {root: states[place[:2]] for root, place in places.items() if is_alive(states.get(place[:2]))}
            missing = [run for run in runs if self._is_missing(run, alive)]
            after = {job for _, job in alive.values()} if self.max_parallel else set()
            for run in missing:
                prepare(run)
            for array in arrays(missing, self.options, cluster.array_cap()):
                try:
                    lease.check()
                    job = self._submit_array(array, sorted(after))
                except (LeaseLost, cluster.SlurmError) as error:
                    taken = isinstance(error, LeaseLost)
                    reason = "another call on this directory took over the submission" if taken else error
                    if not submitted:
                        raise cluster.SlurmError(reason) from error
                    print(f"SLURM: {reason}; the jobs {', '.join(submitted)} go on, other runs have none", flush=True)
                    break
                submitted.append(job)
                if self.max_parallel:
                    after = {job}  # one array after the other, so that the limit is one of all
        return submitted

    @staticmethod
    def _is_missing(run: PlannedRun, alive: Container[Path]) -> bool:
        """Whether no living job will execute the run: it has none, or ended in one that goes on with its other runs."""
        ended = read_status(run.paths).get("state") in (*ENDED, "cancelled")
        return (ended or run.paths.root.absolute() not in alive) and not held(run.paths.lock)

    def _submit_array(self, array: Array, after: list[str]) -> str:
        from benchmark.launch.job import Pack

        name = f"otpr-bench-{uuid.uuid4().hex[:8]}"
        folder, resources = self.folder / name, array.resources
        packs = [[str(run.paths.root.absolute()) for run in pack] for pack in array.packs]
        runs = [run for pack in array.packs for run in pack]
        iterations = {str(run.paths.root.absolute()): read_status(run.paths).get("iteration", 0) for run in runs}
        # Before the jobs: they are found by their name if this process ends before it has learnt their id.
        plan = {"name": name, "created": time.time(), "packs": packs, "iterations": iterations}
        write_json(folder / "plan.json", plan)
        executor = make_executor(folder, name, array, self.options, self.max_parallel, after)
        share = 60.0 * resources.minutes, resources.warning, runs[0].spec.device == "cuda", own_command()
        try:
            with executor.batch():
                jobs = [executor.submit(Pack(pack, *share)) for pack in packs]
        except Exception as error:
            if not any(known == name for known, _ in cluster.job_states()):
                (folder / "plan.json").unlink()
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise cluster.SlurmError(f"refused the jobs: {lines[-1] if lines else type(error).__name__}") from error
        job = str(jobs[0].job_id).split("_")[0]
        write_json(folder / "plan.json", plan | {"job_id": job})
        return job

    def _places(self) -> dict[Path, tuple[str, int, str, int]]:
        """The job that had each run last: name, array index, id if known, and the run's iteration at its submission."""
        plans = []
        for path in self.folder.glob("*/plan.json"):
            with contextlib.suppress(ValueError):  # gone, since SLURM refused its jobs
                plans.append(read_json(path))
        plans.sort(key=lambda plan: plan["created"])
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
                dead = place is None or not is_alive(states.get(place[:2]))
                if dead and not held(run.paths.lock) and self._open(run) and self._is_lost(run, place, states):
                    lost.append(run)
            if lost:
                print(f"{len(lost)} runs lost their job; submitted again: {', '.join(self.submit(lost))}", flush=True)
        except cluster.SlurmError as error:
            print(f"SLURM: {error}; trying again", flush=True)
        return any(self._open(run) for run in self.runs)

    def _open(self, run: PlannedRun) -> bool:
        return run.paths.root not in self._given_up and read_status(run.paths).get("state") not in ENDED

    def _is_lost(self, run: PlannedRun, place: tuple[str, int, str, int] | None, states: dict[Any, Any]) -> bool:
        """Whether a run without a job is to be submitted again; if not, it gets the state that its job's end means."""
        if place is None:
            return True
        name, index, job, iteration = place
        ended = states.get((name, index), ("", ""))[0] or cluster.ended_state(name, index)
        status, root = read_status(run.paths), run.paths.root
        if ended == "CANCELLED" or status.get("state") == "cancelled":
            self._given_up.add(root)
            if status.get("state") != "cancelled":
                mark_dead(run.paths, f"cancelled in SLURM (job {name})", "cancelled")
            return False
        gained = int(status.get("iteration", 0)) > iteration
        # Else there never was a job, or it was looked at before and SLURM has refused to take the run again since.
        if (job or ended) and self._counted.get(root) != (name, index):
            self._counted[root] = name, index
            self._fruitless[root] = 0 if gained else self._fruitless.get(root, 0) + 1
        if (ended in _HARD and status.get("state") == "running") or self._fruitless.get(root, 0) >= FRUITLESS_JOBS:
            outputs = [self.folder / name / f"{stem}_0_log.err" for stem in (f"{job}_{index}", job)]
            lines = [line for path in outputs if (line := last_line(path))]
            mark_dead(run.paths, f"its job ended as {ended or 'unknown'}" + (f" ({lines[0]})" if lines else ""))
            return False
        return True


def is_alive(job: tuple[str, str] | None) -> bool:
    """Whether a job, as `cluster.job_states` gives it, runs or will run."""
    return job is not None and job[0] in cluster.LIVE
