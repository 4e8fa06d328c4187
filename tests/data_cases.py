"""Small data files for the tests: in this benchmark's layouts, and as D4RL, robomimic and Minari publish theirs."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import h5py
import numpy as np

from benchmark.data.episodes import Episodes
from benchmark.data.robomimic import Demonstration

LENGTHS = (5, 3, 9)
KEY_WIDTHS = {"eef_pos": 3, "eef_quat": 4, "gripper_qpos": 2}
OBJECT_WIDTHS = {"lift": 10, "can": 14, "square": 14, "transport": 41}


def random_episodes(
    lengths: Sequence[int] = LENGTHS,
    timed_out: Sequence[int] = (1,),
    cut: bool = False,
    observation_dim: int = 4,
    action_dim: int = 2,
) -> Episodes:
    """Random numbers; episodes end for good but for those of the numbers `timed_out`; `cut`: the last has no end."""
    total, rng = sum(lengths), np.random.default_rng(0)
    terminals, timeouts = np.zeros(total, dtype=bool), np.zeros(total, dtype=bool)
    for i, last in enumerate(np.cumsum(lengths) - 1):
        (timeouts if i in timed_out else terminals)[last] = not (cut and last == total - 1)
    return Episodes(
        observations=rng.normal(size=(total, observation_dim)).astype(np.float32),
        actions=rng.uniform(-1, 1, size=(total, action_dim)).astype(np.float32),
        rewards=rng.normal(size=total).astype(np.float32),
        terminals=terminals,
        timeouts=timeouts,
    )


def write_published_d4rl(path: Path, episodes: Episodes, kitchen: bool = False) -> None:
    """A file as D4RL's collection script writes it: gzip, metadata and so on; the kitchen's is plainer."""
    with h5py.File(path, "w") as file:
        for name in ("observations", "actions", "rewards", "terminals", *(() if kitchen else ("timeouts",))):
            values = getattr(episodes, name)
            file.create_dataset(name, data=values[:, None] if kitchen and name == "rewards" else values,
                                compression="gzip")  # fmt: skip
        if kitchen:
            file["infos"] = np.arange(len(episodes.rewards))
            return
        file.create_dataset("next_observations", data=np.full_like(episodes.observations, np.nan), compression="gzip")
        for name in ("action_log_probs", "qpos", "qvel"):
            file.create_dataset(f"infos/{name}", data=episodes.rewards, compression="gzip")
        file["metadata/algorithm"] = np.bytes_("SAC")
        file["metadata/iteration"] = np.int32(300)
        file["metadata/policy/fc0/weight"] = np.zeros((2, 2))


def observation_widths(task: str) -> dict[str, int]:
    """Widths of robomimic's low-dimensional keys that the published policies see, in their order."""
    arms = 2 if task == "transport" else 1
    widths = {f"robot{arm}_{key}": width for arm in range(arms) for key, width in KEY_WIDTHS.items()}
    return widths | {"object": OBJECT_WIDTHS[task]}


def random_demonstrations(
    widths: Mapping[str, int], action_dim: int, lengths: Sequence[int] = LENGTHS
) -> list[Demonstration]:
    """Random numbers; each is done and rewarded at its last step."""
    rng = np.random.default_rng(1)
    return [
        Demonstration(
            observations={key: rng.normal(size=(steps, width)) for key, width in widths.items()},
            actions=rng.uniform(-1, 1, size=(steps, action_dim)).astype(np.float32),
            rewards=(np.arange(steps) == steps - 1).astype(np.float64),
            dones=(np.arange(steps) == steps - 1).astype(np.int64),
            states=rng.normal(size=(steps, 32)),
            model_file="<mujoco/>" * 10_000,
        )
        for steps in lengths
    ]


def write_published_robomimic(
    path: Path, demonstrations: Sequence[Demonstration], env_args: Mapping[str, object]
) -> None:
    """A file as robomimic's ``dataset_states_to_obs.py`` writes it: float64, uncompressed, further keys, masks."""
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        for number in reversed(range(len(demonstrations))):
            demonstration, group = demonstrations[number], data.create_group(f"demo_{number}")
            for name in ("actions", "rewards", "dones", "states"):
                group[name] = np.asarray(getattr(demonstration, name)).astype(
                    np.int64 if name == "dones" else np.float64
                )
            extra = {"robot0_joint_pos": np.zeros((len(demonstration.actions), 7))}
            for key, values in (demonstration.observations | extra).items():
                group[f"obs/{key}"] = values
                group[f"next_obs/{key}"] = values
            group.attrs["num_samples"] = len(demonstration.actions)
            group.attrs["model_file"] = demonstration.model_file
        data.attrs["total"] = sum(len(demonstration.actions) for demonstration in demonstrations)
        data.attrs["env_args"] = json.dumps(env_args, indent=4)
        names = np.array([f"demo_{number}".encode() for number in range(len(demonstrations))])
        for mask in ("better", "okay", "train", "valid", "worse"):
            file[f"mask/{mask}"] = names


def write_published_minari(path: Path, episodes: Episodes) -> None:
    """A directory as Minari 0.5 writes it, without the package."""
    (path / "data").mkdir(parents=True)
    edges = episodes.boundaries
    with h5py.File(path / "data" / "main_data.hdf5", "w", track_order=True) as file:
        for number, (start, stop) in enumerate(itertools.pairwise(edges)):
            group, last = file.create_group(f"episode_{number}"), episodes.observations[stop - 1 : stop]
            columns = {
                "observations": np.concatenate([episodes.observations[start:stop], last]),
                "actions": episodes.actions[start:stop],
                "rewards": episodes.rewards[start:stop].astype(np.float64),
                "terminations": episodes.terminals[start:stop],
                "truncations": episodes.timeouts[start:stop],
            }
            for name, values in columns.items():
                group.create_dataset(name, data=values, chunks=True, maxshape=(None, *values.shape[1:]))
            group.create_group("infos")
            group.attrs.update({"id": number, "total_steps": stop - start, "seed": 7})
    metadata = {"total_episodes": len(edges) - 1, "total_steps": int(edges[-1]), "data_format": "hdf5"}
    (path / "data" / "metadata.json").write_text(json.dumps(metadata))
