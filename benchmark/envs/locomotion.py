"""Hopper, Walker2d and HalfCheetah as in gymnasium's v4 environments, bit for bit, in one process."""

# pyright: reportAttributeAccessIssue=false
# (mujoco is a compiled module without type stubs)

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from pathlib import Path

import gymnasium
import mujoco
import numpy as np
from gymnasium.utils import seeding
from numpy.typing import NDArray

from benchmark.envs import native
from benchmark.envs.base import check_indices, check_seeds, check_sizes
from benchmark.envs.native_env import NativeEnv

MAX_EPISODE_STEPS = 1000
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


class LocomotionEnv(NativeEnv):
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
        model = mujoco.MjModel.from_xml_path(str(_ASSETS / self._task.model_file))
        rules = self._task.rules(model)
        super().__init__(model, native.step_slice, rules, num_envs, action_horizon, threads, camera="track")
        self.observation_dim = model.nq - 1 + model.nv
        self.max_episode_steps = MAX_EPISODE_STEPS

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
