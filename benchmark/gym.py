"""Every task as an environment of gymnasium; importing this module registers them.

    import benchmark.gym, gymnasium
    gymnasium.make("otpr_bench/hopper-local")

or, without the import, `gymnasium.make("benchmark.gym:otpr_bench/hopper-local")`.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box
from numpy.typing import NDArray

from benchmark import video
from benchmark.tasks import ENTRY_POINTS, TASKS, get_task

NAMESPACE = "otpr_bench"
_INDEX = np.zeros(1, dtype=np.int64)


class TaskEnv(gymnasium.Env[NDArray[np.float64], NDArray[np.float32]]):
    """One environment of a task, stepped one action at a time.

    Observations are the task's own, float64 and not normalised; actions are in [-1, 1], float32. The time limit is the
    task's, and `reset(seed=...)` starts the same episode as that seed does in `benchmark.envs.VectorEnv`.

    Args:
        task: name of the task.
        render_mode: None, or "rgb_array" for pictures of 480 x 480.
        arguments: of a robosuite environment, as a dataset describes them; by default the published ones.

    Raises:
        ValueError: unknown task or render mode, bad arguments, or a simulator that is not installed.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": video.FRAMES_PER_SECOND}  # noqa: RUF012 - as gymnasium's

    def __init__(self, task: str, render_mode: str | None = None, arguments: Mapping[str, Any] | None = None) -> None:
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"unknown render_mode {render_mode!r}; valid: None, rgb_array")
        self._env = dataclasses.replace(get_task(task), action_horizon=1).make_env(1, 1, arguments)
        self.render_mode = render_mode
        self.observation_space = Box(-np.inf, np.inf, (self._env.observation_dim,), np.float64)
        self.action_space = Box(-1.0, 1.0, (self._env.action_dim,), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float64], dict[str, Any]]:
        """Start an episode, of the given seed or of one drawn from `np_random`; there are no options."""
        super().reset(seed=seed, options=options)
        episode = self.np_random.integers(2**31) if seed is None else seed
        return self._env.reset(_INDEX, np.array([episode], dtype=np.int64))[0], {}

    def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.float64], float, bool, bool, dict[str, Any]]:
        """Execute one action (A,).

        Raises:
            ValueError: another shape, or an action that is not finite.
            RuntimeError: the episode has ended.
        """
        step = self._env.step(_INDEX, np.asarray(action, dtype=np.float32)[None, None])
        reward, terminated, truncated = step.rewards[0, 0], step.terminated[0], step.truncated[0]
        return step.observations[0], float(reward), bool(terminated), bool(truncated), {}

    def render(self) -> video.Picture | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The present picture (480, 480, 3), or None without a render mode.

        Raises:
            ValueError: the task cannot be drawn on this machine.
        """
        return video.draw(self._env) if self.render_mode else None

    def close(self) -> None:
        """Release the simulator."""
        self._env.close()


def register() -> None:
    """Add the tasks of the table and of installed packages to gymnasium's registry; none is loaded before `make`."""
    for name in dict.fromkeys((*TASKS, *importlib.metadata.entry_points(group=ENTRY_POINTS).names)):
        gymnasium.register(id=f"{NAMESPACE}/{name}", entry_point="benchmark.gym:TaskEnv", kwargs={"task": name})


register()
