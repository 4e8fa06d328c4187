"""Whole iterations, collecting and learning with published settings: ours beside plain ones, and OTPR beside IDQL.

Every contender has a process of its own, with its own threads, and waits there while another is timed; a turn is one
iteration of each. Fewer chunks than the published ones are collected, and the gradient steps are in proportion; what
an iteration does once however long it is, OTPR's transport with its cost block, is done whole. A rate is that of the
published iteration, put together from the parts' measured seconds: those of collecting and of gradient steps times how
many more the published iteration has of each, and those of the transport once.

An iteration before the first turn makes OTPR's first fit and counts floating-point operations (of matrix products, as
torch counts them); it is not timed. Before it the replay is filled: it holds as many times an iteration's chunks as
the published one, so that what OTPR computes once per stored pair is in proportion too. Warm-ups of the methods are
off. Policies are freshly initialised, observations are not normalised, and actions are kept weak so that a hopper
stands for a while.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmark.envs import make_env
from benchmark.finetune import Collector
from benchmark.methods import resolve_settings
from benchmark.policies import Normalizer
from benchmark.seeding import BASE_SEED, Streams
from benchmark.speed.learning import PROTOCOL, TASK, make_method, multiply, synthetic_rollout, update_once
from benchmark.speed.measuring import Figure, OperationCounter, Row, Sizes, measure, ratio
from benchmark.speed.physics import ACTION_SCALE
from benchmark.speed.plain import PlainCollector
from benchmark.speed.plain_methods import PLAIN
from otpr.precision import PRECISIONS, precision_context

ITERATION_RATE, ITERATION_GIB = 1500, 2.0  # aims of a whole DPPO iteration on 2 cores: env steps/s, peak memory
EQUAL = ("replay_ratio", "batch_size", "candidates")  # settings that OTPR takes from IDQL for the comparison
PRODUCTS = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # element types of the matrix products beside them


@dataclass(frozen=True)
class Contender:
    """One of those that take turns."""

    method: str
    plain: bool = False
    precision: str = "float32"

    @property
    def label(self) -> str:
        """As a row names it."""
        return f"{self.method}, {'plain' if self.plain else 'ours'}, {self.precision}"


# Those of one group take turns with each other. OTPR stands beside IDQL, from which it was made.
GROUPS: tuple[tuple[Contender, ...], ...] = (
    (Contender("dppo", plain=True), *(Contender("dppo", precision=p) for p in PRECISIONS)),
    (
        Contender("idql", plain=True),
        *(Contender(method, precision=p) for p in PRECISIONS for method in ("idql", "otpr")),
    ),
    (Contender("dql", plain=True), *(Contender("dql", precision=p) for p in PRECISIONS)),
)
AIMS = {  # least ratio to the reference, by method and precision
    ("dppo", "float32"): 2.0,
    ("dppo", "bfloat16"): 3.0,
    ("idql", "float32"): 1.5,
    ("idql", "bfloat16"): 3.0,
    ("dql", "float32"): 1.5,
    ("dql", "bfloat16"): 3.0,
    ("otpr", "float32"): 0.85,
    ("otpr", "bfloat16"): 0.85,
}


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


def peak_memory() -> int:
    """Peak resident memory of this process so far, in bytes.

    Linux's own record comes first: its getrusage also counts the process that this one was forked from.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


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
        self.contender, self.counter = contender, OperationCounter()
        self.fit_seconds, self.fit_operations = 0.0, 0
        self.collector = self._collector(envs, chunks, threads)  # before torch starts threads: it may fork
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
        wide, weak = (
            np.full(n, x, np.float32) for n, x in ((TASK.observation_dim, 1), (TASK.action_dim, ACTION_SCALE))
        )
        normalizer = Normalizer(observation_min=-wide, observation_max=wide, action_min=-weak, action_max=weak)
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
            return self.iterate()

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
            peak_memory(),
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


@dataclass(frozen=True)
class Outcome:
    """A contender's turns, in terms of the published iteration."""

    contender: Contender
    seconds: list[Parts]
    operations: float
    env_steps: int
    turns: list[Iteration]

    @property
    def rates(self) -> list[float]:
        """Environment steps per second, by turn."""
        return [self.env_steps / parts.total for parts in self.seconds]

    @property
    def speeds(self) -> list[float]:
        """GFLOP/s of matrix products, by turn."""
        return [self.operations / parts.total / 1e9 for parts in self.seconds]


