"""Where a run came from: code, versions, machine, command."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmark.store import read_json, write_json

PACKAGES = (
    "torch", "numpy", "mujoco", "gymnasium", "gymnasium-robotics", "robosuite", "numba", "scipy", "pot", "rliable",
    "pandas", "submitit",
)  # fmt: skip
COMMAND = "OTPR_BENCH_COMMAND"  # environment variable with the user's command, where this process has another


def collect_provenance() -> dict[str, Any]:
    """Git commit and dirty-diff digest, package versions, CPU and GPU, command line, SLURM job; plain JSON values."""
    return {
        "git": git_state(Path(__file__).parent),
        **environment(),
        "command": shlex.split(os.environ.get(COMMAND, "")) or own_command(),
        "slurm": {key: value for key, value in os.environ.items() if key.startswith("SLURM_JOB") and "PATH" not in key},
    }


def environment() -> dict[str, Any]:
    """Package versions, Python, system, processor and GPU: what may change the last bits of a result."""
    import torch  # for the GPU's name: what reads provenance needs none

    return {
        "packages": {name: version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def own_command() -> list[str]:
    """The command line of this process, without the folder of its program."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]


def add_attempt(path: Path, attempt: dict[str, Any]) -> None:
    """Add an attempt, with the commit that it runs, to the provenance at `path`, collected where there is none.

    Of versions and machine it names what is no longer as at the first attempt. A damaged file, which decides nothing,
    is collected anew.

    Args:
        attempt: number, host, job and time of its start, which say where the results from then on come from.

    Raises:
        OSError: it cannot be written.
    """
    try:
        known = read_json(path) if path.exists() else collect_provenance()
    except ValueError:
        known = collect_provenance() | {"note": "earlier attempts are not known: the file that held them was damaged"}
    changed = {name: value for name, value in environment().items() if known.get(name) != value}
    attempts = [*known.get("attempts", []), attempt | {"git": git_state(Path(__file__).parent)} | changed]
    write_json(path, known | {"attempts": attempts})


def version(package: str) -> str | None:
    """Installed version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_model() -> str:
    """The processor's name as the kernel gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def git_state(folder: Path) -> dict[str, str | None]:
    """Commit and, where the checkout differs from it, the SHA-256 of the difference.

    None where the folder of a package does not lie at the top of a checkout: one around an environment that the
    package was installed into is somebody else's. What lies in results/ does not count; modules of the packages do,
    also before they are added.
    """

    def git(*arguments: str) -> bytes | None:
        try:
            result = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return result.stdout

    top = os.fsdecode((git("rev-parse", "--show-toplevel") or b"").strip())
    if not top or Path(top).resolve() != folder.parent.resolve():
        return {"commit": None, "dirty": None}
    commit, difference = git("rev-parse", "HEAD"), git("diff", "HEAD", "--", ":(top)", ":(top,exclude)results") or b""
    modules = (f":(top,glob){package}/**/*.py" for package in ("otpr", "baselines", "benchmark"))
    listed = git("ls-files", "--others", "--exclude-standard", "--full-name", "-z", "--", *modules) or b""
    for name in filter(None, listed.split(b"\0")):
        difference += name
        with suppress(OSError):  # a link to nothing, as editors leave it, or deleted by now
            difference += Path(top, os.fsdecode(name)).read_bytes()
    return {
        "commit": commit.decode().strip() if commit else None,
        "dirty": hashlib.sha256(difference).hexdigest() if difference else None,
    }
