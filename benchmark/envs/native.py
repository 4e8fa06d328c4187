"""Compiled stepping of MuJoCo environments: whole chunks, whole slices of environments, no GIL.

The kernels call the very libmujoco that the Python bindings loaded, so their physics is MuJoCo's to the last bit.
Everything an environment carries from one step to the next is its `mjSTATE_INTEGRATION` vector (time, positions,
velocities, warm start, controls...), loaded into a thread's `MjData` before a chunk and read back after it. All kernels
share this file: numba notices a change of the file that holds a kernel, not of another one that holds its helpers.
"""

# pyright: reportAttributeAccessIssue=false
# (mujoco is a compiled module without type stubs)

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import llvmlite.binding
import mujoco
import numba
import numpy as np
from numba import types

from otpr.compiling import compiled

INTEGRATION = int(mujoco.mjtState.mjSTATE_INTEGRATION)
_LIBRARY_PATTERNS = {"darwin": "libmujoco*.dylib", "win32": "mujoco.dll"}


class Rules(NamedTuple):
    """A locomotion task's constants, in the units of its MuJoCo model (metres, radians, seconds)."""

    frame_skip: int  # physics steps per environment step
    dt: float  # seconds per environment step
    control_weight: np.float32  # float32, as gymnasium's cost of a float32 action is
    alive_reward: float  # added to every reward
    terminates: bool  # whether leaving the ranges below ends the episode
    min_height: float  # exclusive bounds on qpos[1]
    max_height: float
    max_angle: float  # exclusive bound on |qpos[2]|
    max_state: float  # exclusive bound on the magnitude of qpos[2:] and qvel
    velocity_clip: float  # observed velocities are clipped to +-this
    max_episode_steps: int


class KitchenRules(NamedTuple):
    """The kitchen's constants, in metres, radians and seconds. R robot joints, Q positions, T sub-tasks."""

    frame_skip: int  # physics steps per environment step
    dt: float  # seconds per environment step
    speed: float  # joint velocity that an action of 1 asks for, per second
    lower: np.ndarray  # (R,) bounds of the commanded robot positions
    upper: np.ndarray  # (R,)
    goal: np.ndarray  # (Q,) goal positions, 0 outside the sub-tasks
    first: np.ndarray  # (T,) each sub-task's range of positions, first to last exclusive
    last: np.ndarray  # (T,)
    threshold: float  # a sub-task is complete where its positions are nearer to the goal than this
    max_episode_steps: int


class Simulation(NamedTuple):
    """Addresses of one (model, data) pair and views of its data; valid while the pair lives."""

    model: int
    data: int
    qpos: np.ndarray
    qvel: np.ndarray
    ctrl: np.ndarray


class Batch(NamedTuple):
    """Every environment's state: (N, S) float64 integration states, (N,) int64 steps so far, (N,) bool ended."""

    states: np.ndarray
    elapsed: np.ndarray
    ended: np.ndarray


class KitchenBatch(NamedTuple):
    """`Batch`, the whole episode's observation noise (N, steps + 1, Q), and (N, T) bool sub-tasks to complete."""

    states: np.ndarray
    elapsed: np.ndarray
    ended: np.ndarray
    noise: np.ndarray
    pending: np.ndarray


class Outcome(NamedTuple):
    """Arrays the kernel fills, as in `ChunkStep`: (n, O), (n, H), (n,), (n,), (n,). Rewards must start at 0."""

    observations: np.ndarray
    rewards: np.ndarray
    steps: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray


def _load_library() -> None:
    """Make libmujoco's symbols visible to the compiler. Raises FileNotFoundError if the package has no library."""
    pattern = _LIBRARY_PATTERNS.get(sys.platform, "libmujoco.so*")
    folder = Path(mujoco.__file__).parent
    found = sorted(folder.glob(pattern))
    if not found:
        raise FileNotFoundError(f"no {pattern} in the installed mujoco package")
    llvmlite.binding.load_library_permanently(str(found[0]))


_load_library()
_set_state = types.ExternalFunction("mj_setState", types.void(types.intp, types.intp, types.intp, types.int32))
_get_state = types.ExternalFunction("mj_getState", types.void(types.intp, types.intp, types.intp, types.int32))
_mj_step = types.ExternalFunction("mj_step", types.void(types.intp, types.intp))


@numba.njit(error_model="numpy")
def _load(simulation, batch, env):
    """Put environment `env` into the simulation."""
    state = batch.states.ctypes.data + env * batch.states.strides[0]
    _set_state(simulation.model, simulation.data, state, INTEGRATION)


@numba.njit(error_model="numpy")
def _save(simulation, batch, env):
    """Keep the simulation's state as that of environment `env`."""
    state = batch.states.ctypes.data + env * batch.states.strides[0]
    _get_state(simulation.model, simulation.data, state, INTEGRATION)


