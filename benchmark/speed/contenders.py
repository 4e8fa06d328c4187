"""Those that take turns in `benchmark.speed.iterations`: a method, ours or plain, in a process of its own."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from llvmlite.binding import get_host_cpu_features

from benchmark.envs import make_env
from benchmark.finetune import Collector
from benchmark.launch.resources import keep_freed_memory
from benchmark.methods import resolve_settings
from benchmark.seeding import BASE_SEED, Streams
from benchmark.speed.learning import PROTOCOL, TASK, make_method, synthetic_rollout, update_once, weak_normalizer
from benchmark.speed.measuring import OperationCounter, resident_memory
from benchmark.speed.plain import PlainCollector
from benchmark.speed.plain_methods import PLAIN, compile_networks
from otpr.precision import precision_context

ROUNDING = ("avx512bf16", "amx-bf16", "bf16")  # names of processors' instructions for bfloat16
COMPILER = os.environ.get("CXX", "g++")  # of torch.compile
EQUAL = ("replay_ratio", "batch_size", "candidates")  # settings that OTPR takes from IDQL for the comparison


@dataclass(frozen=True)
class Contender:
    """One of those that take turns."""

    method: str
    plain: bool = False
    precision: str = "float32"
    compiled: bool = False  # a plain one whose networks torch.compile has translated

    @property
    def lacking(self) -> str:
        """Why it cannot take part on this machine, or nothing."""
        if self.compiled and shutil.which(COMPILER) is None:
            return f"torch.compile needs a compiler, and there is no {COMPILER}"
        features = get_host_cpu_features()
        if self.precision == "bfloat16" and not any(features.get(name) for name in ROUNDING):
            return "the processor has no instructions for bfloat16, and would take many times as long"
        return ""

    @property
    def label(self) -> str:
        """As a row names it."""
        kind = "plain with torch.compile" if self.compiled else "plain" if self.plain else "ours"
        return f"{self.method}, {kind}, {self.precision}"


@dataclass(frozen=True)
class Parts:
    """Seconds, or floating-point operations, of the parts of one iteration.

    Attributes:
        collect: of collecting.
        learn: of all gradient steps.
        fit: of OTPR's transport, which is done once however many chunks were collected.
    """

    collect: float
    learn: float
    fit: float

    def published(self, collect_factor: float, learn_factor: float) -> Parts:
        """The same of an iteration with so many times the chunks and the gradient steps."""
        return Parts(collect_factor * self.collect, learn_factor * self.learn, self.fit)

    @property
    def total(self) -> float:
        """Of the whole iteration."""
        return self.collect + self.learn + self.fit


@dataclass(frozen=True)
class Iteration:
    """What one iteration took; `operations` are counted in the untimed one alone, `memory` is the peak so far."""

    seconds: Parts
    operations: Parts
    gradient_steps: int
    memory: int  # bytes, of the contender's process


def iteration_settings(name: str, chunks: int) -> dict[str, Any]:
    """Overrides of the published settings: a replay in proportion to `chunks`, and OTPR's work per chunk that of IDQL.

    Its first fit, which no turn times, takes as few steps as a later one may take.
    """
    own = resolve_settings(name, TASK, PROTOCOL, {})
    if not hasattr(own, "replay_capacity"):
        return {}
    values = {"replay_capacity": round(own.replay_capacity * chunks / TASK.loop(PROTOCOL).n_steps)}
    if name == "otpr":
        reference = resolve_settings("idql", TASK, PROTOCOL, {})
        values |= {key: getattr(reference, key) for key in EQUAL} | {"transport_first_steps": own.transport_warm_steps}
    return values


class Learner:
    """A method that collects and learns in this process, iteration by iteration.

    Raises:
        ImportError, ValueError: see `make_method`.
    """

    def __init__(self, contender: Contender, envs: int, chunks: int, threads: int) -> None:
        if not contender.plain:
            keep_freed_memory()  # as every run of ours does
        self.contender, self.counter = contender, OperationCounter()
        self.fit_seconds, self.fit_operations = 0.0, 0
        self.collector = self._collector(envs, chunks, threads)
        torch.set_num_threads(threads)
        self.settings = iteration_settings(contender.method, chunks)
        ours, _ = make_method(contender.method, envs, chunks, overrides=self.settings)
        self.method: Any = ours
        if contender.plain:
            self.method = PLAIN[contender.method](ours, TASK.network.activation)
        elif hasattr(ours, "fit_transport"):
            fit: Callable[[], dict[str, float]] = self.method.fit_transport
            self.method.fit_transport = lambda: self._timed_fit(fit)

    def _collector(self, envs: int, chunks: int, threads: int) -> PlainCollector | Collector:
        normalizer = weak_normalizer()
        streams = Streams(BASE_SEED, TASK.name, 0)
        if self.contender.plain:
            return PlainCollector(TASK.environment, envs, chunks, TASK.action_horizon, normalizer, streams)
        loop = dataclasses.replace(TASK.loop(PROTOCOL), n_steps=chunks)
        env = make_env(TASK.environment, envs, TASK.action_horizon, threads)
        return Collector(env, normalizer, streams, loop, "cpu")

    def _timed_fit(self, fit: Callable[[], dict[str, float]]) -> dict[str, float]:
        started, operations = time.perf_counter(), self.counter.total
        metrics = fit()
        self.fit_seconds = time.perf_counter() - started
        self.fit_operations = self.counter.total - operations
        return metrics

    def prepare(self, envs: int) -> Iteration:
        """An untimed iteration, counted; before it a tiny one of ours, so that what is compiled at first use is.

        Nothing compiles while operations are counted.
        """
        if not self.contender.plain:
            tiny, shape = make_method(self.contender.method, envs, 1, overrides=self.settings)
            if hasattr(tiny, "fit_transport"):
                setattr(tiny, "fit_transport", dict)  # noqa: B010 - a fit of its own would only take time
            with precision_context(self.contender.precision, "cpu"):
                update_once(tiny, synthetic_rollout(tiny, shape))
        if hasattr(self.method, "replay"):
            self._fill_replay()
        with self.counter:
            counted = self.iterate()
        if self.contender.compiled:  # now, since nothing compiled can be counted
            compile_networks(self.method)
            self.iterate()
        return counted

    def _fill_replay(self) -> None:
        """One rollout, as often as the replay holds it."""
        rollout, scale = self.collector.collect(self.method.act), self.method.base_settings.reward_scale
        for _ in range(-(-self.settings["replay_capacity"] // rollout.rewards.numel())):
            self.method.replay.add(rollout, scale)

    def iterate(self) -> Iteration:
        """Collect and learn once."""
        before = self.counter.total
        with precision_context(self.contender.precision, "cpu"):
            started = time.perf_counter()
            rollout = self.collector.collect(self.method.act)
            collected, counted = time.perf_counter(), self.counter.total
            gradient_steps = update_once(self.method, rollout)
            finished = time.perf_counter()
        learned = self.counter.total - counted
        return Iteration(
            Parts(collected - started, finished - collected - self.fit_seconds, self.fit_seconds),
            Parts(counted - before, learned - self.fit_operations, self.fit_operations),
            gradient_steps,
            resident_memory(peak=True),
        )

    def close(self) -> None:
        """Release the environments."""
        (self.collector if isinstance(self.collector, PlainCollector) else self.collector.env).close()


_learner: list[Learner] = []  # the one of this process


def _start(contender: Contender, envs: int, chunks: int, threads: int) -> Iteration:
    _learner.append(Learner(contender, envs, chunks, threads))
    return _learner[0].prepare(envs)


def _iterate() -> Iteration:
    return _learner[0].iterate()


def _finish() -> None:
    _learner.pop().close()


class Seat:
    """The process of one contender; it idles between its turns.

    Raises:
        ImportError, ValueError: see `make_method`.
        BrokenProcessPool: the process died.
    """

    def __init__(self, contender: Contender, envs: int, chunks: int, threads: int) -> None:
        self.contender = contender
        self.pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        try:
            self.counted: Iteration = self.pool.submit(_start, contender, envs, chunks, threads).result()
        except BaseException:
            self.pool.shutdown()
            raise
        self.turns: list[Iteration] = []

    def turn(self) -> None:
        """One timed iteration."""
        self.turns.append(self.pool.submit(_iterate).result())

    def close(self) -> None:
        """End the process."""
        try:
            self.pool.submit(_finish).result()
        finally:
            self.pool.shutdown()
