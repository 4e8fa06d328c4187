"""Hopper, Walker2d and HalfCheetah as in gymnasium's v4 environments, bit for bit, in one process."""

# pyright: reportAttributeAccessIssue=false
# (mujoco is a compiled module without type stubs)

from __future__ import annotations

import itertools
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

import gymnasium
import mujoco
import numpy as np
from gymnasium.utils import seeding
from numpy.typing import NDArray

from benchmark.envs import native
from benchmark.envs.base import (
    ChunkStep,
    VectorEnv,
    check_actions,
    check_indices,
    check_running,
    check_seeds,
    check_sizes,
    load_arrays,
)

MAX_EPISODE_STEPS = 1000
_SLICES_PER_THREAD = 4  # small enough to level out uneven episodes, large enough that dispatch costs nothing
_ASSETS = Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets"


@dataclass(frozen=True)
class Task:
    """The constructor defaults of one gymnasium v4 environment; symbols as in `native.Rules`."""

    model_file: str
    frame_skip: int
    control_weight: float
    reset_noise: float  # half-width of the uniform start noise, in m, rad, m/s, rad/s
    normal_velocity_noise: bool = False  # start velocities are normal, of deviation `reset_noise`, not uniform
    alive_reward: float = 0.0
    terminates: bool = False
    min_height: float = -inf
    max_height: float = inf
    max_angle: float = inf
    max_state: float = inf
    velocity_clip: float = inf

    def rules(self, model: mujoco.MjModel) -> native.Rules:
        """The constants the compiled kernel needs, with the time step taken from `model`."""
        return native.Rules(
            frame_skip=self.frame_skip,
            dt=float(model.opt.timestep * self.frame_skip),
            control_weight=np.float32(self.control_weight),
            alive_reward=self.alive_reward,
            terminates=self.terminates,
            min_height=self.min_height,
            max_height=self.max_height,
            max_angle=self.max_angle,
            max_state=self.max_state,
            velocity_clip=self.velocity_clip,
            max_episode_steps=MAX_EPISODE_STEPS,
        )


TASKS = {
    "hopper": Task(
        model_file="hopper.xml", frame_skip=4, control_weight=1e-3, reset_noise=5e-3, alive_reward=1.0,
        terminates=True, min_height=0.7, max_angle=0.2, max_state=100.0, velocity_clip=10.0,
    ),
    "walker2d": Task(
        model_file="walker2d.xml", frame_skip=4, control_weight=1e-3, reset_noise=5e-3, alive_reward=1.0,
        terminates=True, min_height=0.8, max_height=2.0, max_angle=1.0, velocity_clip=10.0,
    ),
    "halfcheetah": Task(
        model_file="half_cheetah.xml", frame_skip=5, control_weight=0.1, reset_noise=0.1, normal_velocity_noise=True,
    ),
}  # fmt: skip


