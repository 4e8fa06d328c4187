"""Compiled stepping of robosuite 1.4.1: the physics steps of one environment step and the controllers between them.

Stock robosuite recomputes all of MuJoCo's forward dynamics two or three times in each physics step, only to read poses,
Jacobians and mass matrices that `mj_step` computes anyway. Here the controller runs between the two halves of that very
step. Its arithmetic is robosuite's own compiled functions on arrays of the same memory order, and BLAS products in the
same order, since the last bits depend on both.

Importing this module imports robosuite: call `robosuite_simulator.load_robosuite` first.
"""

# ruff: noqa: ANN001, ANN202 - numba infers the types of compiled functions

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np
from numba import types
from robosuite.utils.control_utils import (  # pyright: ignore[reportMissingImports]  # optional
    nullspace_torques,
    opspace_matrices,
    orientation_error,
)

import benchmark.envs.native  # noqa: F401 - makes libmujoco's symbols visible to the compiler
from otpr.compiling import compiled


class Simulation(NamedTuple):
    """Addresses of one (model, data) pair, views of its data, and space for a site's Jacobian (2, 3, velocities)."""

    model: int
    data: int
    qpos: np.ndarray
    qvel: np.ndarray
    ctrl: np.ndarray
    site_xpos: np.ndarray
    site_xmat: np.ndarray
    mass: np.ndarray  # MuJoCo's qM
    bias: np.ndarray  # qfrc_bias
    jacobian: np.ndarray


class Arms(NamedTuple):
    """Where A arms of J joints stand in model and data, and their constants (N, N m, rad)."""

    site: np.ndarray  # (A,) that is controlled
    qpos: np.ndarray  # (A, J)
    qvel: np.ndarray  # (A, J)
    mass: np.ndarray  # (A, J, J) places in qM
    motors: np.ndarray  # (A, J)
    torque_min: np.ndarray  # (A, J)
    torque_max: np.ndarray  # (A, J)
    stiffness: np.ndarray  # (A, 6), of position and orientation
    damping: np.ndarray  # (A, 6)
    fingers: np.ndarray  # (A, 2) actuators of the gripper
    finger_middle: np.ndarray  # (A, 2) and half the width of their control range
    finger_range: np.ndarray  # (A, 2)


class Moves(NamedTuple):
    """What T actions ask of A arms."""

    shift: np.ndarray  # (T, A, 3) of the hand, m
    turn: np.ndarray  # (T, A, 3, 3) rotation matrices in the world's frame
    turns: np.ndarray  # (T, A) bool, False where the rotation is exactly zero, which keeps the goal as it was
    closing: np.ndarray  # (T, A, 2) added to `Goals.gripper` at each physics step


class Goals(NamedTuple):
    """What A arms are drawn to; all but `rest` change with each environment step."""

    position: np.ndarray  # (A, 3) of the site
    orientation: np.ndarray  # (A, 3, 3)
    rest: np.ndarray  # (A, J) joint positions of the null space
    gripper: np.ndarray  # (A, 2) in [-1, 1], open to closed


_mj_step1 = types.ExternalFunction("mj_step1", types.void(types.intp, types.intp))
_mj_step2 = types.ExternalFunction("mj_step2", types.void(types.intp, types.intp))
_mj_jac_site = types.ExternalFunction(
    "mj_jacSite", types.void(types.intp, types.intp, types.intp, types.intp, types.int32)
)


@numba.njit(error_model="numpy")
def _task_force(error, velocity, stiffness, damping):
    """(3,) spring and damper."""
    force = np.empty(3)
    for i in range(3):
        force[i] = error[i] * stiffness[i] + -velocity[i] * damping[i]
    return force


@numba.njit(error_model="numpy")
def _select_columns(matrix, columns):
    """(R, C) columns of a matrix in Fortran's order, which numpy's selection has too."""
    selected = np.empty((columns.shape[0], matrix.shape[0])).T
    for i in range(selected.shape[0]):
        for j in range(selected.shape[1]):
            selected[i, j] = matrix[i, columns[j]]
    return selected


