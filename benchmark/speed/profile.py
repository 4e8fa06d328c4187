"""Where the time of an iteration goes, by method and task, with published settings and the pre-trained policies.

Collecting is timed by its parts: stepping, sampling (all of `act`), the rest. Of the update, replay (storing and
drawing), optimiser and transport are timed alike; torch's profiler then tells how the remainder divides into matrix
products, activations and the rest, and that division is applied to seconds measured without the profiler. Sampling
inside an update (DQL's through the chain) counts as what it is made of, compiled activations without
gradient as rest: the profiler does not see them.

As in `benchmark.speed.iterations` fewer chunks are collected than in a published iteration, and the shares are those of
the published one: the transport counts once, all else in proportion. No episode is ended for a new iteration, so that
resets count as far as episodes end by themselves.
"""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any

import torch
import torch.profiler

from benchmark.finetune import Collector
from benchmark.methods import get_arm, resolve_settings, uses_demonstrations
from benchmark.policies import load_pretrained
from benchmark.policies.demonstrations import load_demonstrations
from benchmark.seeding import BASE_SEED, Streams
from benchmark.speed.learning import PROTOCOL
from benchmark.speed.measuring import Figure, Row, Sizes
from benchmark.tasks import TASKS, LoopSettings, Task, get_task

PROFILED_TASKS = ("hopper-local", "kitchen-local", "can-local")
PROFILED_METHODS = ("otpr", "dppo", "idql", "dql")
UPDATE_PARTS = ("replay", "optimiser", "transport")  # timed inside an update
PRODUCTS = ("aten::addmm", "aten::mm", "aten::bmm", "aten::_addmm_activation", "aten::baddbmm")
ACTIVATIONS = ("mish", "silu", "relu", "threshold_backward", "clamp_min", "tanh", "softplus", "sigmoid", "elu")
COMPILED = ("_Hidden",)  # in the names of what holds the compiled passes: activations, biases included


class Clock:
    """Seconds spent in calls, by part; a call inside another timed one counts for the outer one alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._depth = 0

    def time(self, owner: Any, member: str, part: str) -> None:
        """From now on, time calls of a member of `owner`, where there is one."""
        function = getattr(owner, member, None)
        if function is None:
            return

        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._depth:
                return function(*args, **kwargs)
            self._depth += 1
            started = time.perf_counter()
            try:
                with torch.profiler.record_function(f"part:{part}"):
                    return function(*args, **kwargs)
            finally:
                self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - started
                self._depth -= 1

        setattr(owner, member, timed)

    def take(self, part: str) -> float:
        """Seconds of a part since they were last taken."""
        return self.seconds.pop(part, 0.0)


def published_loop(task: Task) -> LoopSettings:
    """The loop that the papers' task of the same family has."""
    others = (other.loops.get(PROTOCOL) for other in TASKS.values() if other.family == task.family)
    return task.loops.get(PROTOCOL) or next(loop for loop in others if loop is not None)


