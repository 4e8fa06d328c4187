"""Franka Kitchen as D4RL defines it, in one process: kitchen-complete/-partial and kitchen-mixed.

The rules are those of D4RL 1.1 (Fu et al. 2020, https://arxiv.org/abs/2004.07219; `d4rl/kitchen` of its package), run
on the MuJoCo model that gymnasium-robotics maintains. Against D4RL's own model that one differs in one respect that
physics can notice, undone by `load_model`; it also lacks a body without mass, a weld and a site that touch nothing.
"""

# pyright: reportAttributeAccessIssue=false
# (mujoco is a compiled module without type stubs)

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
from gymnasium.utils import seeding
from numpy.typing import NDArray

from benchmark.envs import native
from benchmark.envs.base import check_indices, check_seeds, check_sizes, load_arrays
from benchmark.envs.native_env import NativeEnv

MAX_EPISODE_STEPS = 280
DEFINITIONS = {
    "kitchen-microwave-kettle-light-slider": ("microwave", "kettle", "light switch", "slide cabinet"),
    "kitchen-microwave-kettle-bottomburner-light": ("microwave", "kettle", "bottom burner", "light switch"),
}
# D4RL's goals: where the sub-task's positions start among the 30, and what they should be (m, rad, quaternion).
GOALS = {
    "bottom burner": (11, (-0.88, -0.01)),
    "light switch": (17, (-0.69, -0.05)),
    "slide cabinet": (19, (0.37,)),
    "microwave": (22, (-0.75,)),
    "kettle": (23, (-0.23, 0.75, 1.62, 0.99, 0.0, 0.0, -0.06)),
}
POSITIONS = 30  # of the robot's 9 joints, then 21 of the objects; the kettle's 7 are a free joint's
COMPLETE_DISTANCE = 0.3  # Euclidean, between a sub-task's observed positions and its goal
START = np.array(
    [
        1.48388023e-01, -1.76848573e00, 1.84390296e00, -2.47685760e00, 2.60252026e-01, 7.12533105e-01,
        1.59515394e00, 4.79267505e-02, 3.71350919e-02, -2.66279850e-04, -5.18043486e-05, 3.12877220e-05,
        -4.51199853e-05, -3.90842156e-06, -4.22629655e-05, 6.28065475e-05, 4.04984708e-05, 4.62730939e-04,
        -2.26906415e-04, -4.65501369e-04, -6.44129196e-03, -1.77048263e-03, 1.08009684e-03, -2.69397440e-01,
        3.50383255e-01, 1.61944683e00, 1.00618764e00, 4.06395120e-03, -6.62095997e-03, -2.68278933e-04,
    ]
)  # fmt: skip

_FRAME_SKIP = 40
_SPEED = 2.0  # joint velocity of a full action, rad/s or m/s; D4RL's own bounds, +-10, therefore never bind
_ROBOT_BOUNDS = np.array(
    [(-2.9, 2.9), (-1.8, 1.8), (-2.9, 2.9), (-3.1, 0.0), (-2.9, 2.9), (0.0, 3.8), (-2.9, 2.9), (0.0, 0.04), (0.0, 0.04)]
)
# D4RL applies its configuration's noise by place, though the places no longer name the objects that they were made for.
_NOISE = 0.1 * np.repeat([0.1, 0.005, 0.0005, 0.005, 0.1, 0.005, 0.1, 0.005], [9, 2, 6, 3, 3, 3, 3, 1])
_DRAWS = 60  # per observation: 9 robot positions, 9 velocities, 21 object positions, 21 velocities
_DRAWS_OF_POSITIONS = np.r_[0:9, 18:39]
_DRAWS_BEFORE_EPISODE = 5  # observations that a reset puts into D4RL's cache and that nobody sees


