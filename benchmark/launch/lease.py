"""Who executes a run: an advisory lock with a heartbeat, on one machine or on a file system shared by many."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from benchmark.store import RunPaths, read_status

HEARTBEAT_SECONDS = 15.0
STALE_SECONDS = 120.0  # without a heartbeat, after which the holder counts as dead
_SETTLE_SECONDS = 1.0  # after taking over: two that did it at the same time see here who came last
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # file systems without flock


class RunBusy(Exception):
    """Another process executes this run."""


class LeaseLost(Exception):
    """The lease was taken over while this process did not show that it is alive; it must not write any more."""


class Lease:
    """Held by at most one living process. Use as a context manager.

    On one machine the kernel's lock decides, which ends with its process, however that ends. Elsewhere, and where
    the file system has no such locks, the file's modification time does: the holder renews it every
    `HEARTBEAT_SECONDS`, by the file server's clock. A holder that stopped doing so for `STALE_SECONDS` is replaced, by
    a new file under the same name; if it comes to life again, `check` tells it.

    Args:
        path: the lock file; made where there is none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.token = uuid.uuid4().hex
        self.last_heartbeat = 0.0  # of the holder before, in seconds since the epoch
        self._file: IO[str] | None = None
        self._stopping = threading.Event()

    def __enter__(self) -> Lease:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def acquire(self) -> None:
        """Take the lease.

        Raises:
            RunBusy: a living process holds it, or one of which that is not known yet.
        """
        file = open(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666), "r+")  # noqa: SIM115
        locked = _lock(file)
        holder = _holder(file)
        self.last_heartbeat = os.fstat(file.fileno()).st_mtime
        free = locked is not False and (not holder or (locked is True and holder.get("host") == platform.node()))
        if not free:
            if _age(self.path, file) <= STALE_SECONDS:
                file.close()
                raise RunBusy(f"{self.path.parent} is being run by another process ({describe(holder)})")
            file = self._replace(file)
        self._write(file)
        if not free or locked is None:
            time.sleep(_SETTLE_SECONDS)
        self._file = file
        try:
            self.check()
        except LeaseLost as error:
            self._close()
            raise RunBusy(f"{self.path.parent} was taken by another process at the same moment") from error
        threading.Thread(target=self._beat, name="lease", daemon=True).start()

    def check(self) -> None:
        """To be called before anything is written.

        Raises:
            LeaseLost: somebody else holds it now, or nobody.
            OSError: the file system does not tell.
        """
        try:
            with self.path.open() as file:
                held = _holder(file).get("token") == self.token
        except FileNotFoundError:
            held = False
        if not held or self._file is None:
            raise LeaseLost(f"{self.path.parent} was taken over by another process")

    def release(self) -> None:
        """Give the lease back, unless it is lost already."""
        self._stopping.set()
        try:
            self.check()
            if self._file is not None:
                self._file.truncate(0)
        except (LeaseLost, OSError):
            pass  # the next one to ask finds out by age
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()  # which drops the kernel's lock
            self._file = None

    def _write(self, file: IO[str]) -> None:
        content = {"token": self.token, "host": platform.node(), "pid": os.getpid(), "job_id": job_id()}
        file.seek(0)
        file.truncate(0)
        file.write(json.dumps(content))
        file.flush()
        os.fsync(file.fileno())

    def _replace(self, stale: IO[str]) -> IO[str]:
        """Put a new file in the place of the one that `stale` is, and lock it."""
        stale.close()
        path = self.path.with_name(f".{self.path.name}.{self.token}.tmp")
        new = path.open("x+")
        _lock(new)
        self._write(new)
        os.replace(path, self.path)
        return new

    def _beat(self) -> None:
        while not self._stopping.wait(HEARTBEAT_SECONDS):
            try:
                self.check()
                os.utime(self.path)
            except (LeaseLost, OSError):  # a lost lease is noticed at the next write, a lost file server by age
                continue


def held(path: Path) -> bool:
    """Whether a living process of this machine, or one that wrote lately from elsewhere, holds the lease of `path`."""
    try:
        file = path.open("r+")
    except OSError:
        return False
    with file:
        locked, holder = _lock(file), _holder(file)
        elsewhere = bool(holder) and (locked is None or holder.get("host") != platform.node())
        return (locked is False or elsewhere) and _age(path, file) <= STALE_SECONDS


def last_status(paths: RunPaths, lease: Lease) -> dict[str, Any]:
    """What an attempt left in `status.json`, empty where there is nothing readable.

    If it ended without a word, its last sign of life is that of the lease, which came before the present holder's.
    """
    status = read_status(paths)
    silent = status.get("state") == "running"
    return status | ({"heartbeat": max(status.get("heartbeat", 0.0), lease.last_heartbeat)} if silent else {})


def describe(holder: dict[str, object]) -> str:
    """Host, process and job of a lease's content, for a message."""
    job = f", job {holder['job_id']}" if holder.get("job_id") else ""
    return f"process {holder.get('pid')} on {holder.get('host')}{job}" if holder else "starting"


def job_id() -> str | None:
    """The SLURM job that this process belongs to, an array element as ``ARRAY_INDEX``."""
    array, index = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{index}" if array and index else os.environ.get("SLURM_JOB_ID")


def _lock(file: IO[str]) -> bool | None:
    """Whether the kernel's lock could be had; None where the file system has none."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return None if error.errno in _NO_LOCKS else False
    return True


def _holder(file: IO[str]) -> dict[str, object]:
    try:
        content = json.loads(file.read() or "{}")
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _age(path: Path, file: IO[str]) -> float:
    """Seconds since the last heartbeat, by the clock of the file system, which a new file beside it tells."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".clock-", suffix=".tmp") as clock:
        return os.stat(clock.name).st_mtime - os.fstat(file.fileno()).st_mtime


@contextmanager
def waited_for(path: Path) -> Iterator[Lease]:
    """Hold the lease of `path`, after whoever holds it."""
    lease = Lease(path)
    while True:
        try:
            lease.acquire()
            break
        except RunBusy:
            time.sleep(1.0)
    try:
        yield lease
    finally:
        lease.release()
