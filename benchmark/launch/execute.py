"""Execute one prepared run directory: lease, resume, train, and turn every expected failure into the run's state."""

from __future__ import annotations

import errno
import os
import platform
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from benchmark.evaluation import Diverged
from benchmark.finetune import Trainer
from benchmark.launch.attempt import CHECKPOINT_SECONDS, Stop
from benchmark.launch.lease import Lease, job_id, last_status
from benchmark.launch.resources import keep_freed_memory
from benchmark.provenance import add_attempt
from benchmark.spec import RunSpec, load_spec
from benchmark.store import ENDED, RunPaths, overwrite_json, read_status, write_json
from otpr.precision import precision_context

RECORD_SECONDS = 2.0  # between writes of the curve, the metrics and the status
FRUITLESS_ATTEMPTS = 2  # used up by the time limit without a new checkpoint, after which the run is timed-out
_MACHINE_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EROFS)


class Stopped(Exception):
    """The run was asked to stop, and did so after an iteration, with a checkpoint."""


@contextmanager
def numeric_settings(spec: RunSpec) -> Iterator[None]:
    """Threads, deterministic kernels and the precision of products as the spec says, restored afterwards.

    The process keeps freed memory from then on.
    """
    keep_freed_memory()
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(spec.threads)
    torch.use_deterministic_algorithms(spec.device != "cpu", warn_only=True)
    try:
        with precision_context(spec.precision, torch.device(spec.device).type):
            yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)


class Status:
    """The run's `status.json`: rewritten when something changes, with a heartbeat; only by the holder of the lease."""

    def __init__(self, paths: RunPaths, iterations: int, lease: Lease, time_limit: float | None) -> None:
        self.path, self.lease = paths.status, lease
        previous = last_status(paths, lease)
        self.values: dict[str, Any] = previous | {
            "state": "running",
            "attempt": int(previous.get("attempt", 0)) + 1,
            "host": platform.node(),
            "pid": os.getpid(),
            "job_id": job_id(),
            "started": time.time(),
            "iterations": iterations,
            "error": None,
            "fruitless_attempts": _fruitless(previous, time_limit),
        }

    def write(self, **changes: Any) -> None:
        """Change values and write the file with the present time as heartbeat, into the old one where the disk is full.

        Raises:
            LeaseLost: another process executes the run now.
        """
        self.values |= changes
        self.lease.check()
        content = self.values | {"heartbeat": time.time()}
        try:
            write_json(self.path, content)
        except OSError:
            overwrite_json(self.path, content)

    def progress(self, trainer: Trainer, started: float, first_iteration: int) -> None:
        """Iteration, environment steps, last score, seconds an iteration takes and those to the end."""
        finished = trainer.iteration - first_iteration
        rate = (time.monotonic() - started) / finished if finished else None
        self.write(
            iteration=trainer.iteration,
            env_steps=trainer.env_steps,
            score=trainer.curve[-1]["score"] if trainer.curve else None,
            return_mean=trainer.curve[-1]["return_mean"] if trainer.curve else None,
            wall_seconds=round(trainer.wall_seconds, 1),
            iteration_seconds=self.values.get("iteration_seconds") if rate is None else round(rate, 2),
            eta_seconds=None if rate is None else round(rate * (trainer.spec.loop.iterations - trainer.iteration), 1),
        )


def _fruitless(previous: dict[str, Any], time_limit: float | None) -> int:
    """How many attempts in a row spent most of the time limit without a new checkpoint, up to the last one."""
    if previous.get("checkpointed", True):
        return 0
    lasted = previous.get("heartbeat", 0.0) - previous.get("started", previous.get("heartbeat", 0.0))
    return int(previous.get("fruitless_attempts", 0)) + int(time_limit is not None and lasted >= time_limit / 2)


