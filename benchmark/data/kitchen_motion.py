"""How the scripted kitchen demonstrator moves the arm: hand poses to joint paths, and following a path by what is seen.

Poses become joint angles by damped least squares (Nakamura and Hanafusa 1986, "Inverse kinematic solutions with
singularity robustness"), with the step towards a preferred posture projected into the null space of the hand's task.
"""

# pyright: reportAttributeAccessIssue=false
# (mujoco is a compiled module without type stubs)

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import mujoco
import numpy as np
from numpy.typing import NDArray

JOINTS = 7  # of the arm; the two fingers follow in observations and actions
ACTION_REACH = 0.16  # rad or m by which a full action moves the position target: 2 rad/s for the step's 0.08 s
NODE_SPACING = 0.02  # rad of the joint that moves furthest from one node of a path to the next

_FINGERTIPS = 0.035  # m from the model's 'end_effector' site to the middle of the fingertips, along the hand
_POSE_SPACING = 0.04  # m between the hand poses solved for on the way from one waypoint to the next
_DAMPING = 1e-4  # squared
_ROTATION_WEIGHT = 0.1  # m per rad: the hand may turn where the joints' limits ask for it
_POSTURE_RATE = 0.02
_ITERATIONS = 60
_POSITION_TOLERANCE, _ROTATION_TOLERANCE = 1e-3, 0.02  # m, rad
_LARGEST_STEP = 0.3  # rad, of any joint in one iteration
_LIMIT_MARGIN = 0.01  # rad kept from the joints' limits
_WINDOW = 8  # nodes ahead among which the nearest to the observed arm is looked for
_PATIENCE = 3  # steps without progress after which a blocked arm's target moves on


@dataclass(frozen=True)
class Waypoint:
    """A pose of the hand to pass through.

    Attributes:
        position: (3,) of the middle of the fingertips, m, in the world's frame.
        yaw: rad by which the horizontal hand is turned left from the +y axis.
        pitch: rad by which it then points down; the fingers open sideways.
        closed: whether the fingers close on the way there, or else open.
        pace: nodes by which the target leads the arm on the way there; about half as many pass in each step.
        hold: steps to stay.
    """

    position: NDArray[np.float64]
    yaw: float = 0.0
    pitch: float = 0.0
    closed: bool = True
    pace: float = 6.5
    hold: int = 0

    def rotation(self) -> NDArray[np.float64]:
        """(3, 3) axes of the hand as columns: across both, the direction that the fingers open in, the pointing one."""
        sin_yaw, cos_yaw, sin_pitch, cos_pitch = (
            np.sin(self.yaw),
            np.cos(self.yaw),
            np.sin(self.pitch),
            np.cos(self.pitch),
        )
        opening = np.array([cos_yaw, sin_yaw, 0.0])
        pointing = np.array([-sin_yaw * cos_pitch, cos_yaw * cos_pitch, -sin_pitch])
        return np.stack([np.cross(opening, pointing), opening, pointing], axis=1)


@dataclass(frozen=True)
class Path:
    """K arm postures close to one another. Attributes as in `Waypoint`; holds are 0 but at waypoints.

    Attributes:
        joints: (K, 7) rad.
        closed: (K,) bool.
        pace: (K,) float64.
        hold: (K,) int64.
    """

    joints: NDArray[np.float64]
    closed: NDArray[np.bool_]
    pace: NDArray[np.float64]
    hold: NDArray[np.int64]


