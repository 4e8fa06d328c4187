"""Scripted hands for robosuite's Lift, PickPlaceCan and NutAssemblySquare, with the variety of human demonstrators.

A script decides from the policy's own observations and from habits drawn once per episode: speed, the path's height
and bend, care, tremor. Nearly all it does is a function of what it sees, so that a policy without memory can learn it:
a lapse slows the hand down rather than stops it, and an empty or half-open gripper is a reason to rise. A share of the
episodes is sloppy: aimed worse, reacting late, with a gripper that closes, or a hand that sets off, too early.

Lengths are metres, angles radians, positions in robosuite's world frame (z up).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

Vector = NDArray[np.float64]

STEP_LENGTH = 0.0133  # metres the hand moves per control step at a translation action of 1, once it is moving
STEP_ANGLE = 0.125  # radians it turns per control step at a rotation action of 1
DOWNWARD = np.diag([1.0, -1.0, -1.0])  # orientation of a hand that points straight down; its fingers move along y
OPEN_APERTURE = 0.07  # metres between the pads (0.08 at most) from which on the gripper counts as open
OPEN, CLOSE = -1.0, 1.0


@dataclass(frozen=True)
class Style:
    """How the demonstrators of one task vary; pairs are ranges of a uniform draw per episode unless said otherwise."""

    speed: tuple[float, float]  # largest norm of the translation action
    hover: tuple[float, float]  # height above the grasp at which the hand comes near
    curve: float = 0.35  # standard deviation of the angle by which a far target is aimed past
    settling: float = 3.0  # steps in which the hand covers most of what remains of its way, once it slows down
    lapse: float = 0.02  # probability per step of a lapse: for some steps the hand is slow and drifts
    drift: float = 0.2  # standard deviation of the translation action that a lapse adds
    fumble: float = 0.2  # probability that a lapse on the way to the object closes the gripper
    tremor: tuple[float, float] = (0.04, 0.12)  # standard deviation of the action's noise: careful, sloppy
    grasp_error: tuple[float, float] = (0.003, 0.009)  # standard deviation per axis of the aim: careful, sloppy
    place_error: tuple[float, float] = (0.01, 0.03)  # the same, of where the object is brought
    sloppy: float = 0.35  # probability that an episode is sloppy
    early: float = 0.4  # probability that a sloppy attempt closes the gripper too early
    early_distance: tuple[float, float] = (0.03, 0.07)  # height above the grasp at which it then does
    closing_steps: tuple[int, int] = (6, 9)  # steps between the command to close and setting off
    hasty: float = 0.4  # probability that a sloppy attempt sets off before the grip is firm
    hasty_steps: tuple[int, int] = (0, 3)  # steps after which it then does
    reaction: int = 2  # most steps by which a sloppy demonstrator reacts late


STYLES = {
    "lift": Style((0.25, 0.8), (0.03, 0.08), lapse=0.03, grasp_error=(0.004, 0.015), sloppy=0.6, early=0.5, hasty=0.5),
    "can": Style((0.8, 1.0), (0.05, 0.08), settling=3.5, lapse=0.01, fumble=0.1, early=0.25, hasty=0.25),
    "square": Style(
        speed=(0.75, 1.0), hover=(0.03, 0.06), settling=3.5, lapse=0.015, drift=0.3, fumble=0.05, tremor=(0.05, 0.1),
        grasp_error=(0.002, 0.005), place_error=(0.001, 0.002), sloppy=0.25, early=0.15, hasty=0.15,
    ),
}  # fmt: skip


class Scene(NamedTuple):
    """What a script sees; rotations are (3, 3) matrices from the local to the world frame."""

    hand: Vector
    hand_rotation: Vector
    aperture: float  # metres between the gripper's pads
    object: Vector
    object_rotation: Vector


class Move(NamedTuple):
    """What a script wants next."""

    target: Vector  # (3,) where the hand is to be
    turn: float = 0.0  # about the world's z axis, from the present orientation
    gripper: float = OPEN
    urgency: Vector | float = 1.0  # factor on the speed, of all axes or each


def read_scene(observation: Mapping[str, Vector]) -> Scene:
    """The scene of an observation with robomimic's keys; 'object' begins with the object's position and quaternion."""
    fingers, state = observation["robot0_gripper_qpos"], observation["object"]
    return Scene(
        hand=observation["robot0_eef_pos"],
        hand_rotation=Rotation.from_quat(observation["robot0_eef_quat"]).as_matrix(),
        aperture=float(fingers[0] - fingers[1]),
        object=state[:3],
        object_rotation=Rotation.from_quat(state[3:7]).as_matrix(),
    )


def heading(rotation: Vector) -> float:
    """Angle of the local x axis in the world's xy plane."""
    return math.atan2(rotation[1, 0], rotation[0, 0])


