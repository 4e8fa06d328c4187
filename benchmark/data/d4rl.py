"""Demonstrations as flat arrays of whole episodes, and files of them in the layout of D4RL (Fu et al. 2020).

An HDF5 file holds ``observations`` (M, O), ``actions`` (M, A), ``rewards`` (M,), ``terminals`` (M,) and ``timeouts``
(M,) for M steps, episode after episode; other entries, such as ``next_observations`` or ``metadata``, are ignored.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

COLUMNS = ("observations", "actions", "rewards", "terminals", "timeouts")
ACTION_TOLERANCE = 1e-5  # by which an action may lie outside [-1, 1]
MAX_NUMBERS = 1_000_000_000  # per entry; a file that declares more is refused before any memory is asked for
_BLOCK = 65_536  # steps read and checked at a time


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


def write_dataset(path: Path, episodes: Episodes, attributes: Mapping[str, str | int | float]) -> None:
    """Write a compressed file, with `attributes` and a ``content_sha256``, through a temporary name.

    Raises:
        OSError: as the file system says; nothing is then left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with h5py.File(temporary, "w") as file:
            for name in COLUMNS:
                file.create_dataset(name, data=getattr(episodes, name), compression="lzf", shuffle=True)
            file.attrs.update({**attributes, "content_sha256": episodes.content_digest()})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_dataset(path: Path, observation_dim: int | None = None, action_dim: int | None = None) -> Dataset:
    """Read and check a whole file; nothing in it is executed or followed to another file.

    Args:
        observation_dim, action_dim: the widths asked for; by default any.

    Raises:
        ValueError: in one line: missing or unreadable file, missing entry, wrong shape or type, unequal lengths,
            NaN or infinity, action outside [-1, 1], or contents that differ from the digest stored with them.
    """
    try:
        with h5py.File(path, "r") as file:
            columns = {name: _open_column(file, name, path) for name in COLUMNS}
            _check_shapes(columns, path, observation_dim, action_dim)
            episodes = Episodes(**{name: _read_column(column, name, path) for name, column in columns.items()})
            attributes = {str(key): _plain(value) for key, value in file.attrs.items() if _is_plain(value)}
    except (OSError, RuntimeError, KeyError, TypeError) as error:  # what HDF5 raises for a damaged file
        raise ValueError(f"{path}: unreadable HDF5 file ({' '.join(str(error).split())})") from error
    content = episodes.content_digest()
    if attributes.get("content_sha256", content) != content:
        raise ValueError(f"{path}: its contents are not those that it was written with")
    return Dataset(episodes, attributes, str(attributes.get("data_digest", content)))


def _open_column(file: h5py.File, name: str, path: Path) -> h5py.Dataset:
    """The entry `name`, provided that its numbers lie in this very file."""
    if name not in file:
        raise ValueError(f"{path}: lacks {name!r}; a D4RL file holds {', '.join(COLUMNS)}")
    column = file[name] if isinstance(file.get(name, getlink=True), h5py.HardLink) else None
    if not isinstance(column, h5py.Dataset) or column.external or column.is_virtual:
        raise ValueError(f"{path}: {name!r} must be an array stored in the file itself")
    if column.dtype.kind not in "biuf":
        raise ValueError(f"{path}: {name!r} must hold numbers, got {column.dtype}")
    return column


def _check_shapes(
    columns: Mapping[str, h5py.Dataset], path: Path, observation_dim: int | None, action_dim: int | None
) -> None:
    widths = {"observations": observation_dim, "actions": action_dim}
    for name, column in columns.items():
        if len(column.shape) != (2 if name in widths else 1):
            raise ValueError(f"{path}: {name!r} must have {2 if name in widths else 1} dimensions, got {column.shape}")
        if name in widths and (widths[name] or column.shape[1]) != column.shape[1]:
            raise ValueError(f"{path}: {name!r} must have width {widths[name]}, got {column.shape[1]}")
        if not 1 <= math.prod(column.shape) <= MAX_NUMBERS:
            raise ValueError(f"{path}: {name!r} must hold 1 to {MAX_NUMBERS} numbers, got shape {column.shape}")
    steps = {name: column.shape[0] for name, column in columns.items()}
    if len(set(steps.values())) != 1:
        raise ValueError(f"{path}: lengths differ: {', '.join(f'{name} {count}' for name, count in steps.items())}")


def _read_column(column: h5py.Dataset, name: str, path: Path) -> NDArray[Any]:
    """Read block by block into float32 or bool, checking each block as it comes."""
    flags = name in ("terminals", "timeouts")
    values = np.empty(column.shape, dtype=np.bool_ if flags else np.float32)
    for start in range(0, len(values), _BLOCK):
        block = np.asarray(column[start : start + _BLOCK])
        problem = _flag_problem(block) if flags else _number_problem(block, name == "actions")
        if problem is not None:
            raise ValueError(f"{path}: {name!r} at step {start + problem[0]}: {problem[1]}")
        values[start : start + len(block)] = block
    return values


def _flag_problem(block: NDArray[Any]) -> tuple[int, str] | None:
    bad = np.flatnonzero((block != 0) & (block != 1))
    return (int(bad[0]), f"must be 0 or 1, got {block[bad[0]]}") if bad.size else None


def _number_problem(block: NDArray[Any], bounded: bool) -> tuple[int, str] | None:
    """The first step whose values float32 cannot hold, or, where `bounded`, that lie outside [-1, 1]."""
    limit = 1.0 + ACTION_TOLERANCE if bounded else float(np.finfo(np.float32).max)
    good = np.abs(block) <= limit  # false for NaN
    if good.all():
        return None
    row = int(np.argwhere(~good)[0][0])
    value = block[~good][0]
    return row, f"{value} is {'outside [-1, 1]' if bounded and np.isfinite(value) else 'not a finite float32'}"


def _is_plain(value: Any) -> bool:
    return isinstance(value, (str, int, float, np.integer, np.floating))


def _plain(value: Any) -> str | int | float:
    return value.item() if isinstance(value, np.generic) else value