@numba.njit(error_model="numpy")
def _finish_step(batch, env, outcome, row, step, terminated, max_episode_steps):
    """Count one step of environment `env` and record its flags; returns whether its episode has ended."""
    batch.elapsed[env] += 1
    outcome.steps[row] = step + 1
    outcome.terminated[row] = terminated
    outcome.truncated[row] = batch.elapsed[env] >= max_episode_steps
    if outcome.terminated[row] or outcome.truncated[row]:
        batch.ended[env] = True
    return batch.ended[env]


@numba.njit(error_model="numpy")
def _is_healthy(qpos, qvel, rules):
    """Whether the posture lies inside the task's ranges; a NaN lies outside."""
    healthy = rules.min_height < qpos[1] < rules.max_height and -rules.max_angle < qpos[2] < rules.max_angle
    for i in range(2, qpos.shape[0]):
        healthy = healthy and -rules.max_state < qpos[i] < rules.max_state
    for i in range(qvel.shape[0]):
        healthy = healthy and -rules.max_state < qvel[i] < rules.max_state
    return healthy


@numba.njit(error_model="numpy")
def _advance(simulation, action, rules):
    """One environment step: `frame_skip` physics steps under (A,) float32 `action`; returns its reward."""
    before = simulation.qpos[0]
    squares = np.float32(0.0)  # summed in float32 and in order, like np.sum over fewer than 8 float32 numbers
    for i in range(action.shape[0]):
        simulation.ctrl[i] = action[i]
        squares += action[i] * action[i]
    for _ in range(rules.frame_skip):
        _mj_step(simulation.model, simulation.data)
    velocity = (simulation.qpos[0] - before) / rules.dt
    return velocity + rules.alive_reward - np.float64(rules.control_weight * squares)


@numba.njit(error_model="numpy")
def _observe(simulation, rules, observation):
    """Write (O,) `observation`: all positions but the first, then the clipped velocities (NaN stays NaN)."""
    positions = simulation.qpos.shape[0] - 1
    for i in range(positions):
        observation[i] = simulation.qpos[i + 1]
    for i in range(simulation.qvel.shape[0]):
        value = simulation.qvel[i]
        if value > rules.velocity_clip:
            value = rules.velocity_clip
        elif value < -rules.velocity_clip:
            value = -rules.velocity_clip
        observation[positions + i] = value


def _step_slice(simulation, rules, batch, indices, actions, outcome, start, stop):
    """Run rows `start` to `stop` of (n, H, A) float32 `actions` in locomotion environments `indices[start:stop]`."""
    for row in range(start, stop):
        env = indices[row]
        _load(simulation, batch, env)
        for step in range(actions.shape[1]):
            outcome.rewards[row, step] = _advance(simulation, actions[row, step], rules)
            terminated = rules.terminates and not _is_healthy(simulation.qpos, simulation.qvel, rules)
            if _finish_step(batch, env, outcome, row, step, terminated, rules.max_episode_steps):
                break
        _save(simulation, batch, env)
        _observe(simulation, rules, outcome.observations[row])


@numba.njit(error_model="numpy")
def _move_robot(simulation, action, noise, rules):
    """One kitchen step under (R,) float32 `action`: velocities, held by position control from the last observation."""
    for i in range(action.shape[0]):
        velocity = min(max(np.float64(action[i]), -1.0), 1.0) * rules.speed
        target = simulation.qpos[i] + noise[i] + velocity * rules.dt
        simulation.ctrl[i] = min(max(target, rules.lower[i]), rules.upper[i])
    for _ in range(rules.frame_skip):
        _mj_step(simulation.model, simulation.data)


@numba.njit(error_model="numpy")
def _count_completions(observation, pending, rules):
    """Sub-tasks that (2 Q,) `observation` completes; they leave (T,) `pending`."""
    completions = 0
    for task in range(pending.shape[0]):
        squares = 0.0
        for i in range(rules.first[task], rules.last[task]):
            squares += (observation[i] - rules.goal[i]) ** 2
        if pending[task] and np.sqrt(squares) < rules.threshold:
            pending[task] = False
            completions += 1
    return completions


def _step_kitchen(simulation, rules, batch, indices, actions, outcome, start, stop):
    """Run rows `start` to `stop` of (n, H, R) float32 `actions` in kitchen environments `indices[start:stop]`."""
    size = rules.goal.shape[0]
    for row in range(start, stop):
        env = indices[row]
        observation, noise, pending = outcome.observations[row], batch.noise[env], batch.pending[env]
        observation[size:] = rules.goal
        _load(simulation, batch, env)
        for step in range(actions.shape[1]):
            _move_robot(simulation, actions[row, step], noise[batch.elapsed[env]], rules)
            observation[:size] = simulation.qpos + noise[batch.elapsed[env] + 1]
            outcome.rewards[row, step] = _count_completions(observation, pending, rules)
            if _finish_step(batch, env, outcome, row, step, not pending.any(), rules.max_episode_steps):
                break
        _save(simulation, batch, env)


step_slice = compiled(_step_slice)
step_kitchen = compiled(_step_kitchen)