def wrap(angle: float, period: float) -> float:
    """The angle nearest to zero that differs by multiples of `period`."""
    return angle - period * round(angle / period)


def ramp(value: float, start: float, end: float) -> float:
    """Rises linearly from 0 at `start` to 1 at `end`, constant outside."""
    return min(1.0, max(0.0, (value - start) / (end - start)))


def raised(position: Vector, height: float) -> Vector:
    """The position moved up."""
    return position + np.array([0.0, 0.0, height])


class Script(ABC):
    """Reach, close, carry, release; the subclasses say where the object is held and where it goes.

    Attributes:
        empty: aperture below which there is nothing between the pads.
        grip: (3,) where the hand holds it, from its centre, in its own frame turned about z alone.
    """

    empty: float
    grip: Vector

    def __init__(self, style: Style, generator: np.random.Generator) -> None:
        self.style, self.generator = style, generator
        uniform = generator.uniform
        self.sloppy = bool(uniform() < style.sloppy)
        self.speed, self.hover = uniform(*style.speed), uniform(*style.hover)
        self.curve = generator.normal(0.0, style.curve)
        self.tremor = style.tremor[self.sloppy]
        delay = int(generator.integers(style.reaction + 1)) if self.sloppy else 0
        self.seen: deque[Scene] = deque(maxlen=delay + 1)
        self.noise, self.height = np.zeros(6), 0.0
        self.lapsing, self.drift, self.fumbling = 0, np.zeros(3), False
        self.place_error = generator.normal(0.0, style.place_error[self.sloppy], 2)
        self._enter(self._reach)
        self._aim(1.0)

    def act(self, observation: Mapping[str, Vector]) -> NDArray[np.float32]:
        """The next action (7,) in [-1, 1]: translation, rotation (about the world's axes) and gripper."""
        self.seen.append(read_scene(observation))
        scene = self.seen[0]
        self.count += 1
        move = self.phase(scene)
        action = np.array([*self._translation(scene, move), *self._rotation(scene, move), move.gripper])
        if self._lapse():
            action[:6] *= 0.3
            action[:3] += self.drift
            action[6] = CLOSE if self.fumbling and self.phase == self._reach else action[6]
        self.noise = 0.7 * self.noise + self.generator.normal(0.0, 0.7 * self.tremor, 6)
        action[:3] += self.noise[:3]
        action[3:6] += 0.3 * self.noise[3:]
        return np.clip(action, -1.0, 1.0).astype(np.float32)

    @abstractmethod
    def turn_to_grasp(self, scene: Scene) -> float:
        """How far the hand must turn about z before it grasps."""

    @abstractmethod
    def carry(self, scene: Scene) -> tuple[Move, bool]:
        """What to do with the object in hand, and whether to let go of it."""

    def grasp_point(self, scene: Scene) -> Vector:
        """Where the hand is to close, without the error of the aim."""
        angle = heading(scene.object_rotation)
        x, y, z = self.grip
        along = np.array([math.cos(angle) * x - math.sin(angle) * y, math.sin(angle) * x + math.cos(angle) * y, z])
        return scene.object + along

    def _aim(self, scale: float) -> None:
        """Draw the errors of the next attempt to grasp, `scale` times as large as the first ones."""
        style, generator = self.style, self.generator
        self.error = generator.normal(0.0, scale * style.grasp_error[self.sloppy], 3) * (1.0, 1.0, 0.5)
        early, hasty = self.sloppy * scale * np.array([style.early, style.hasty]) > generator.uniform(size=2)
        self.tolerance = generator.uniform(*(style.early_distance if early else (0.006, 0.01)))
        fewest, most = style.hasty_steps if hasty else style.closing_steps
        self.closing = int(generator.integers(fewest, most + 1))

    def _enter(self, phase: Callable[[Scene], Move]) -> None:
        self.phase, self.count, self.blocked = phase, 0, 0  # steps in this phase; of them, near the grasp but not at it

    def _reach(self, scene: Scene) -> Move:
        target, turn = self.grasp_point(scene) + self.error, self.turn_to_grasp(scene)
        offset = target - scene.hand
        distance = math.hypot(offset[0], offset[1])
        half_open = ramp(-scene.aperture, -OPEN_APERTURE, -0.03)
        rise = max(ramp(distance, 0.008, 0.035), ramp(abs(turn), 0.2, 0.6), half_open)
        self.blocked += bool(rise < 0.2 and abs(offset[2]) < 0.04)
        arrived = distance < 0.01 and abs(offset[2]) < self.tolerance and abs(turn) < 0.25
        if (arrived or self.blocked > 20) and scene.aperture > OPEN_APERTURE:
            self._enter(self._close)
            self.height = scene.hand[2]
        return Move(raised(target, self.hover * rise), turn)

    def _close(self, scene: Scene) -> Move:
        if scene.aperture < self.empty:
            return self._try_again(scene)
        if self.count >= self.closing:
            self._enter(self._carry)
        target = self.grasp_point(scene) + self.error
        return Move(np.array([*target[:2], self.height]), self.turn_to_grasp(scene), CLOSE)

    def _carry(self, scene: Scene) -> Move:
        if scene.aperture < self.empty:
            return self._try_again(scene)
        move, done = self.carry(scene)
        if done:
            self._enter(self._release)
        return move

    def _try_again(self, scene: Scene) -> Move:
        """There is nothing between the pads: up, and aim better."""
        self._enter(self._reach)
        self._aim(0.5)
        return Move(raised(scene.hand, self.hover))

    def _release(self, scene: Scene) -> Move:
        if self.count > 12:
            self._enter(self._reach)
        return Move(raised(scene.hand, 0.02 * ramp(scene.aperture, self.empty, OPEN_APERTURE)))

    def _lapse(self) -> bool:
        """Whether the demonstrator is inattentive at this step."""
        self.lapsing = max(0, self.lapsing - 1)
        if not self.lapsing and self.generator.uniform() < self.style.lapse:
            self.lapsing = int(self.generator.integers(3, 9))
            self.drift = self.generator.normal(0.0, self.style.drift, 3)
            self.fumbling = bool(self.generator.uniform() < self.style.fumble)
        return self.lapsing > 0

    def _translation(self, scene: Scene, move: Move) -> Vector:
        """(3,): proportional to what remains, bent while far, limited in speed."""
        remaining = move.target - scene.hand
        bend = self.curve * ramp(math.hypot(remaining[0], remaining[1]), 0.02, 0.12)
        cosine, sine = math.cos(bend), math.sin(bend)
        bent = np.array([[cosine, -sine, 0.0], [sine, cosine, 0.0], [0.0, 0.0, 1.0]]) @ remaining
        translation = bent / (self.style.settling * STEP_LENGTH) * move.urgency
        return translation * min(1.0, self.speed / (float(np.linalg.norm(translation)) + 1e-9))

    def _rotation(self, scene: Scene, move: Move) -> Vector:
        """(3,): turns about the vertical, and tilts the hand back to it."""
        rotation = np.cross(scene.hand_rotation[:, 2], DOWNWARD[:, 2])
        rotation[2] += move.turn
        return np.clip(rotation / (4.0 * STEP_ANGLE), -0.6 * self.speed, 0.6 * self.speed)


