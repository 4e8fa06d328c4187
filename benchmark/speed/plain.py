"""The plain way to collect: gymnasium's AsyncVectorEnv, one process an environment, one message a chunk.

As in DPPO's code a wrapper in each process executes the whole chunk. Unlike there every episode has its own seed, the
one that `benchmark.finetune.Collector` gives it, so that both collect the same trajectories.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray
from torch import Tensor

from benchmark.policies import Normalizer
from benchmark.seeding import Streams
from benchmark.speed.physics import async_vector, make_gymnasium
from otpr.method import ActionChunk, Rollout


class ChunkEnv(gymnasium.Wrapper):
    """One environment whose step is a chunk of actions (H, A): rewards are summed, the episode's end cuts it short.

    Its k-th reset starts the k-th training episode of environment `index`, whatever seed it is called with.
    """

    def __init__(self, env: gymnasium.Env, action_horizon: int, streams: Streams, index: int) -> None:
        super().__init__(env)
        single = env.action_space
        assert isinstance(single, Box)
        low, high = (np.tile(bound, (action_horizon, 1)) for bound in (single.low, single.high))
        self.action_space = Box(low, high, dtype=np.float32)
        self.streams, self.index, self.episodes = streams, index, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start the next episode."""
        seeds = self.streams.episodes("training-episode", np.array([self.index]), np.array([self.episodes]))
        self.episodes += 1
        return self.env.reset(seed=int(seeds[0]))

    def step(self, action: NDArray[np.float32]) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Execute a chunk (H, A), or what of it precedes the episode's end."""
        total, terminated, truncated, observation = 0.0, False, False, None
        for single in action:
            observation, reward, terminated, truncated, _ = self.env.step(single)
            total += float(reward)
            if terminated or truncated:
                break
        return observation, total, terminated, truncated, {}


def make_chunk_env(name: str, action_horizon: int, streams: Streams, index: int) -> gymnasium.Env:
    """Environment `index` of the vector."""
    return ChunkEnv(make_gymnasium(name), action_horizon, streams, index)


class PlainCollector:
    """Fills a `Rollout` from AsyncVectorEnv; episodes go on across iterations.

    Args:
        name: of a locomotion environment.
        envs: environments, each in a process of its own.
        chunks: per environment and iteration.
    """

    def __init__(
        self, name: str, envs: int, chunks: int, action_horizon: int, normalizer: Normalizer, streams: Streams
    ) -> None:
        makers = [partial(make_chunk_env, name, action_horizon, streams, index) for index in range(envs)]
        self.env = async_vector(makers, autoreset_mode=AutoresetMode.SAME_STEP)
        self.envs, self.chunks, self.normalizer = envs, chunks, normalizer
        self.generator = streams.torch("exploration")
        self.observations = self._normalised(self.env.reset()[0])

    def collect(self, act: Callable[[Tensor, bool, torch.Generator], ActionChunk]) -> Rollout:
        """Step every environment `chunks` chunks."""
        columns: dict[str, list[Tensor]] = {}
        for _ in range(self.chunks):
            chunk = act(self.observations, True, self.generator)
            actions = self.normalizer.denormalize_actions(chunk.actions.numpy())
            observations, rewards, terminated, truncated, infos = self.env.step(actions)
            ended = terminated | truncated
            final = observations.copy()
            if ended.any():  # after which `observations` are the next episode's
                final[ended] = np.stack(infos["final_obs"][ended])
            values = {
                "observations": self.observations,
                "actions": chunk.actions,
                "rewards": torch.from_numpy(rewards).float(),
                "terminated": torch.from_numpy(terminated),
                "truncated": torch.from_numpy(truncated & ~terminated),
                "next_observations": self._normalised(final),
                **chunk.extras,
            }
            for name, value in values.items():
                columns.setdefault(name, []).append(value)
            self.observations = self._normalised(observations)
        return self._rollout({name: torch.stack(values) for name, values in columns.items()})

    def _rollout(self, columns: dict[str, Tensor]) -> Rollout:
        names = ("observations", "actions", "rewards", "terminated", "truncated", "next_observations")
        own = {name: columns.pop(name) for name in names}
        return Rollout(**own, extras=columns)

    def _normalised(self, observations: NDArray[Any]) -> Tensor:
        return torch.from_numpy(self.normalizer.normalize_observations(observations))

    def close(self) -> None:
        """End the processes."""
        self.env.close()
