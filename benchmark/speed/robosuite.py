"""Stepping robosuite's tasks on one core: ours, stock robosuite, and the physics alone, all on the same trajectory."""

# pyright: reportAttributeAccessIssue=false
# (mujoco is a compiled module without type stubs)

from __future__ import annotations

import itertools
from contextlib import closing
from typing import Any

import mujoco
import numpy as np
from mujoco.rollout import Rollout as NativeRollout
from numpy.typing import NDArray

from benchmark.envs import ROBOSUITE, VectorEnv
from benchmark.speed.measuring import Figure, Row, Sizes, measure, ratio
from benchmark.speed.physics import ACTION_HORIZON

AIMS = {"lift": 4.5, "can": 5.0, "square": 3.5, "transport": 5.0}  # least ratio of our steps/s to stock robosuite's
PHYSICS_AIM = 0.70  # of the physics alone; reaching either is enough
_FULL_PHYSICS = int(mujoco.mjtState.mjSTATE_FULLPHYSICS)
_ONE, _SEED = np.array([0]), np.array([0])


class StockBlocks:
    """Stock robosuite, as its users step it, through (B, T, A) actions: a block of T steps at each call of `run`."""

    def __init__(self, task: str, actions: NDArray[np.float32]) -> None:
        from benchmark.envs.robosuite import OBSERVATION_KEYS, constructor_arguments, default_arguments
        from benchmark.envs.robosuite_simulator import Simulator

        name = default_arguments(task)["env_name"]
        self.simulator = Simulator(name, constructor_arguments(task), OBSERVATION_KEYS[task], model_seed=int(_SEED[0]))
        self.actions = actions
        self.start()

    def start(self) -> None:
        """Go back to the first block."""
        self.blocks = iter(self.actions)
        self.simulator.reset(int(_SEED[0]))

    def run(self) -> int:
        """Take the next block's steps; returns how many."""
        block = next(self.blocks)
        for action in block:
            self.simulator.env.step(action)
        return len(block)


class PhysicsBlocks:
    """MuJoCo's steps of the same blocks and nothing else: recorded controls, replayed by `mujoco.rollout`."""

    def __init__(self, stock: StockBlocks) -> None:
        self.model, data = stock.simulator.model, stock.simulator.data
        self.data, self.pool = mujoco.MjData(self.model), NativeRollout(nthread=0)
        self.steps = stock.actions.shape[1]
        simulation: Any = stock.simulator.env.sim
        step, controls = simulation.step, []

        def record_controls() -> None:
            controls.append(data.ctrl.copy())
            step()

        simulation.step = record_controls
        self.recorded = []
        for _ in stock.actions:
            start = np.empty((1, mujoco.mj_stateSize(self.model, _FULL_PHYSICS)))
            mujoco.mj_getState(self.model, data, start[0], _FULL_PHYSICS)
            warm_start = data.qacc_warmstart[None].copy()
            controls.clear()
            stock.run()
            states = np.empty((1, len(controls), start.shape[1]))
            self.recorded.append((start, np.stack(controls)[None], warm_start, states))
        simulation.step = step
        stock.start()
        self.blocks = iter(self.recorded)

    def run(self) -> int:
        """Replay the next block; returns its environment steps."""
        start, controls, warm_start, states = next(self.blocks)
        self.pool.rollout(self.model, self.data, start, controls, initial_warmstart=warm_start, state=states)
        return self.steps


class OurBlocks:
    """Our environment through the same blocks, in chunks."""

    def __init__(self, env: VectorEnv, actions: NDArray[np.float32]) -> None:
        self.env = env
        self.blocks = iter(actions)
        env.reset(_ONE, _SEED)

    def run(self) -> int:
        """Take the next block's steps; returns how many."""
        block = next(self.blocks)
        for chunk in block.reshape(-1, 1, ACTION_HORIZON, self.env.action_dim):
            self.env.step(_ONE, chunk)
        return len(block)


def robosuite(sizes: Sizes, threads: int) -> list[Row]:
    """Stepping on one core, of every robosuite task."""
    return list(itertools.chain.from_iterable(robosuite_of(name, sizes) for name in ROBOSUITE))


def robosuite_of(name: str, sizes: Sizes) -> list[Row]:
    """One task under uniform random actions: each turn is the next block of one long episode, the same for all."""
    blocks, steps = 1 + sizes.repeats, sizes.robosuite_chunks * ACTION_HORIZON
    try:
        from benchmark.envs.robosuite import RobosuiteEnv

        env = RobosuiteEnv(name, 1, ACTION_HORIZON, max_episode_steps=blocks * steps, stepping="fast")
    except ValueError as error:
        return [Row("robosuite", name, "env steps/s", [], note=f"not available: {error}")]
    with closing(env):
        actions = np.random.default_rng(0).uniform(-1.0, 1.0, (blocks, steps, env.action_dim)).astype(np.float32)
        stock = StockBlocks(name, actions)
        contenders = {"ours": OurBlocks(env, actions), "stock": stock, "physics alone": PhysicsBlocks(stock)}
        for contender in contenders.values():
            contender.run()  # the first block has the reset's peculiarities, and our compilation
        rates = measure({key: contender.run for key, contender in contenders.items()}, sizes.repeats)
    figures = (
        Figure("x stock", ratio(rates["ours"], rates["stock"]), AIMS[name]),
        Figure("x physics alone", ratio(rates["ours"], rates["physics alone"]), PHYSICS_AIM),
    )
    rows = [Row("robosuite", f"{name}, {key}", "env steps/s", rates[key]) for key in ("stock", "physics alone")]
    return [Row("robosuite", f"{name}, ours", "env steps/s", rates["ours"], figures), *rows]
