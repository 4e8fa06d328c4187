"""robosuite's tasks without the redundant work of stock robosuite 1.4.1, to the last bit the same.

The physics runs on a copy of the model without what is only seen and without sensors; the 25 physics steps of an
environment step and the controllers between them are compiled (`robosuite_native`); actions are converted by
robosuite's own functions, rewards read once a step and observations once a chunk (`robosuite_scenes`). Resets, and an
episode's first step, whose controller reads a state from before the reset, are stock robosuite's. What is not covered
(`why_stock`) stays with stock robosuite. results/speed/robosuite.md has what it gains.
"""

# pyright: reportAttributeAccessIssue=false
# (mujoco is a compiled module without type stubs)

from __future__ import annotations

from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray

from benchmark.envs.robosuite_scenes import SCENES
from benchmark.envs.robosuite_simulator import INTEGRATION, Simulator, flatten_state

_CLOSING = np.array([-1.0, 1.0])  # directions in which the Panda's fingers close


def why_stock(env: Any) -> str:
    """Why a robosuite environment must be stepped by stock robosuite; '' where `FastSimulator` does the same."""
    if type(env).__name__ not in SCENES:
        return f"environment {type(env).__name__}"
    if env.reward_shaping or env.reward_scale != 1.0:
        return "a shaped or scaled reward"
    option = env.sim.model._model.opt
    if option.integrator != mujoco.mjtIntegrator.mjINT_EULER or env.sim.model._model.na > 0:
        return "an integrator other than Euler's, or actuators with states of their own"
    if len({len(robot.robot_joints) for robot in env.robots}) > 1:
        return "arms with different numbers of joints"
    for robot in env.robots:
        controller = robot.controller
        kinds = type(robot).__name__, type(robot.gripper).__name__, type(controller).__name__
        if kinds != ("SingleArm", "PandaGripper", "OperationalSpaceController"):
            return f"{', '.join(kinds)} instead of SingleArm, PandaGripper, OperationalSpaceController"
        interpolated = controller.interpolator_pos is not None or controller.interpolator_ori is not None
        limited = controller.position_limits is not None or controller.orientation_limits is not None
        covered = controller.use_ori and controller.use_delta and controller.uncoupling
        if interpolated or limited or controller.impedance_mode != "fixed" or not covered:
            return "a controller other than OSC_POSE with relative goals, uncoupled, without limits and interpolation"
    return ""


