"""Cost against work: how the seconds of an iteration grow with each of its sizes, and whether memory stays constant.

All of it runs on one thread and is measured in that thread's processor seconds: what else runs on the machine, and how
well several threads share small tensors, would otherwise be taken for growth.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmark.envs import make_env
from benchmark.finetune import Collector
from benchmark.launch.resources import keep_freed_memory
from benchmark.methods import get_arm, resolve_settings, uses_demonstrations
from benchmark.policies.demonstrations import load_demonstrations
from benchmark.seeding import BASE_SEED, Streams
from benchmark.speed.learning import PROTOCOL, TASK, weak_normalizer
from benchmark.speed.measuring import Figure, Row, Sizes, resident_memory
from otpr.diffusion import DiffusionPolicy, SamplerSettings

METHODS = ("dppo", "idql", "dql", "otpr")
MEMORY_AIM = 1.02  # most resident memory after the last iteration, relative to that after a quarter of them


@dataclass(frozen=True)
class Work:
    """The sizes of one iteration, each of which is doubled alone."""

    chunks: int = 8  # per environment
    envs: int = 8
    batch_size: int = 64  # (chunk, denoising step) pairs for DPPO, chunks for the methods with a replay
    candidates: int = 4  # of IDQL and OTPR, for each executed chunk
    denoising_steps: int = 5  # K


# By how much a doubling multiplies the cost of collecting and of updating where cost is proportional to work. Updates
# take as many samples in batches of any size; candidates are drawn while collecting; updates of DPPO, IDQL and OTPR
# concern single denoising steps (DPPO's a fixed number of each chain), DQL's differentiate through the whole chain.
# Physics does not depend on the last two, nor OTPR's transport fits on the first two: growth may lie below.
PROPORTIONAL = {"chunks": (2, 2), "envs": (2, 2), "batch_size": (1, 1), "candidates": (2, 1), "denoising_steps": (2, 1)}
EXCEPTIONS = {("dql", "denoising_steps"): (2, 2)}
_FIXED: dict[str, Any] = {  # settings that no axis changes, where a method has them
    "replay_ratio": 8.0,
    "critic_warmup_iterations": 0,
    "ft_denoising_steps": 5,
    "transport_first_steps": 4,
    "transport_warm_steps": 4,
    "transport_block_size": 64,
}


def method_settings(name: str, work: Work) -> Any:
    """The method's published settings with the sizes of `work`, and a replay that one iteration fills."""
    settings = resolve_settings(name, TASK, PROTOCOL, {})
    sizes = {"batch_size": work.batch_size, "candidates": work.candidates, "replay_capacity": work.envs * work.chunks}
    fixed = _FIXED | {"ft_denoising_steps": min(_FIXED["ft_denoising_steps"], work.denoising_steps)}
    changes = {key: value for key, value in (fixed | sizes).items() if hasattr(settings, key)}
    return dataclasses.replace(settings, **changes)


class Loop:
    """One method on Hopper with a freshly initialised policy: iterations of given sizes, timed, on one thread."""

    def __init__(self, name: str, work: Work) -> None:
        settings = method_settings(name, work)
        generator = torch.Generator().manual_seed(0)
        sampler = SamplerSettings(
            denoising_steps=work.denoising_steps, ddim_steps=min(work.denoising_steps, SamplerSettings.ddim_steps)
        )
        policy = DiffusionPolicy(TASK.build_network(generator), sampler)
        loop = dataclasses.replace(TASK.loop(PROTOCOL), n_envs=work.envs, n_steps=work.chunks)
        pairs = load_demonstrations(TASK).pairs if uses_demonstrations(settings) else None
        self.method = get_arm(name).build(settings, policy, TASK.shape(loop), generator, pairs)
        self.env = make_env(TASK.environment, work.envs, TASK.action_horizon)
        self.collector = Collector(self.env, weak_normalizer(), Streams(BASE_SEED, TASK.name, 0), loop, "cpu")

    def iterate(self) -> tuple[float, float]:
        """Collect and update once; the processor seconds of each."""
        started = time.process_time()
        rollout = self.collector.collect(self.method.act)
        collected = time.process_time()
        self.method.update(rollout)
        return collected - started, time.process_time() - collected


def iteration_seconds(name: str, works: Sequence[Work], repeats: int) -> np.ndarray:
    """Iterations of all sizes in turns, (repeats, sizes, 2) seconds of collecting and updating; the first is left out.

    The first also fills the replay and starts what later ones continue, such as OTPR's transport.
    """
    loops = [Loop(name, work) for work in works]
    seconds = np.array([[loop.iterate() for loop in loops] for _ in range(repeats + 1)])
    for loop in loops:
        loop.env.close()
    return seconds[1:]


def growth_of(name: str, axis: str, base: Work, sizes: Sizes) -> list[Row]:
    """Collecting and updating of one method while one size is doubled: growth per doubling, one sample a turn."""
    factors = [2**doubling for doubling in range(sizes.growth_doublings + 1)]
    works = [dataclasses.replace(base, **{axis: getattr(base, axis) * factor}) for factor in factors]
    seconds = iteration_seconds(name, works, sizes.growth_turns)
    rows = []
    for index, phase in enumerate(("collect", "update")):
        measured = seconds[..., index]
        growth = (measured[:, -1] / measured[:, 0]) ** (1 / sizes.growth_doublings)
        times = [Figure(f"ms at {factors[i]}x", 1000 * median(measured[:, i])) for i in (0, -1)]
        proportional = EXCEPTIONS.get((name, axis), PROPORTIONAL[axis])[index]
        figures = (Figure("if proportional", proportional), *times)
        rows.append(Row("growth", f"{name}, {phase}, {axis}", "x/doubling", growth.tolist(), figures))
    return rows


def memory_over_time(name: str, work: Work, iterations: int) -> list[int]:
    """Resident memory in bytes after each iteration."""
    torch.set_num_threads(1)
    keep_freed_memory()
    loop, memory = Loop(name, work), []
    for _ in range(iterations):
        loop.iterate()
        memory.append(resident_memory())
    loop.env.close()
    return memory


def memory_of(name: str, base: Work, sizes: Sizes) -> Row:
    """One method's memory over time, in a process of its own.

    Raises:
        BrokenProcessPool: the process died.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        memory = pool.submit(memory_over_time, name, base, sizes.growth_iterations).result()
    early = max(1, sizes.growth_iterations // 4)
    figures = (
        Figure(f"x that after iteration {early}", memory[-1] / memory[early - 1], MEMORY_AIM, at_most=True),
        Figure("GiB at most", max(memory) / 2**30),
    )
    label = f"{name}, memory after iteration {sizes.growth_iterations}"
    return Row("growth", label, "GiB", [memory[-1] / 2**30], figures)


def growth(sizes: Sizes, threads: int) -> list[Row]:
    """Every size that a method has, doubled alone, then memory over time; on one thread, whatever `threads` is."""
    torch.set_num_threads(1)
    try:
        return [row for name in METHODS for row in method_growth(name, Work(), sizes)]
    finally:
        torch.set_num_threads(threads)


def method_growth(name: str, base: Work, sizes: Sizes) -> list[Row]:
    """All rows of one method, or one that says why there are none."""
    try:
        settings = method_settings(name, base)
        axes = [axis for axis in PROPORTIONAL if axis != "candidates" or hasattr(settings, axis)]
        rows = [row for axis in axes for row in growth_of(name, axis, base, sizes)]
        return [*rows, memory_of(name, base, sizes)]
    except (ImportError, ValueError) as error:
        return [Row("growth", name, "x/doubling", [], note=f"not available: {error}")]
