"""What Lift, PickPlaceCan, NutAssemblySquare and TwoArmTransport observe and pay, read from places found once.

Stock robosuite asks up to forty observables through dictionaries and names, most of them for values that nobody sees.
The arithmetic is the same, by robosuite's own functions where it passes through float32. As in robosuite, everything
but joint positions is one physics step old, because nothing recomputes it after the last one.
"""

# pyright: reportAttributeAccessIssue=false
# (mujoco is a compiled module without type stubs)

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray

_XYZW = np.array([1, 2, 3, 0])  # places in MuJoCo's quaternions
_ARM = 9  # numbers that an arm observes
_REACH = 0.6  # robosuite counts an object as placed once the hand has left it: 1 - tanh(10 distance) below this


class Scene(ABC):
    """What all tasks share: each arm's hand position (3), its quaternion x-y-z-w (4) and finger positions (2).

    Args:
        env: robosuite's environment, after a reset; it is only asked for names and constants.
        model, data: MuJoCo's, of the same bodies and sites as the environment's own.
    """

    def __init__(self, env: Any, model: Any, data: Any) -> None:
        self.env, self.data = env, data
        self.sites = [robot.eef_site_id for robot in env.robots]
        self.hands = [env.sim.model.body_name2id(robot.robot_model.eef_name) for robot in env.robots]
        self.fingers = [np.array(robot._ref_gripper_joint_pos_indexes) for robot in env.robots]
        self.first = _ARM * len(env.robots)  # of the numbers about objects

    def observe(self, out: NDArray[np.float64]) -> None:
        """Write the observation, (O,)."""
        data = self.data
        for arm, (site, hand, fingers) in enumerate(zip(self.sites, self.hands, self.fingers, strict=True)):
            start = arm * _ARM
            out[start : start + 3] = data.site_xpos[site]
            out[start + 3 : start + 7] = data.xquat[hand][_XYZW]
            out[start + 7 : start + 9] = data.qpos[fingers]
        self.observe_objects(out, out[self.first :])

    @abstractmethod
    def observe_objects(self, seen: NDArray[np.float64], out: NDArray[np.float64]) -> None:
        """Write what follows the arms in an observation, given the whole of it with the arms' part complete."""

    @abstractmethod
    def is_solved(self) -> bool:
        """Whether robosuite pays for this state."""


class LiftScene(Scene):
    """The cube's position (3), quaternion (4) and offset to the hand (3); solved 4 cm above the table."""

    def __init__(self, env: Any, model: Any, data: Any) -> None:
        super().__init__(env, model, data)
        self.height = env.model.mujoco_arena.table_offset[2] + 0.04

    def observe_objects(self, seen: NDArray[np.float64], out: NDArray[np.float64]) -> None:
        """See `Scene.observe_objects`."""
        cube = self.env.cube_body_id
        out[:3] = self.data.xpos[cube]
        out[3:7] = self.data.xquat[cube][_XYZW]
        out[7:] = seen[:3] - out[:3]

    def is_solved(self) -> bool:
        """See `Scene.is_solved`."""
        return bool(self.data.xpos[self.env.cube_body_id, 2] > self.height)


class _PlacingScene(Scene):
    """The object's position (3), quaternion (4) and both in the hand's frame; solved in its place with the hand away.

    Robosuite also looks at the objects that the task does not use; they lie ten metres away.
    """

    def __init__(self, env: Any, model: Any, data: Any) -> None:
        from robosuite.utils import transform_utils  # pyright: ignore[reportMissingImports]  # optional

        super().__init__(env, model, data)
        self.transforms = transform_utils
        self.object = env.obj_body_id[env.obj_to_use]

    def observe_objects(self, seen: NDArray[np.float64], out: NDArray[np.float64]) -> None:
        """See `Scene.observe_objects`."""
        transforms = self.transforms
        out[:3] = self.data.xpos[self.object]
        out[3:7] = self.data.xquat[self.object][_XYZW]
        world_in_hand = transforms.pose_inv(transforms.pose2mat((seen[:3], seen[3:7])))
        object_in_hand = transforms.pose_in_A_to_pose_in_B(transforms.pose2mat((out[:3], out[3:7])), world_in_hand)
        out[7:10], out[10:] = transforms.mat2pose(object_in_hand)

    def is_solved(self) -> bool:
        """See `Scene.is_solved`."""
        position = self.data.xpos[self.object]
        if not self.is_in_place(position):
            return False
        distance = np.linalg.norm(self.data.site_xpos[self.sites[0]] - position)
        return bool(1 - np.tanh(10.0 * distance) < _REACH)

    @abstractmethod
    def is_in_place(self, position: NDArray[np.float64]) -> bool:
        """Whether the object is where it belongs, wherever the hand is."""


