"""Stepping alone: our locomotion environments beside mujoco.rollout and gymnasium's vector environments."""

# pyright: reportAttributeAccessIssue=false
# (mujoco is a compiled module without type stubs)

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import gymnasium
import mujoco
import numpy as np
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv
from mujoco.rollout import Rollout as NativeRollout
from numpy.typing import NDArray

from benchmark.envs import LOCOMOTION, VectorEnv, make_env
from benchmark.speed.measuring import Figure, Row, Sizes, measure, ratio

ACTION_HORIZON = 4
ACTION_SCALE = 0.05  # of the uniform random actions: so weak that a hopper stands for about 100 steps
GYMNASIUM = {"hopper": "Hopper-v4", "walker2d": "Walker2d-v4", "halfcheetah": "HalfCheetah-v4"}
AIMS = {"mujoco.rollout": 0.70, "AsyncVectorEnv": 2.5}  # least ratio of our steps/s to theirs
_FULL_PHYSICS = int(mujoco.mjtState.mjSTATE_FULLPHYSICS)


def play(env: VectorEnv, actions: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Step every environment through (T, N, H, A) given actions, starting anew where an episode ends.

    The k-th episode of environment i has seed i + k N.

    Returns:
        (T, N) int64 steps executed and (T, N) bool, whether the episode ended with that chunk.
    """
    everyone = np.arange(env.num_envs)
    seeds = everyone.copy()
    steps, ended = np.empty(actions.shape[:2], dtype=np.int64), np.empty(actions.shape[:2], dtype=np.bool_)
    env.reset(everyone, seeds)
    for t, chunk in enumerate(actions):
        outcome = env.step(everyone, chunk)
        steps[t], ended[t] = outcome.steps, outcome.terminated | outcome.truncated
        stopped = np.flatnonzero(ended[t])
        if stopped.size:
            seeds[stopped] += env.num_envs
            env.reset(stopped, seeds[stopped])
    return steps, ended


def played_episodes(
    steps: NDArray[np.int64], ended: NDArray[np.bool_], actions: NDArray[np.float32]
) -> list[tuple[int, NDArray[np.float32]]]:
    """Seed and executed actions (L, A) of each episode that `play` went through, the unfinished last ones included."""
    chunks, envs, _, action_dim = actions.shape
    found = []
    for index in range(envs):
        edges = [0, *(np.flatnonzero(ended[:-1, index]) + 1), chunks]
        for number, (start, stop) in enumerate(itertools.pairwise(edges)):
            length = steps[start:stop, index].sum()  # only an episode's last chunk can be cut short
            found.append((index + number * envs, actions[start:stop, index].reshape(-1, action_dim)[:length]))
    return found


class EpisodeRollout:
    """`mujoco.rollout` on given episodes, in batches of up to `batch` that are cut to their shortest member.

    No environment around it: nothing is observed, rewarded or reset. That is the bar for the physics.
    """

    def __init__(
        self, reference: gymnasium.Env, episodes: list[tuple[int, NDArray[np.float32]]], batch: int, threads: int
    ) -> None:
        simulator: Any = reference.unwrapped
        self.model, self.frame_skip = simulator.model, simulator.frame_skip
        self.data = [mujoco.MjData(self.model) for _ in range(threads)]
        self.pool = NativeRollout(nthread=threads)
        self.batches = []
        ordered = sorted(episodes, key=lambda episode: len(episode[1]))
        for group in (ordered[start : start + batch] for start in range(0, len(ordered), batch)):
            starts = np.stack([self._start(reference, seed) for seed, _ in group])
            controls = np.stack([actions[: len(group[0][1])] for _, actions in group]).astype(np.float64)
            controls = controls.repeat(self.frame_skip, axis=1)  # (n, physics steps, A)
            self.batches.append((starts, controls, np.empty((*controls.shape[:2], starts.shape[1]))))

    def _start(self, reference: gymnasium.Env, seed: int) -> NDArray[np.float64]:
        simulator: Any = reference.unwrapped
        state = np.empty(mujoco.mj_stateSize(self.model, _FULL_PHYSICS))
        reference.reset(seed=seed)
        mujoco.mj_getState(self.model, simulator.data, state, _FULL_PHYSICS)
        return state

    def run(self) -> int:
        """Roll out everything; returns environment steps, `frame_skip` physics steps each."""
        for starts, controls, states in self.batches:
            self.pool.rollout(self.model, self.data, starts, controls, state=states)
        return sum(states.shape[0] * states.shape[1] for *_, states in self.batches) // self.frame_skip


def make_gymnasium(name: str) -> gymnasium.Env:
    """Gymnasium's environment, without its checker, which would slow it down."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # v4 is said to be out of date; it is the nearest to D4RL's v2
        return gymnasium.make(GYMNASIUM[name], disable_env_checker=True)


def step_gymnasium(vector: gymnasium.vector.VectorEnv, actions: NDArray[np.float32]) -> int:
    """Step gymnasium's vector environment through (T, N, H, A) given actions; returns the steps executed."""
    vector.reset(seed=0)  # environment i gets seed i
    count, resetting = 0, np.zeros(vector.num_envs, dtype=np.bool_)
    for action in actions.swapaxes(1, 2).reshape(-1, *actions.shape[1::2]):  # (T * H, N, A)
        _, _, terminated, truncated, _ = vector.step(action)
        count += vector.num_envs - int(resetting.sum())
        resetting = terminated | truncated  # the next call resets these instead of stepping them
    return count


def physics(sizes: Sizes, threads: int) -> list[Row]:
    """Stepping alone, of every locomotion task."""
    return [row for name in LOCOMOTION for row in physics_of(name, sizes, threads)]


def physics_of(name: str, sizes: Sizes, threads: int) -> list[Row]:
    """Our environment beside mujoco.rollout and gymnasium's vector environments, on the same actions."""
    with ExitStack() as stack:
        vectors: dict[str, gymnasium.vector.VectorEnv] = {}
        makers = [partial(make_gymnasium, name)] * sizes.envs
        if name in sizes.async_tasks:  # first, because it forks: no threads are there yet
            vectors["AsyncVectorEnv"] = AsyncVectorEnv(makers)
        vectors["SyncVectorEnv"] = SyncVectorEnv(makers)
        for vector in vectors.values():
            stack.callback(vector.close)
        env = make_env(name, sizes.envs, ACTION_HORIZON, threads)
        stack.callback(env.close)
        shape = (sizes.physics_chunks, sizes.envs, ACTION_HORIZON, env.action_dim)
        actions = np.random.default_rng(0).uniform(-ACTION_SCALE, ACTION_SCALE, shape).astype(np.float32)
        episodes = played_episodes(*play(env, actions), actions)
        native = EpisodeRollout(make_gymnasium(name), episodes, sizes.envs, threads)
        stack.callback(native.pool.close)
        functions: dict[str, Callable[[], int]] = {
            "ours": lambda: int(play(env, actions)[0].sum()),
            "mujoco.rollout": native.run,
        }
        functions |= {key: partial(step_gymnasium, vector, actions) for key, vector in vectors.items()}
        rates = measure(functions, sizes.repeats)
    others = [key for key in rates if key != "ours"]
    figures = tuple(Figure(f"x {key}", ratio(rates["ours"], rates[key]), AIMS.get(key)) for key in others)
    rows = [Row("physics", f"{name}, {key}", "env steps/s", rates[key]) for key in others]
    return [Row("physics", f"{name}, ours", "env steps/s", rates["ours"], figures), *rows]