class Arm:
    """The arm's kinematics and weight, computed on a private copy of the simulator's data.

    Args:
        model: the kitchen's model; only read.
        positions: (30,) joint positions at which everything but the arm stays.
    """

    def __init__(self, model: mujoco.MjModel, positions: NDArray[np.float64]) -> None:
        self._model = model
        self._data = mujoco.MjData(model)
        self._data.qpos[:] = positions
        self._site = model.site("end_effector").id
        self._jacobian = np.zeros((6, model.nv))
        self._forces = np.zeros(model.nv)
        self._stiffness = model.actuator_gainprm[:, 0].copy()
        self._limits = model.jnt_range[:JOINTS].T + np.array([[_LIMIT_MARGIN], [-_LIMIT_MARGIN]])

    def sag(self, positions: NDArray[np.float64]) -> NDArray[np.float64]:
        """(9,) rad or m by which position control at rest stays behind its target at (9,) `positions`."""
        self._data.qpos[: len(positions)] = positions
        mujoco.mj_kinematics(self._model, self._data)
        mujoco.mj_comPos(self._model, self._data)
        mujoco.mj_comVel(self._model, self._data)
        mujoco.mj_rne(self._model, self._data, 0, self._forces)
        return self._forces[: len(positions)] / self._stiffness

    def reach(
        self, start: NDArray[np.float64], waypoint: Waypoint, posture: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """(7,) joint angles, near (7,) `start` and `posture`, that bring the hand as near to the waypoint as can be."""
        joints, rotation = start.copy(), waypoint.rotation()
        for _ in range(_ITERATIONS):
            shift, turn, jacobian = self._errors(joints, waypoint.position, rotation)
            if np.linalg.norm(shift) < _POSITION_TOLERANCE and np.linalg.norm(turn) < _ROTATION_TOLERANCE:
                break
            aside = _POSTURE_RATE * (posture - joints)
            task = np.concatenate([shift, _ROTATION_WEIGHT * turn]) - jacobian @ aside
            damped = jacobian @ jacobian.T + _DAMPING * np.eye(6)
            step = aside + jacobian.T @ np.linalg.solve(damped, task)
            step *= min(1.0, _LARGEST_STEP / np.abs(step).max())
            joints = np.clip(joints + step, *self._limits)
        return joints

    def _errors(
        self, joints: NDArray[np.float64], position: NDArray[np.float64], rotation: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """(3,) m and (3,) rad from the hand to a pose, and the (6, 7) Jacobian with its weighted rotational rows."""
        self._data.qpos[:JOINTS] = joints
        mujoco.mj_kinematics(self._model, self._data)
        mujoco.mj_comPos(self._model, self._data)
        axes = self._data.site_xmat[self._site].reshape(3, 3)
        tip = self._data.site_xpos[self._site] + _FINGERTIPS * axes[:, 2]
        body = self._model.site_bodyid[self._site]
        mujoco.mj_jac(self._model, self._data, self._jacobian[:3], self._jacobian[3:], tip, body)
        jacobian = self._jacobian[:, :JOINTS].copy()
        jacobian[3:] *= _ROTATION_WEIGHT
        return position - tip, 0.5 * np.cross(axes.T, rotation.T).sum(0), jacobian

    def path(
        self,
        start: NDArray[np.float64],
        home: NDArray[np.float64],
        detour: NDArray[np.float64],
        waypoints: Sequence[Waypoint],
    ) -> Path:
        """The path through the waypoints: by way of `home` to the first, from one to the next straight in space.

        Args:
            start: (7,) joint angles where the path begins.
            home: (7,) joint angles that the way to the first waypoint bends towards, preferred among those that fit.
            detour: (7,) rad by which it bends elsewhere.
            waypoints: at least one.
        """
        first = self.reach(home, waypoints[0], home)
        bend = np.clip(0.5 * (home + 0.5 * (start + first)) + detour, *self._limits)
        joints = [*straight(start, bend), *straight(bend, first)[1:]]
        owners = [0] * len(joints)
        for number, (previous, waypoint) in enumerate(itertools.pairwise(waypoints), start=1):
            pieces = max(1, int(np.ceil(np.linalg.norm(waypoint.position - previous.position) / _POSE_SPACING)))
            for fraction in np.arange(1, pieces + 1) / pieces:
                target = self.reach(joints[-1], _between(previous, waypoint, fraction), home)
                joints.extend(straight(joints[-1], target)[1:])
            owners += [number] * (len(joints) - len(owners))
        return _as_path(np.stack(joints), np.array(owners), waypoints)


class Follower:
    """Leads the arm along a path: the target is a few nodes after the one that the observed arm is nearest to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._node, self._stalled, self._held = 0, 0, 0
        last = len(path.joints) - 1
        stops = np.append(np.flatnonzero(path.hold), last)
        self._stops = stops[np.searchsorted(stops, np.arange(last + 1))]  # the next node to hold at, for each

    @property
    def done(self) -> bool:
        """Whether the arm has come to the end of the path and held there."""
        return self._node == len(self.path.joints) - 1 and self._held >= self.path.hold[-1]

    @property
    def pace(self) -> float:
        """Of the path where the arm is."""
        return float(self.path.pace[self._node])

    def aim(self, observed: NDArray[np.float64]) -> tuple[NDArray[np.float64], bool]:
        """(7,) joint angles to aim at and whether to close the fingers, given (7,) observed joint angles."""
        self._move_on(observed)
        ahead = min(self._node + self.pace, self._stops[self._node])
        below, share = int(ahead), ahead - int(ahead)
        above = min(below + 1, self._stops[self._node])
        joints = (1.0 - share) * self.path.joints[below] + share * self.path.joints[above]
        return joints, bool(self.path.closed[min(below, self._node + 1)])

    def _move_on(self, observed: NDArray[np.float64]) -> None:
        """Find the node that the arm has come to; after a while without progress, go on to the next regardless."""
        node, stop = self._node, self._stops[self._node]
        if node == stop:
            self._held += 1
            if self._held >= self.path.hold[node] and node < len(self.path.joints) - 1:
                self._node, self._stalled, self._held = node + 1, 0, 0
            return
        window = self.path.joints[node : min(node + _WINDOW, stop + 1)]
        self._node = node + int(np.square(window - observed).sum(1).argmin())
        self._stalled = 0 if self._node > node else self._stalled + 1
        if self._stalled > _PATIENCE:
            self._node = node + 1


def straight(start: NDArray[np.float64], end: NDArray[np.float64]) -> NDArray[np.float64]:
    """(K, 7) joint angles from (7,) `start` to (7,) `end`, both included, K at least 2."""
    steps = max(1, int(np.ceil(np.abs(end - start).max() / NODE_SPACING)))
    return np.linspace(start, end, steps + 1)


def _between(first: Waypoint, second: Waypoint, fraction: float) -> Waypoint:
    """The pose that lies `fraction` of the way from the first to the second."""
    position = first.position + fraction * (second.position - first.position)
    yaw = first.yaw + fraction * (second.yaw - first.yaw)
    return Waypoint(position, yaw, first.pitch + fraction * (second.pitch - first.pitch))


def _as_path(joints: NDArray[np.float64], owners: NDArray[np.int64], waypoints: Sequence[Waypoint]) -> Path:
    """The path of (K, 7) joints whose nodes lie on the way to the waypoints that (K,) `owners` numbers."""
    hold = np.zeros(len(joints), dtype=np.int64)
    ends = np.searchsorted(owners, np.arange(len(waypoints)), side="right") - 1
    hold[ends] = [waypoint.hold for waypoint in waypoints]
    closed = np.array([waypoint.closed for waypoint in waypoints])[owners]
    return Path(joints, closed, np.array([waypoint.pace for waypoint in waypoints])[owners], hold)
