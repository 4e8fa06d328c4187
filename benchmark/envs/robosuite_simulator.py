"""One stock robosuite 1.4.1 simulator that plays many episodes in turn, each put in and taken out to the last bit.

A robosuite environment takes 60 to 110 MB and up to a second to build, so a process keeps one per model and swaps
episodes. What an episode carries from one step to the next is: MuJoCo's integration state (which holds the solver's
warm start, missing from robosuite's flattened state), the clock of the observables, and per arm the gripper's
accumulated action, the goal orientation (kept while the rotation action is exactly zero), the null space's target, and
the readings of the controller, which are stale in the first physics step after a reset and stay so in robosuite.
Everything else is recomputed before it is read.
"""

# pyright: reportAttributeAccessIssue=false
# (mujoco is a compiled module without type stubs)

from __future__ import annotations

import copy
import ctypes.util
import functools
import inspect
import logging
import os
import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray

import otpr.compiling  # noqa: F401 - numba's settings for ours, which it takes over once, before robosuite's functions
from benchmark.envs import ROBOSUITE_ADVICE, ROBOSUITE_VERSION
from benchmark.envs.drawing import make_renderer

INTEGRATION = int(mujoco.mjtState.mjSTATE_INTEGRATION)
# Of a controller, in the order of a saved row; all but the first two are its readings of the simulation.
_CONTROLLER_ARRAYS = ("goal_ori", "initial_joint", "ee_pos", "ee_ori_mat", "ee_pos_vel", "ee_ori_vel", "joint_pos",
                      "joint_vel", "J_pos", "J_ori", "mass_matrix")  # fmt: skip


@functools.cache
def load_robosuite() -> ModuleType:
    """The robosuite package, imported without its three warnings about a missing macro file.

    Raises:
        ValueError: it is not installed, is another version, or cannot be imported.
    """
    logger, graphics = logging.getLogger("robosuite_logs"), os.environ.get("MUJOCO_GL")
    if sys.platform.startswith("linux") and ctypes.util.find_library("EGL") is None:
        os.environ.setdefault("MUJOCO_GL", "glx")  # robosuite would import EGL, though nothing here draws with it
    logger.addFilter(_is_not_about_macros)
    try:
        import robosuite
    except (ImportError, AttributeError, RuntimeError) as error:  # the last two from robosuite's graphics libraries
        missing = isinstance(error, ModuleNotFoundError) and error.name == "robosuite"
        why = ROBOSUITE_ADVICE if missing else f"robosuite cannot be imported: {_one_line(error)}"
        raise ValueError(why) from error
    finally:
        logger.removeFilter(_is_not_about_macros)
        os.environ.pop("MUJOCO_GL", None)  # which robosuite sets, too late for a MuJoCo that was imported before it
        if graphics is not None:
            os.environ["MUJOCO_GL"] = graphics
    if robosuite.__version__ != ROBOSUITE_VERSION:
        raise ValueError(f"{ROBOSUITE_ADVICE} (found {robosuite.__version__})")
    return robosuite


