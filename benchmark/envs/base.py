"""The one interface of every simulator: a batch of environments stepped in chunks of actions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class ChunkStep:
    """What one chunk of actions did to `n` environments, in the order of the indices given to `step`.

    Attributes:
        observations: (n, O) float64, after the last executed action: an ended episode's own final observation.
        rewards: (n, H) float64, one per action; 0 for the actions after the end, which are not executed.
        steps: (n,) int64, actions executed, 1 to H.
        terminated: (n,) bool, the task itself ended (a fall, a success).
        truncated: (n,) bool, the time limit was reached; both flags may be set, as in gymnasium.
    """

    observations: NDArray[np.float64]
    rewards: NDArray[np.float64]
    steps: NDArray[np.int64]
    terminated: NDArray[np.bool_]
    truncated: NDArray[np.bool_]


class VectorEnv(ABC):
    """`num_envs` independent environments without automatic reset.

    A new environment has no episode: the caller resets each index, always with a seed, before stepping it and again
    after its episode ended. Nothing depends on which environments are stepped together, or on how many threads do it.
    """

    num_envs: int
    observation_dim: int
    action_dim: int
    action_horizon: int
    max_episode_steps: int

    @abstractmethod
    def reset(self, indices: NDArray[np.int64], seeds: NDArray[np.int64]) -> NDArray[np.float64]:
        """Start new episodes.

        Args:
            indices: (n,) int64, distinct, in [0, num_envs).
            seeds: (n,) int64, non-negative; the episode's start is a function of its seed alone.

        Returns:
            (n, O) float64 first observations.

        Raises:
            ValueError: for a bad index or seed, or arrays of different lengths.
        """

    @abstractmethod
    def step(self, indices: NDArray[np.int64], actions: NDArray[np.float32]) -> ChunkStep:
        """Execute one chunk of actions in each of the given environments, or what of it precedes the episode's end.

        Args:
            indices: (n,) int64, distinct, in [0, num_envs).
            actions: (n, H, A) float32 in the environment's own units.

        Raises:
            ValueError: for a bad index, a bad shape, or an action that is not finite.
            RuntimeError: if one of the episodes has ended or was never started. No environment is then stepped.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Copies of the whole state as arrays and ints; a fresh environment that loads it continues bit-identically."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned. Raises ValueError where an entry is missing or does not fit."""

    def render(self, index: int, width: int = 480, height: int = 480) -> NDArray[np.uint8]:
        """A picture of one environment's present state, (height, width, 3) uint8.

        Raises:
            ValueError: this simulator draws nothing, or not on this machine.
        """
        raise ValueError(f"{type(self).__name__} cannot be rendered")

    def close(self) -> None:  # noqa: B027 - most environments hold nothing that needs closing
        """Release threads and processes; safe to call twice."""


def check_sizes(num_envs: int, action_horizon: int, threads: int = 1) -> None:
    """Raise ValueError unless all three are at least 1."""
    for name, value in (("num_envs", num_envs), ("action_horizon", action_horizon), ("threads", threads)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def check_indices(env: VectorEnv, indices: NDArray[np.int64]) -> NDArray[np.int64]:
    """The indices as contiguous (n,) int64. Raises ValueError unless they are distinct and in [0, num_envs)."""
    checked = np.ascontiguousarray(indices)
    if checked.ndim != 1 or not (checked.size == 0 or np.issubdtype(checked.dtype, np.integer)):
        raise ValueError(f"indices must be a 1-D integer array, got shape {checked.shape} of {checked.dtype}")
    outside = checked[(checked < 0) | (checked >= env.num_envs)]
    if outside.size:
        raise ValueError(f"environment index {outside[0]} is outside 0..{env.num_envs - 1}")
    if np.bincount(checked, minlength=1).max(initial=0) > 1:
        raise ValueError(f"environment indices must be distinct, got {checked.tolist()}")
    return checked.astype(np.int64, copy=False)


def check_seeds(indices: NDArray[np.int64], seeds: NDArray[np.int64]) -> NDArray[np.int64]:
    """The seeds as an array. Raises ValueError unless there is one non-negative integer per index."""
    checked = np.asarray(seeds)
    if checked.shape != indices.shape:
        raise ValueError(f"seeds must have the indices' shape {indices.shape}, got {checked.shape}")
    if checked.size and (not np.issubdtype(checked.dtype, np.integer) or checked.min() < 0):
        raise ValueError(f"seeds must be non-negative integers, got {checked.tolist()}")
    return checked


def check_actions(env: VectorEnv, indices: NDArray[np.int64], actions: NDArray[np.float32]) -> NDArray[np.float32]:
    """The actions as contiguous (n, H, A) float32. Raises ValueError for another shape, an infinity or a NaN."""
    checked = np.ascontiguousarray(actions, dtype=np.float32)
    expected = (len(indices), env.action_horizon, env.action_dim)
    if checked.shape != expected:
        raise ValueError(f"actions must have shape {expected}, got {checked.shape}")
    if not np.isfinite(checked).all():
        bad = indices[~np.isfinite(checked).all(axis=(1, 2))]
        raise ValueError(f"actions must be finite, but those of environments {bad.tolist()} are not")
    return checked


def check_running(indices: NDArray[np.int64], ended: NDArray[np.bool_]) -> None:
    """Raise RuntimeError if an environment named by `indices` is marked in `ended` ((num_envs,) bool)."""
    stopped = indices[ended[indices]]
    if stopped.size:
        raise RuntimeError(f"environments {stopped.tolist()} have no running episode: reset them before stepping")


def load_arrays(targets: Mapping[str, NDArray[Any]], state: Mapping[str, Any]) -> None:
    """Copy each entry of `state` into the array of the same name. All are checked before the first is written.

    Raises:
        ValueError: if an entry is missing, or has another shape or dtype than its target.
    """
    for name, target in targets.items():
        if name not in state:
            raise ValueError(f"environment state lacks {name!r}; it has {sorted(state)}")
        value = np.asarray(state[name])
        if value.shape != target.shape or value.dtype != target.dtype:
            raise ValueError(
                f"environment state {name!r} must be {target.dtype} {target.shape}, got {value.dtype} {value.shape}"
            )
    for name, target in targets.items():
        target[...] = state[name]
