"""Generate the local datasets: whole episodes of a demonstrator, from seeded starts."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmark.data.d4rl import write_d4rl
from benchmark.data.demonstrator import Demonstrator, load_demonstrator
from benchmark.data.episodes import Episodes
from benchmark.data.registry import LocalData, dataset_path
from benchmark.data.robomimic import write_robomimic
from benchmark.envs import VectorEnv, make_env
from benchmark.envs.toy import toy_demonstrations
from benchmark.seeding import Streams, derive_seed


def make_dataset(data: LocalData, path: Path | None = None, threads: int = 1) -> Path:
    """Generate a dataset and write it, by default to the cache; returns where.

    Args:
        threads: threads of the physics, or worker processes of robosuite; never changes a result.

    Raises:
        ValueError: the demonstrator is missing or damaged.
        OSError: the file cannot be written.
    """
    path = dataset_path(data.task) if path is None else path
    attributes = {**data.recipe(), "data_digest": data.digest()}
    if data.layout == "robomimic":
        from benchmark.envs.robosuite import default_arguments  # optional package

        script = importlib.import_module(str(data.script))
        demonstrations = script.demonstrate(data.environment, _seeds(data), threads)
        write_robomimic(path, demonstrations, default_arguments(data.environment), attributes)
    else:
        write_d4rl(path, make_episodes(data, threads), attributes)
    return path


def make_episodes(data: LocalData, threads: int = 1) -> Episodes:
    """Generate the episodes of a dataset in D4RL's layout.

    Args:
        threads: threads of the physics; never changes a result.

    Raises:
        ValueError: the demonstrator is missing or damaged.
    """
    path = data.demonstrator_path()
    if data.script is not None:
        return importlib.import_module(data.script).demonstrate(_seeds(data), threads)
    if path is None:
        generator = np.random.default_rng(derive_seed(data.seed, data.task, 0, "demonstrations"))
        return Episodes(**toy_demonstrations(generator, data.episodes))
    data.recipe()  # refuses a demonstrator that is not the one of its card
    env = make_env(data.environment, data.episodes, action_horizon=1, threads=threads)
    try:
        actions = Streams(data.seed, data.task, 0).torch("demonstrator")
        return roll_out(env, load_demonstrator(path), _seeds(data), actions, data.noise)
    finally:
        env.close()


def _seeds(data: LocalData) -> NDArray[np.int64]:
    """The reset seed of each episode."""
    indices = np.arange(data.episodes)
    return Streams(data.seed, data.task, 0).episodes("demonstrations", indices, np.zeros_like(indices))


def roll_out(
    env: VectorEnv, policy: Demonstrator, seeds: NDArray[np.int64], generator: torch.Generator, noise: float = 1.0
) -> Episodes:
    """One whole episode per environment under the stochastic policy, all stepped side by side.

    Args:
        env: of action horizon 1 and as many environments as `seeds`.
        seeds: (E,) int64, the reset seed of each episode.
        generator: draws the actions.
        noise: share of the policy's standard deviation.
    """
    indices = np.arange(env.num_envs)
    observations = env.reset(indices, seeds)
    rows: list[tuple[NDArray, ...]] = []
    while indices.size:
        actions = policy.act(observations, generator, noise)
        outcome = env.step(indices, actions[:, None])
        timeouts = outcome.truncated & ~outcome.terminated
        rewards = outcome.rewards[:, 0].astype(np.float32)
        rows.append((indices, observations.astype(np.float32), actions, rewards, outcome.terminated, timeouts))
        running = ~(outcome.terminated | outcome.truncated)
        indices, observations = indices[running], outcome.observations[running]
    episode, *columns = (np.concatenate(column) for column in zip(*rows, strict=True))
    order = np.argsort(episode, kind="stable")  # from step after step to episode after episode
    return Episodes(*(column[order] for column in columns))
