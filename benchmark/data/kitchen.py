"""A scripted demonstrator of `kitchen-microwave-kettle-light-slider`: the data of `kitchen-local`.

It opens the microwave, pushes the kettle back, turns the light on and slides the cabinet open: one to four of these in
an order drawn per episode. It sees the noisy observation alone: where the arm is on its path, what is done already.
Like a person it varies in pace, way and aim, trembles, hesitates, is sometimes careless, and tries once more where it
sees a failure. Detours and tremor also show a policy cloned from the data how to come back to the path, as the noise
of Laskey et al. 2017 does ("DART: Noise Injection for Robust Imitation Learning"); unlike there, the executed actions
are the recorded ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context

import numpy as np
from numpy.typing import NDArray

from benchmark.data.episodes import COLUMNS, Episodes
from benchmark.data.kitchen_motion import ACTION_REACH, JOINTS, Arm, Follower, Path, Waypoint, straight
from benchmark.envs.kitchen import COMPLETE_DISTANCE, DEFINITIONS, GOALS, START, KitchenEnv, load_model
from benchmark.seeding import derive_seed

SCRIPT_VERSION = 1  # raise it whenever the same seeds would give other episodes

_DEFINITION = "kitchen-microwave-kettle-light-slider"
_SUB_TASKS = DEFINITIONS[_DEFINITION]
_COUNT_CHANCES = (0.05, 0.25, 0.4, 0.3)  # of setting out to do 1, 2, 3 or 4 sub-tasks
_PACES = (0.85, 1.1)  # range of an episode's factor on all paces
_FAST, _STEADY, _SLOW = 7.5, 6.5, 5.0  # paces of the hand in the open, by default, and where it touches
_ERROR = 0.004  # m, standard deviation of an attempt's aim in each coordinate
_CARELESS_CHANCE, _CARELESSNESS = 0.1, 4.0  # of an attempt; the factor on its error
_HESITATION_CHANCE, _HESITATION = 0.15, (3, 9)  # of an attempt; range of steps
_DETOUR = 0.12  # rad, standard deviation in each joint of the detour on the way to a sub-task
_TREMOR = 0.02  # rad, standard deviation of a fast arm's target in each joint
_TREMOR_MEMORY = 0.8  # correlation of the tremor from one step to the next
_HOME_SPREAD = 0.05  # rad by which an episode's retreat posture differs from the start's in each joint
_ATTEMPTS = 2
_LAST_NODES = (12, 30)  # range of nodes of the way home that are followed after the last sub-task

_HANDLE = np.array([-0.642, 0.4926, 1.78])  # m, of the closed microwave
_HINGE = np.array([-1.1275, 0.455, 1.78])
_DOOR_YAW = 0.3  # rad, of the closed door


@dataclass(frozen=True)
class Manner:
    """How one attempt is made.

    Attributes:
        generator: draws its variations.
        error: (3,) m by which the hand is off.
    """

    generator: np.random.Generator
    error: NDArray[np.float64]

    def near(self, x: float, y: float, z: float, spread: float = 0.0) -> NDArray[np.float64]:
        """(3,) m: a point, off by the error and by up to `spread` m in each coordinate."""
        return np.array([x, y, z]) + self.error + self.generator.uniform(-spread, spread, 3)


def _open_microwave(manner: Manner) -> list[Waypoint]:
    """Grip the door's handle and pull along the door's circle."""
    opening = manner.generator.uniform(-0.72, -0.6)
    turn = manner.generator.uniform(0.4, 0.6)  # of the hand for the door's; the rest turns within the grip

    def at(angle: float, depth: float) -> Waypoint:
        yaw = _DOOR_YAW + turn * angle
        sine, cosine = np.sin(angle), np.cos(angle)
        arm = np.array([[cosine, -sine, 0.0], [sine, cosine, 0.0], [0.0, 0.0, 1.0]]) @ (_HANDLE - _HINGE)
        into = np.array([-np.sin(yaw), np.cos(yaw), 0.0])
        return Waypoint(_HINGE + arm + depth * into + manner.error, yaw, pace=_SLOW)

    before, grip = at(0.0, -0.12), at(0.0, 0.005)
    pull = [at(angle, 0.005) for angle in np.linspace(0.0, opening, 7)[1:]]
    return [
        replace(before, position=before.position + manner.generator.uniform(-0.03, 0.03, 3), closed=False, pace=_FAST),
        replace(grip, closed=False, hold=2),
        replace(grip, hold=5),
        *pull,
        replace(pull[-1], closed=False, hold=2),
        replace(at(opening, -0.1), closed=False),
    ]


def _push_kettle(manner: Manner) -> list[Waypoint]:
    """Reach down before the kettle and push its lower part towards the back burner."""
    pitch = manner.generator.uniform(0.75, 0.95)
    far = manner.generator.uniform(0.43, 0.49)
    return [
        Waypoint(manner.near(-0.31, 0.1, 1.88, 0.03), 0.0, 0.7 * pitch, closed=False, pace=_FAST),
        Waypoint(manner.near(-0.285, 0.17, 1.69), 0.0, pitch, closed=False),
        Waypoint(manner.near(-0.285, far, 1.69), 0.0, pitch, closed=False, pace=_SLOW),
        Waypoint(manner.near(-0.33, 0.24, 1.9, 0.015), 0.0, 0.5 * pitch, closed=False),
    ]


def _switch_light_on(manner: Manner) -> list[Waypoint]:
    """Push the lever to the left with closed fingers."""
    height, depth = manner.generator.uniform(2.265, 2.295), manner.generator.uniform(0.605, 0.625)
    return [
        Waypoint(manner.near(-0.3, 0.48, height, 0.03), pace=_FAST),
        Waypoint(manner.near(-0.31, depth, height), pace=_SLOW),
        Waypoint(manner.near(manner.generator.uniform(-0.47, -0.44), depth, height), pace=_SLOW),
        Waypoint(manner.near(-0.42, 0.46, height - 0.03, 0.02)),
    ]


def _slide_cabinet_open(manner: Manner) -> list[Waypoint]:
    """Push the handle to the right with open fingers, from below, which a clone can tell from the way to the light."""
    height, depth = manner.generator.uniform(2.5, 2.54), manner.generator.uniform(0.61, 0.63)
    end, pitch = manner.generator.uniform(0.04, 0.14), manner.generator.uniform(-0.5, -0.3)
    return [
        Waypoint(manner.near(-0.23, 0.48, height, 0.03), 0.0, pitch, closed=False, pace=_FAST),
        Waypoint(manner.near(-0.22, depth, height), 0.0, pitch, closed=False, pace=_SLOW),
        Waypoint(manner.near(end, depth, height), 0.0, pitch, closed=False, pace=_STEADY),
        Waypoint(manner.near(end - 0.05, 0.46, height - 0.02, 0.02), 0.0, pitch, closed=False),
    ]


_SCRIPTS: dict[str, Callable[[Manner], list[Waypoint]]] = {
    "microwave": _open_microwave,
    "kettle": _push_kettle,
    "light switch": _switch_light_on,
    "slide cabinet": _slide_cabinet_open,
}


class Demonstration:
    """One episode's hidden intentions; turns observations into actions.

    Args:
        seed: decides all of them.
    """

    def __init__(self, seed: int) -> None:
        self._generator = np.random.default_rng(derive_seed(seed, "kitchen demonstrator", SCRIPT_VERSION))
        self._arm = Arm(load_model()[0], START)
        count = self._generator.choice(len(_COUNT_CHANCES), p=_COUNT_CHANCES) + 1
        self.order = tuple(str(name) for name in self._generator.permutation(_SUB_TASKS)[:count])
        self._pace = self._generator.uniform(*_PACES)
        self._home = START[:JOINTS] + self._generator.uniform(-_HOME_SPREAD, _HOME_SPREAD, JOINTS)
        self._tremor = np.zeros(JOINTS)
        self._motions = self._intend()
        self._follower: Follower | None = None
        self._observed, self._done = START, set[str]()

    def act(self, observation: NDArray[np.float64]) -> NDArray[np.float32] | None:
        """(9,) action in [-1, 1] for a (60,) observation; None once the demonstrator is through."""
        self._observed = observation[: len(START)]
        self._done.update(name for name in _SUB_TASKS if is_complete(name, self._observed))
        while self._follower is None or self._follower.done:
            self._follower = next(self._motions, None)
            if self._follower is None:
                return None
        arm, fingers = self._observed[:JOINTS], self._observed[JOINTS : JOINTS + 2]
        target, closed = self._follower.aim(arm)
        sag = self._arm.sag(np.concatenate([arm, fingers]))[:JOINTS]
        fresh = np.sqrt(1.0 - _TREMOR_MEMORY**2) * self._generator.normal(size=JOINTS)
        self._tremor = _TREMOR_MEMORY * self._tremor + fresh
        shake = _TREMOR * (self._follower.pace / _FAST) ** 2 * self._tremor
        joints = (target + shake + sag - arm) / ACTION_REACH
        return np.clip(np.append(joints, np.repeat(-1.0 if closed else 1.0, 2)), -1.0, 1.0).astype(np.float32)

    def _intend(self) -> Iterator[Follower]:
        """The paths to follow, each planned when it is its turn, from where the last one ended."""
        joints = START[:JOINTS]
        for name in self.order:
            for _ in range(_ATTEMPTS):
                if name in self._done:
                    break
                detour = self._generator.normal(0.0, _DETOUR, JOINTS)
                path = self._arm.path(joints, self._home, detour, self._waypoints(name))
                yield Follower(path)
                joints = path.joints[-1]
        end = straight(joints, self._home)[: self._generator.integers(*_LAST_NODES)]
        still = np.zeros(len(end), dtype=np.int64)
        yield Follower(Path(end, still > 0, np.full(len(end), self._pace * _STEADY), still))

    def _waypoints(self, name: str) -> list[Waypoint]:
        """One attempt at a sub-task, with its variations."""
        careless = self._generator.random() < _CARELESS_CHANCE
        error = self._generator.normal(0.0, _ERROR * (_CARELESSNESS if careless else 1.0), 3)
        waypoints = _SCRIPTS[name](Manner(self._generator, error))
        if self._generator.random() < _HESITATION_CHANCE:
            waypoints[0] = replace(waypoints[0], hold=int(self._generator.integers(*_HESITATION)))
        return [replace(waypoint, pace=waypoint.pace * self._pace) for waypoint in waypoints]


def is_complete(name: str, positions: NDArray[np.float64]) -> bool:
    """Whether the (30,) observed positions count as the sub-task done."""
    first, goal = GOALS[name]
    return bool(np.linalg.norm(positions[first : first + len(goal)] - np.array(goal)) < COMPLETE_DISTANCE)


def _record(seed: int) -> dict[str, NDArray]:
    """One episode's columns, by their names in `Episodes`."""
    env, demonstration, index = KitchenEnv(_DEFINITION, 1, action_horizon=1), Demonstration(seed), np.array([0])
    observations, actions, rewards, terminated = [env.reset(index, np.array([seed]))[0]], [], [], False
    while not terminated and len(actions) < env.max_episode_steps:
        action = demonstration.act(observations[-1])
        if action is None:
            break
        outcome = env.step(index, action[None, None])
        observations.append(outcome.observations[0])
        actions.append(action)
        rewards.append(outcome.rewards[0, 0])
        terminated = bool(outcome.terminated[0])
    env.close()
    last = np.arange(len(actions)) == len(actions) - 1
    return {
        "observations": np.array(observations[:-1], dtype=np.float32),
        "actions": np.array(actions, dtype=np.float32),
        "rewards": np.array(rewards, dtype=np.float32),
        "terminals": last & terminated,
        "timeouts": last & (not terminated),
    }


def demonstrate(seeds: NDArray[np.int64], threads: int = 1) -> Episodes:
    """One episode per seed. An episode that ends with sub-tasks open is marked as timed out at its last step.

    Args:
        seeds: (E,) int64, non-negative, E at least 1; each decides its episode's noise and intentions.
        threads: processes that share the episodes; 1 stays in this process. Never changes a result.

    Raises:
        ValueError: no seed, a negative one, or `threads` below 1.
    """
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    if seeds.ndim != 1 or not seeds.size or seeds.min() < 0:
        raise ValueError(f"seeds must be a 1-D array of at least one non-negative integer, got {seeds.tolist()}")
    if threads == 1:
        records = list(map(_record, seeds.tolist()))
    else:
        # processes, since the planning is Python
        with ProcessPoolExecutor(threads, get_context("spawn")) as pool:
            records = list(pool.map(_record, seeds.tolist(), chunksize=4))
    return Episodes(**{name: np.concatenate([record[name] for record in records]) for name in COLUMNS})