def short_chunks(settings: Any, loop: LoopSettings, replay_chunks: int) -> int:
    """Chunks per environment such that the minibatches of an on-policy method are whole, `replay_chunks` for others."""
    if hasattr(settings, "replay_ratio"):
        return min(replay_chunks, loop.n_steps)
    pairs = loop.n_envs * settings.ft_denoising_steps
    return min(settings.batch_size // math.gcd(settings.batch_size, pairs), loop.n_steps)


class Profiled:
    """One method on one task, its parts timed."""

    def __init__(self, task: Task, name: str, sizes: Sizes, threads: int) -> None:
        pretrained, loop = load_pretrained(task), published_loop(task)
        settings = resolve_settings(name, task, PROTOCOL, {"critic_warmup_iterations": 0})
        self.loop = dataclasses.replace(loop, n_envs=min(loop.n_envs, sizes.profile_envs), reset_at_iteration=False)
        chunks = short_chunks(settings, self.loop, sizes.replay_iteration_chunks)
        self.factor, self.learn_factor = self.loop.n_steps / chunks, self.loop.n_steps / chunks
        shape = task.shape(dataclasses.replace(self.loop, n_steps=chunks))
        pairs = load_demonstrations(task).pairs if uses_demonstrations(settings) else None
        generator = torch.Generator().manual_seed(0)
        self.method: Any = get_arm(name).build(settings, pretrained.policy, shape, generator, pairs)
        if hasattr(settings, "replay_ratio"):
            whole = self.loop.n_steps * self.loop.n_envs * settings.replay_ratio / settings.batch_size
            self.learn_factor = whole / self.method.steps_per_iteration
        env = task.make_env(self.loop.n_envs, threads, pretrained.arguments)
        short = dataclasses.replace(self.loop, n_steps=chunks)
        self.collector = Collector(env, pretrained.normalizer, Streams(BASE_SEED, task.name, 0), short, "cpu")
        self.clock = Clock()
        self._watch()

    def _watch(self) -> None:
        for member in ("step", "reset"):
            self.clock.time(self.collector.env, member, "stepping")
        self.clock.time(self.method, "act", "sampling")
        self.clock.time(self.method, "fit_transport", "transport")
        replay = getattr(self.method, "replay", None)
        for member in ("add", "sample"):
            self.clock.time(replay, member, "replay")
        holders = (self.method, getattr(self.method, "critic", None))
        for optimizer in (value for holder in holders if holder is not None for value in vars(holder).values()):
            if isinstance(optimizer, torch.optim.Optimizer):
                for member in ("step", "advance", "zero_grad"):
                    self.clock.time(optimizer, member, "optimiser")

    def seconds(self) -> dict[str, float]:
        """Seconds of a published iteration by part, those of the update's remainder under "update"."""
        self.clock.seconds.clear()
        started = time.perf_counter()
        rollout = self.collector.collect(self.method.act)
        collected = time.perf_counter()
        collect = {name: self.clock.take(name) for name in ("stepping", "sampling")}
        self.method.update(rollout)
        update = {name: self.clock.take(name) for name in UPDATE_PARTS}
        rest, learn = collected - started - sum(collect.values()), time.perf_counter() - collected
        update["update"] = learn - sum(update.values())
        found = {name: self.factor * value for name, value in collect.items()} | {"rest": self.factor * rest}
        return found | {
            name: value * (1.0 if name == "transport" else self.learn_factor) for name, value in update.items()
        }

    def division(self) -> dict[str, float]:
        """Shares of matrix products, activations and the rest in the remainder of an update; they sum to 1."""
        rollout = self.collector.collect(self.method.act)
        self.clock.seconds.clear()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            started = time.perf_counter()
            self.method.update(rollout)
            total = time.perf_counter() - started
        total -= sum(self.clock.take(name) for name in UPDATE_PARTS)
        found = {"matrix products": 0.0, "activations": 0.0}
        for event in profiler.events() or ():
            kind = kind_of(event)
            if kind is not None:
                found[kind] += event.self_cpu_time_total / 1e6
        found = {name: value / max(total, sum(found.values())) for name, value in found.items()}
        return found | {"rest": 1.0 - sum(found.values())}

    def close(self) -> None:
        """Release the environments."""
        self.collector.env.close()


def kind_of(event: Any) -> str | None:
    """What a profiler's event is; None for one inside a part that is timed by itself, and for all else."""
    name, ancestor = event.name, event
    is_product = name in PRODUCTS
    is_activation = name.startswith("aten::") and any(word in name for word in ACTIVATIONS)
    if not (is_product or is_activation or any(word in name for word in COMPILED)):
        return None
    while ancestor is not None:
        if ancestor.name.startswith("part:"):
            return None
        ancestor = ancestor.cpu_parent
    return "matrix products" if is_product else "activations"


def profile_of(task: Task, name: str, sizes: Sizes, threads: int) -> Row:
    """Shares of one method's iteration on one task; the sample is the seconds of a whole one."""
    profiled = Profiled(task, name, sizes, threads)
    try:
        profiled.seconds()  # fills the replay, compiles, fits the first potentials
        seconds = profiled.seconds()
        division = profiled.division()
    finally:
        profiled.close()
    total = sum(seconds.values())
    remainder = seconds.pop("update")
    for part, share in division.items():
        seconds[part] = seconds.get(part, 0.0) + share * remainder
    seconds["rest"] = seconds.pop("rest")
    figures = tuple(Figure(f"% {part}", 100 * value / total) for part, value in seconds.items() if value)
    label = f"{task.name}, {name}, {profiled.loop.n_envs} x {profiled.loop.n_steps} chunks"
    return Row("profile", label, "s an iteration", [total], figures)


def profile(sizes: Sizes, threads: int) -> list[Row]:
    """Every profiled method on every profiled task whose simulator is installed."""
    rows = []
    for task in map(get_task, PROFILED_TASKS):
        for name in PROFILED_METHODS:
            try:
                rows.append(profile_of(task, name, sizes, threads))
            except (ImportError, ValueError) as error:
                label = f"{task.name}, {name}"
                rows.append(Row("profile", label, "s an iteration", [], note=f"not available: {error}"))
    return rows
