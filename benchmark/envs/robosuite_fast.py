"""robosuite's tasks at four to six times the speed of stock robosuite 1.4.1, to the last bit the same.

The physics runs on a copy of the model without what is only seen; the 25 physics steps of an environment step and the
controllers between them are compiled (`robosuite_native`), goals are set by robosuite's own controller, observations
and rewards are read once (`robosuite_scenes`). Resets, and an episode's first step, whose controller reads a state from
before the reset, are stock robosuite's.
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
    for robot in env.robots:
        controller = robot.controller
        kinds = type(robot).__name__, type(robot.gripper).__name__, type(controller).__name__
        if kinds != ("SingleArm", "PandaGripper", "OperationalSpaceController"):
            return f"{', '.join(kinds)} instead of SingleArm, PandaGripper, OperationalSpaceController"
        interpolated = controller.interpolator_pos is not None or controller.interpolator_ori is not None
        if interpolated or controller.impedance_mode != "fixed" or not (controller.use_ori and controller.uncoupling):
            return "a controller that interpolates, varies its impedance, couples, or leaves orientation alone"
    return ""


class FastSimulator:
    """Plays what `Simulator` plays, with the same rows, which either can continue.

    Args:
        stock: a simulator for which `why_stock` has no reason; it is used for resets, first steps and pictures.
    """

    def __init__(self, stock: Simulator) -> None:
        from benchmark.envs import robosuite_native  # compiled functions, which take a moment to load

        self.stock = stock
        self.observation_size, self.action_size = stock.observation_size, stock.action_size
        self.state_size = stock.state_size
        self._native = robosuite_native
        self._model = _physics_model(stock)
        self._data = mujoco.MjData(self._model)
        data, robots = self._data, stock.env.robots
        self._simulation = robosuite_native.Simulation(
            self._model._address, data._address, data.qpos, data.qvel, data.ctrl, data.site_xpos, data.site_xmat,
            data.qM, data.qfrc_bias, np.zeros((2, 3, self._model.nv)),
        )  # fmt: skip
        self._arms = self._find_arms(robots)
        arms, joints = self._arms.qpos.shape
        shapes = (arms, 3), (arms, 3, 3), (arms, joints), (arms, 2), (arms, 2)
        self._commands = robosuite_native.Commands(*map(np.zeros, shapes))
        self._scene = SCENES[type(stock.env).__name__](stock.env, self._model, data)
        self._substeps = int(stock.env.control_timestep / stock.env.model_timestep)
        size = self.action_size // arms
        self._actions = [slice(arm * size, (arm + 1) * size) for arm in range(arms)]
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
        if self._starting:
            outcome = self.stock.step(action)
            self.stock.save(self._row)
            self.load(self._row)
            return outcome
        mujoco.mj_step1(self._model, self._data)
        for arm, own in enumerate(self._actions):
            self._command(arm, action[own])
        self._native.step_arms(self._simulation, self._arms, self._commands, self._substeps)
        observation = np.empty(self.observation_size)
        self._scene.observe(observation)
        return observation, float(self._scene.is_solved())

    def save(self, state: NDArray[np.float64]) -> None:
        """See `Simulator.save`; the controller's readings, which are not read again, stay as they were loaded."""
        if self._starting:
            self.stock.save(state)
            return
        mujoco.mj_getState(self._model, self._data, self._row[: self.stock.physics_size], INTEGRATION)
        for arm, part in enumerate(self._parts):
            part["gripper"][:] = self._commands.gripper[arm]
            part["goal_ori"][:] = self._commands.orientation[arm].ravel()
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
            self._commands.gripper[arm] = part["gripper"]
            self._commands.orientation[arm] = part["goal_ori"].reshape(3, 3)
            self._commands.rest[arm] = part["initial_joint"]

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

    def _command(self, arm: int, action: NDArray[np.float32]) -> None:
        """Set an arm's goals from its (7,) action and the pose of its hand, as robosuite's controller does."""
        robot, commands, site = self.env.robots[arm], self._commands, self._arms.site[arm]
        controller = robot.controller
        controller.ee_pos = self._data.site_xpos[site].copy()
        controller.ee_ori_mat = self._data.site_xmat[site].reshape(3, 3).copy()
        controller.goal_ori = commands.orientation[arm]
        controller.new_update = False  # so that it takes the pose from here, not from the stock simulation
        controller.set_goal(action[:-1])
        commands.position[arm] = controller.goal_pos
        commands.orientation[arm] = controller.goal_ori
        commands.closing[arm] = _CLOSING * robot.gripper.speed * np.sign(action[-1:])

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
    # Resets place what PickPlaceCan only shows, always alike.
    model.body_pos[:], model.body_quat[:] = stock.model.body_pos, stock.model.body_quat
    return model
