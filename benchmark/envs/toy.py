"""A point that must get past a disc, left or right, to a goal: two equally good ways and a sparse reward.

The average of the two ways runs into the disc, so a policy has to commit to one; and because a demonstrator's mistakes
lie beside its successes, choosing among the behaviours of the data is enough to solve the task.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmark.envs.base import (
    ChunkStep,
    VectorEnv,
    check_actions,
    check_indices,
    check_running,
    check_seeds,
    check_sizes,
    load_arrays,
)

MAX_EPISODE_STEPS = 48
START = np.array([0.0, -0.8])
GOAL = np.array([0.0, 0.8])
START_NOISE = 0.05  # half-width of the uniform start noise, per coordinate
GOAL_RADIUS = 0.12
DISC_RADIUS = 0.4  # the obstacle, centred on the origin
STEP_SIZE = 0.08  # distance moved per coordinate by an action of 1
_GREY, _GREEN, _BLUE = (150, 150, 150), (60, 160, 70), (30, 80, 200)

_CLEARANCE = (0.32, 0.8)  # where demonstrations pass the disc, on the x axis; below 0.46 they hit it
_AIM_DEVIATION = 0.1  # of the demonstrations' aim at the goal, against GOAL_RADIUS
_SPEED = (0.7, 1.0)  # of the demonstrations, as a fraction of a full action
_ACTION_DEVIATION = 0.1  # of the demonstrations' per-step action noise


class ToyEnv(VectorEnv):
    """A batch of the point task, in the square [-1, 1]^2.

    Observations are the position (x, y). Actions are velocities in [-1, 1]^2, clipped. Reaching the goal gives reward 1
    and terminates; entering the disc or leaving the square terminates with nothing. Episodes are truncated after
    `max_episode_steps` steps; the straight ways take about 22.

    Args:
        num_envs: environments in the batch.
        action_horizon: H, actions per chunk.
        max_episode_steps: the time limit.

    Raises:
        ValueError: for a size below 1.
    """

    observation_dim = 2
    action_dim = 2

    def __init__(self, num_envs: int, action_horizon: int = 4, max_episode_steps: int = MAX_EPISODE_STEPS) -> None:
        check_sizes(num_envs, action_horizon)
        if max_episode_steps < 1:
            raise ValueError(f"max_episode_steps must be at least 1, got {max_episode_steps}")
        self.num_envs = num_envs
        self.action_horizon = action_horizon
        self.max_episode_steps = max_episode_steps
        self._position = np.zeros((num_envs, 2))
        self._elapsed = np.zeros(num_envs, dtype=np.int64)
        self._ended = np.ones(num_envs, dtype=np.bool_)

    def reset(self, indices: NDArray[np.int64], seeds: NDArray[np.int64]) -> NDArray[np.float64]:
        """Start new episodes near (0, -0.8); see `VectorEnv.reset`."""
        indices = check_indices(self, indices)
        seeds = check_seeds(indices, seeds)
        for index, seed in zip(indices, seeds, strict=True):
            noise = np.random.default_rng(int(seed)).uniform(-START_NOISE, START_NOISE, size=2)
            self._position[index] = START + noise
        self._elapsed[indices] = 0
        self._ended[indices] = False
        return self._position[indices]

    def step(self, indices: NDArray[np.int64], actions: NDArray[np.float32]) -> ChunkStep:
        """Execute one chunk per environment; see `VectorEnv.step`."""
        indices = check_indices(self, indices)
        actions = check_actions(self, indices, actions)
        check_running(indices, self._ended)
        moves = STEP_SIZE * np.clip(actions.astype(np.float64), -1.0, 1.0)
        position = self._position[indices]
        elapsed = self._elapsed[indices]
        first = elapsed.copy()
        terminated = np.zeros(len(indices), dtype=np.bool_)
        truncated = elapsed >= self.max_episode_steps
        rewards = np.zeros((len(indices), self.action_horizon))
        for step in range(self.action_horizon):
            running = ~(terminated | truncated)
            position[running] += moves[running, step]
            elapsed[running] += 1
            reached = running & (_squared_distance(position, GOAL) <= GOAL_RADIUS**2)
            rewards[reached, step] = 1.0
            terminated |= reached | (running & _crashed(position))
            truncated |= running & (elapsed >= self.max_episode_steps)
        self._position[indices] = position
        self._elapsed[indices] = elapsed
        self._ended[indices] = terminated | truncated
        return ChunkStep(position, rewards, elapsed - first, terminated, truncated)

    def render(self, index: int, width: int = 480, height: int = 480) -> NDArray[np.uint8]:
        """The square seen from above: point blue, goal green, obstacle grey; see `VectorEnv.render`."""
        index = int(check_indices(self, np.array([index]))[0])
        x, y = np.meshgrid((np.arange(width) + 0.5) * 2 / width - 1, 1 - (np.arange(height) + 0.5) * 2 / height)
        pixels = np.stack([x, y], axis=-1).reshape(-1, 2)
        picture = np.full((height * width, 3), 255, dtype=np.uint8)
        discs = ((np.zeros(2), DISC_RADIUS, _GREY), (GOAL, GOAL_RADIUS, _GREEN), (self._position[index], 0.03, _BLUE))
        for centre, radius, colour in discs:
            picture[_squared_distance(pixels, centre) <= radius**2] = colour
        return picture.reshape(height, width, 3)

    def state_dict(self) -> dict[str, Any]:
        """`position` (N, 2) float64, `elapsed` (N,) int64, `ended` (N,) bool; see `VectorEnv.state_dict`."""
        return {name: array.copy() for name, array in self._arrays().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; see `VectorEnv.load_state_dict`."""
        load_arrays(self._arrays(), state)

    def _arrays(self) -> dict[str, NDArray[Any]]:
        return {"position": self._position, "elapsed": self._elapsed, "ended": self._ended}