class CanScene(_PlacingScene):
    """The can belongs into its quarter of the second bin."""

    def is_in_place(self, position: NDArray[np.float64]) -> bool:
        """See `_PlacingScene.is_in_place`."""
        return not self.env.not_in_bin(position, self.env.object_id)


class SquareScene(_PlacingScene):
    """The square nut belongs around its peg."""

    def is_in_place(self, position: NDArray[np.float64]) -> bool:
        """See `_PlacingScene.is_in_place`; the pegs do not move, so the environment's own data have them."""
        return self.env.on_peg(position, self.env.nut_id)


class TransportScene(Scene):
    """Poses of payload, trash and lid handle, the bins' positions, offsets from the hands, and two flags of contact.

    Solved when the payload touches the base of the target bin and the trash that of the trash bin.
    """

    def __init__(self, env: Any, model: Any, data: Any) -> None:
        from robosuite.utils import transform_utils  # pyright: ignore[reportMissingImports]  # optional

        super().__init__(env, model, data)
        self.transforms = transform_utils
        group = env.transport
        self.handle = _geoms(model, group.lid.handle_geoms)[0]
        bases = [_geoms(model, target.base_geoms) for target in (group.target_bin, group.trash_bin)]
        self.target, self.trash_bin = bases[0][0], bases[1][0]
        self.pairs = np.zeros((2, 2, model.ngeom), dtype=np.bool_)  # payload, trash; of each, bin and object
        for pair, base, thing in zip(self.pairs, bases, (group.payload, group.trash), strict=True):
            pair[0, base] = True
            pair[1, _geoms(model, thing.contact_geoms)] = True

    def observe_objects(self, seen: NDArray[np.float64], out: NDArray[np.float64]) -> None:
        """See `Scene.observe_objects`."""
        data, group, to_quaternion = self.data, self.env.transport, self.transforms.mat2quat
        for start, body in ((0, group.payload_body_id), (7, group.trash_body_id)):
            out[start : start + 3] = data.xpos[body]
            out[start + 3 : start + 7] = to_quaternion(data.xmat[body].reshape(3, 3))
        out[14:17] = data.geom_xpos[self.handle]
        out[17:21] = to_quaternion(data.geom_xmat[self.handle].reshape(3, 3))
        out[21:24], out[24:27] = data.geom_xpos[self.target], data.geom_xpos[self.trash_bin]
        payload, trash, handle = out[:3], out[7:10], out[14:17]
        hands = seen[:3], seen[_ARM : _ARM + 3]
        out[27:30], out[30:33] = payload - hands[0], handle - hands[0]
        out[33:36], out[36:39] = payload - hands[1], trash - hands[1]
        out[39:] = [self._touch(bin_, thing) for bin_, thing in self.pairs]

    def is_solved(self) -> bool:
        """See `Scene.is_solved`."""
        return all(self._touch(bin_, thing) for bin_, thing in self.pairs)

    def _touch(self, first: NDArray[np.bool_], second: NDArray[np.bool_]) -> bool:
        """Whether any of the geoms marked in `first` is in contact with one of those marked in `second`."""
        one, other = self.data.contact.geom.T
        return bool(np.any((first[one] & second[other]) | (second[one] & first[other])))


SCENES: dict[str, type[Scene]] = {
    "Lift": LiftScene,
    "PickPlaceCan": CanScene,
    "NutAssemblySquare": SquareScene,
    "TwoArmTransport": TransportScene,
}


def _geoms(model: Any, names: list[str]) -> list[int]:
    """The numbers of a model's named geoms."""
    return [mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_GEOM, name) for name in names]