class LiftScript(Script):
    """Grasp the cube and raise it about 8 cm."""

    empty, grip = 0.03, np.array([0.0, 0.0, 0.0])

    def turn_to_grasp(self, scene: Scene) -> float:
        """None: the open gripper spans the cube's diagonal, and closing turns the cube."""
        return 0.0

    def carry(self, scene: Scene) -> tuple[Move, bool]:
        """Upwards, to a height that is a habit of the episode."""
        target = np.array([*scene.hand[:2], 0.88 + self.hover])
        return Move(target, gripper=CLOSE), False


class CanScript(Script):
    """Grasp the can, carry it over the bins' walls and drop it into its compartment."""

    empty, grip = 0.04, np.array([0.0, 0.0, 0.015])
    compartment = np.array([0.16, 0.345])  # inside the near corner of its quarter: the arm does not reach the centre
    clearance = 1.0  # height of the hand at which the can passes over the walls

    def turn_to_grasp(self, scene: Scene) -> float:
        """None: a can is round."""
        return 0.0

    def carry(self, scene: Scene) -> tuple[Move, bool]:
        """Up, across while above the walls, and let go over the compartment."""
        goal = self.compartment + self.place_error
        distance = math.hypot(*(goal - scene.hand[:2]))
        height = self.clearance + self.hover * ramp(distance, 0.05, 0.2)
        urgency = np.array([*[ramp(scene.hand[2], self.clearance - 0.07, self.clearance)] * 2, 1.0])
        return Move(np.array([*goal, height]), gripper=CLOSE, urgency=urgency), distance < 0.02


