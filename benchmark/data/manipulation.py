"""Demonstrations of robosuite's Lift, PickPlaceCan and NutAssemblySquare by scripted hands, in robomimic's terms.

The scripts (`benchmark.data.manipulation_scripts`) stand in for the human demonstrators of robomimic's datasets: same
simulator, controller, observations and actions, variety and mistakes, some failures.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmark.data.manipulation_scripts import SCRIPTS, STYLES
from benchmark.data.robomimic import Demonstration
from benchmark.envs.base import check_seeds
from benchmark.envs.robosuite import MODEL_VARIANTS, OBSERVATION_KEYS, constructor_arguments, default_arguments
from benchmark.envs.workers import Models, SimulatorPool
from benchmark.seeding import derive_seed

SCRIPT_VERSION = 1  # raise it whenever the same seeds would give other demonstrations
STEP_LIMITS = {"lift": 150, "can": 250, "square": 300}  # steps after which a demonstrator gives up
_TAIL = (5, 10)  # fewest and most steps recorded after the one that solved the task
_SIZES = {"robot0_eef_pos": 3, "robot0_eef_quat": 4, "robot0_gripper_qpos": 2}  # 'object' is the rest
_SINGLE_THREADED = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL", "NUMBA")}


def demonstrate(task: str, seeds: NDArray[np.int64], workers: int = 1) -> Iterator[Demonstration]:
    """Scripted demonstrations, one per seed and in their order; each is a function of its seed alone.

    An episode starts as `benchmark.envs.robosuite.RobosuiteEnv` starts it from the same seed. Steps after the one that
    solved the task are recorded too, 5 to 10 of them; an episode that fails ends at the limit of `STEP_LIMITS`.

    Args:
        task: 'lift', 'can' or 'square'.
        seeds: (E,) int64, non-negative.
        workers: processes that share the episodes; 1 stays in this process. Never changes a result.

    Raises:
        ValueError: unknown task, a bad seed, fewer than one worker, or without robosuite 1.4.1.
        concurrent.futures.process.BrokenProcessPool: a worker process died.
    """
    if task not in SCRIPTS:
        raise ValueError(f"no script demonstrates task {task!r}; valid: {', '.join(SCRIPTS)}")
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    checked = check_seeds(np.arange(len(seeds)), seeds).tolist()
    return _in_turn(task, checked) if workers == 1 else _side_by_side(task, checked, workers)


def record_episode(task: str, seed: int) -> Demonstration:
    """The demonstration of one seed; see `demonstrate`."""
    observations, states = _simulators(task).reset(np.array([seed]))
    simulator, observation = _simulators(task).load(states[0]), observations[0]
    generator = np.random.default_rng(derive_seed("demonstrator", task, seed))
    script, rows = SCRIPTS[task](STYLES[task], generator), []
    end, tail, solved = STEP_LIMITS[task], int(generator.integers(_TAIL[0], _TAIL[1] + 1)), False
    while len(rows) < end:
        seen = _split(observation)
        action, state = script.act(seen), simulator.simulation_state()
        observation, reward = simulator.step(action)
        rows.append((seen, action, reward, state))
        if reward > 0.0 and not solved:
            solved, end = True, min(end, len(rows) + tail)
    return _demonstration(rows, simulator.env.model.get_xml())


def _demonstration(rows: list[tuple[Mapping[str, Any], Any, float, Any]], model_file: str) -> Demonstration:
    """Steps (observation, action, reward, state) as arrays."""
    observations, actions, rewards, states = zip(*rows, strict=True)
    dones = (np.array(rewards) > 0.0).astype(np.int64)
    dones[-1] = 1
    return Demonstration(
        observations={key: np.stack([row[key] for row in observations]) for key in observations[0]},
        actions=np.stack(actions),
        rewards=np.array(rewards),
        dones=dones,
        states=np.stack(states),
        model_file=model_file,
    )


@functools.cache
def _simulators(task: str) -> SimulatorPool:
    """This process's simulators of a task, the same models as `RobosuiteEnv` chooses from."""
    # Only Lift's model depends on the constructor's seed: the others need one simulator, not four alike.
    variants = MODEL_VARIANTS if task == "lift" else 1
    name = default_arguments(task)["env_name"]
    return SimulatorPool(Models(name, constructor_arguments(task), OBSERVATION_KEYS[task], variants))


def _split(observation: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """An observation vector (O,) by robomimic's keys."""
    parts = np.split(observation, np.cumsum(list(_SIZES.values())))
    return dict(zip((*_SIZES, "object"), parts, strict=True))


def _in_turn(task: str, seeds: list[int]) -> Iterator[Demonstration]:
    for seed in seeds:
        yield record_episode(task, seed)


def _side_by_side(task: str, seeds: list[int], workers: int) -> Iterator[Demonstration]:
    """The same from worker processes, one episode at a time each."""
    executor = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    try:
        with _environment(_SINGLE_THREADED):  # inherited by the workers, which start with the first tasks
            demonstrations = executor.map(functools.partial(record_episode, task), seeds)
        yield from demonstrations
    finally:
        executor.shutdown(cancel_futures=True)


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for a while."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
