"""What one SLURM job executes: a few runs side by side, requeued by submitit before the time limit or a preemption."""

from __future__ import annotations

import copy
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

import submitit

from benchmark.launch.attempt import CHECKPOINT_SECONDS, AttemptLimits
from benchmark.launch.lease import STALE_SECONDS
from benchmark.launch.local import Pool
from benchmark.launch.resources import GpuSlots, visible_gpus
from benchmark.provenance import COMMAND

MAX_REQUEUES = 100_000  # none of submitit's: a run that gets nowhere ends as timed-out by itself
_KILL_SECONDS = 5.0  # kept of the warning before the end, for the requeue itself


class Pack:
    """Runs that share a job. submitit calls it in the job, and `checkpoint` when SLURM warns of the end.

    Args:
        roots: the runs' directories.
        time_limit: of the job, in seconds.
        warning: seconds before its end at which SLURM warns.
        on_gpu: whether the runs take a GPU.
        command: of the user, for the runs' provenance.
    """

    def __init__(self, roots: list[str], time_limit: float, warning: float, on_gpu: bool, command: list[str]) -> None:
        self.roots, self.time_limit, self.warning, self.on_gpu = roots, time_limit, warning, on_gpu
        self.command = command
        self._pool: Pool | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_pool": None}

    def __call__(self) -> None:
        """Execute the runs to their ends; what comes of them is in their directories alone."""
        print(f"job {os.environ.get('SLURM_JOB_ID')} on {os.uname().nodename}: {len(self.roots)} runs", flush=True)
        gpus = visible_gpus() if self.on_gpu else []
        slots = GpuSlots(gpus, -(-len(self.roots) // len(gpus))) if gpus else None
        limits = AttemptLimits(min(CHECKPOINT_SECONDS, self.time_limit / 8), self.time_limit, stopped_state="queued")
        os.environ[COMMAND] = shlex.join(self.command)
        self._pool = Pool(len(self.roots), lambda: None, slots, patience=3 * STALE_SECONDS, limits=limits)
        signal.signal(signal.SIGTERM, self._cancel)
        self._pool.run([Path(root) for root in self.roots])

    def _cancel(self, *_: Any) -> None:
        """SIGTERM: cancelled or preempted, which SLURM's state of the job tells whoever looks after it.

        The runs' processes got it too; start no more, and blame none that dies.
        """
        print("SIGTERM: stopping", file=sys.stderr, flush=True)
        if self._pool is not None:
            self._pool.stopping = True

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Stop the runs with a checkpoint, as ``queued``; submitit then requeues the job with what this returns."""
        if self._pool is not None:
            self._pool.stop(signal.SIGUSR1, max(self.warning - _KILL_SECONDS, 1.0))
        return submitit.helpers.DelayedSubmission(copy.copy(self))