@numba.njit(error_model="numpy")
def _joint_mass(mass, places):
    """(J, J) mass matrix in Fortran's order."""
    selected = np.empty(places.shape).T
    for i in range(places.shape[0]):
        for j in range(places.shape[1]):
            selected[i, j] = mass[places[i, j]]
    return selected


@numba.njit(error_model="numpy")
def _set_goal(simulation, arms, goals, moves, step, arm):
    """Aim from where the hand is."""
    site = arms.site[arm]
    for i in range(3):
        goals.position[arm, i] = simulation.site_xpos[site, i] + moves.shift[step, arm, i]
    if moves.turns[step, arm]:
        goals.orientation[arm] = np.dot(moves.turn[step, arm], simulation.site_xmat[site].reshape((3, 3)))


@numba.njit(error_model="numpy")
def _torques(simulation, arms, goals, arm):
    """(J,) torques of robosuite's `OperationalSpaceController` with fixed impedance, before they are clipped."""
    site, velocities = arms.site[arm], arms.qvel[arm]
    linear, angular = simulation.jacobian[0], simulation.jacobian[1]
    _mj_jac_site(simulation.model, simulation.data, linear.ctypes.data, angular.ctypes.data, site)
    orientation = simulation.site_xmat[site].reshape((3, 3))
    turn = orientation_error(goals.orientation[arm], orientation)
    stiffness, damping = arms.stiffness[arm], arms.damping[arm]
    offset = goals.position[arm] - simulation.site_xpos[site]
    force = _task_force(offset, np.dot(linear, simulation.qvel), stiffness[:3], damping[:3])
    torque = _task_force(turn, np.dot(angular, simulation.qvel), stiffness[3:], damping[3:])

    j_pos, j_ori = _select_columns(linear, velocities), _select_columns(angular, velocities)
    j_full = np.empty((velocities.shape[0], 6)).T
    j_full[:3], j_full[3:] = j_pos, j_ori
    mass = _joint_mass(simulation.mass, arms.mass[arm])
    _, lambda_pos, lambda_ori, nullspace = opspace_matrices(mass, j_full, j_pos, j_ori)
    wrench = np.empty(6)
    wrench[:3], wrench[3:] = np.dot(lambda_pos, force), np.dot(lambda_ori, torque)
    joint_pos, joint_vel = simulation.qpos[arms.qpos[arm]], simulation.qvel[velocities]
    torques = np.dot(j_full.T, wrench) + simulation.bias[velocities]
    return torques + nullspace_torques(mass, nullspace, goals.rest[arm], joint_pos, joint_vel)


@numba.njit(error_model="numpy")
def _actuate(simulation, arms, goals, closing, arm):
    """Write one arm's and its gripper's controls."""
    torques = _torques(simulation, arms, goals, arm)
    for i in range(torques.shape[0]):
        clipped = min(max(torques[i], arms.torque_min[arm, i]), arms.torque_max[arm, i])
        simulation.ctrl[arms.motors[arm, i]] = clipped
    for i in range(arms.fingers.shape[1]):
        goals.gripper[arm, i] = min(max(goals.gripper[arm, i] + closing[i], -1.0), 1.0)
        applied = arms.finger_middle[arm, i] + arms.finger_range[arm, i] * goals.gripper[arm, i]
        simulation.ctrl[arms.fingers[arm, i]] = applied


def _step_arms(simulation, arms, goals, moves, step, substeps):
    """All physics steps of the environment step of action `step`."""
    for substep in range(substeps):
        _mj_step1(simulation.model, simulation.data)
        for arm in range(arms.site.shape[0]):
            if substep == 0:
                _set_goal(simulation, arms, goals, moves, step, arm)
            _actuate(simulation, arms, goals, moves.closing[step, arm], arm)
        _mj_step2(simulation.model, simulation.data)


step_arms = compiled(_step_arms)