class SquareScript(Script):
    """Grasp the nut by its handle, bring its hole over the peg, square to it, lower it and let go."""

    empty, grip = 0.024, np.array([0.06, 0.0, 0.0])
    peg = np.array([0.23, 0.1])
    peg_top = 0.95

    def __init__(self, style: Style, generator: np.random.Generator) -> None:
        super().__init__(style, generator)
        self.release_height = generator.uniform(0.865, 0.93)  # of the nut; it falls the rest of the way
        self.match = generator.uniform(0.004, 0.007) * (1.0 + 0.5 * self.sloppy)  # offset at which lowering begins

    def turn_to_grasp(self, scene: Scene) -> float:
        """The handle lies between the pads from either side."""
        return wrap(heading(scene.object_rotation) - heading(scene.hand_rotation), math.pi)

    def carry(self, scene: Scene) -> tuple[Move, bool]:
        """Up, across while above the peg's top, down where hole and peg match; let go once the peg is inside."""
        goal = self.peg + self.place_error
        offset = goal - scene.object[:2]
        turn = self._turn_to_peg(heading(scene.object_rotation))
        distance = math.hypot(*offset)
        inside = scene.object[2] < self.peg_top and distance < 0.02
        hover = self.peg_top + 0.02 + 0.5 * self.hover
        high = ramp(scene.object[2], self.peg_top - 0.04, self.peg_top + 0.015)
        matched = inside or (distance < self.match and abs(turn) < 0.15)
        height = self.peg_top - 0.1 if matched else hover + 0.5 * self.hover * ramp(distance, 0.02, 0.1)
        target = scene.hand + np.array([*offset, height - scene.object[2]])
        urgency = 1.0 if inside else np.array([high, high, 1.0])
        return Move(target, turn, CLOSE, urgency), inside and scene.object[2] < self.release_height

    @staticmethod
    def _turn_to_peg(angle: float) -> float:
        """To the nearest side of the peg but the far one, beyond which the arm does not reach with the handle."""
        quarter = 0.5 * math.pi
        side = round(angle / quarter) * quarter
        return (side or math.copysign(quarter, angle)) - angle


SCRIPTS: dict[str, type[Script]] = {"lift": LiftScript, "can": CanScript, "square": SquareScript}
