"""Which launcher brings the runs of a directory to their ends, and how it is asked to."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from benchmark.estimate import run_memory
from benchmark.launch import cluster
from benchmark.launch.local import Pool, run_inline
from benchmark.launch.resources import GpuSlots, available_cores, available_memory, visible_gpus
from benchmark.launch.slurm import Array, SlurmOptions, arrays, batch_text
from benchmark.launch.sweep import Sweep
from benchmark.plan import PlannedRun, prepare


def choose_launcher(asked: str, options: SlurmOptions) -> str:
    """``auto`` to ``slurm`` where its controller answers and this process is not in a job already, else to ``local``.

    Raises:
        ValueError: SLURM asked for and not there, or without submitit, or its options given with another launcher.
    """
    options.check()
    launcher = asked
    if asked == "auto":
        launcher = "slurm" if "SLURM_JOB_ID" not in os.environ and cluster.answers() else "local"
    if launcher != "slurm":
        for item in dataclasses.fields(options):
            if getattr(options, item.name) != item.default:
                why = "there is no SLURM here" if asked == "auto" else f"the launcher is {asked}"
                raise ValueError(f"--{item.name.replace('_', '-')} is an option of SLURM, and {why}")
    elif not cluster.answers():
        raise ValueError(
            "SLURM does not answer here (sbatch and scontrol ping are tried); --launcher local runs without"
        )
    elif find_spec("submitit") is None:
        raise ValueError("SLURM needs submitit: pip install 'otpr-bench[slurm]'; --launcher local runs without it")
    return launcher


@dataclass(frozen=True)
class Launch:
    """How the runs of a directory are brought to their ends."""

    launcher: str  # local, slurm or inline
    options: SlurmOptions
    max_parallel: int | None
    out: Path

    @property
    def interrupted(self) -> str:
        """What to say after Ctrl-C."""
        if self.launcher == "slurm":
            return "no longer following; the jobs go on, and the same command follows them again"
        return "stopped; the same command goes on from the checkpoints"

    def check(self, runs: Sequence[PlannedRun]) -> None:
        """Look at everything that can be refused before something is written.

        Raises:
            ValueError: a bad number of processes, or jobs that SLURM would refuse.
        """
        if self.max_parallel is not None and self.max_parallel < 1:
            raise ValueError(f"--max-parallel must be at least 1, got {self.max_parallel}")
        if self.max_parallel is not None and self.options.runs_per_job > self.max_parallel:
            packed = self.options.runs_per_job
            raise ValueError(f"--runs-per-job {packed} is more than --max-parallel {self.max_parallel} allows at once")
        if self.launcher == "inline" and self.max_parallel is not None:
            raise ValueError(f"--max-parallel {self.max_parallel} is not for --launcher inline: one at a time")
        if self.launcher == "slurm":
            for array in self.jobs(runs):
                try:
                    cluster.check_submission(batch_text(array, self.options, self.out, self.max_parallel))
                except cluster.SlurmError as error:
                    asked = (
                        f"{array.resources.cpus} cores, {array.resources.memory} MiB, {array.resources.minutes} minutes"
                    )
                    raise ValueError(f"SLURM refuses a job of {asked}: {error}") from error

    def jobs(self, runs: Sequence[PlannedRun]) -> list[Array]:
        """The arrays of jobs for these runs.

        Raises:
            ValueError: SLURM does not answer, or too few cores asked for.
        """
        return arrays(runs, self.options, cluster.array_cap())

    def start(self, runs: Sequence[PlannedRun], on_progress: Callable[[], None]) -> None:
        """Bring these runs to their ends; with SLURM submit them, see `follow`.

        Raises:
            ValueError: SLURM refuses.
            OSError: the directory cannot be written.
            KeyboardInterrupt: asked to stop.
        """
        if self.launcher == "slurm":
            if runs:
                submitted = Sweep(self.out, runs, self.options, self.max_parallel).submit(runs)
                print(f"SLURM: submitted {', '.join(submitted) or 'nothing new'}", flush=True)
            return
        for run in runs:
            prepare(run)
        roots = [run.paths.root for run in runs]
        if self.launcher == "inline":
            run_inline(roots, on_progress)
        elif runs:
            self._pool(runs, on_progress).run(roots)

    def follow(self, runs: Sequence[PlannedRun], on_progress: Callable[[], None]) -> None:
        """Wait until all of these runs, started before, have ended: jobs of SLURM, unless detached.

        Raises:
            OSError: the directory cannot be written.
            KeyboardInterrupt: asked to stop.
        """
        if self.launcher == "slurm" and not self.options.detach:
            Sweep(self.out, runs, self.options, self.max_parallel).follow(on_progress)

    def _pool(self, runs: Sequence[PlannedRun], on_progress: Callable[[], None]) -> Pool:
        """As many processes as cores, memory and GPUs hold, or as asked for."""
        by_cores = available_cores() // max(run.spec.threads for run in runs)
        fits = int(min(by_cores, available_memory() / max(run_memory(run.spec) for run in runs)))
        gpus = visible_gpus() if runs[0].spec.device == "cuda" else []
        parallel = self.max_parallel or max(min(fits, len(gpus) or fits), 1)
        slots = GpuSlots(gpus, -(-parallel // len(gpus))) if gpus else None
        return Pool(parallel, on_progress, slots)
