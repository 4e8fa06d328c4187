"""The plain methods and collector that ours are timed against do the same: rollouts, updates, random draws."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from benchmark.envs import make_env
from benchmark.finetune import Collector
from benchmark.policies import Normalizer
from benchmark.seeding import BASE_SEED, Streams
from benchmark.speed.contenders import COMPILER
from benchmark.speed.learning import TASK, make_method
from benchmark.speed.plain import PlainCollector
from benchmark.speed.plain_methods import PLAIN, compile_networks
from benchmark.speed.plain_networks import PlainPolicy, plain_layers
from otpr.diffusion import SamplerSettings
from otpr.method import ActionChunk, Rollout

ENVS, CHUNKS = 3, 12
STREAMS = Streams(BASE_SEED, TASK.name, 0)
OVERRIDES: dict[str, dict[str, Any]] = {
    "dppo": {"batch_size": 100, "update_epochs": 2},
    "idql": {"batch_size": 50, "replay_ratio": 4.0, "replay_capacity": 1000, "candidates": 3},
    "dql": {"batch_size": 50, "replay_ratio": 4.0, "replay_capacity": 1000},
}


def normalizer(strength: float) -> Normalizer:
    wide, weak = (np.full(n, x, np.float32) for n, x in ((TASK.observation_dim, 1), (TASK.action_dim, strength)))
    return Normalizer(observation_min=-wide, observation_max=wide, action_min=-weak, action_max=weak)


@pytest.fixture
def plain_collector() -> Iterator[PlainCollector]:
    collector = PlainCollector(TASK.environment, ENVS, CHUNKS, TASK.action_horizon, normalizer(1.0), STREAMS)
    yield collector
    collector.close()


def our_collector() -> Collector:
    env = make_env(TASK.environment, ENVS, TASK.action_horizon)
    loop = dataclasses.replace(TASK.loop("published"), n_steps=CHUNKS)
    return Collector(env, normalizer(1.0), STREAMS, loop, "cpu")


def assert_same_rollout(plain: Rollout, ours: Rollout, tolerance: float) -> None:
    for field in dataclasses.fields(Rollout):
        if field.name != "extras":
            torch.testing.assert_close(
                getattr(plain, field.name), getattr(ours, field.name), atol=tolerance, rtol=tolerance, msg=field.name
            )
    assert plain.extras.keys() <= ours.extras.keys()  # ours keeps log-probabilities that plain computes anew
    for name, values in plain.extras.items():
        torch.testing.assert_close(values, ours.extras[name], atol=tolerance, rtol=tolerance)


def test_both_collect_the_same_to_the_bit(plain_collector: PlainCollector) -> None:
    def act(observations: torch.Tensor, explore: bool, generator: torch.Generator) -> ActionChunk:
        chunk = torch.rand(len(observations), TASK.action_horizon, TASK.action_dim, generator=generator) * 2 - 1
        return ActionChunk(chunk, {"first": observations[:, :1]})

    ours, ends = our_collector(), 0
    for _ in range(3):
        plain_rollout, rollout = plain_collector.collect(act), ours.collect(act)
        assert_same_rollout(plain_rollout, rollout, tolerance=0.0)
        ends += int(rollout.terminated.sum())
    assert ends > ENVS  # every environment began a later episode, with the seed that it has in ours


def trained(method: Any) -> dict[str, list[torch.Tensor]]:
    """Parameters of everything that learns, by what it is called here."""
    critic = getattr(method, "critic", method)
    parts = {"actor": method.actor}
    for ours, plain in (("q", "q"), ("target_q", "target_q"), ("target_critic", "target_q"), ("value_net", "value")):
        for holder, name in ((critic, ours), (method, ours), (method, plain)):
            if isinstance(getattr(holder, name, None), torch.nn.Module):
                parts[plain] = getattr(holder, name)
    if isinstance(critic, torch.nn.Module):
        parts["value" if hasattr(method, "reward_scaler") else "q"] = critic
    return {name: [p.detach().clone() for p in part.parameters()] for name, part in parts.items()}


@pytest.mark.parametrize(
    ("name", "compiled"), [*((name, False) for name in PLAIN), pytest.param("idql", True, marks=pytest.mark.slow)]
)
def test_both_learn_the_same(name: str, compiled: bool, plain_collector: PlainCollector) -> None:
    if compiled and shutil.which(COMPILER) is None:
        pytest.skip(f"no {COMPILER}")
    ours, _ = make_method(name, ENVS, CHUNKS, overrides=OVERRIDES[name])
    twin: Any = make_method(name, ENVS, CHUNKS, overrides=OVERRIDES[name])[0]
    plain, collector = PLAIN[name](twin, TASK.network.activation), our_collector()
    if compiled:
        compile_networks(plain)
    start = trained(plain)
    for _ in range(3):
        plain_rollout, rollout = plain_collector.collect(plain.act), collector.collect(ours.act)
        assert_same_rollout(plain_rollout, rollout, tolerance=1e-4)
        ours.update(rollout)
        plain.update(plain_rollout)
    assert plain.gradient_steps == ours.gradient_steps > 3
    assert torch.equal(plain.generator.get_state(), ours.generator.get_state())
    ends, references = trained(plain), trained(ours)
    assert ends.keys() == references.keys() == start.keys()
    assert len(ends) == {"dppo": 2, "idql": 4, "dql": 3}[name]
    for part, values in ends.items():
        old, new, reference = (torch.cat([p.flatten() for p in x]) for x in (start[part], values, references[part]))
        moved = (reference - old).norm()
        assert moved > 0
        assert (new - reference).norm() < 2e-3 * moved, part


def test_a_plain_network_is_the_same_function() -> None:
    ours: Any = make_method("idql", 1, 1)[0]
    generator = torch.Generator().manual_seed(1)
    features = torch.rand(5, TASK.observation_dim, generator=generator)
    plain = plain_layers(ours.critic.value_net.Q1, "mish")
    torch.testing.assert_close(plain(features)[:, 0], ours.critic.value(features))
    assert [p.shape for p in plain.parameters()] == [p.shape for p in ours.critic.value_net.parameters()]


def test_another_sampler_is_refused() -> None:
    ours: Any = make_method("idql", 1, 1)[0]
    ours.actor.sampler = SamplerSettings(kind="ddim")
    with pytest.raises(ValueError, match="sample by DDPM"):
        PlainPolicy(ours.actor, "relu")