class LocomotionEnv(VectorEnv):
    """A batch of one gymnasium v4 locomotion task: same seeds and float32 actions give gymnasium's bits.

    Observations are (positions without x, velocities): 11 numbers for hopper, 17 for walker2d and halfcheetah, in m,
    rad, m/s and rad/s. Actions are motor torques in [-1, 1] (3 for hopper, 6 for the others); MuJoCo clamps them, but
    the control cost is of the action as given. Episodes are truncated after 1000 steps.

    Args:
        task: 'hopper', 'walker2d' or 'halfcheetah'.
        num_envs: environments in the batch.
        action_horizon: H, actions per chunk.
        threads: threads that step the batch, the calling one included; never changes a result.

    Raises:
        ValueError: for an unknown task, or a size below 1.
    """

    def __init__(self, task: str, num_envs: int, action_horizon: int = 4, threads: int = 1) -> None:
        if task not in TASKS:
            raise ValueError(f"unknown locomotion task {task!r}; valid: {', '.join(sorted(TASKS))}")
        check_sizes(num_envs, action_horizon, threads)
        self._task = TASKS[task]
        self._model = mujoco.MjModel.from_xml_path(str(_ASSETS / self._task.model_file))
        self._rules = self._task.rules(self._model)
        self._data = [mujoco.MjData(self._model) for _ in range(threads)]
        self._simulations = [_simulation(self._model, data) for data in self._data]
        self._pool = ThreadPoolExecutor(threads - 1) if threads > 1 else None
        self.num_envs = num_envs
        self.observation_dim = self._model.nq - 1 + self._model.nv
        self.action_dim = self._model.nu
        self.action_horizon = action_horizon
        self.max_episode_steps = MAX_EPISODE_STEPS
        size = mujoco.mj_stateSize(self._model, native.INTEGRATION)
        self._batch = native.Batch(
            states=np.zeros((num_envs, size)),
            elapsed=np.zeros(num_envs, dtype=np.int64),
            ended=np.ones(num_envs, dtype=np.bool_),
        )

    def reset(self, indices: NDArray[np.int64], seeds: NDArray[np.int64]) -> NDArray[np.float64]:
        """Start new episodes as `gymnasium.Env.reset(seed=...)` does; see `VectorEnv.reset`."""
        indices = check_indices(self, indices)
        seeds = check_seeds(indices, seeds)
        observations = np.empty((len(indices), self.observation_dim))
        data = self._data[0]
        clip = self._task.velocity_clip
        for row, (index, seed) in enumerate(zip(indices, seeds, strict=True)):
            self._start_episode(data, int(seed))
            mujoco.mj_getState(self._model, data, self._batch.states[index], native.INTEGRATION)
            observations[row, : self._model.nq - 1] = data.qpos[1:]
            np.clip(data.qvel, -clip, clip, out=observations[row, self._model.nq - 1 :])
        self._batch.elapsed[indices] = 0
        self._batch.ended[indices] = False
        return observations

    def step(self, indices: NDArray[np.int64], actions: NDArray[np.float32]) -> ChunkStep:
        """Execute one chunk per environment; see `VectorEnv.step`."""
        indices = check_indices(self, indices)
        actions = check_actions(self, indices, actions)
        check_running(indices, self._batch.ended)
        count = len(indices)
        outcome = native.Outcome(
            observations=np.empty((count, self.observation_dim)),
            rewards=np.zeros((count, self.action_horizon)),
            steps=np.zeros(count, dtype=np.int64),
            terminated=np.zeros(count, dtype=np.bool_),
            truncated=np.zeros(count, dtype=np.bool_),
        )
        slices = itertools.pairwise(self._bounds(count))

        def work(simulation: native.Simulation) -> None:
            for start, stop in slices:  # shared: next() on a C iterator is atomic, so each slice is taken once
                native.step_slice(simulation, self._rules, self._batch, indices, actions, outcome, start, stop)

        helpers = [self._pool.submit(work, simulation) for simulation in self._simulations[1:]] if self._pool else []
        work(self._simulations[0])
        for helper in helpers:
            helper.result()
        return ChunkStep(*outcome)

    def state_dict(self) -> dict[str, Any]:
        """`states` (N, S) float64, `elapsed` (N,) int64, `ended` (N,) bool; see `VectorEnv.state_dict`."""
        return {name: array.copy() for name, array in self._batch._asdict().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; see `VectorEnv.load_state_dict`."""
        load_arrays(self._batch._asdict(), state)

    def close(self) -> None:
        """Stop the threads; the environment cannot be stepped afterwards if it had any."""
        if self._pool:
            self._pool.shutdown()

    def _start_episode(self, data: mujoco.MjData, seed: int) -> None:
        """Put `data` at the start of episode `seed`: gymnasium's draws, in gymnasium's order."""
        random, _ = seeding.np_random(seed)
        noise = self._task.reset_noise
        mujoco.mj_resetData(self._model, data)
        data.qpos[:] += random.uniform(low=-noise, high=noise, size=self._model.nq)
        if self._task.normal_velocity_noise:
            data.qvel[:] += noise * random.standard_normal(self._model.nv)
        else:
            data.qvel[:] += random.uniform(low=-noise, high=noise, size=self._model.nv)
        mujoco.mj_forward(self._model, data)

    def _bounds(self, count: int) -> list[int]:
        """Edges of the slices that `count` rows are cut into."""
        threads = len(self._simulations)
        pieces = 1 if threads == 1 else min(count, threads * _SLICES_PER_THREAD)
        return [count * piece // pieces for piece in range(pieces + 1)] if count else []


def _simulation(model: mujoco.MjModel, data: mujoco.MjData) -> native.Simulation:
    """What the kernel needs of one pair; the caller keeps the pair alive."""
    return native.Simulation(model._address, data._address, data.qpos, data.qvel, data.ctrl)
