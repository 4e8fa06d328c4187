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

VERSION = "1.4.1"
_INTEGRATION = int(mujoco.mjtState.mjSTATE_INTEGRATION)
# Of a controller, in the order of a saved row; all but the first two are its readings of the simulation.
_CONTROLLER_ARRAYS = ("goal_ori", "initial_joint", "ee_pos", "ee_ori_mat", "ee_pos_vel", "ee_ori_vel", "joint_pos",
                      "joint_vel", "J_pos", "J_ori", "mass_matrix")  # fmt: skip


@functools.cache
def load_robosuite() -> ModuleType:
    """The robosuite package, imported without its three warnings about a missing macro file.

    Raises:
        ValueError: it is not installed, is another version, or cannot be imported.
    """
    advice = f"robosuite tasks need robosuite {VERSION}: pip install 'otpr-bench[robosuite]'"
    logger = logging.getLogger("robosuite_logs")
    if sys.platform.startswith("linux") and ctypes.util.find_library("EGL") is None:
        os.environ.setdefault("MUJOCO_GL", "glx")  # robosuite would import EGL, though nothing here draws with it
    logger.addFilter(_is_not_about_macros)
    try:
        import robosuite
    except (ImportError, AttributeError, RuntimeError) as error:  # the last two from robosuite's graphics libraries
        missing = isinstance(error, ModuleNotFoundError) and error.name == "robosuite"
        raise ValueError(advice if missing else f"robosuite cannot be imported: {_one_line(error)}") from error
    finally:
        logger.removeFilter(_is_not_about_macros)
    if robosuite.__version__ != VERSION:
        raise ValueError(f"{advice} (found {robosuite.__version__})")
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
        self._model = self.env.sim.model._model
        self._data = self.env.sim.data._data
        self._physics_size = mujoco.mj_stateSize(self._model, _INTEGRATION)
        self._renderer: mujoco.Renderer | None = None
        self.observation_size = len(self.reset(0))
        self.action_size = int(self.env.action_dim)
        self.state_size = self._physics_size + 1 + sum(self._arm_size(robot) for robot in self.env.robots)

    def reset(self, seed: int) -> NDArray[np.float64]:
        """Start the episode of a 32-bit seed; its first observation (O,)."""
        with seeded(seed):
            return self._observation(self.env.reset())

    def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.float64], float]:
        """One environment step (25 physics steps at 20 Hz) under (A,) float32: observation (O,) and reward."""
        observations, reward, _, _ = self.env.step(action)
        return self._observation(observations), float(reward)

    def save(self, state: NDArray[np.float64]) -> None:
        """Write all that the episode carries on into `state`, (state_size,) float64."""
        end = self._physics_size
        mujoco.mj_getState(self._model, self._data, state[:end], _INTEGRATION)
        state[end] = self._observables()[0]._time_since_last_sample  # the same of all that are enabled
        end += 1
        for robot in self.env.robots:
            parts = [np.broadcast_to(robot.gripper.current_action, self._gripper_size(robot))]
            parts += [[robot.controller.new_update]]
            parts += [getattr(robot.controller, name).ravel() for name in _CONTROLLER_ARRAYS]
            start, end = end, end + self._arm_size(robot)
            np.concatenate(parts, out=state[start:end])

    def load(self, state: NDArray[np.float64]) -> None:
        """Continue from a row that `save` wrote in any simulator of the same model."""
        end = self._physics_size
        mujoco.mj_setState(self._model, self._data, state[:end], _INTEGRATION)
        for observable in self._observables():
            observable._time_since_last_sample = float(state[end])
            observable._sampled = True  # as after every reset and step
        end += 1
        for robot in self.env.robots:
            start, end = end, end + self._arm_size(robot)
            _load_arm(robot, state[start:end], self._gripper_size(robot))

    def draw(self, width: int, height: int) -> NDArray[np.uint8]:
        """The loaded state from robomimic's camera 'agentview', (height, width, 3), visual shapes only.

        Raises:
            ValueError: this machine cannot draw.
        """
        option = mujoco.MjvOption()
        option.geomgroup[0] = 0  # robosuite's collision shapes
        try:
            if self._renderer is None or (self._renderer.width, self._renderer.height) != (width, height):
                frame = self._model.vis.global_
                frame.offwidth, frame.offheight = max(frame.offwidth, width), max(frame.offheight, height)
                self._renderer = mujoco.Renderer(self._model, height, width)
            mujoco.mj_forward(self._model, self._data)
            self._renderer.update_scene(self._data, "agentview", option)
            return self._renderer.render().copy()
        except Exception as error:
            raise ValueError(f"robosuite cannot be rendered on this machine: {_one_line(error)}") from error

    def _observation(self, observations: Mapping[str, NDArray[np.float64]]) -> NDArray[np.float64]:
        return np.concatenate([observations[key] for key in self._keys])

    def _observables(self) -> list[Any]:
        return list(self.env._observables.values())

    def _arm_size(self, robot: Any) -> int:
        """Numbers saved for one arm: its gripper's, a flag, its controller's."""
        return self._gripper_size(robot) + 1 + sum(getattr(robot.controller, name).size for name in _CONTROLLER_ARRAYS)

    def _gripper_size(self, robot: Any) -> int:
        return len(robot.gripper.actuators)


def _load_arm(robot: Any, values: NDArray[np.float64], gripper_size: int) -> None:
    """Give an arm the part of a saved row that is its own."""
    robot.gripper.current_action = values[:gripper_size].copy()
    controller = robot.controller
    controller.new_update = bool(values[gripper_size])
    end = gripper_size + 1
    for name in _CONTROLLER_ARRAYS:
        # A new array, since robosuite lets two names share one; in the old one's memory order, since LAPACK's and
        # BLAS's bits depend on it.
        array = np.empty_like(getattr(controller, name))
        start, end = end, end + array.size
        array[...] = values[start:end].reshape(array.shape)
        setattr(controller, name, array)
    controller.J_full = np.array(np.vstack([controller.J_pos, controller.J_ori]))


def _is_not_about_macros(record: logging.LogRecord) -> bool:
    return "macro" not in record.getMessage()


def _one_line(error: Exception) -> str:
    """Type and first line of an exception."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