def execute(
    root: Path,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    stop: Stop | None = None,
    time_limit: float | None = None,
) -> str:
    """Run, or go on with, the run in directory `root`, which holds a `spec.json`; one that has ended stays as it is.

    Args:
        checkpoint_seconds: between checkpoints.
        stop: asks it to stop; the run then ends with the stop's state.
        time_limit: seconds after which the scheduler ends the attempt; None for no end.

    Returns:
        The state, also in `status.json` with the error: ``done``, ``failed``, ``diverged``, ``timed-out`` or
        ``cancelled``; ``queued`` where `stop` asks for it.

    Raises:
        RunBusy: another process executes it.
        LeaseLost: another process took it over; nothing was written since.
        KeyboardInterrupt: asked to stop at once; the state is then ``cancelled`` and a later call goes on.
    """
    paths, stop = RunPaths(root), stop or Stop()
    with Lease(paths.lock) as lease:
        state = read_status(paths).get("state")
        if state in ENDED:
            return state
        paths.remove_leftovers()
        spec = load_spec(paths.spec)
        status = Status(paths, spec.loop.iterations, lease, time_limit)
        if status.values["fruitless_attempts"] >= FRUITLESS_ATTEMPTS and time_limit is not None:
            status.write(state="timed-out", error=too_slow(status.values, time_limit))
            return "timed-out"
        try:
            status.write(checkpointed=False)  # in this attempt
            with numeric_settings(spec):
                train(spec, paths, status, checkpoint_seconds, stop)
            status.write(state="done", eta_seconds=0.0)
        except Stopped:
            status.write(state=stop.state, error=None if stop.state == "queued" else "stopped")
        except Diverged as error:
            status.write(state="diverged", error=str(error))
        except KeyboardInterrupt:
            status.write(state="cancelled", error="interrupted")
            raise
        except Exception as error:
            traceback.print_exc()
            status.write(state=_state_of(error, stop), error=one_line(error))
        return status.values["state"]


def _state_of(error: Exception, stop: Stop) -> str:
    """``cancelled``, to be gone on with, where it was the machine or the stop that broke the run; else ``failed``."""
    if stop.state:
        return stop.state
    return "cancelled" if isinstance(error, OSError) and error.errno in _MACHINE_FAULTS else "failed"


def too_slow(status: dict[str, Any], time_limit: float) -> str:
    """Why a run cannot come to its end under this limit, and the one that it needs."""
    known = status.get("iteration_seconds")
    takes = f"about {known:.0f} s" if known else f"more than {time_limit:.0f} s with what is before it"
    needed = 3 * max(known or 0.0, time_limit) / 60
    return (
        f"{FRUITLESS_ATTEMPTS} attempts of {time_limit:.0f} s saved no checkpoint; an iteration takes {takes}: "
        f"--time {needed:.0f} (minutes) or more, then --retry-failed"
    )


def train(spec: RunSpec, paths: RunPaths, status: Status, checkpoint_seconds: float, stop: Stop) -> None:
    """Build the trainer, resume, and advance it to the end of the budget.

    Raises:
        Stopped: `stop` asked for it; the checkpoint is written.
    """
    trainer = Trainer(spec)
    try:
        trainer.restore(paths, own=True)
        add_attempt(paths.provenance, {k: status.values[k] for k in ("attempt", "host", "job_id", "started")})
        started = saved = recorded = time.monotonic()
        first_iteration = trainer.iteration
        while not trainer.done or not trainer.curve:
            try:
                trainer.advance()
            except Exception:  # what was evaluated before stays known, however soon it happens
                with suppress(OSError):  # a full disk is not why it ends
                    status.progress(trainer, started, first_iteration)
                    trainer.record(paths, status.lease.check)
                raise
            due = bool(stop.state) or time.monotonic() - saved >= checkpoint_seconds
            if due or time.monotonic() - recorded >= RECORD_SECONDS:
                status.progress(trainer, started, first_iteration)
                trainer.record(paths, status.lease.check)
                recorded = time.monotonic()
            if due:
                trainer.save(paths, guard=status.lease.check)
                status.write(checkpointed=True)
                saved = time.monotonic()
            if stop.state and not trainer.done:
                raise Stopped
        status.progress(trainer, started, first_iteration)
        trainer.record(paths, status.lease.check)
        trainer.save(paths, last=True, guard=status.lease.check)
    finally:
        trainer.close()


def one_line(error: BaseException) -> str:
    """An exception as one line: type and first line of its message."""
    message = str(error).strip().splitlines()
    return f"{type(error).__name__}: {message[0]}" if message else type(error).__name__
