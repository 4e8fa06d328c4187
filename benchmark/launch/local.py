"""A bounded pool on this machine, or in a SLURM job: one process a run, never more at once than asked for."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from benchmark.launch.attempt import AttemptLimits, Stop
from benchmark.launch.lease import Lease, LeaseLost, RunBusy, held, last_status
from benchmark.launch.resources import GpuSlots
from benchmark.store import ENDED, RunPaths, write_json

POLL_SECONDS = 0.2
BUSY_SECONDS = 2.0  # between looks at a run that another process executes
STOP_SECONDS = 10.0  # for a process to end after it was interrupted
_BUSY_EXIT = 75  # EX_TEMPFAIL: the run is another process's
_PRELOADED = ["benchmark.launch.execute", "benchmark.envs.locomotion", "otpr.agent", "baselines.dppo", "baselines.dql"]


def run_inline(roots: Sequence[Path], on_progress: Callable[[], None]) -> None:
    """Execute the runs one after the other in this process."""
    from benchmark.launch.execute import execute  # and with it PyTorch

    for root in roots:
        try:
            execute(root)
        except (RunBusy, LeaseLost, OSError) as error:
            print(error, file=sys.stderr)
        on_progress()


@dataclass
class _Child:
    process: BaseProcess
    gpu: tuple[str, int] | None


class Pool:
    """Executes runs in at most `max_parallel` processes at once.

    A process that dies without a word leaves its run ``failed`` with the reason. A run that another process executes
    is waited for, and taken over if that process dies.

    Args:
        max_parallel: processes at once.
        on_progress: called several times a second.
        gpus: where the runs get their GPU; None for runs on the CPU.
        patience: seconds to wait for runs that other processes execute, when nothing else is left to do.
        limits: of every attempt.
    """

    def __init__(
        self,
        max_parallel: int,
        on_progress: Callable[[], None],
        gpus: GpuSlots | None = None,
        patience: float = float("inf"),
        limits: AttemptLimits | None = None,
    ) -> None:
        self.max_parallel, self.on_progress, self.gpus, self.patience = max_parallel, on_progress, gpus, patience
        self.limits = limits or AttemptLimits()
        self.stopping = False
        self._running: dict[Path, _Child] = {}
        self._context = _forkserver_context()

    def run(self, roots: Sequence[Path]) -> None:
        """Execute the runs to their end, in this order.

        On KeyboardInterrupt the processes are interrupted, their runs are ``cancelled``, and the interrupt goes on.
        """
        waiting, not_before = list(roots), dict[Path, float]()
        worked = time.monotonic()
        try:
            while (waiting and not self.stopping) or self._running:
                now = time.monotonic()
                if self._running:
                    worked = now
                elif now - worked > self.patience:
                    return
                ready = [root for root in waiting if not_before.get(root, 0.0) <= now]
                for root in ready:
                    if self.stopping or len(self._running) >= self.max_parallel:
                        break
                    if held(RunPaths(root).lock):
                        not_before[root] = now + BUSY_SECONDS
                    elif self._start(root):
                        waiting.remove(root)
                for root in self._reap():
                    waiting.append(root)
                    not_before[root] = now + BUSY_SECONDS
                self.on_progress()
                time.sleep(POLL_SECONDS)
        finally:
            self.stop(signal.SIGINT, STOP_SECONDS)

    def stop(self, number: signal.Signals, seconds: float) -> None:
        """Signal the processes until they end, and kill those that are still there after `seconds`.

        SIGINT: at once; SIGTERM and SIGUSR1: after the iteration, with a checkpoint, as ``cancelled`` or ``queued``.
        """
        self.stopping = True
        deadline, signalled = time.monotonic() + seconds, 0.0
        while self._running and time.monotonic() < deadline:
            if time.monotonic() - signalled >= 1.0:  # again and again: a process that is just starting misses the first
                signalled = time.monotonic()
                for child in self._running.values():
                    if child.process.pid is not None and child.process.is_alive():
                        os.kill(child.process.pid, number)
            self._reap()
            time.sleep(POLL_SECONDS / 4)
        for child in self._running.values():
            child.process.kill()
        while self._running:
            self._reap()
            time.sleep(POLL_SECONDS / 4)

    def _start(self, root: Path) -> bool:
        """Start a run's process, unless no GPU is free for it."""
        gpu = self.gpus.take() if self.gpus else None
        if self.gpus and gpu is None:
            return False
        arguments = (root, gpu[0] if gpu else None, self.limits)
        process = self._context.Process(target=_child, args=arguments, name=str(root))
        process.start()
        self._running[root] = _Child(process, gpu)
        return True

    def _reap(self) -> list[Path]:
        """Put away the processes that ended; returns the runs that turned out to be another process's."""
        busy = []
        for root, child in list(self._running.items()):
            if child.process.is_alive():
                continue
            child.process.join()
            del self._running[root]
            if child.gpu and self.gpus:
                self.gpus.give_back(child.gpu)
            if child.process.exitcode == _BUSY_EXIT:
                busy.append(root)
            elif child.process.exitcode != 0 and self.stopping:
                mark_dead(RunPaths(root), "stopped before its iteration ended", self.limits.stopped_state)
            elif child.process.exitcode != 0:
                mark_dead(RunPaths(root), _how_it_ended(child.process.exitcode))
        return busy