def outcome(seat: Seat, envs: int, chunks: int) -> Outcome:
    """What a seat's turns come to at the published number of chunks."""
    method = seat.contender.method
    settings = resolve_settings(method, TASK, PROTOCOL, iteration_settings(method, chunks))
    published = TASK.loop(PROTOCOL).n_steps
    collect_factor = learn_factor = published / chunks
    if hasattr(settings, "replay_ratio"):  # whose gradient steps are a whole number, also in a short iteration
        learn_factor = published * envs * settings.replay_ratio / settings.batch_size / seat.counted.gradient_steps
    seconds = [turn.seconds.published(collect_factor, learn_factor) for turn in seat.turns]
    operations = seat.counted.operations.published(collect_factor, learn_factor).total
    return Outcome(seat.contender, seconds, operations, envs * published * TASK.action_horizon, seat.turns)


def reference_of(contender: Contender) -> Contender | None:
    """What it is compared with: the plain method; our IDQL for OTPR."""
    if contender.plain:
        return None
    if contender.method == "otpr":
        return dataclasses.replace(contender, method="idql")
    return Contender(contender.method, plain=True)


def figures_of(one: Outcome, others: dict[Contender, Outcome], products: dict[str, list[float]]) -> tuple[Figure, ...]:
    """The ratio to the reference first, then how near the machine's matrix product it is, and what it took."""
    contender, figures = one.contender, []
    reference = reference_of(contender)
    if reference in others:
        name = "x plain" if others[reference].contender.plain else f"of {reference.method}'s rate"
        aim = AIMS.get((contender.method, contender.precision))
        figures.append(Figure(name, ratio(one.rates, others[reference].rates), aim))
    if contender == Contender("dppo"):
        figures.append(Figure(f"of {ITERATION_RATE:,} env steps/s", median(one.rates) / ITERATION_RATE, 1.0))
    gib, limit = max(turn.memory for turn in one.turns) / 2**30, ITERATION_GIB if contender.method == "dppo" else None
    figures += [
        Figure("GFLOP/s", median(one.speeds)),
        Figure("of the matrix product's GFLOP/s", ratio(one.speeds, products[contender.precision])),
        Figure("GiB peak memory without workers", gib)
        if contender.plain
        else Figure("GiB peak memory", gib, limit, at_most=True),
    ]
    parts = {"collecting": "collect", "in gradient steps": "learn", "fitting the transport": "fit"}
    for words, name in parts.items():
        seconds = median(getattr(turn, name) for turn in one.seconds)
        if seconds:
            figures.append(Figure(f"s {words}", seconds))
    return tuple(figures)


def measure_group(contenders: Sequence[Contender], sizes: Sizes, threads: int) -> list[Row]:
    """Turns of one group, with the machine's matrix product in every turn.

    Raises:
        BrokenProcessPool: a process died.
    """
    on_policy = contenders[0].method == "dppo"
    chunks = sizes.iteration_chunks if on_policy else sizes.replay_iteration_chunks
    seats: list[Seat] = []
    missing: list[Row] = []
    products: dict[str, list[float]] = {contender.precision: [] for contender in contenders}
    with ExitStack() as stack:
        for contender in contenders:
            try:
                seats.append(Seat(contender, sizes.envs, chunks, threads))
                stack.callback(seats[-1].close)
            except (ImportError, ValueError) as error:
                missing.append(Row("iteration", contender.label, "env steps/s", [], note=f"not available: {error}"))
        for _ in range(sizes.iteration_turns):
            for seat in seats:
                seat.turn()
            for precision, rates in products.items():
                rates += measure_product(sizes.matmul_size, precision)
    outcomes = {seat.contender: outcome(seat, sizes.envs, chunks) for seat in seats}
    rows = []
    for contender, one in outcomes.items():
        label = f"{contender.label}, {sizes.envs} x {TASK.loop(PROTOCOL).n_steps} chunks (from {chunks})"
        rows.append(Row("iteration", label, "env steps/s", one.rates, figures_of(one, outcomes, products)))
    for precision, rates in products.items():
        label = f"matrix product between {contenders[0].method}'s turns, {precision}, {sizes.matmul_size} x same"
        rows.append(Row("iteration", label, "GFLOP/s", rates))
    return rows + missing


def measure_product(size: int, precision: str) -> list[float]:
    """GFLOP/s of one matrix product in that precision."""
    product = multiply(size, PRODUCTS[precision])
    product()
    return [rate / 1e9 for rate in measure({"product": product}, 1)["product"]]


def iteration(sizes: Sizes, threads: int) -> list[Row]:
    """Whole iterations of every group."""
    return [row for contenders in GROUPS for row in measure_group(contenders, sizes, threads)]
