"""Implicit Q-learning critic over action chunks (Kostrikov et al. 2022), as DPPO's IDQL configures it.

Twin Q, their Polyak-averaged copies and a state value V; a chunk is one action, so that the discount is per chunk and
the reward the undiscounted sum over the chunk.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.adamw import adamw as adamw_step

from otpr.networks import TwinQ, ValueNet, polyak_update
from otpr.precision import float32_products
from otpr.replay import Batch

Metrics = dict[str, Tensor]


def expectile_loss(advantages: Tensor, expectile: float) -> Tensor:
    """Asymmetric squared loss of IQL, mean |expectile - 1(u <= 0)| u^2 over (B,) advantages u = min target Q - V."""
    return (torch.where(advantages > 0, expectile, 1 - expectile) * advantages**2).mean()


def td_target(batch: Batch, next_values: Tensor, discount: float) -> Tensor:
    """r + discount V(s') (1 - terminated), (B,)."""
    return batch.rewards + discount * (1 - batch.terminated) * next_values


def twin_q_loss(q1: Tensor, q2: Tensor, target: Tensor) -> tuple[Tensor, Metrics]:
    """Sum of both heads' mean squared errors to `target`, all (B,), and metrics."""
    loss = F.mse_loss(q1, target) + F.mse_loss(q2, target)
    return loss, {"critic/q_loss": loss.detach(), "critic/q": q1.detach().mean()}


class FusedAdamW(torch.optim.AdamW):
    """DPPO's optimiser: AdamW without weight decay, in one kernel."""

    def __init__(self, parameters: Iterable[Tensor], learning_rate: float) -> None:
        super().__init__(parameters, lr=learning_rate, weight_decay=0.0, fused=True)

    @torch.no_grad()
    def advance(self) -> None:
        """`step`, without PyTorch's preparations for every case: they take as long as the arithmetic of a critic."""
        (group,) = self.param_groups
        moved = [parameter for parameter in group["params"] if parameter.grad is not None]
        if not all(parameter in self.state for parameter in moved):  # which `step` makes
            self.step()
            return
        means, squares, steps = (
            [self.state[parameter][name] for parameter in moved] for name in ("exp_avg", "exp_avg_sq", "step")
        )
        adamw_step(
            moved,
            [parameter.grad for parameter in moved],
            means,
            squares,
            [],
            steps,
            fused=group["fused"],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def descend(optimizer: FusedAdamW, loss: Tensor) -> None:
    """One optimiser step on `loss`; no gradients but the optimiser's parameters' are kept."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    with float32_products(loss.device.type):  # see `precision.backward`
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        # the fused optimiser reads a gradient as if it lay in memory like its parameter
        parameter.grad = None if gradient is None else gradient.contiguous()
    optimizer.advance()


@contextmanager
def without_parameter_gradients(module: nn.Module) -> Iterator[None]:
    """What `module`, all of it trainable, evaluates inside has gradients by its inputs alone."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)


def frozen_copy(source: TwinQ, fresh: TwinQ) -> TwinQ:
    """`fresh` with the weights of `source`, not trained by gradients: a target network."""
    fresh.load_state_dict(source.state_dict())
    return fresh.requires_grad_(False)


def expectile_choice(q: Tensor, value: Tensor, weight: float, generator: torch.Generator) -> Tensor:
    """Draw one candidate per state with DPPO's two-level weights: `weight` where Q > V, 1 - `weight` elsewhere.

    Args:
        q: (N, S) values of S candidates.
        value: (N,) state values.
        weight: in (0, 1).
        generator: source of the draw.

    Returns:
        (N,) int64 indices of candidates.
    """
    weights = torch.where(q > value[:, None], weight, 1 - weight)
    return torch.multinomial(weights, 1, generator=generator)[:, 0]


@dataclass(frozen=True)
class CriticSettings:
    """Settings of the critic; the defaults are those of DPPO's IDQL."""

    hidden_dims: Sequence[int] = (256, 256, 256)
    q_residual: bool = False
    expectile: float = 0.8
    discount: float = 0.99
    polyak: float = 0.001
    learning_rate: float = 1e-3


class ImplicitQCritic:
    """Q1, Q2, their targets and V with optimisers; `update` takes one gradient step of each.

    `generator` (CPU) initialises the networks, which then move to `device`.
    """

    def __init__(
        self,
        settings: CriticSettings,
        observation_dim: int,
        chunk_dim: int,
        generator: torch.Generator,
        device: torch.device | str = "cpu",
    ) -> None:
        self.settings = settings
        sizes = (observation_dim, chunk_dim, settings.hidden_dims, settings.q_residual)
        self.q = TwinQ(*sizes, generator).to(device)
        self.target_q = frozen_copy(self.q, TwinQ(*sizes, generator).to(device))
        # moving averages and what they follow, listed once: `polyak_update` is called every gradient step
        self.averaged = list(self.target_q.parameters()), list(self.q.parameters())
        self.value_net = ValueNet(observation_dim, settings.hidden_dims, generator).to(device)
        self.q_optimizer = FusedAdamW(self.q.parameters(), settings.learning_rate)
        self.value_optimizer = FusedAdamW(self.value_net.parameters(), settings.learning_rate)

    def min_target_q(self, observations: Tensor, actions: Tensor) -> Tensor:
        """The smaller target Q of observations (B, O) and chunks (B, H, A), (B,)."""
        return self.target_q.minimum(observations, actions)

    def candidate_q(self, observations: Tensor, candidates: Tensor) -> Tensor:
        """`min_target_q` of S candidates (N, S, H, A) for each of (N, O) observations, (N, S)."""
        return self.target_q.per_candidate(observations, candidates)

    def value(self, observations: Tensor) -> Tensor:
        """V of observations (B, O), (B,)."""
        return self.value_net(observations)

    def value_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Expectile regression of V on the smaller target Q."""
        with torch.no_grad():
            target = self.min_target_q(batch.observations, batch.actions)
        advantages = target - self.value(batch.observations)
        loss = expectile_loss(advantages, self.settings.expectile)
        return loss, {
            "critic/value_loss": loss.detach(),
            "critic/advantage": advantages.detach().mean(),
            "critic/advantage_std": advantages.detach().std(correction=0),
        }

    def q_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Temporal-difference loss of both heads with V(s') as the value of what follows."""
        with torch.no_grad():
            target = td_target(batch, self.value(batch.next_observations), self.settings.discount)
        q1, q2 = self.q(batch.observations, batch.actions)
        return twin_q_loss(q1, q2, target)

    def update(self, batch: Batch) -> Metrics:
        """A step of V, then of Q (which sees the new V), then of the target, in DPPO's order."""
        value_loss, value_metrics = self.value_loss(batch)
        descend(self.value_optimizer, value_loss)
        q_loss, q_metrics = self.q_loss(batch)
        descend(self.q_optimizer, q_loss)
        polyak_update(*self.averaged, self.settings.polyak)
        return value_metrics | q_metrics

    def state_dict(self) -> dict[str, Any]:
        """Networks and optimisers."""
        return {name: getattr(self, name).state_dict() for name in STATEFUL}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        for name in STATEFUL:
            getattr(self, name).load_state_dict(state[name])


STATEFUL = ("q", "target_q", "value_net", "q_optimizer", "value_optimizer")
