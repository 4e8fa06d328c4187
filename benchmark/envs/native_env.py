"""What the MuJoCo environments share: a batch of states, threads that step slices of it, restoring, pictures."""

# pyright: reportAttributeAccessIssue=false
# (mujoco is a compiled module without type stubs)

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray

from benchmark.envs import native
from benchmark.envs.base import ChunkStep, VectorEnv, check_actions, check_indices, check_running, load_arrays
from benchmark.envs.drawing import make_renderer

_SLICES_PER_THREAD = 4  # small enough to level out uneven episodes, large enough that dispatch costs nothing


class NativeEnv(VectorEnv):
    """A batch of environments of one MuJoCo model, stepped by a compiled kernel in several threads.

    Args:
        model: the compiled model; only read.
        kernel: one of the step functions of `native`.
        rules: the kernel's constants.
        num_envs: environments in the batch.
        action_horizon: H, actions per chunk.
        threads: threads that step the batch, the calling one included; never changes a result.
        camera: what `render` looks through: a camera of the model by name, or a free one.
    """

    def __init__(
        self,
        model: Any,
        kernel: Callable[..., None],
        rules: native.Rules | native.KitchenRules,
        num_envs: int,
        action_horizon: int,
        threads: int,
        camera: str | mujoco.MjvCamera,
    ) -> None:
        self._model = model
        self._kernel = kernel
        self._rules = rules
        self._data = [mujoco.MjData(model) for _ in range(threads)]
        self._simulations = [_simulation(model, data) for data in self._data]
        self._pool = ThreadPoolExecutor(threads - 1) if threads > 1 else None
        self._camera = camera
        self._renderer: mujoco.Renderer | None = None
        self.num_envs = num_envs
        self.action_dim = model.nu
        self.action_horizon = action_horizon
        self._batch = native.Batch(
            states=np.zeros((num_envs, mujoco.mj_stateSize(model, native.INTEGRATION))),
            elapsed=np.zeros(num_envs, dtype=np.int64),
            ended=np.ones(num_envs, dtype=np.bool_),
        )
        self._episodes: native.Batch | native.KitchenBatch = self._batch  # what the kernel steps

    @property
    def model(self) -> Any:
        """The compiled model, which nobody may change."""
        return self._model

    @property
    def frame_skip(self) -> int:
        """Physics steps per environment step."""
        return self._rules.frame_skip

    def step(self, indices: NDArray[np.int64], actions: NDArray[np.float32]) -> ChunkStep:
        """Execute one chunk per environment; see `VectorEnv.step`."""
        indices = check_indices(self, indices)
        actions = check_actions(self, indices, actions)
        check_running(indices, self._batch.ended)
        count = len(indices)
        outcome = native.Outcome(
            observations=np.empty((count, self.observation_dim)),
            rewards=np.zeros((count, self.action_horizon)),
            steps=np.zeros(count, dtype=np.int64),
            terminated=np.zeros(count, dtype=np.bool_),
            truncated=np.zeros(count, dtype=np.bool_),
        )
        slices = itertools.pairwise(self._bounds(count))

        def work(simulation: native.Simulation) -> None:
            for start, stop in slices:  # shared: next() on a C iterator is atomic, so each slice is taken once
                self._kernel(simulation, self._rules, self._episodes, indices, actions, outcome, start, stop)

        helpers = [self._pool.submit(work, simulation) for simulation in self._simulations[1:]] if self._pool else []
        work(self._simulations[0])
        for helper in helpers:
            helper.result()
        return ChunkStep(*outcome)

    def state_dict(self) -> dict[str, Any]:
        """`states` (N, S) float64, `elapsed` (N,) int64, `ended` (N,) bool; see `VectorEnv.state_dict`."""
        return {name: array.copy() for name, array in self._batch._asdict().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; see `VectorEnv.load_state_dict`."""
        load_arrays(self._batch._asdict(), state)

    def render(self, index: int, width: int = 480, height: int = 480) -> NDArray[np.uint8]:
        """A picture of one environment's present state; see `VectorEnv.render`."""
        check_indices(self, np.array([index]))
        data = self._data[0]
        mujoco.mj_setState(self._model, data, self._batch.states[index], native.INTEGRATION)
        mujoco.mj_forward(self._model, data)
        try:
            if self._renderer is None or (self._renderer.width, self._renderer.height) != (width, height):
                self._close_renderer()
                self._renderer = make_renderer(self._model, width, height)
                # which cost most of the time without a GPU
                self._renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
            self._renderer.update_scene(data, self._camera)
            return self._renderer.render()
        except Exception as error:
            raise ValueError(f"cannot render: {' '.join(str(error).split())}") from error

    def close(self) -> None:
        """Stop the threads and the renderer; an environment with several threads cannot be stepped afterwards."""
        if self._pool:
            self._pool.shutdown()
        self._close_renderer()

    def _close_renderer(self) -> None:
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None

    def _bounds(self, count: int) -> list[int]:
        """Edges of the slices that `count` rows are cut into."""
        threads = len(self._simulations)
        pieces = 1 if threads == 1 else min(count, threads * _SLICES_PER_THREAD)
        return [count * piece // pieces for piece in range(pieces + 1)] if count else []


def _simulation(model: mujoco.MjModel, data: mujoco.MjData) -> native.Simulation:
    """What the kernel needs of one pair; the caller keeps the pair alive."""
    return native.Simulation(model._address, data._address, data.qpos, data.qvel, data.ctrl)