class KitchenEnv(NativeEnv):
    """A batch of D4RL's Franka Kitchen with four sub-tasks: same seeds and actions give D4RL's numbers.

    Observations are 60 numbers: 9 robot and 21 object positions, each with uniform noise, then the 30 goal positions, 0
    outside the sub-tasks (m, rad, quaternion). Actions are 9 joint velocities in units of 2 rad/s (fingers: 2 m/s),
    clipped to [-1, 1]; D4RL integrates them over 0.08 s from the last *observed*, noisy position and holds the result
    by position control within its bounds. A sub-task whose observed positions come within 0.3 of its goal gives 1,
    once. The episode terminates when all four are done and is truncated after 280 steps.

    The noise of a whole episode is a function of its seed, drawn in D4RL's order from gymnasium's generator. Where the
    physics diverges MuJoCo restarts it from the model's default positions; D4RL would raise an error.

    Args:
        definition: a name in `DEFINITIONS`: '...-light-slider' is D4RL's kitchen-complete and kitchen-partial,
            '...-bottomburner-light' its kitchen-mixed.
        num_envs: environments in the batch.
        action_horizon: H, actions per chunk.
        threads: threads that step the batch, the calling one included; never changes a result.

    Raises:
        ValueError: for an unknown definition, or a size below 1.
    """

    def __init__(self, definition: str, num_envs: int, action_horizon: int = 4, threads: int = 1) -> None:
        if definition not in DEFINITIONS:
            raise ValueError(f"unknown kitchen definition {definition!r}; valid: {', '.join(sorted(DEFINITIONS))}")
        check_sizes(num_envs, action_horizon, threads)
        model, self._start = load_model()
        self.sub_tasks = DEFINITIONS[definition]
        rules = _rules(self.sub_tasks, model.opt.timestep)
        super().__init__(model, native.step_kitchen, rules, num_envs, action_horizon, threads, camera=_camera())
        self.observation_dim = 2 * POSITIONS
        self.max_episode_steps = MAX_EPISODE_STEPS
        self._goal = rules.goal
        self._seeds = np.zeros(num_envs, dtype=np.int64)
        self._episodes = native.KitchenBatch(
            *self._batch,
            noise=np.zeros((num_envs, MAX_EPISODE_STEPS + 1, POSITIONS)),
            pending=np.zeros((num_envs, len(self.sub_tasks)), dtype=np.bool_),
        )

    def reset(self, indices: NDArray[np.int64], seeds: NDArray[np.int64]) -> NDArray[np.float64]:
        """Start new episodes: D4RL's one start, and the seed's noise; see `VectorEnv.reset`."""
        indices = check_indices(self, indices)
        seeds = check_seeds(indices, seeds)
        self._batch.states[indices] = self._start
        self._batch.elapsed[indices] = 0
        self._batch.ended[indices] = False
        self._episodes.pending[indices] = True
        self._seeds[indices] = seeds
        for index in indices:
            self._episodes.noise[index] = observation_noise(int(self._seeds[index]))
        observed = START + self._episodes.noise[indices, 0]
        return np.concatenate([observed, np.tile(self._goal, (len(indices), 1))], axis=1)

    def state_dict(self) -> dict[str, Any]:
        """As in `NativeEnv`, with `pending` (N, 4) bool sub-tasks not yet complete and `seeds` (N,) int64."""
        return super().state_dict() | {"pending": self._episodes.pending.copy(), "seeds": self._seeds.copy()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, and draw the noise of the running episodes again."""
        load_arrays(self._batch._asdict() | {"pending": self._episodes.pending, "seeds": self._seeds}, state)
        for index in np.flatnonzero(~self._batch.ended):
            self._episodes.noise[index] = observation_noise(int(self._seeds[index]))


def goal_positions(sub_tasks: tuple[str, ...]) -> NDArray[np.float64]:
    """(30,) goal of the given sub-tasks, 0 elsewhere, as it stands in the observation."""
    goal = np.zeros(POSITIONS)
    for name in sub_tasks:
        first, values = GOALS[name]
        goal[first : first + len(values)] = values
    return goal


def observation_noise(seed: int) -> NDArray[np.float64]:
    """(281, 30) noise of the positions observed at the start of episode `seed` and after each of its steps.

    D4RL draws 60 uniform numbers for each observation, those of the velocities too, which no observation shows.
    """
    generator, _ = seeding.np_random(seed)
    draws = generator.uniform(-1.0, 1.0, (_DRAWS_BEFORE_EPISODE + 1 + MAX_EPISODE_STEPS, _DRAWS))
    return _NOISE * draws[_DRAWS_BEFORE_EPISODE:, _DRAWS_OF_POSITIONS]


def _rules(sub_tasks: tuple[str, ...], timestep: float) -> native.KitchenRules:
    """The constants the compiled kernel needs."""
    first = np.array([GOALS[name][0] for name in sub_tasks])
    return native.KitchenRules(
        frame_skip=_FRAME_SKIP,
        dt=float(_FRAME_SKIP * timestep),
        speed=_SPEED,
        lower=_ROBOT_BOUNDS[:, 0].copy(),
        upper=_ROBOT_BOUNDS[:, 1].copy(),
        goal=goal_positions(sub_tasks),
        first=first,
        last=first + [len(GOALS[name][1]) for name in sub_tasks],
        threshold=COMPLETE_DISTANCE,
        max_episode_steps=MAX_EPISODE_STEPS,
    )


@functools.lru_cache(maxsize=1)
def load_model() -> tuple[Any, NDArray[np.float64]]:
    """The model, which nobody may change, and the (S,) integration state in which all episodes start.

    In gymnasium-robotics' model the pedestal under the robot collides; in D4RL's it is only seen. The start repeats the
    calls that D4RL's reset makes through dm_control, since each leaves the solver a warm start for the next.

    Raises:
        RuntimeError: if the pedestal is not where the model is known to have it.
    """
    spec = mujoco.MjSpec.from_file(str(_assets() / "kitchen_assets" / "kitchen_env_model.xml"))
    pedestal = spec.worldbody.first_body().first_geom()
    if pedestal.type != mujoco.mjtGeom.mjGEOM_CYLINDER or not np.allclose(pedestal.size[:2], (0.12, 0.9)):
        raise RuntimeError("gymnasium-robotics' kitchen model has changed: its first body is not the robot's pedestal")
    pedestal.contype = pedestal.conaffinity = 0
    model = spec.compile()
    data = mujoco.MjData(model)
    model.opt.disableflags |= int(mujoco.mjtDisableBit.mjDSBL_ACTUATION)
    mujoco.mj_forward(model, data)
    model.opt.disableflags &= ~int(mujoco.mjtDisableBit.mjDSBL_ACTUATION)
    data.qpos[:] = START
    mujoco.mj_forward(model, data)
    mujoco.mj_forward(model, data)
    start = np.empty(mujoco.mj_stateSize(model, native.INTEGRATION))
    mujoco.mj_getState(model, data, start, native.INTEGRATION)
    return model, start


def _assets() -> Path:
    """gymnasium-robotics' folder of kitchen models. Raises ValueError where the package is missing."""
    package = importlib.util.find_spec("gymnasium_robotics")  # not imported: that prints, and registers environments
    if package is None or package.origin is None:
        raise ValueError("the kitchen needs the package gymnasium-robotics, which is not installed")
    return Path(package.origin).parent / "envs" / "assets" / "kitchen_franka"


def _camera() -> mujoco.MjvCamera:
    """D4RL's view of the kitchen: distances in m, angles in degrees."""
    camera = mujoco.MjvCamera()
    camera.distance, camera.azimuth, camera.elevation = 2.2, 70.0, -35.0
    camera.lookat[:] = (-0.2, 0.5, 2.0)
    return camera