def toy_demonstrations(generator: np.random.Generator, episodes: int) -> dict[str, NDArray[Any]]:
    """Demonstrations of a careless scripted demonstrator, in D4RL's flat layout, episode after episode.

    Each episode picks a side with equal chance, a clearance from the disc, a speed and an aim. One that passes too
    close ends at the disc and one that misses the goal leaves the square, so that about half succeed.

    Args:
        generator: the only source of randomness.
        episodes: number of episodes, each of 1 to 48 steps.

    Returns:
        `observations` (M, 2) and `actions` (M, 2) float32, `rewards` (M,) float32, `terminals` and `timeouts` (M,)
        bool, for M steps in all; each episode's last step has exactly one of the two set.

    Raises:
        ValueError: for fewer than 1 episode.
    """
    if episodes < 1:
        raise ValueError(f"episodes must be at least 1, got {episodes}")
    env = ToyEnv(episodes, action_horizon=1)
    indices = np.arange(episodes)
    observations = env.reset(indices, generator.integers(2**31, size=episodes))
    side = generator.choice([-1.0, 1.0], size=episodes)
    waypoints = np.stack([side * generator.uniform(*_CLEARANCE, size=episodes), np.zeros(episodes)], axis=1)
    targets = GOAL + np.stack([generator.normal(0.0, _AIM_DEVIATION, size=episodes), np.zeros(episodes)], axis=1)
    speeds = generator.uniform(*_SPEED, size=episodes)
    names = ("observations", "actions", "rewards", "terminals", "timeouts")
    columns: dict[str, list[NDArray[Any]]] = {name: [] for name in ("episode", *names)}
    while indices.size:
        actions = _scripted(observations, waypoints[indices], targets[indices], speeds[indices])
        actions += generator.normal(0.0, _ACTION_DEVIATION, size=actions.shape)
        clipped = np.clip(actions, -1.0, 1.0).astype(np.float32)
        outcome = env.step(indices, clipped[:, None])
        timeouts = outcome.truncated & ~outcome.terminated
        row = (indices, observations.astype(np.float32), clipped, outcome.rewards[:, 0].astype(np.float32),
               outcome.terminated, timeouts)  # fmt: skip
        for column, values in zip(columns.values(), row, strict=True):
            column.append(values)
        running = ~(outcome.terminated | outcome.truncated)
        indices, observations = indices[running], outcome.observations[running]
    flat = {name: np.concatenate(values) for name, values in columns.items()}
    order = np.argsort(flat["episode"], kind="stable")
    return {name: flat[name][order] for name in names}


def _squared_distance(points: NDArray[np.float64], centre: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n,) squared distances of (n, 2) points; products and sums only, so the same bits on every machine."""
    x, y = points[:, 0] - centre[0], points[:, 1] - centre[1]
    return x * x + y * y


def _crashed(position: NDArray[np.float64]) -> NDArray[np.bool_]:
    """(n,) whether each of (n, 2) positions is in the disc or outside the square."""
    return (_squared_distance(position, np.zeros(2)) < DISC_RADIUS**2) | (np.abs(position) > 1.0).any(axis=1)


def _scripted(
    position: NDArray[np.float64],
    waypoints: NDArray[np.float64],
    targets: NDArray[np.float64],
    speeds: NDArray[np.float64],
) -> NDArray[np.float64]:
    """(n, 2) actions toward the waypoint below the x axis, then along the line to the target and beyond it."""
    below = position[:, 1:] < 0.0
    beyond = position[:, 1:] > targets[:, 1:] - STEP_SIZE
    heading = np.where(below, waypoints - position, targets - position)
    heading = np.where(beyond, [0.0, 1.0], heading)
    return speeds[:, None] * heading / np.linalg.norm(heading, axis=1, keepdims=True).clip(1e-6)
