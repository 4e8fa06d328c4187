"""A bounded pool on this machine: one process a run, never more at once than asked for."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from benchmark.launch.execute import RunBusy, execute
from benchmark.store import RunPaths, read_json, write_json

POLL_SECONDS = 0.2


def run_inline(roots: Sequence[Path], on_progress: Callable[[], None]) -> None:
    """Execute the runs one after the other in this process."""
    for root in roots:
        try:
            execute(root)
        except RunBusy as error:
            print(error, file=sys.stderr)
        on_progress()


def run_pool(roots: Sequence[Path], max_parallel: int, on_progress: Callable[[], None]) -> None:
    """Execute the runs in at most `max_parallel` processes at once.

    A process that dies without a word leaves its run ``failed`` with the reason. On KeyboardInterrupt the processes are
    stopped, their runs are ``cancelled``, and the interrupt goes on.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmark.launch.execute", "benchmark.envs.locomotion"])
    waiting, running = list(roots), dict[Path, BaseProcess]()
    try:
        while waiting or running:
            while waiting and len(running) < max_parallel:
                root = waiting.pop(0)
                running[root] = context.Process(target=_child, args=(root,), name=str(root))
                running[root].start()
            for root, process in list(running.items()):
                if not process.is_alive():
                    process.join()
                    del running[root]
                    _mark_if_dead(RunPaths(root), process.exitcode)
            on_progress()
            time.sleep(POLL_SECONDS)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.join()


def _child(root: Path) -> None:
    """Entry of a run's process: output goes to the run's log, SIGTERM stops it like Ctrl-C."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    with RunPaths(root).log.open("ab", buffering=0) as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    try:
        execute(root)
    except (RunBusy, KeyboardInterrupt) as error:
        print(f"stopped: {error}", file=sys.stderr)


def _mark_if_dead(paths: RunPaths, exit_code: int | None) -> None:
    """Mark a run whose process ended with an error code as failed, with the last line that it printed."""
    if exit_code == 0:
        return
    status = read_json(paths.status) if paths.status.exists() else {}
    if status.get("state") in ("running", "queued", None):
        lines = paths.log.read_text(errors="replace").strip().splitlines() if paths.log.exists() else []
        reason = f"process ended with exit code {exit_code}" + (f": {lines[-1][:200]}" if lines else "")
        write_json(paths.status, status | {"state": "failed", "error": reason})
