"""The one form in which demonstrations are held: flat arrays of whole episodes, whatever file they came from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

COLUMNS = ("observations", "actions", "rewards", "terminals", "timeouts")
ACTION_TOLERANCE = 1e-5  # by which an action may lie outside [-1, 1]


@dataclass(frozen=True)
class Episodes:
    """M steps of whole episodes, one after the other.

    Attributes:
        observations: (M, O) float32, seen before the action, in the environment's units.
        actions: (M, A) float32 in [-1, 1] (to within `ACTION_TOLERANCE`), the environment's units.
        rewards: (M,) float32.
        terminals: (M,) bool, the step ended the episode for good.
        timeouts: (M,) bool, the time limit cut the episode after the step.
    """

    observations: NDArray[np.float32]
    actions: NDArray[np.float32]
    rewards: NDArray[np.float32]
    terminals: NDArray[np.bool_]
    timeouts: NDArray[np.bool_]

    @property
    def boundaries(self) -> NDArray[np.int64]:
        """(E + 1,) int64: episode i is steps boundaries[i] to boundaries[i + 1] - 1; a cut last episode counts."""
        stops = np.flatnonzero(self.terminals | self.timeouts) + 1
        total = len(self.rewards)
        if not stops.size or stops[-1] != total:
            stops = np.append(stops, total)
        return np.concatenate([[0], stops]).astype(np.int64)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(E,) int64, steps per episode."""
        return np.diff(self.boundaries)

    @property
    def returns(self) -> NDArray[np.float64]:
        """(E,) float64, undiscounted return per episode."""
        return np.add.reduceat(self.rewards.astype(np.float64), self.boundaries[:-1])

    def steps_to(self, reward: float) -> NDArray[np.float64]:
        """(E,) float64, steps per episode to the first of at least `reward`, itself counted; infinite without one."""
        steps = np.arange(1, len(self.rewards) + 1) - np.repeat(self.boundaries[:-1], self.lengths)  # (M,), from 1
        return np.minimum.reduceat(np.where(self.rewards >= reward, steps, np.inf), self.boundaries[:-1])

    def window_starts(self, size: int) -> NDArray[np.int64]:
        """First steps of all windows of `size` steps that lie inside one episode, ascending.

        Raises:
            ValueError: no episode is that long, or `size` is below 1.
        """
        if size < 1:
            raise ValueError(f"window size must be at least 1, got {size}")
        edges = self.boundaries
        remaining = np.repeat(edges[1:], self.lengths) - np.arange(edges[-1])  # steps to the episode's end
        starts = np.flatnonzero(remaining >= size)
        if not starts.size:
            raise ValueError(f"no episode has {size} steps; the longest has {self.lengths.max()}")
        return starts

    def of_positive_return(self) -> Episodes:
        """Those whose return is above 0.

        Raises:
            ValueError: there is none.
        """
        kept = np.repeat(self.returns > 0, self.lengths)
        if not kept.any():
            raise ValueError(f"none of {len(self.lengths)} episodes has a return above 0")
        return Episodes(*(getattr(self, name)[kept] for name in COLUMNS))

    def content_digest(self) -> str:
        """SHA-256 over all arrays, with their names and shapes."""
        digest = hashlib.sha256()
        for name in COLUMNS:
            column = np.ascontiguousarray(getattr(self, name))
            digest.update(f"{name} {column.dtype.str} {column.shape}\n".encode())
            digest.update(column.data)
        return digest.hexdigest()


@dataclass(frozen=True)
class Dataset:
    """A file's episodes and string or number attributes; `digest` identifies the data in specifications and cards.

    Attributes:
        digest: the ``data_digest`` attribute of a file that the benchmark generated, otherwise a hash of the contents.
    """

    episodes: Episodes
    attributes: dict[str, str | int | float]
    digest: str


def empty_episodes(steps: int, observation_dim: int, action_dim: int) -> Episodes:
    """Arrays for `steps` steps: numbers yet to be filled in, flags all False."""
    return Episodes(
        observations=np.empty((steps, observation_dim), dtype=np.float32),
        actions=np.empty((steps, action_dim), dtype=np.float32),
        rewards=np.empty(steps, dtype=np.float32),
        terminals=np.zeros(steps, dtype=np.bool_),
        timeouts=np.zeros(steps, dtype=np.bool_),
    )


def block_problem(block: NDArray[Any], kind: str) -> tuple[int, str] | None:
    """What is wrong with a block of M steps (M, ...): the first bad step and a description, or None.

    Args:
        kind: "flags", each 0 or 1; "actions", within [-1, 1]; "numbers", anything that float32 can hold.
    """
    if kind == "flags":
        bad = np.flatnonzero((block != 0) & (block != 1))
        return (int(bad[0]), f"must be 0 or 1, got {block.reshape(-1)[bad[0]]}") if bad.size else None
    limit = 1.0 + ACTION_TOLERANCE if kind == "actions" else float(np.finfo(np.float32).max)
    good = np.abs(block) <= limit  # false for NaN
    if good.all():
        return None
    row = int(np.argwhere(~good)[0][0])
    value = block[~good][0]
    outside = kind == "actions" and np.isfinite(value)
    return row, f"{value} is {'outside [-1, 1]' if outside else 'not a finite float32'}"
