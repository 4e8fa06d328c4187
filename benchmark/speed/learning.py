"""Sampling, updates and the matrix product that bounds them, at the published sizes of Hopper."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmark.methods import ARMS, get_arm, resolve_settings, uses_demonstrations
from benchmark.policies import Normalizer
from benchmark.policies.demonstrations import load_demonstrations
from benchmark.speed.measuring import Figure, Row, Sizes, measure, ratio
from benchmark.speed.physics import ACTION_SCALE
from benchmark.tasks import get_task
from otpr.diffusion import DiffusionPolicy, SamplerSettings
from otpr.method import Method, Rollout, TaskShape

TASK = get_task("hopper-local")
PROTOCOL = "published"
FITS = ("transport_first_steps", "transport_warm_steps")  # steps once per iteration, beside the gradient steps


def fresh_policy(sampler: SamplerSettings | None = None) -> DiffusionPolicy:
    """A policy of the task's sizes with random weights."""
    return DiffusionPolicy(TASK.build_network(torch.Generator().manual_seed(0)), sampler)


def weak_normalizer() -> Normalizer:
    """Leaves observations as they are and keeps actions weak, so that a hopper stands for a while."""
    wide, weak = (np.full(n, x, np.float32) for n, x in ((TASK.observation_dim, 1), (TASK.action_dim, ACTION_SCALE)))
    return Normalizer(observation_min=-wide, observation_max=wide, action_min=-weak, action_max=weak)


@torch.no_grad()
def sample(policy: DiffusionPolicy, observations: torch.Tensor, generator: torch.Generator, calls: int) -> int:
    """Sample a chunk for each of (N, O) observations, `calls` times; returns the chunks."""
    for _ in range(calls):
        policy.sample(observations, True, generator)
    return calls * len(observations)


@torch.no_grad()
def pass_network(policy: DiffusionPolicy, observations: torch.Tensor, calls: int) -> int:
    """The denoising network's passes for as many calls of `sample`, without the rest of it; returns the chunks."""
    actions = torch.zeros(len(observations), policy.action_horizon, policy.action_dim)
    timesteps = torch.zeros(1, dtype=torch.int64)
    for _ in range(calls * policy.sampling_steps):
        policy.network(actions, timesteps, observations)
    return calls * len(observations)


def sampling(sizes: Sizes, threads: int) -> list[Row]:
    """Chunks for one observation per environment, beside the network's passes alone."""
    generator = torch.Generator().manual_seed(0)
    observations = torch.rand(sizes.envs, TASK.observation_dim, generator=generator)
    samplers = {"DDPM, 20 steps": SamplerSettings(), "DDIM, 5 steps": SamplerSettings(kind="ddim")}
    functions: dict[str, Callable[[], int]] = {}
    operations: dict[str, float] = {}
    for name, sampler in samplers.items():
        policy = fresh_policy(sampler)
        with FlopCounterMode(display=False) as counter:
            chunks = sample(policy, observations, generator, 1)
        operations[name] = counter.get_total_flops() / chunks
        functions[name] = partial(sample, policy, observations, generator, sizes.sampling_calls)
        functions[f"{name}, network alone"] = partial(pass_network, policy, observations, sizes.sampling_calls)
    rates = measure(functions, sizes.repeats)
    rows = []
    for name in samplers:
        alone = f"{name}, network alone"
        speed = Figure("GFLOP/s", median(rates[name]) * operations[name] / 1e9)
        figures = (speed, Figure("x the network alone", ratio(rates[name], rates[alone])))
        rows.append(Row("sampling", name, "chunks/s", rates[name], figures))
        rows.append(Row("sampling", alone, "chunks/s", rates[alone]))
    return rows


