"""robomimic's tasks on robosuite 1.4.1: what their publications fix, and the arguments of robosuite's constructors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmark.envs import ROBOSUITE_VERSION
from benchmark.envs.robosuite_simulator import accepted_arguments

_ARM_KEYS = ("eef_pos", "eef_quat", "gripper_qpos")
_FORCED = {
    "has_renderer": False,
    "has_offscreen_renderer": False,
    "use_camera_obs": False,
    "camera_depths": False,
    "use_object_obs": True,
    "reward_shaping": False,
    "reward_scale": 1.0,
    "ignore_done": True,
    "hard_reset": False,
}  # whatever a dataset says; the last as DPPO sets it
# The kind of controller whose whole memory a simulator saves.
_CONTROLLER = (("type", "OSC_POSE"), ("impedance_mode", "fixed"), ("interpolation", None))


@dataclass(frozen=True)
class TaskDefinition:
    """What robomimic's and DPPO's publications fix of a task."""

    env_name: str  # robosuite's
    arms: int
    observation_dim: int
    max_episode_steps: int  # DPPO's
    models: int  # constructor seeds among which an episode's seed chooses


# Lift draws the cube's edge in its constructor and Transport the hammer's head; the models of the others are fixed.
MODEL_VARIANTS = 4
_TASKS = {
    "lift": TaskDefinition("Lift", 1, 19, 300, MODEL_VARIANTS),
    "can": TaskDefinition("PickPlaceCan", 1, 23, 300, 1),
    "square": TaskDefinition("NutAssemblySquare", 1, 23, 400, 1),
    "transport": TaskDefinition("TwoArmTransport", 2, 59, 800, MODEL_VARIANTS),
}
OBSERVATION_KEYS: dict[str, tuple[str, ...]] = {
    name: (*(f"robot{arm}_{key}" for arm in range(task.arms) for key in _ARM_KEYS), "object")
    for name, task in _TASKS.items()
}


def default_arguments(task: str) -> dict[str, Any]:
    """The environment metadata of robomimic's published v1.4.1 low-dimensional datasets (``env_args``).

    They name ``damping`` and ``damping_limits``, which robosuite 1.4.1 calls ``damping_ratio...`` and therefore
    ignores; its defaults are the same where it matters (ratio 1; the limits are for variable impedance only).

    Raises:
        ValueError: unknown task.
    """
    definition = get_definition(task)
    controller = {
        "type": "OSC_POSE",
        "input_max": 1,
        "input_min": -1,
        "output_max": [0.05, 0.05, 0.05, 0.5, 0.5, 0.5],
        "output_min": [-0.05, -0.05, -0.05, -0.5, -0.5, -0.5],
        "kp": 150,
        "damping": 1,
        "impedance_mode": "fixed",
        "kp_limits": [0, 300],
        "damping_limits": [0, 10],
        "position_limits": None,
        "orientation_limits": None,
        "uncouple_pos_ori": True,
        "control_delta": True,
        "interpolation": None,
        "ramp_ratio": 0.2,
    }
    env_kwargs: dict[str, Any] = {
        "has_renderer": False,
        "has_offscreen_renderer": False,
        "ignore_done": True,
        "use_object_obs": True,
        "use_camera_obs": False,
        "control_freq": 20,
        "controller_configs": controller,
        "robots": ["Panda"] * definition.arms,
        "camera_depths": False,
        "camera_heights": 84,
        "camera_widths": 84,
        "reward_shaping": False,
    }
    if definition.arms == 2:
        env_kwargs["env_configuration"] = "single-arm-opposed"
    return {"env_name": definition.env_name, "env_version": ROBOSUITE_VERSION, "type": 1, "env_kwargs": env_kwargs}


def constructor_arguments(task: str, arguments: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What robosuite's constructor gets for a task: a dataset's ``env_kwargs`` without rendering, as fixed JSON.

    Args:
        arguments: robomimic's ``env_args``; None means `default_arguments`.

    Raises:
        ValueError: an unknown task, or arguments that are not of this task, this version or this controller.
    """
    definition = get_definition(task)
    arguments = default_arguments(task) if arguments is None else arguments
    env_kwargs = arguments.get("env_kwargs") if isinstance(arguments, Mapping) else None
    if not isinstance(env_kwargs, Mapping):
        raise ValueError(f"arguments of task {task!r} must be a mapping with a mapping env_kwargs, got {arguments!r}")
    required = (("env_name", definition.env_name), ("env_version", ROBOSUITE_VERSION), ("type", 1))
    _check_values(f"arguments of task {task!r}", arguments, required)
    unknown = sorted(set(env_kwargs) - accepted_arguments(definition.env_name))
    if unknown:
        raise ValueError(f"{definition.env_name} of robosuite {ROBOSUITE_VERSION} has no argument {', '.join(unknown)}")
    _check_values(f"env_kwargs of task {task!r}", {"control_freq": 20} | dict(env_kwargs), (("control_freq", 20),))
    controllers = env_kwargs.get("controller_configs")
    for controller in controllers if isinstance(controllers, list) else [controllers]:
        if not isinstance(controller, Mapping):
            raise ValueError(f"controller_configs of task {task!r} must be a mapping for each arm, got {controllers!r}")
        given = {"impedance_mode": "fixed", "interpolation": None} | dict(controller)
        _check_values(f"controller_configs of task {task!r}", given, _CONTROLLER)
    try:
        return json.loads(json.dumps(dict(env_kwargs) | _FORCED, sort_keys=True))
    except (TypeError, ValueError) as error:
        raise ValueError(f"arguments of task {task!r} must be plain JSON: {error}") from error


def get_definition(task: str) -> TaskDefinition:
    """A task by name. Raises ValueError for an unknown one."""
    if task not in _TASKS:
        raise ValueError(f"unknown robosuite task {task!r}; valid: {', '.join(_TASKS)}")
    return _TASKS[task]


def _check_values(what: str, given: Mapping[str, Any], required: tuple[tuple[str, Any], ...]) -> None:
    """Raise ValueError unless each required entry has its value."""
    for name, value in required:
        if given.get(name) != value:
            raise ValueError(f"{what} must have {name} {value!r}, got {given.get(name)!r}")
