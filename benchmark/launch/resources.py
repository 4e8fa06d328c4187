"""What this machine, or a SLURM job's share of it, can run at once."""

from __future__ import annotations

import ctypes
import fcntl
import os
import tempfile
from pathlib import Path
from typing import IO

_GIB = 1 << 30
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_MOST_ON_HEAP = 32 << 20  # bytes of an allocation: glibc takes no more
_CGROUP_LIMITS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def keep_freed_memory() -> None:
    """Let this process keep memory that it freed, up to 1 GiB at the top of the heap, where its allocator is glibc's.

    By itself glibc gives the activations of a gradient step back to the system and takes them again, zeroed page by
    page, in the next one: a good part of the time of DPPO's minibatches.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _MOST_ON_HEAP)
        mallopt(_M_TRIM_THRESHOLD, _GIB)


def available_cores() -> int:
    """Cores that this process may use: its affinity, and in a SLURM job what was asked for."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, int(os.environ.get("SLURM_CPUS_PER_TASK", cores)))


def available_memory() -> float:
    """Free memory in GiB, within the limits of the container and of the SLURM job; infinite where nothing tells it."""
    free = [float("inf")]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
        free.append(int(fields["MemAvailable"].split()[0]) * 1024 / _GIB)
    for limit, usage in _CGROUP_LIMITS:
        if Path(limit).exists() and (text := Path(limit).read_text().strip()) != "max":
            free.append((int(text) - int(Path(usage).read_text()) + _page_cache()) / _GIB)
    if "SLURM_MEM_PER_NODE" in os.environ:
        free.append(int(os.environ["SLURM_MEM_PER_NODE"]) / 1024)
    if "SLURM_MEM_PER_CPU" in os.environ:
        free.append(int(os.environ["SLURM_MEM_PER_CPU"]) * available_cores() / 1024)
    return min(free)


def _page_cache() -> int:
    """Bytes of the container's usage that the kernel gives back when they are needed; 0 where it does not tell."""
    statistics = Path("/sys/fs/cgroup/memory.stat")
    lines = statistics.read_text().splitlines() if statistics.exists() else []
    return sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))


def visible_gpus() -> list[str]:
    """The GPUs that this process sees, as `CUDA_VISIBLE_DEVICES` names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name]
    import torch  # where nothing else tells

    return [str(index) for index in range(torch.cuda.device_count())]


class GpuSlots:
    """Slots on the GPUs of this machine, shared by all benchmark processes of a user through locked files.

    Args:
        gpus: names for `CUDA_VISIBLE_DEVICES`.
        runs_per_gpu: how many runs may use one at once.
    """

    def __init__(self, gpus: list[str], runs_per_gpu: int) -> None:
        # A SLURM job has its GPUs to itself, and may see others' under the same names.
        owner = f"job-{os.environ['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in os.environ else f"user-{os.getuid()}"
        self._folder = Path(tempfile.gettempdir()) / f"otpr-bench-gpus-{owner}"
        # Slot by slot over all GPUs, so that runs spread before they share.
        self._slots = [(gpu, slot) for slot in range(runs_per_gpu) for gpu in gpus]
        self._taken: dict[tuple[str, int], IO[str]] = {}

    def take(self) -> tuple[str, int] | None:
        """A free slot, the GPU's name first; None while all are taken.

        Raises:
            OSError: the folder of the locks cannot be written.
        """
        self._folder.mkdir(mode=0o700, exist_ok=True)
        for slot in self._slots:
            if slot in self._taken:
                continue
            file = (self._folder / f"{slot[0]}-{slot[1]}.lock").open("w")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                continue
            self._taken[slot] = file
            return slot
        return None

    def give_back(self, slot: tuple[str, int]) -> None:
        """Free a slot that `take` gave."""
        self._taken.pop(slot).close()
