"""Reader of Minari datasets (Farama Foundation, Minari 0.5), without the package.

A dataset's directory holds ``data/main_data.hdf5``, with a group ``episode_i`` for each episode of T steps
(``observations`` (T + 1, O), ``actions`` (T, A), ``rewards``, ``terminations`` and ``truncations`` (T,)), and
``data/metadata.json`` with ``total_episodes`` and ``total_steps``.
"""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np

from benchmark.data.episodes import Dataset, empty_episodes
from benchmark.data.hdf5 import check_lengths, check_total, child_array, numbered_groups, open_hdf5, read_array
from benchmark.store import read_json

_FLAGS = {"terminals": "terminations", "timeouts": "truncations"}


def read_minari(path: Path, observation_dim: int | None = None, action_dim: int | None = None) -> Dataset:
    """Read and check a whole dataset; nothing in it is executed or followed to another file.

    Args:
        path: the dataset's directory, or its ``data`` directory.
        observation_dim, action_dim: the widths asked for; by default those of the first episode.

    Returns:
        The episodes in the order of their numbers, each without the observation after its last step.

    Raises:
        ValueError: in one line: missing or unreadable file, missing entry, observations that are not one array, wrong
            shape or type, unequal lengths, NaN or infinity, action outside [-1, 1], an end inside an episode, or
            counts that differ from those of the metadata.
    """
    folder = path / "data" if (path / "data").is_dir() else path
    metadata = read_json(folder / "metadata.json")
    if metadata.get("data_format", "hdf5") != "hdf5":
        raise ValueError(f"{path}: Minari data in format {metadata['data_format']!r}; only 'hdf5' can be read")
    main = folder / "main_data.hdf5"
    with open_hdf5(main) as file:
        opened = _open_episodes(file, observation_dim, action_dim, main)
        lengths = [len(columns["rewards"]) for columns in opened]
        for key, count in (("total_episodes", len(opened)), ("total_steps", sum(lengths))):
            if metadata.get(key, count) != count:
                raise ValueError(f"{path}: its metadata announces {metadata[key]} {key[6:]} but it holds {count}")
        first = opened[0]
        episodes = empty_episodes(sum(lengths), first["observations"].shape[1], first["actions"].shape[1])
        stops = np.cumsum(lengths)
        for columns, length, stop in zip(opened, lengths, stops, strict=True):
            rows = slice(stop - length, stop)
            read_array(columns["observations"], "numbers", main, episodes.observations[rows])
            read_array(columns["actions"], "actions", main, episodes.actions[rows])
            read_array(columns["rewards"], "numbers", main, episodes.rewards[rows])
            for name, source in _FLAGS.items():
                read_array(columns[source], "flags", main, getattr(episodes, name)[rows])
            ends = episodes.terminals[rows] | episodes.timeouts[rows]
            if ends[:-1].any():
                raise ValueError(f"{main}: {str(columns['rewards'].name)[1:-8]!r} goes on after its end")
        episodes.timeouts[stops - 1] |= ~episodes.terminals[stops - 1]  # the recording was stopped there
    return Dataset(episodes, {}, episodes.content_digest())


def _open_episodes(
    file: h5py.File, observation_dim: int | None, action_dim: int | None, path: Path
) -> list[dict[str, h5py.Dataset]]:
    """The arrays of each episode by Minari's name, with shapes checked and nothing read."""
    opened = []
    for group in numbered_groups(file, "episode", path):
        columns = {"actions": child_array(group, "actions", path, 2, action_dim)}
        columns |= {key: child_array(group, key, path, 1) for key in ("rewards", *_FLAGS.values())}
        steps = check_lengths(columns, path)
        columns["observations"] = child_array(group, "observations", path, 2, observation_dim)
        held, name = columns["observations"].shape[0], str(group.name)[1:]
        if held != steps + 1:
            raise ValueError(f"{path}: {name!r} has {held} observations for {steps} steps; expected {steps + 1}")
        action_dim, observation_dim = columns["actions"].shape[1], columns["observations"].shape[1]
        opened.append(columns)
    check_total((array for columns in opened for array in columns.values()), path)
    return opened