class FastSimulator:
    """Plays what `Simulator` plays, with the same rows, which either can continue.

    Args:
        stock: a simulator for which `why_stock` has no reason; it is used for resets, first steps and pictures.
    """

    def __init__(self, stock: Simulator) -> None:
        from robosuite.utils import transform_utils  # pyright: ignore[reportMissingImports]  # optional

        from benchmark.envs import robosuite_native  # which imports robosuite

        self.stock = stock
        self.observation_size, self.action_size = stock.observation_size, stock.action_size
        self.state_size = stock.state_size
        self._native, self._transforms = robosuite_native, transform_utils
        self._model = _physics_model(stock)
        self._data = mujoco.MjData(self._model)
        data, robots = self._data, stock.env.robots
        self._simulation = robosuite_native.Simulation(
            self._model._address, data._address, data.qpos, data.qvel, data.ctrl, data.site_xpos, data.site_xmat,
            data.qM, data.qfrc_bias, np.zeros((2, 3, self._model.nv)),
        )  # fmt: skip
        self._arms = self._find_arms(robots)
        arms, joints = self._arms.qpos.shape
        shapes = (arms, 3), (arms, 3, 3), (arms, joints), (arms, 2)
        self._goals = robosuite_native.Goals(*map(np.zeros, shapes))
        self._scene = SCENES[type(stock.env).__name__](stock.env, self._model, data)
        self._substeps = int(stock.env.control_timestep / stock.env.model_timestep)
        self._row = np.zeros(self.state_size)  # the loaded one; the parts that change are written by `save`
        self._parts = stock.arm_parts(self._row)
        self._starting = False  # whether the loaded episode has not taken its first step, and is in `stock`

    def reset(self, seed: int) -> NDArray[np.float64]:
        """See `Simulator.reset`."""
        observation = self.stock.reset(seed)
        self._starting = True
        return observation

    def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.float64], float]:
        """See `Simulator.step`."""
        observation, rewards = self.play(action[None])
        return observation, float(rewards[0])

    def play(self, actions: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """See `Simulator.play`."""
        observation, rewards, first = np.empty(self.observation_size), np.empty(len(actions)), 0
        if self._starting:
            observation[:], rewards[0] = self.stock.step(actions[0])
            self.stock.save(self._row)
            self.load(self._row)
            first = 1
        moves = self._moves(actions[first:])
        for step in range(len(actions) - first):
            self._native.step_arms(self._simulation, self._arms, self._goals, moves, step, self._substeps)
            rewards[first + step] = self._scene.is_solved()
        if len(actions) > first:
            self._scene.observe(observation)
        return observation, rewards

    def save(self, state: NDArray[np.float64]) -> None:
        """See `Simulator.save`; the controller's readings, which are not read again, stay as they were loaded."""
        if self._starting:
            self.stock.save(state)
            return
        mujoco.mj_getState(self._model, self._data, self._row[: self.stock.physics_size], INTEGRATION)
        for arm, part in enumerate(self._parts):
            part["gripper"][:] = self._goals.gripper[arm]
            part["goal_ori"][:] = self._goals.orientation[arm].ravel()
        state[:] = self._row

    def load(self, state: NDArray[np.float64]) -> None:
        """See `Simulator.load`."""
        self._row[:] = state
        self._starting = not all(part["new_update"][0] for part in self._parts)
        if self._starting:
            self.stock.load(state)
            return
        mujoco.mj_setState(self._model, self._data, self._row[: self.stock.physics_size], INTEGRATION)
        for arm, part in enumerate(self._parts):
            self._goals.gripper[arm] = part["gripper"]
            self._goals.orientation[arm] = part["goal_ori"].reshape(3, 3)
            self._goals.rest[arm] = part["initial_joint"]

    def simulation_state(self) -> NDArray[np.float64]:
        """See `Simulator.simulation_state`."""
        return self.stock.simulation_state() if self._starting else flatten_state(self._data)

    def draw(self, width: int, height: int) -> NDArray[np.uint8]:
        """See `Simulator.draw`; the stock simulator draws, because its model has the visual shapes."""
        if not self._starting:
            self.save(self._row)
            self.stock.load(self._row)
        return self.stock.draw(width, height)

    @property
    def env(self) -> Any:
        """Stock robosuite's environment; it holds the episode only before the first step."""
        return self.stock.env

    def _moves(self, actions: NDArray[np.float32]) -> Any:
        """What (T, A) actions ask of the arms (`robosuite_native.Moves`), by robosuite's own conversions."""
        robots = self.env.robots
        actions = actions.reshape(len(actions), len(robots), self.action_size // len(robots))
        shape = actions.shape[:2]
        scaled = np.empty((*shape, 6))
        for arm, robot in enumerate(robots):
            scaled[:, arm] = robot.controller.scale_action(actions[:, arm, :6])
        turn, turns = np.empty((*shape, 3, 3)), scaled[:, :, 3:].any(axis=2)
        for place in np.argwhere(turns):
            step, arm = place
            quaternion = self._transforms.axisangle2quat(scaled[step, arm, 3:])
            turn[step, arm] = self._transforms.quat2mat(quaternion)
        closing = _CLOSING * robots[0].gripper.speed * np.sign(actions[:, :, 6:])
        return self._native.Moves(scaled[:, :, :3].copy(), turn, turns, closing)

    def _find_arms(self, robots: list[Any]) -> Any:
        """The places and constants of the arms (`robosuite_native.Arms`)."""
        model = self._model
        numbers = np.empty((model.nv, model.nv))
        mujoco.mj_fullM(model, numbers, np.arange(model.nM, dtype=np.float64))  # right within one chain of joints
        velocities = np.array([robot._ref_joint_vel_indexes for robot in robots])
        fingers = np.array([robot._ref_joint_gripper_actuator_indexes for robot in robots])
        limits = np.array([robot.torque_limits for robot in robots])
        bounds = model.actuator_ctrlrange[fingers]  # (A, 2, 2)
        return self._native.Arms(
            site=np.array([robot.eef_site_id for robot in robots]),
            qpos=np.array([robot._ref_joint_pos_indexes for robot in robots]),
            qvel=velocities,
            mass=np.stack([numbers[np.ix_(own, own)] for own in velocities]).astype(np.int64),
            motors=np.array([robot._ref_joint_actuator_indexes for robot in robots]),
            torque_min=limits[:, 0].copy(),
            torque_max=limits[:, 1].copy(),
            stiffness=np.array([robot.controller.kp for robot in robots]),
            damping=np.array([robot.controller.kd for robot in robots]),
            fingers=fingers,
            finger_middle=0.5 * (bounds[..., 1] + bounds[..., 0]),
            finger_range=0.5 * (bounds[..., 1] - bounds[..., 0]),
        )


def _physics_model(stock: Simulator) -> Any:
    """The stock simulator's model without shapes, meshes and textures that nothing can collide with."""
    spec = mujoco.MjSpec.from_string(stock.env.model.get_xml())
    spec.compiler.discardvisual = True
    model = spec.compile()
    model.opt.disableflags |= int(mujoco.mjtDisableBit.mjDSBL_SENSOR)  # robosuite only keeps a log of them
    # Resets place what PickPlaceCan only shows, always alike.
    model.body_pos[:], model.body_quat[:] = stock.model.body_pos, stock.model.body_quat
    return model