def accepted_arguments(env_name: str) -> set[str]:
    """Names of the constructor arguments of one of robosuite's environments."""
    names: set[str] = set()
    for parent in load_robosuite().environments.base.REGISTERED_ENVS[env_name].__mro__:
        parameters = inspect.signature(parent.__init__).parameters.values()
        names |= {p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}
        if all(p.kind is not p.VAR_KEYWORD for p in parameters):
            break
    return names - {"self", "single_object_mode", "object_type", "nut_type"}  # the environment's name sets the last


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the two global generators that robosuite draws from, and put both back as they were afterwards.

    Args:
        seed: in [0, 2^32); the draws are those after ``np.random`` and ``random`` were seeded with it.
    """
    numpy_state, python_state = np.random.get_state(), random.getstate()
    np.random.set_state(np.random.RandomState(seed).get_state())
    random.setstate(random.Random(seed).getstate())
    try:
        yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)


class Simulator:
    """One robosuite environment of one model.

    Args:
        env_name: robosuite's name of the environment.
        env_kwargs: its constructor's arguments, without rendering and with ``hard_reset`` False.
        keys: observation keys, in the order of the observation vector; 'object' is robosuite's 'object-state'.
        model_seed: of both global generators during construction, in which Lift and Transport draw sizes of objects.

    Raises:
        ValueError: robosuite is missing, or refuses the arguments.
    """

    def __init__(
        self, env_name: str, env_kwargs: Mapping[str, Any], keys: tuple[str, ...], model_seed: int = 0
    ) -> None:
        robosuite = load_robosuite()
        try:
            with seeded(model_seed):
                # a copy, because robosuite writes into the controller's settings
                self.env: Any = robosuite.make(env_name, **copy.deepcopy(dict(env_kwargs)))
        except Exception as error:
            raise ValueError(f"robosuite refuses the arguments of {env_name}: {_one_line(error)}") from error
        self._keys = tuple("object-state" if key == "object" else key for key in keys)
        self.model = self.env.sim.model._model
        self.data = self.env.sim.data._data
        self.physics_size = mujoco.mj_stateSize(self.model, INTEGRATION)
        self._renderer: mujoco.Renderer | None = None
        self.observation_size = len(self.reset(0))
        self.action_size = int(self.env.action_dim)
        self.state_size = self.physics_size + 1 + sum(sum(_arm_sizes(robot).values()) for robot in self.env.robots)

    def reset(self, seed: int) -> NDArray[np.float64]:
        """Start the episode of a 32-bit seed; its first observation (O,)."""
        with seeded(seed):
            return self._observation(self.env.reset())

    def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.float64], float]:
        """One environment step (25 physics steps at 20 Hz) under (A,) float32: observation (O,) and reward."""
        observations, reward, _, _ = self.env.step(action)
        return self._observation(observations), float(reward)

    def play(self, actions: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The steps of (T, A) actions, T at least 1: the last observation (O,) and all rewards (T,)."""
        outcomes = [self.step(action) for action in actions]
        return outcomes[-1][0], np.array([reward for _, reward in outcomes])

    def save(self, state: NDArray[np.float64]) -> None:
        """Write all that the episode carries on into `state`, (state_size,) float64."""
        end = self.physics_size
        mujoco.mj_getState(self.model, self.data, state[:end], INTEGRATION)
        state[end] = self._observables()[0]._time_since_last_sample  # the same of all that are enabled
        for robot, parts in zip(self.env.robots, self.arm_parts(state), strict=True):
            parts["gripper"][:] = robot.gripper.current_action
            parts["new_update"][:] = robot.controller.new_update
            for name in _CONTROLLER_ARRAYS:
                parts[name][:] = getattr(robot.controller, name).ravel()

    def load(self, state: NDArray[np.float64]) -> None:
        """Continue from a row that `save` wrote in any simulator of the same model."""
        end = self.physics_size
        mujoco.mj_setState(self.model, self.data, state[:end], INTEGRATION)
        for observable in self._observables():
            observable._time_since_last_sample = float(state[end])
            observable._sampled = True  # as after every reset and step
        for robot, parts in zip(self.env.robots, self.arm_parts(state), strict=True):
            _load_arm(robot, parts)

    def simulation_state(self) -> NDArray[np.float64]:
        """The state as robomimic's datasets store it: time, positions, velocities."""
        return flatten_state(self.data)

    def arm_parts(self, state: NDArray[np.float64]) -> list[dict[str, NDArray[np.float64]]]:
        """Views of what `save` wrote of each arm, by name: 'gripper', 'new_update' and the controller's arrays."""
        parts, end = [], self.physics_size + 1
        for robot in self.env.robots:
            sizes = _arm_sizes(robot)
            edges = end + np.cumsum([0, *sizes.values()])
            parts.append(dict(zip(sizes, np.split(state, edges)[1:], strict=False)))
            end = edges[-1]
        return parts

    def draw(self, width: int, height: int) -> NDArray[np.uint8]:
        """The loaded state from robomimic's camera 'agentview', (height, width, 3), visual shapes only.

        Raises:
            ValueError: this machine cannot draw.
        """
        option = mujoco.MjvOption()
        option.geomgroup[0] = 0  # robosuite's collision shapes
        try:
            if self._renderer is None or (self._renderer.width, self._renderer.height) != (width, height):
                frame = self.model.vis.global_
                frame.offwidth, frame.offheight = max(frame.offwidth, width), max(frame.offheight, height)
                self._renderer = make_renderer(self.model, width, height)
            mujoco.mj_forward(self.model, self.data)
            self._renderer.update_scene(self.data, "agentview", option)
            return self._renderer.render().copy()
        except Exception as error:
            raise ValueError(f"robosuite cannot be rendered on this machine: {_one_line(error)}") from error

    def _observation(self, observations: Mapping[str, NDArray[np.float64]]) -> NDArray[np.float64]:
        return np.concatenate([observations[key] for key in self._keys])

    def _observables(self) -> list[Any]:
        return list(self.env._observables.values())


def _arm_sizes(robot: Any) -> dict[str, int]:
    """Numbers saved of one arm, by name and in their order: its gripper's, a flag, its controller's."""
    sizes = {"gripper": len(robot.gripper.actuators), "new_update": 1}
    return sizes | {name: getattr(robot.controller, name).size for name in _CONTROLLER_ARRAYS}


def _load_arm(robot: Any, parts: Mapping[str, NDArray[np.float64]]) -> None:
    """Give an arm the parts of a saved row that are its own."""
    robot.gripper.current_action = parts["gripper"].copy()
    controller = robot.controller
    controller.new_update = bool(parts["new_update"][0])
    for name in _CONTROLLER_ARRAYS:
        # A new array, since robosuite lets two names share one; in the old one's memory order, since LAPACK's and
        # BLAS's bits depend on it.
        array = np.empty_like(getattr(controller, name))
        array[...] = parts[name].reshape(array.shape)
        setattr(controller, name, array)
    controller.J_full = np.array(np.vstack([controller.J_pos, controller.J_ori]))


def flatten_state(data: Any) -> NDArray[np.float64]:
    """Time, positions and velocities of MuJoCo's data, (1 + Q + V,)."""
    return np.concatenate([[data.time], data.qpos, data.qvel])


def _is_not_about_macros(record: logging.LogRecord) -> bool:
    return "macro" not in record.getMessage()


def _one_line(error: Exception) -> str:
    """Type and first line of an exception."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
