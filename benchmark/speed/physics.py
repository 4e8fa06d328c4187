"""Stepping alone: our MuJoCo environments beside mujoco.rollout, and locomotion beside gymnasium's vector ones."""

# pyright: reportAttributeAccessIssue=false
# (mujoco is a compiled module without type stubs)

from __future__ import annotations

import itertools
import multiprocessing
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import gymnasium
import mujoco
import numpy as np
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv
from mujoco.rollout import Rollout as NativeRollout
from numpy.typing import NDArray

from benchmark.envs import KITCHEN, LOCOMOTION, VectorEnv, make_env
from benchmark.envs.native import INTEGRATION
from benchmark.envs.native_env import NativeEnv
from benchmark.speed.measuring import Figure, Row, Sizes, measure, ratio

ACTION_HORIZON = 4
ACTION_SCALE = 0.05  # of the uniform random actions: so weak that a hopper stands for about 100 steps
BATCH_PER_THREAD = 4  # episodes in a batch of mujoco.rollout: enough to level out its threads
KITCHEN_SCALE = 1.0  # the same in the kitchen, where nothing falls
GYMNASIUM = {"hopper": "Hopper-v4", "walker2d": "Walker2d-v4", "halfcheetah": "HalfCheetah-v4"}
AIMS = {"mujoco.rollout": 0.85, "AsyncVectorEnv": 2.5}  # least ratio of our steps/s to theirs
KITCHEN_AIMS = {"mujoco.rollout": 0.90}
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


@dataclass(frozen=True)
class Recording:
    """One episode as `mujoco.rollout` repeats it.

    Attributes:
        start: (S,) float64 full physics state (time in s, positions, velocities) in which the episode starts.
        warm_start: (V,) float64 accelerations from which the solver's first step starts.
        controls: (L, A) float64 the environment's own, one per environment step.
    """

    start: NDArray[np.float64]
    warm_start: NDArray[np.float64]
    controls: NDArray[np.float64]


def record(name: str, episodes: Sequence[tuple[int, NDArray[np.float32]]], threads: int) -> list[Recording]:
    """Play episodes, given by seed and (L, A) actions, once more, one action a chunk, and keep what drives the physics.

    The kitchen's controls depend on what it observes, hence cannot be had from the actions alone.
    """
    env = make_native(name, len(episodes), 1, threads)
    data = mujoco.MjData(env.model)
    lengths = np.array([len(actions) for _, actions in episodes])
    env.reset(np.arange(len(episodes)), np.array([seed for seed, _ in episodes]))
    recordings = []
    for state, length in zip(env.state_dict()["states"], lengths, strict=True):
        start = np.empty(mujoco.mj_stateSize(env.model, _FULL_PHYSICS))
        mujoco.mj_setState(env.model, data, state, INTEGRATION)
        mujoco.mj_getState(env.model, data, start, _FULL_PHYSICS)
        recordings.append(Recording(start, data.qacc_warmstart.copy(), np.empty((length, env.model.nu))))
    for t in range(lengths.max()):
        running = np.flatnonzero(lengths > t)
        env.step(running, np.stack([episodes[index][1][t : t + 1] for index in running.tolist()]))
        states = env.state_dict()["states"]
        for index in running.tolist():
            mujoco.mj_setState(env.model, data, states[index], INTEGRATION)
            recordings[index].controls[t] = data.ctrl
    env.close()
    return recordings


class EpisodeRollout:
    """`mujoco.rollout` on recorded episodes in batches of up to `batch`, cut to their shortest member.

    No environment around it: nothing is observed, rewarded or reset. That is the bar for the physics. Sorted by length,
    the episodes of a batch are nearly equally long: in batches of 8, 94 % of a falling hopper's steps are repeated, and
    all of an environment's whose episodes end with their time limit.
    """

    def __init__(self, env: NativeEnv, recordings: Sequence[Recording], batch: int, threads: int) -> None:
        self.model, self.frame_skip = env.model, env.frame_skip
        self.data = [mujoco.MjData(self.model) for _ in range(threads)]
        self.pool = NativeRollout(nthread=threads)
        self.batches = []
        ordered = sorted(recordings, key=lambda recording: len(recording.controls))
        for group in (ordered[first : first + batch] for first in range(0, len(ordered), batch)):
            starts = np.stack([recording.start for recording in group])
            warm_starts = np.stack([recording.warm_start for recording in group])
            controls = np.stack([recording.controls[: len(group[0].controls)] for recording in group])
            controls = controls.repeat(self.frame_skip, axis=1)  # (n, physics steps, A)
            states = np.empty((*controls.shape[:2], starts.shape[1]))
            self.batches.append((starts, warm_starts, controls, states))

    def run(self) -> int:
        """Roll out everything; returns environment steps, `frame_skip` physics steps each."""
        for starts, warm_starts, controls, states in self.batches:
            self.pool.rollout(self.model, self.data, starts, controls, initial_warmstart=warm_starts, state=states)
        return sum(states.shape[0] * states.shape[1] for *_, states in self.batches) // self.frame_skip


