"""Files of demonstrations in robomimic's layout (Mandlekar et al. 2021; robomimic 0.3, datasets "v1.4.1").

An HDF5 file holds a group ``data/demo_i`` for each demonstration of T steps, with ``actions`` (T, A), ``rewards``
(T,), ``dones`` (T,), ``states`` (T, S), ``obs/KEY`` and ``next_obs/KEY`` (T, d), and the attributes ``num_samples``
and ``model_file``; ``data`` has the attributes ``total`` (steps) and ``env_args`` (JSON: how to build the
environment); ``mask/train`` and ``mask/valid`` name demonstrations.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from benchmark.data.episodes import Dataset, Episodes, block_problem, empty_episodes
from benchmark.data.hdf5 import (
    check_lengths,
    check_total,
    child_array,
    child_group,
    numbered_groups,
    open_hdf5,
    read_array,
    read_attribute,
    read_attributes,
    writing_hdf5,
)

VALIDATION_SHARE = 10  # one demonstration in so many goes to mask/valid, as robomimic's split does
_STORED = {"compression": "gzip", "compression_opts": 4, "shuffle": True, "fletcher32": True}


@dataclass(frozen=True)
class Demonstration:
    """One recorded episode of T steps.

    Attributes:
        observations: by key, (T, d) float32 or float64, seen before the action.
        actions: (T, A) float32 in [-1, 1].
        rewards: (T,) float.
        dones: (T,) int, 1 where robomimic's episode is over (success or the end of the recording), otherwise 0.
        states: (T, S) float64, MuJoCo's flattened state before the action.
        model_file: XML of the MuJoCo model.
    """

    observations: dict[str, NDArray[Any]]
    actions: NDArray[np.float32]
    rewards: NDArray[Any]
    dones: NDArray[Any]
    states: NDArray[np.float64]
    model_file: str


def write_robomimic(
    path: Path,
    demonstrations: Iterable[Demonstration],
    env_args: Mapping[str, Any],
    attributes: Mapping[str, str | int | float],
) -> None:
    """Write one demonstration after the other, in memory, then the whole file; all arrays carry checksums.

    ``next_obs`` at the last step repeats that step's own observation: what follows the end is not recorded, and
    learners that bootstrap do not use it where ``dones`` is 1.

    Args:
        env_args: robomimic's {"env_name", "env_version", "type", "env_kwargs"}.
        attributes: of the file itself.

    Raises:
        ValueError: no demonstration, or one that is not as `Demonstration` says.
        OSError: as the file system says; nothing is then left behind.
    """
    with writing_hdf5(path) as file:
        data, lengths = file.create_group("data"), []
        for number, demonstration in enumerate(demonstrations):
            _write_demonstration(data.create_group(f"demo_{number}"), demonstration)
            lengths.append(len(demonstration.actions))
        if not lengths:
            raise ValueError(f"{path}: no demonstration to write")
        data.attrs.update({"total": sum(lengths), "env_args": json.dumps(env_args, indent=4)})
        names = np.array([f"demo_{i}".encode() for i in range(len(lengths))])
        valid = np.arange(len(names)) % VALIDATION_SHARE == VALIDATION_SHARE - 1
        file["mask/train"], file["mask/valid"] = names[~valid], names[valid]
        file.attrs.update(attributes)


def _write_demonstration(group: h5py.Group, demonstration: Demonstration) -> None:
    columns = {name: getattr(demonstration, name) for name in ("actions", "rewards", "dones", "states")}
    observations = {f"obs/{key}": value for key, value in demonstration.observations.items()}
    steps = len(demonstration.actions)
    for name, values in (columns | observations).items():
        kind = {"actions": "actions", "dones": "flags"}.get(name, "numbers")
        if len(values) != steps or not steps:
            raise ValueError(f"{group.name}/{name} must have {steps} steps, at least 1, got {len(values)}")
        problem = block_problem(values, kind)
        if problem is not None:
            raise ValueError(f"{group.name}/{name} at step {problem[0]}: {problem[1]}")
        group.create_dataset(name, data=values, **_STORED)
        if name in observations:
            group.create_dataset(f"next_{name}", data=np.concatenate([values[1:], values[-1:]]), **_STORED)
    group.attrs.update({"num_samples": steps, "model_file": demonstration.model_file})


def read_robomimic(path: Path, keys: Sequence[str], action_dim: int | None = None) -> Dataset:
    """Read and check a whole file; nothing in it is executed or followed to another file.

    Args:
        keys: observation keys, concatenated in this order.
        action_dim: the width asked for; by default that of the first demonstration.

    Returns:
        The demonstrations in the order of their numbers; terminals all False, timeouts at each one's last step; the
        attributes are the file's own and, as "env_args", the JSON text of the environment.

    Raises:
        ValueError: in one line: missing or unreadable file, missing entry, wrong shape or type, unequal lengths,
            NaN or infinity, action outside [-1, 1], or counts that differ from those stored with the data.
    """
    with open_hdf5(path) as file:
        data = child_group(file, "data", path)
        attributes = read_attributes(file, path)
        env_args = read_attribute(data, "env_args", path)
        if env_args is not None:
            attributes["env_args"] = str(env_args)
        demonstrations = _open_demonstrations(data, keys, action_dim, path)
        stops = np.cumsum([check_lengths(columns, path) for columns in demonstrations])
        _check_announced(data, "total", int(stops[-1]), path)
        first = demonstrations[0]
        width = sum(first[f"obs/{key}"].shape[1] for key in keys)
        episodes = empty_episodes(int(stops[-1]), width, first["actions"].shape[1])
        for columns, start, stop in zip(demonstrations, [0, *stops[:-1]], stops, strict=True):
            _read_columns(columns, episodes, slice(start, stop), path)
        episodes.timeouts[stops - 1] = True
    return Dataset(episodes, attributes, str(attributes.get("data_digest", episodes.content_digest())))


def _open_demonstrations(
    data: h5py.Group, keys: Sequence[str], action_dim: int | None, path: Path
) -> list[dict[str, h5py.Dataset]]:
    """Of each demonstration the arrays that are read, by name, with shapes checked and nothing read."""
    widths: dict[str, int | None] = {"actions": action_dim}
    opened = []
    for group in numbered_groups(data, "demo", path):
        observations = child_group(group, "obs", path)
        columns = {"actions": child_array(group, "actions", path, 2, widths["actions"])}
        columns |= {f"obs/{key}": child_array(observations, key, path, 2, widths.get(key)) for key in keys}
        columns["rewards"] = child_array(group, "rewards", path, 1)
        if not opened:
            widths = {"actions": columns["actions"].shape[1]} | {key: columns[f"obs/{key}"].shape[1] for key in keys}
        opened.append(columns)
        _check_announced(group, "num_samples", check_lengths(columns, path), path)
    check_total((array for columns in opened for array in columns.values()), path)
    return opened


def _check_announced(group: h5py.Group, name: str, steps: int, path: Path) -> None:
    announced = read_attribute(group, name, path)
    if announced is not None and announced != steps:
        raise ValueError(f"{path}: {str(group.name)[1:]!r} announces {announced} steps but holds {steps}")


def _read_columns(columns: Mapping[str, h5py.Dataset], episodes: Episodes, rows: slice, path: Path) -> None:
    """Read one demonstration into its rows, the observations side by side."""
    read_array(columns["actions"], "actions", path, episodes.actions[rows])
    read_array(columns["rewards"], "numbers", path, episodes.rewards[rows])
    left = 0
    for name, array in columns.items():
        if name.startswith("obs/"):
            right = left + array.shape[1]
            read_array(array, "numbers", path, episodes.observations[rows, left:right])
            left = right
