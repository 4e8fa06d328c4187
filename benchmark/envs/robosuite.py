"""robomimic's tasks on robosuite 1.4.1: Lift, PickPlaceCan, NutAssemblySquare and TwoArmTransport."""

from __future__ import annotations

import os
import warnings
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
from benchmark.envs.robosuite_tasks import (
    MODEL_VARIANTS,
    OBSERVATION_KEYS,
    constructor_arguments,
    default_arguments,
    get_definition,
)
from benchmark.envs.workers import Models, SimulatorPool, WorkerGroup, shared_group, shared_pool

__all__ = ["MODEL_VARIANTS", "OBSERVATION_KEYS", "RobosuiteEnv", "constructor_arguments", "default_arguments"]

STEPPING = ("fast", "stock")
STEPPING_VARIABLE = "OTPR_BENCH_ROBOSUITE"  # of the process's environment; chooses among them for every command
_NO_EPISODE = -1.0  # as the model of a row


class RobosuiteEnv(VectorEnv):
    """A batch of one robomimic task: same seeds and actions give stock robosuite's bits, about five times faster.

    Observations are the values of `OBSERVATION_KEYS` one after another (m, rad, unit quaternions x-y-z-w): 19 numbers
    for lift, 23 for can and square, 59 for transport. Actions are per arm a translation, a rotation vector (scaled to
    5 cm and 0.5 rad a step) and the gripper (positive closes), all in [-1, 1] and clipped. The reward is 1 after every
    step at whose end the task stands solved, else 0. Episodes never terminate; they are truncated at the time limit.

    An episode is a function of its seed: seed modulo the number of models chooses the constructor's seed, the seed
    modulo 2^32 seeds robosuite's reset, as in DPPO.

    Args:
        task: 'lift', 'can', 'square' or 'transport'.
        num_envs: environments in the batch.
        action_horizon: H, actions per chunk.
        threads: worker processes that share the batch, or 1 to step in this process; never changes a result.
        arguments: robomimic's ``env_args`` of a dataset; None means the published ones (`default_arguments`).
        max_episode_steps: the time limit; None means DPPO's (300, 300, 400, 800).
        stepping: 'fast' (`robosuite_fast`) or 'stock', robosuite's own code; never changes a result, and a state of
            one can be loaded into the other. None means what the variable OTPR_BENCH_ROBOSUITE says, or else 'fast'.

    Warns:
        UserWarning: the arguments name a gripper or controller that only robosuite's own code steps, whatever
            `stepping` says: all but PandaGripper and OSC_POSE with relative goals, uncoupled and without limits.

    Raises:
        ValueError: for an unknown task or stepping, a size below 1, bad arguments, or without robosuite 1.4.1.
    """

    def __init__(
        self,
        task: str,
        num_envs: int,
        action_horizon: int = 4,
        threads: int = 1,
        arguments: Mapping[str, Any] | None = None,
        max_episode_steps: int | None = None,
        stepping: str | None = None,
    ) -> None:
        definition = get_definition(task)
        check_sizes(num_envs, action_horizon, threads)
        if max_episode_steps is not None and max_episode_steps < 1:
            raise ValueError(f"max_episode_steps must be at least 1, got {max_episode_steps}")
        self.num_envs = num_envs
        self.observation_dim = definition.observation_dim
        self.action_dim = 7 * definition.arms
        self.action_horizon = action_horizon
        self.max_episode_steps = max_episode_steps or definition.max_episode_steps
        env_kwargs, stock = constructor_arguments(task, arguments), _is_stock(stepping)
        self._models = Models(definition.env_name, env_kwargs, OBSERVATION_KEYS[task], definition.models, stock)
        self._pool: SimulatorPool | WorkerGroup | None
        self._pool = shared_pool(self._models) if threads == 1 else shared_group(self._models, threads)
        sizes = self._pool.sizes()
        for name, got, expected in (
            ("observations", sizes.observation, self.observation_dim),
            ("actions", sizes.action, self.action_dim),
        ):
            if got != expected:
                raise ValueError(f"arguments of task {task!r} give {name} of {got} numbers, not {expected}")
        if sizes.why_stock and not stock:
            message = f"task {task!r} is stepped by robosuite's own, slower code because of {sizes.why_stock}"
            warnings.warn(message, stacklevel=2)
        self._states = np.full((num_envs, sizes.state), _NO_EPISODE)
        self._elapsed = np.zeros(num_envs, dtype=np.int64)
        self._ended = np.ones(num_envs, dtype=np.bool_)
        self._drawing: SimulatorPool | None = None

    def reset(self, indices: NDArray[np.int64], seeds: NDArray[np.int64]) -> NDArray[np.float64]:
        """Start new episodes; see `VectorEnv.reset`. Raises RuntimeError if a worker process died."""
        indices = check_indices(self, indices)
        seeds = check_seeds(indices, seeds)
        observations, self._states[indices] = self._running_pool().reset(seeds.astype(np.int64))
        self._elapsed[indices] = 0
        self._ended[indices] = False
        return observations

    def step(self, indices: NDArray[np.int64], actions: NDArray[np.float32]) -> ChunkStep:
        """Execute one chunk per environment; see `VectorEnv.step`. RuntimeError also if a worker process died."""
        indices = check_indices(self, indices)
        actions = check_actions(self, indices, actions)
        check_running(indices, self._ended)
        remaining = self.max_episode_steps - self._elapsed[indices]
        outcome = self._running_pool().step(self._states[indices], actions, remaining)
        self._states[indices] = outcome.states
        self._elapsed[indices] += outcome.steps
        truncated = outcome.steps == remaining
        self._ended[indices] = truncated
        return ChunkStep(
            outcome.observations, outcome.rewards, outcome.steps, np.zeros(len(indices), dtype=np.bool_), truncated
        )

    def state_dict(self) -> dict[str, Any]:
        """`states` (N, S) float64, `elapsed` (N,) int64, `ended` (N,) bool; see `VectorEnv.state_dict`."""
        return {name: array.copy() for name, array in self._arrays().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; see `VectorEnv.load_state_dict`."""
        load_arrays(self._arrays(), state)

    def render(self, index: int, width: int = 480, height: int = 480) -> NDArray[np.uint8]:
        """The view of robosuite's camera 'agentview', drawn in this process; see `VectorEnv.render`."""
        state = self._states[check_indices(self, np.array([index]))[0]]
        if state[0] == _NO_EPISODE:
            raise ValueError(f"environment {index} has no episode to render")
        self._drawing = self._drawing or shared_pool(self._models)
        return self._drawing.load(state).draw(width, height)

    def close(self) -> None:
        """Let go of the simulators; workers end unless another environment shares them."""
        self._pool = self._drawing = None

    def _running_pool(self) -> SimulatorPool | WorkerGroup:
        if self._pool is None:
            raise RuntimeError("this robosuite environment has been closed")
        return self._pool

    def _arrays(self) -> dict[str, NDArray[Any]]:
        return {"states": self._states, "elapsed": self._elapsed, "ended": self._ended}


def _is_stock(stepping: str | None) -> bool:
    """Whether stock robosuite was chosen, by argument or variable."""
    chosen = stepping or os.environ.get(STEPPING_VARIABLE) or STEPPING[0]
    if chosen not in STEPPING:
        source = "stepping" if stepping else STEPPING_VARIABLE
        raise ValueError(f"{source} must be one of {', '.join(STEPPING)}, got {chosen!r}")
    return chosen == "stock"
