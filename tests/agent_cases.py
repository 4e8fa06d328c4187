"""OTPR on a parity case, small: for the tests of its defects, its arms and its settings."""

from __future__ import annotations

from typing import Any

import torch
from parity_cases import CASES, Case
from test_offpolicy import collect

from otpr import agent, released
from otpr.method import Demonstrations, TaskShape
from otpr.replay import Batch

SMALL = {
    "critic_hidden_dims": (32, 32, 32),
    "batch_size": 16,
    "replay_ratio": 2.0,
    "replay_capacity": 60,
    "critic_warmup_iterations": 1,
    "candidates": 3,
    "transport_block_size": 16,
    "transport_first_steps": 40,
    "transport_warm_steps": 10,
}
MASKED = {"keypoints": 4, "guide_weight": 0.5, "expert_fraction": 0.25}
CASE = CASES[0]


def pairs(case: Case = CASE, count: int = 50) -> Demonstrations:
    generator = torch.Generator().manual_seed(5)
    observations = torch.rand(count, case.observation_dim, generator=generator) * 2 - 1
    actions = torch.rand(count, 4, case.action_dim, generator=generator) * 2 - 1
    return Demonstrations(observations, actions, torch.linspace(0.005, 0.25, count))


def make(name: type[agent.OTPR] = agent.OTPR, demonstrations: Demonstrations | None = None, **values) -> Any:
    shape = TaskShape(CASE.observation_dim, CASE.action_dim, 4, n_envs=4, n_steps=6)
    module, lacking = (released, released.LACKING) if name is released.ReleasedOTPR else (agent, ())
    settings = module.Settings(**{name: value for name, value in (SMALL | values).items() if name not in lacking})
    return name(settings, CASE.policy(), shape, torch.Generator().manual_seed(0), demonstrations or pairs())


def trained(iterations: int = 3, **values) -> Any:
    method, generator = make(**values), torch.Generator().manual_seed(1)
    for _ in range(iterations):
        method.update(collect(method, CASE, generator))
    return method


def batch_of(method: agent.OTPR) -> Batch:
    return method.replay.sample(16, torch.Generator().manual_seed(3))


def batch_of_any(method: agent.OTPR) -> Batch:
    zeros = torch.zeros(16, CASE.observation_dim)
    return Batch(zeros, torch.zeros(16, 4, CASE.action_dim), torch.zeros(16), torch.zeros(16), zeros, torch.arange(16))