def make_method(
    name: str, envs: int, chunks: int, share: float = 1.0, overrides: dict[str, Any] | None = None
) -> tuple[Method, TaskShape]:
    """A method with published settings, past its warm-up, and the sizes that it is built for.

    Args:
        chunks: per environment and iteration.
        share: of an iteration's steps that are not counted as gradient steps.
        overrides: of the published settings.

    Raises:
        ImportError: the method is not installed.
        ValueError: it has no published settings for this task.
    """
    settings = resolve_settings(name, TASK, PROTOCOL, overrides or {})
    fixed = getattr(get_arm(name).load(), "LACKING", ())  # settings that the released code's arm has no choice of
    changes = {key: max(1, round(share * getattr(settings, key, 0))) for key in FITS if key not in fixed}
    changes["critic_warmup_iterations"] = 0
    settings = dataclasses.replace(settings, **{key: n for key, n in changes.items() if hasattr(settings, key)})
    shape = TASK.shape(dataclasses.replace(TASK.loop(PROTOCOL), n_envs=envs, n_steps=chunks))
    pairs = load_demonstrations(TASK).pairs if uses_demonstrations(settings) else None
    return get_arm(name).build(settings, fresh_policy(), shape, torch.Generator().manual_seed(0), pairs), shape


def synthetic_rollout(method: Method, shape: TaskShape) -> Rollout:
    """Random experience of the right shapes; the method's own chunks for one chunk step are repeated over time."""
    generator = torch.Generator().manual_seed(0)
    count = (shape.n_steps, shape.n_envs)
    observations = torch.rand(shape.n_envs, shape.observation_dim, generator=generator)
    chunk = method.act(observations, True, generator)

    def over_time(values: torch.Tensor) -> torch.Tensor:
        return values.expand(shape.n_steps, *values.shape).contiguous()

    return Rollout(
        observations=over_time(observations),
        actions=over_time(chunk.actions),
        rewards=torch.rand(count, generator=generator),
        terminated=torch.rand(count, generator=generator) < 0.02,
        truncated=torch.zeros(count, dtype=torch.bool),
        next_observations=torch.rand(*count, shape.observation_dim, generator=generator),
        extras={name: over_time(values) for name, values in chunk.extras.items()},
    )


def update_once(method: Method, rollout: Rollout) -> int:
    """One update; returns its gradient steps."""
    before = method.gradient_steps
    method.update(rollout)
    return method.gradient_steps - before


def learning_methods() -> tuple[str, ...]:
    """The first arm of every class that learns."""
    arms = {(arm.module, arm.class_name): name for name, arm in reversed(ARMS.items()) if arm.learns}
    return tuple(reversed(arms.values()))


def prepare_update(name: str, sizes: Sizes) -> Callable[[], int]:
    """A method's `update_once` on random experience; raises what `make_method` does.

    An off-policy method takes its gradient steps in proportion to the chunks collected, hence gets few of them.
    """
    settings = resolve_settings(name, TASK, PROTOCOL, {})
    chunks = sizes.replay_chunks if hasattr(settings, "replay_ratio") else sizes.update_chunks
    method, shape = make_method(name, sizes.envs, chunks, share=chunks / TASK.loop(PROTOCOL).n_steps)
    return partial(update_once, method, synthetic_rollout(method, shape))


def update(sizes: Sizes, threads: int) -> list[Row]:
    """Gradient steps of every learning method with published batch sizes, all that an update does included."""
    functions: dict[str, Callable[[], int]] = {}
    missing = []
    for name in learning_methods():
        try:
            functions[name] = prepare_update(name, sizes)
        except (ImportError, ValueError) as error:
            missing.append(Row("update", name, "gradient steps/s", [], note=f"not available: {error}"))
    rows = []
    for name, rates in measure(functions, sizes.repeats).items():
        rows.append(Row("update", name, "gradient steps/s", rates, (Figure("ms/gradient step", 1000 / median(rates)),)))
    return rows + missing


def multiply(size: int, dtype: torch.dtype) -> Callable[[], int]:
    """A function that multiplies two square matrices and returns how many floating-point operations that is."""
    factor, product = torch.rand(size, size).to(dtype), torch.empty(size, size, dtype=dtype)

    def call() -> int:
        torch.mm(factor, factor, out=product)
        return 2 * size**3

    return call


def matmul(sizes: Sizes, threads: int) -> list[Row]:
    """The machine's own float32 matrix product."""
    function = multiply(sizes.matmul_size, torch.float32)
    rates = [rate / 1e9 for rate in measure({"product": function}, sizes.repeats)["product"]]
    name = f"float32, {sizes.matmul_size} x {sizes.matmul_size}"
    return [Row("matmul", name, "GFLOP/s", rates, (Figure("GFLOP/s at best", max(rates)),))]