def make_native(name: str, num_envs: int, action_horizon: int, threads: int) -> NativeEnv:
    """`make_env` for the environments of one MuJoCo model, locomotion and the kitchen."""
    env = make_env(name, num_envs, action_horizon, threads)
    assert isinstance(env, NativeEnv)
    return env


def make_gymnasium(name: str) -> gymnasium.Env:
    """Gymnasium's environment, without its checker, which would slow it down."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # v4 is said to be out of date; it is the nearest to D4RL's v2
        return gymnasium.make(GYMNASIUM[name], disable_env_checker=True)


def async_vector(makers: Sequence[Callable[[], gymnasium.Env]], **settings: Any) -> AsyncVectorEnv:
    """Gymnasium's vector environment of one process each.

    The processes are forked from a server that has imported what they need, not from this one, which may be large and
    have threads.
    """
    multiprocessing.set_forkserver_preload(["benchmark.speed.plain"])
    return AsyncVectorEnv(makers, context="forkserver", **settings)


def step_gymnasium(vector: gymnasium.vector.VectorEnv, actions: NDArray[np.float32]) -> int:
    """Step gymnasium's vector environment through (T, N, H, A) given actions; returns the steps executed."""
    vector.reset(seed=0)  # environment i gets seed i
    count, resetting = 0, np.zeros(vector.num_envs, dtype=np.bool_)
    for action in actions.swapaxes(1, 2).reshape(-1, *actions.shape[1::2]):  # (T * H, N, A)
        _, _, terminated, truncated, _ = vector.step(action)
        count += vector.num_envs - int(resetting.sum())
        resetting = terminated | truncated  # the next call resets these instead of stepping them
    return count


def make_vectors(name: str, sizes: Sizes, stack: ExitStack) -> dict[str, gymnasium.vector.VectorEnv]:
    """Gymnasium's vector environments for the task, closed with the stack; none for the kitchen, which it has not."""
    if name not in GYMNASIUM:
        return {}
    vectors: dict[str, gymnasium.vector.VectorEnv] = {}
    makers = [partial(make_gymnasium, name)] * sizes.envs
    if name in sizes.async_tasks:
        vectors["AsyncVectorEnv"] = async_vector(makers)
    vectors["SyncVectorEnv"] = SyncVectorEnv(makers)
    for vector in vectors.values():
        stack.callback(vector.close)
    return vectors


def physics(sizes: Sizes, threads: int) -> list[Row]:
    """Stepping alone, of every locomotion task and the kitchen."""
    rows = [row for name in LOCOMOTION for row in physics_of(name, sizes, threads)]
    try:
        return rows + physics_of(KITCHEN[0], sizes, threads)
    except ValueError as error:  # its package is missing
        return [*rows, Row("physics", KITCHEN[0], "env steps/s", [], note=f"not available: {error}")]


def physics_of(name: str, sizes: Sizes, threads: int) -> list[Row]:
    """Our environment beside mujoco.rollout and gymnasium's vector environments, on the same actions."""
    if name in KITCHEN:
        envs, chunks, scale, aims = sizes.kitchen_envs, sizes.kitchen_chunks, KITCHEN_SCALE, KITCHEN_AIMS
    else:
        envs, chunks, scale, aims = sizes.envs, sizes.physics_chunks, ACTION_SCALE, AIMS
    with ExitStack() as stack:
        vectors = make_vectors(name, sizes, stack)
        env = make_native(name, envs, ACTION_HORIZON, threads)
        stack.callback(env.close)
        shape = (chunks, envs, ACTION_HORIZON, env.action_dim)
        actions = np.random.default_rng(0).uniform(-scale, scale, shape).astype(np.float32)
        episodes = played_episodes(*play(env, actions), actions)
        native = EpisodeRollout(env, record(name, episodes, threads), BATCH_PER_THREAD * threads, threads)
        stack.callback(native.pool.close)
        functions: dict[str, Callable[[], int]] = {
            "ours": lambda: int(play(env, actions)[0].sum()),
            "mujoco.rollout": native.run,
        }
        functions |= {key: partial(step_gymnasium, vector, actions) for key, vector in vectors.items()}
        rates = measure(functions, sizes.repeats)
    others = [key for key in rates if key != "ours"]
    figures = tuple(Figure(f"x {key}", ratio(rates["ours"], rates[key]), aims.get(key)) for key in others)
    rows = [Row("physics", f"{name}, {key}", "env steps/s", rates[key]) for key in others]
    return [Row("physics", f"{name}, ours", "env steps/s", rates["ours"], figures), *rows]
