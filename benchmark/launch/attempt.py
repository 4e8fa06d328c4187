"""What an attempt at a run is told from outside; here and in all that a job itself imports there is no PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

CHECKPOINT_SECONDS = 120.0  # between checkpoints; a kill loses at most this and one iteration


@dataclass(frozen=True)
class AttemptLimits:
    """What a scheduler imposes on an attempt."""

    checkpoint_seconds: float = CHECKPOINT_SECONDS
    time_limit: float | None = None  # seconds until the attempt is ended from outside
    stopped_state: str = "cancelled"  # of a run that SIGTERM stops; "queued" where somebody else decides what it means


@dataclass
class Stop:
    """How a run is asked to stop: signal handlers set `state`, and the run ends with it after the current iteration."""

    state: str = ""  # "cancelled", or "queued" where the run goes on later by itself