def _forkserver_context() -> ForkServerContext:
    """Processes are forked from a server that has imported what they need.

    The server ignores what SLURM sends to all processes of a job; what is ignored stays so in a new program.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    if threading.current_thread() is not threading.main_thread():
        return context
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTERM, signal.SIGUSR2)}
    try:
        resource_tracker.ensure_running()
        forkserver.ensure_running()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return context


def _child(root: Path, gpu: str | None, limits: AttemptLimits) -> None:
    """Entry of a run's process: output goes to the run's log, signals ask it to stop."""
    from benchmark.launch.execute import execute  # which the server of these processes has imported

    stop = Stop()

    def ask(state: str) -> Callable[..., None]:
        def handle(*_: Any) -> None:
            stop.state = stop.state or state

        return handle

    def interrupt(*_: Any) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # once: the state is still to be written
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, ask(limits.stopped_state))
    signal.signal(signal.SIGUSR1, ask("queued"))
    signal.signal(signal.SIGINT, interrupt)
    threading.Thread(target=_follow_parent, daemon=True).start()
    with RunPaths(root).log.open("ab", buffering=0) as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    faulthandler.enable()
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    try:
        execute(root, limits.checkpoint_seconds, stop, limits.time_limit)
    except RunBusy:
        sys.exit(_BUSY_EXIT)
    except (LeaseLost, KeyboardInterrupt) as error:
        print(f"stopped: {error}", file=sys.stderr)


def _follow_parent() -> None:
    """Ask this process to stop when the one that started it is gone."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


def mark_dead(paths: RunPaths, reason: str, state: str = "failed") -> None:
    """Give a run whose process ended without a word its state, with the reason and the last line that it printed.

    A run that has ended, or that another process executes by now, stays as it is.
    """
    line = last_line(paths.log)
    try:
        with Lease(paths.lock) as lease:
            status = last_status(paths, lease)
            if status.get("state") not in ENDED:
                error = f"{reason}: {line}" if line else reason
                write_json(paths.status, status | {"state": state, "error": error})
    except (RunBusy, OSError) as error:
        print(f"{paths.root}: {reason}; its state could not be written ({error})", file=sys.stderr)


def last_line(log: Path) -> str:
    """The line of a log that says most: the interpreter's last words if there are any, else the last one."""
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 20_000))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    fatal = [line for line in lines if line.startswith("Fatal Python error")]
    return [*lines, *fatal][-1][:200] if lines else ""


def _how_it_ended(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        name = signal.Signals(-exit_code).name
        return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return f"process ended with exit code {exit_code}"
