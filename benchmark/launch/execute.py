"""Execute one prepared run directory: lease, resume, train, and turn every expected failure into the run's state."""

from __future__ import annotations

import fcntl
import os
import platform
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmark.evaluation import Diverged
from benchmark.finetune import Trainer
from benchmark.provenance import collect_provenance
from benchmark.spec import RunSpec
from benchmark.store import RunPaths, read_json, write_json

CHECKPOINT_SECONDS = 120.0  # between checkpoints; a kill loses at most this and one iteration


class RunBusy(Exception):
    """Another process executes this run."""


@contextmanager
def lease(paths: RunPaths) -> Iterator[None]:
    """Hold the run's lock file; the operating system drops it when the process ends, however it ends.

    Raises:
        RunBusy: another process holds it.
    """
    with paths.lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunBusy(f"{paths.root} is being run by another process") from error
        yield


@contextmanager
def numeric_settings(spec: RunSpec) -> Iterator[None]:
    """Threads and deterministic kernels as the spec says, restored afterwards."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(spec.threads)
    torch.use_deterministic_algorithms(spec.device != "cpu", warn_only=True)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)


class Status:
    """The run's `status.json`: rewritten whenever something changes, with a heartbeat."""

    def __init__(self, paths: RunPaths, spec: RunSpec) -> None:
        self.path = paths.status
        previous = read_json(paths.status) if paths.status.exists() else {}
        self.values: dict[str, Any] = {
            "state": "running",
            "attempt": int(previous.get("attempt", 0)) + 1,
            "host": platform.node(),
            "pid": os.getpid(),
            "job_id": os.environ.get("SLURM_JOB_ID"),
            "iteration": 0,
            "iterations": spec.loop.iterations,
            "error": None,
        }

    def write(self, **changes: Any) -> None:
        """Change values and write the file with the present time as heartbeat."""
        self.values |= changes
        write_json(self.path, self.values | {"heartbeat": time.time()})

    def progress(self, trainer: Trainer, started: float, first_iteration: int) -> None:
        """Iteration, environment steps, last score and the estimated seconds to the end."""
        finished = trainer.iteration - first_iteration
        rate = (time.monotonic() - started) / finished if finished else None
        self.write(
            iteration=trainer.iteration,
            env_steps=trainer.env_steps,
            score=trainer.curve[-1]["score"] if trainer.curve else None,
            return_mean=trainer.curve[-1]["return_mean"] if trainer.curve else None,
            wall_seconds=round(trainer.wall_seconds, 1),
            eta_seconds=None if rate is None else round(rate * (trainer.spec.loop.iterations - trainer.iteration), 1),
        )


def execute(root: Path, checkpoint_seconds: float = CHECKPOINT_SECONDS) -> str:
    """Run, or go on with, the run in directory `root`, which holds a `spec.json`.

    Returns:
        The final state: ``done``, ``failed``, ``diverged`` or ``cancelled``; also in `status.json`, with the error.

    Raises:
        RunBusy: another process executes it.
        KeyboardInterrupt: asked to stop; the state is then ``cancelled`` and a later call goes on.
    """
    paths = RunPaths(root)
    with lease(paths):
        spec = RunSpec.from_dict(read_json(paths.spec))
        status = Status(paths, spec)
        status.write()
        try:
            with numeric_settings(spec):
                train(spec, paths, status, checkpoint_seconds)
            status.write(state="done", eta_seconds=0.0)
        except Diverged as error:
            status.write(state="diverged", error=str(error))
        except KeyboardInterrupt:
            status.write(state="cancelled", error="interrupted")
            raise
        except Exception as error:
            traceback.print_exc()
            status.write(state="failed", error=one_line(error))
        return status.values["state"]


def train(spec: RunSpec, paths: RunPaths, status: Status, checkpoint_seconds: float) -> None:
    """Build the trainer, resume, and advance it to the end of the budget."""
    trainer = Trainer(spec)
    try:
        trainer.restore(paths)
        if not paths.provenance.exists():
            write_json(paths.provenance, collect_provenance())
        started, saved, first_iteration = time.monotonic(), time.monotonic(), trainer.iteration
        while not trainer.done or not trainer.curve:
            trainer.advance()
            trainer.record(paths)
            if time.monotonic() - saved >= checkpoint_seconds:
                trainer.save(paths)
                saved = time.monotonic()
            status.progress(trainer, started, first_iteration)
        trainer.record(paths)
        trainer.save(paths)
    finally:
        trainer.close()


def one_line(error: BaseException) -> str:
    """An exception as one line: type and first line of its message."""
    message = str(error).strip().splitlines()
    return f"{type(error).__name__}: {message[0]}" if message else type(error).__name__
