"""Files of demonstrations in the layout of D4RL (Fu et al. 2020): one flat array per column, for all episodes.

An HDF5 file holds ``observations`` (M, O), ``actions`` (M, A), ``rewards`` (M,), ``terminals`` (M,) and ``timeouts``
(M,) for M steps, episode after episode; other entries, such as ``next_observations`` or ``metadata``, are ignored.
A file of the kitchen may lack ``timeouts``: there ``terminals`` marks the last step of each demonstration.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from benchmark.data.episodes import COLUMNS, Dataset, Episodes, empty_episodes
from benchmark.data.hdf5 import (
    check_lengths,
    check_total,
    child_array,
    open_hdf5,
    read_array,
    read_attributes,
    writing_hdf5,
)

KINDS = {"actions": "actions", "terminals": "flags", "timeouts": "flags"}  # of a column's values; others are numbers


def write_d4rl(path: Path, episodes: Episodes, attributes: Mapping[str, str | int | float]) -> None:
    """Write a compressed file, with `attributes` and a ``content_sha256``, through a temporary name.

    Raises:
        OSError: as the file system says; nothing is then left behind.
    """
    with writing_hdf5(path) as file:
        for name in COLUMNS:
            file.create_dataset(name, data=getattr(episodes, name), compression="lzf", shuffle=True)
        file.attrs.update({**attributes, "content_sha256": episodes.content_digest()})


def read_d4rl(
    path: Path, observation_dim: int | None = None, action_dim: int | None = None, timeouts: bool = True
) -> Dataset:
    """Read and check a whole file; nothing in it is executed or followed to another file.

    Args:
        observation_dim, action_dim: the widths asked for; by default any.
        timeouts: whether the file must have them; without, a file that lacks them has none.

    Raises:
        ValueError: in one line: missing or unreadable file, missing entry, wrong shape or type, unequal lengths,
            NaN or infinity, action outside [-1, 1], or contents that differ from the digest stored with them.
    """
    widths = {"observations": (2, observation_dim), "actions": (2, action_dim)}
    with open_hdf5(path) as file:
        names = [name for name in COLUMNS if timeouts or name != "timeouts" or name in file]
        columns = {name: child_array(file, name, path, *widths.get(name, (1, None))) for name in names}
        steps = check_lengths(columns, path)
        check_total(columns.values(), path)
        episodes = empty_episodes(steps, columns["observations"].shape[1], columns["actions"].shape[1])
        for name, column in columns.items():
            read_array(column, KINDS.get(name, "numbers"), path, getattr(episodes, name))
        attributes = read_attributes(file, path)
    content = episodes.content_digest()
    if attributes.get("content_sha256", content) != content:
        raise ValueError(f"{path}: its contents are not those that it was written with")
    return Dataset(episodes, attributes, str(attributes.get("data_digest", content)))
