"""Generate the local datasets: whole episodes of a demonstrator, from seeded starts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmark.data.d4rl import Dataset, Episodes, read_dataset, write_dataset
from benchmark.data.demonstrator import Demonstrator, load_demonstrator
from benchmark.data.registry import LocalData, dataset_path
from benchmark.envs import VectorEnv, make_env
from benchmark.envs.toy import toy_demonstrations
from benchmark.seeding import Streams, derive_seed


def make_episodes(data: LocalData, threads: int = 1) -> Episodes:
    """Generate a dataset's episodes.

    Args:
        threads: threads of the physics; never changes a result.

    Raises:
        ValueError: the demonstrator is missing or damaged.
    """
    streams = Streams(data.seed, data.task, 0)
    path = data.demonstrator_path()
    if path is None:
        generator = np.random.default_rng(derive_seed(data.seed, data.task, 0, "demonstrations"))
        return Episodes(**toy_demonstrations(generator, data.episodes))
    data.recipe()  # refuses a demonstrator that is not the one of its card
    env = make_env(data.environment, data.episodes, action_horizon=1, threads=threads)
    try:
        indices = np.arange(data.episodes)
        seeds = streams.episodes("demonstrations", indices, np.zeros_like(indices))
        return roll_out(env, load_demonstrator(path), seeds, streams.torch("demonstrator"))
    finally:
        env.close()


def roll_out(env: VectorEnv, policy: Demonstrator, seeds: NDArray[np.int64], generator: torch.Generator) -> Episodes:
    """One whole episode per environment under the stochastic policy, all stepped side by side.

    Args:
        env: of action horizon 1 and as many environments as `seeds`.
        seeds: (E,) int64, the reset seed of each episode.
        generator: draws the actions.
    """
    indices = np.arange(env.num_envs)
    observations = env.reset(indices, seeds)
    rows: list[tuple[NDArray, ...]] = []
    while indices.size:
        actions = policy.act(observations, generator)
        outcome = env.step(indices, actions[:, None])
        timeouts = outcome.truncated & ~outcome.terminated
        rewards = outcome.rewards[:, 0].astype(np.float32)
        rows.append((indices, observations.astype(np.float32), actions, rewards, outcome.terminated, timeouts))
        running = ~(outcome.terminated | outcome.truncated)
        indices, observations = indices[running], outcome.observations[running]
    episode, *columns = (np.concatenate(column) for column in zip(*rows, strict=True))
    order = np.argsort(episode, kind="stable")  # from step after step to episode after episode
    return Episodes(*(column[order] for column in columns))


def make_dataset(data: LocalData, path: Path | None = None, threads: int = 1) -> Path:
    """Generate a dataset and write it, by default to the cache; returns where.

    Raises:
        ValueError: the demonstrator is missing or damaged.
        OSError: the file cannot be written.
    """
    path = dataset_path(data.task) if path is None else path
    write_dataset(path, make_episodes(data, threads), {**data.recipe(), "data_digest": data.digest()})
    return path


def verify_dataset(data: LocalData, path: Path) -> Dataset:
    """Read a file and check that it holds this dataset as the present recipe makes it.

    Raises:
        ValueError: missing, damaged, or made by another recipe.
    """
    dataset = read_dataset(path)
    if dataset.digest != data.digest():
        found = {key: dataset.attributes.get(key) for key in data.recipe()}
        other = [key for key, value in data.recipe().items() if found[key] != value]
        raise ValueError(f"{path}: not {data.task!r} as made today; it differs in {', '.join(other) or 'data_digest'}")
    return dataset


def load_dataset(data: LocalData) -> Dataset:
    """The dataset from the cache, generated first where it is missing or made by an older recipe.

    Raises:
        ValueError: the cached file is damaged, or the demonstrator is missing.
        OSError: the file cannot be written.
    """
    path = dataset_path(data.task)
    if path.exists():
        dataset = read_dataset(path)
        if dataset.digest == data.digest():
            return dataset
    make_dataset(data, path)
    return verify_dataset(data, path)
