"""What SLURM's own commands say; every answer that could not be had is an error, never an empty answer."""

from __future__ import annotations

import re
import shutil
import subprocess

# A job in one of these will run, or runs: squeue's states that are not the end.
LIVE = {
    "PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "COMPLETING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD",
    "RESIZING", "SIGNALING", "SPECIAL_EXIT", "STAGE_OUT", "STOPPED", "RESV_DEL_HOLD",
}  # fmt: skip
COMMAND_SECONDS = 60.0


class SlurmError(ValueError):
    """A command of SLURM failed, or did not answer; one line."""


def call(*command: str, text: str | None = None) -> str:
    """The output of a command, to which `text` is piped.

    Raises:
        SlurmError: it is not there, fails, or takes longer than `COMMAND_SECONDS`.
    """
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SlurmError(f"{command[0]}: {error}") from error
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise SlurmError("; ".join(lines[:2]) if lines else f"{command[0]} ended with exit status {done.returncode}")
    return done.stdout + done.stderr


def answers() -> bool:
    """Whether there is a SLURM here whose controller answers."""
    if shutil.which("sbatch") is None:
        return False
    try:
        return "is UP" in call("scontrol", "ping")
    except SlurmError:
        return False


def job_states() -> dict[tuple[str, int], tuple[str, str]]:
    """State and reason of every job of this user that the controller remembers, by job name and array index.

    Raises:
        SlurmError: the controller does not answer.
    """
    states: dict[tuple[str, int], tuple[str, str]] = {}
    for line in call("squeue", "--me", "--noheader", "--array", "--states=all", "--format=%K|%T|%r|%j").splitlines():
        index, state, reason, name = line.strip().split("|", 3)
        states[name, int(index) if index.isdigit() else 0] = state, reason
    return states


def ended_state(name: str, index: int) -> str | None:
    """How an array element ended, by the accounting; None where there is no accounting, or it does not know yet."""
    try:
        lines = call("sacct", "--noheader", "--parsable2", "--allocations", f"--name={name}", "--format=JobID,State",
                     "--starttime=now-90days").splitlines()  # fmt: skip
    except SlurmError:
        return None
    for line in lines:
        job, _, state = line.partition("|")
        _, separator, element = job.partition("_")
        if (element if separator else "0") == str(index):
            return state.split()[0] if state else None
    return None


def array_cap() -> int:
    """How many elements an array may have here.

    Raises:
        SlurmError: the controller does not answer.
    """
    found = re.search(r"MaxArraySize\s*=\s*(\d+)", call("scontrol", "show", "config"))
    return max(int(found[1]) - 1, 1) if found else 1000


def check_submission(text: str) -> None:
    """Have SLURM judge a batch script without submitting it.

    Raises:
        SlurmError: it would refuse it: unknown partition or account, resources that it does not have.
    """
    call("sbatch", "--test-only", text=text)


def parse_minutes(text: str) -> int:
    """SLURM's time formats as minutes: ``M``, ``M:S``, ``H:M:S``, ``D-H``, ``D-H:M``, ``D-H:M:S``; rounded up.

    Raises:
        ValueError: none of them, or not positive.
    """
    match = re.fullmatch(r"(?:(\d+)-(\d+)(?::(\d+))?(?::(\d+))?|(?:(\d+):)?(\d+):(\d+)|(\d+))", text.strip())
    if match:
        days, hours, minutes, seconds, hours2, minutes2, seconds2, plain = (int(part or 0) for part in match.groups())
        total = ((days * 24 + hours + hours2) * 60 + minutes + minutes2 + plain) * 60 + seconds + seconds2
        if total > 0:
            return -(-total // 60)
    raise ValueError(f"--time takes minutes, H:M:S or D-H:M:S, more than 0, got {text!r}")


def parse_memory(text: str) -> int:
    """Memory such as ``4G``, ``500M`` or ``6`` (GiB) as MiB.

    Raises:
        ValueError: not such a size, or not positive.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([MGT]?)B?", text.strip().upper())
    size = float(match[1]) * {"M": 1, "": 1024, "G": 1024, "T": 1024**2}[match[2]] if match else 0.0
    if size < 1:
        raise ValueError(f"--mem takes a size such as 4G or 500M, got {text!r}")
    return round(size)
