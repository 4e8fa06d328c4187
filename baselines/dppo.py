"""DPPO: proximal policy optimisation of a diffusion policy (Ren et al. 2024, arXiv 2409.00588).

The denoising chain is a decision process of its own inside every environment step: the last K' steps are fine-tuned,
each a Gaussian action; the advantage of the executed chunk is credited to all of them, discounted towards the noisy
end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from otpr.checks import check_choice, check_range, check_widths
from otpr.critic import FusedAdamW
from otpr.diffusion import DiffusionPolicy
from otpr.method import ActionChunk, Rollout, Rule, TaskShape
from otpr.networks import ValueNet, network_generator
from otpr.precision import backward

MICRO_BATCH = 4096  # samples per backward pass: gradients are accumulated, so that activations stay in the cache


class RewardScaler:
    """Divides rewards by the running standard deviation of the discounted return and clips the result.

    The statistics start from variance 1 with weight 1e-4, as in DPPO.
    """

    def __init__(self, n_envs: int, discount: float = 0.99, clip: float = 10.0) -> None:
        self.discount, self.clip = discount, clip
        self.returns = torch.zeros(n_envs, dtype=torch.float64)
        self.mean, self.variance, self.count = 0.0, 1.0, 1e-4

    def __call__(self, rewards: Tensor, first: Tensor) -> Tensor:
        """Update the statistics and scale.

        Args:
            rewards: (T, N), any float type.
            first: (T, N) bool, whether an episode begins at that chunk.

        Returns:
            (T, N) float32 in [-clip, clip].
        """
        rewards64, running = rewards.double().cpu(), []
        carry = torch.where(first.cpu(), 0.0, self.discount).double()
        for reward, factor in zip(rewards64, carry, strict=True):
            self.returns = reward + factor * self.returns
            running.append(self.returns)
        self._merge(torch.stack(running))
        scaled = rewards64 / (self.variance + 1e-8) ** 0.5
        return scaled.clamp(-self.clip, self.clip).to(rewards.device, torch.float32)

    def _merge(self, values: Tensor) -> None:
        """Merge the moments of `values` into the running ones (Chan et al. 1983)."""
        number, mean, variance = values.numel(), values.mean().item(), values.var(correction=0).item()
        total, delta = self.count + number, mean - self.mean
        squares = self.variance * self.count + variance * number + delta**2 * self.count * number / total
        self.mean += delta * number / total
        self.variance, self.count = squares / (total - 1), total  # the unbiased divisor, as in DPPO

    def state_dict(self) -> dict[str, Any]:
        """Running statistics."""
        return {"returns": self.returns, "moments": (self.mean, self.variance, self.count)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        self.returns = state["returns"]
        self.mean, self.variance, self.count = state["moments"]


def generalised_advantages(
    rewards: Tensor, values: Tensor, next_values: Tensor, ended: Tensor, discount: float, gae_lambda: float
) -> Tensor:
    """Generalised advantage estimates (Schulman et al. 2016) over chunks.

    Args:
        rewards, values: (T, N).
        next_values: (T, N), value of what follows, already zero where the episode terminated.
        ended: (T, N) bool, no credit flows back across these.
        discount, gae_lambda: per chunk, in [0, 1].
    """
    deltas = rewards + discount * next_values - values
    decay = torch.where(ended, 0.0, discount * gae_lambda)
    advantages, carry = torch.empty_like(deltas), torch.zeros_like(deltas[0])
    for t in range(len(deltas) - 1, -1, -1):
        carry = deltas[t] + decay[t] * carry
        advantages[t] = carry
    return advantages


class DPPO:
    """Fine-tunes the last `ft_denoising_steps` of the chain by PPO; the frozen network takes the earlier ones."""

    def __init__(
        self, settings: Settings, policy: DiffusionPolicy, shape: TaskShape, generator: torch.Generator
    ) -> None:
        if not 1 <= settings.ft_denoising_steps <= policy.sampling_steps:
            raise ValueError(
                f"ft_denoising_steps must be in 1..{policy.sampling_steps}, got {settings.ft_denoising_steps}"
            )
        self.settings, self.shape, self.generator = settings, shape, generator
        self.gradient_steps = self.iteration = 0
        self.frozen, self.actor = policy.clone().requires_grad_(False), policy.clone()
        init = network_generator(generator)
        self.critic = ValueNet(shape.observation_dim, settings.critic_hidden_dims, init)
        self.critic.to(generator.device)
        self.actor_optimizer = FusedAdamW(self.actor.parameters(), settings.actor_learning_rate)
        self.critic_optimizer = FusedAdamW(self.critic.parameters(), settings.critic_learning_rate)
        self.reward_scaler = RewardScaler(shape.n_envs)
        self.first = torch.ones(shape.n_envs, dtype=torch.bool, device=generator.device)

    @torch.no_grad()
    def act(self, observations: Tensor, explore: bool, generator: torch.Generator) -> ActionChunk:
        """Sample chunks for (N, O).

        Exploring, ``extras["chain"]`` is (N, K' + 1, H, A), ``extras["log_probability"]`` that of its steps, (N, K').
        """
        noise = self.actor.draw_noise(len(observations), generator)
        keep = self.settings.ft_denoising_steps
        chain = self.actor.sample_chain(observations, noise, explore, keep, early=self.frozen)
        if not explore:
            return ActionChunk(chain[:, -1])
        log_probability = chunk_mean(self.actor.drawn_log_probability(noise, keep).flatten(0, 1))  # (N * K',)
        return ActionChunk(chain[:, -1], {"chain": chain, "log_probability": log_probability.view(-1, keep)})

    def other_rules(self) -> dict[str, Rule]:
        """It has no Q and acts with its actor anyway."""
        return {}

    def update(self, rollout: Rollout) -> dict[str, float]:
        """`update_epochs` passes of PPO over all (chunk, denoising step) pairs of the rollout."""
        settings, steps = self.settings, self.settings.ft_denoising_steps
        observations = rollout.observations.flatten(0, 1)  # (T*N, O)
        chains = rollout.extras["chain"].flatten(0, 1)  # (T*N, K'+1, H, A)
        advantages, returns = self.estimate_advantages(rollout)
        old = rollout.extras["log_probability"].flatten(0, 1)  # (T*N, K'), of the actor as it still is
        total, history = old.numel(), []
        train_actor = self.iteration >= settings.critic_warmup_iterations
        for _ in range(settings.update_epochs):
            order = torch.randperm(total, generator=self.generator, device=old.device)
            epoch = []
            for picks in order[: max(total // settings.batch_size, 1) * settings.batch_size].split(settings.batch_size):
                rows, index = picks // steps, picks % steps
                metrics = self.value_step(observations, returns, rows)
                minibatch = (observations[rows], chains[rows, index], chains[rows, index + 1], index)
                metrics |= self.policy_step(minibatch, advantages[rows], old[rows, index], train_actor)
                self.gradient_steps += 1
                epoch.append(metrics)
            history += epoch
            if torch.stack([m["actor/approx_kl"] for m in epoch]).max() > settings.target_kl:
                break
        self.iteration += 1
        summary = {name: torch.stack([m[name] for m in history]).mean().item() for name in history[0]}
        return summary | {"critic/explained_variance": explained_variance(returns - advantages, returns)}

    @torch.no_grad()
    def estimate_advantages(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Advantages and returns of the scaled rewards, both (T*N,)."""
        settings, ended = self.settings, rollout.terminated | rollout.truncated
        first = torch.cat([self.first[None], ended[:-1]])
        self.first = torch.ones_like(ended[-1]) if self.shape.reset_at_iteration else ended[-1]
        rewards = self.reward_scaler(rollout.rewards, first) if settings.reward_scaling else rollout.rewards
        states = (rollout.observations, rollout.next_observations)
        values, next_values = (self.critic(part.flatten(0, 1)).view(ended.shape) for part in states)  # (T, N)
        terminated = rollout.terminated
        if settings.time_limit == "terminal":
            terminated = ended
        elif settings.time_limit == "ignore":
            ended = terminated
            next_values = torch.cat([values[1:], next_values[-1:]])
        next_values = next_values.masked_fill(terminated, 0.0)
        advantages = generalised_advantages(rewards, values, next_values, ended, settings.discount, settings.gae_lambda)
        return advantages.flatten(), (advantages + values).flatten()

    def log_probability(self, observations: Tensor, before: Tensor, after: Tensor, index: Tensor) -> Tensor:
        """Log-probability of (B,) transitions of the chain, see `chunk_mean`.

        `index` (B,) counts the fine-tuned steps, 0 the noisiest.
        """
        offset = self.actor.sampling_steps - self.settings.ft_denoising_steps
        values = self.actor.log_probability(before, after, observations, index + offset)
        return chunk_mean(values)

    def value_step(self, observations: Tensor, returns: Tensor, rows: Tensor) -> dict[str, Tensor]:
        """One critic step on the states of a minibatch; a state drawn c times counts c times."""
        self.critic_optimizer.zero_grad(set_to_none=True)
        states, counts = torch.unique(rows, return_counts=True)
        loss = returns.new_zeros(())
        for part, weight in zip(states.split(MICRO_BATCH), counts.split(MICRO_BATCH), strict=True):
            value_loss = 0.5 * (weight * (self.critic(observations[part]) - returns[part]) ** 2).sum() / len(rows)
            backward([self.settings.vf_coef * value_loss])
            loss += value_loss.detach()
        self.critic_optimizer.step()
        return {"critic/value_loss": loss}

    def policy_step(
        self, minibatch: tuple[Tensor, ...], advantages: Tensor, old: Tensor, train: bool
    ) -> dict[str, Tensor]:
        """One actor step on (observations, before, after, index); during critic warm-up the weights stay."""
        weighted = self.weight_advantages(advantages, minibatch[3])
        self.actor_optimizer.zero_grad(set_to_none=True)
        totals: dict[str, Tensor] = {}
        columns = (*minibatch, weighted, old)
        for part in zip(*(column.split(MICRO_BATCH) for column in columns), strict=True):
            loss, metrics = self.policy_loss(*part)
            share = len(part[0]) / len(old)
            if train:
                backward([loss * share])
            totals = {name: totals.get(name, 0.0) + value * share for name, value in metrics.items()}
        if train:
            self.actor_optimizer.step()
        return totals

    def weight_advantages(self, advantages: Tensor, index: Tensor) -> Tensor:
        """Standardise over the minibatch, then discount by gamma_denoising^(K' - 1 - index), both (B,)."""
        standard = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        return standard * self.settings.denoising_discount ** (self.settings.ft_denoising_steps - 1 - index)

    def policy_loss(
        self, observations: Tensor, before: Tensor, after: Tensor, index: Tensor, advantages: Tensor, old: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Clipped surrogate loss of (B,) transitions, given weighted advantages and old log-probabilities."""
        log_ratio = self.log_probability(observations, before, after, index) - old
        ratio, width = log_ratio.exp(), self.clip_width(index)
        clipped = torch.minimum(torch.maximum(ratio, 1 - width), 1 + width)
        loss = torch.maximum(-advantages * ratio, -advantages * clipped).mean()
        with torch.no_grad():
            metrics = {
                "actor/policy_loss": loss.detach(),
                "actor/approx_kl": (ratio - 1 - log_ratio).mean(),
                "actor/clip_fraction": ((ratio - 1).abs() > width).float().mean(),
                "actor/ratio": ratio.mean(),
            }
        return loss, metrics

    def clip_width(self, index: Tensor) -> Tensor:
        """Clip width per step, (B,): from clip_base at the noisiest to clip_coef at the last, exponentially."""
        settings = self.settings
        if settings.ft_denoising_steps == 1:
            return torch.full_like(index, settings.clip_coef, dtype=torch.float32)
        fraction = index.float() / (settings.ft_denoising_steps - 1)
        growth = torch.expm1(settings.clip_rate * fraction) / torch.expm1(fraction.new_tensor(settings.clip_rate))
        return settings.clip_base + (settings.clip_coef - settings.clip_base) * growth

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimisers, reward scaling, generator and counters."""
        modules = {name: getattr(self, name).state_dict() for name in STATEFUL}
        counters = {"gradient_steps": self.gradient_steps, "iteration": self.iteration}
        return modules | counters | {"first": self.first, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        for name in STATEFUL:
            getattr(self, name).load_state_dict(state[name])
        self.gradient_steps, self.iteration = state["gradient_steps"], state["iteration"]
        self.first = state["first"].to(self.generator.device)
        self.generator.set_state(state["generator"].cpu())


STATEFUL = ("frozen", "actor", "critic", "actor_optimizer", "critic_optimizer", "reward_scaler")


def chunk_mean(log_density: Tensor) -> Tensor:
    """Mean over the chunk of the per-dimension log-density (B, H, A), clamped to [-5, 2] as in DPPO, (B,)."""
    return log_density.clamp(-5, 2).flatten(1).mean(1)


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) of two (B,) tensors; 1 is a perfect critic."""
    return (1 - (returns - values).var() / returns.var().clamp(min=1e-12)).item()


@dataclass(frozen=True)
class Settings:
    """Settings of DPPO; the defaults are the published gym ones."""

    ft_denoising_steps: int = 10  # K', steps of the chain that are fine-tuned
    denoising_discount: float = 0.99  # gamma_denoising, credit of earlier denoising steps
    discount: float = 0.99  # gamma_env, per chunk
    gae_lambda: float = 0.95
    actor_learning_rate: float = 1e-4
    critic_learning_rate: float = 1e-3
    batch_size: int = 50_000  # (chunk, denoising step) pairs per gradient step
    update_epochs: int = 5
    clip_coef: float = 0.01  # clip width of the ratio at the last denoising step
    clip_base: float = 0.01  # and at the noisiest one
    clip_rate: float = 3.0  # growth of the width in between
    vf_coef: float = 0.5
    target_kl: float = 1.0  # an epoch whose largest minibatch KL exceeds this is the last
    critic_warmup_iterations: int = 0  # training iterations before the actor moves
    critic_hidden_dims: tuple[int, ...] = (256, 256, 256)
    reward_scaling: bool = True  # by the running deviation of the discounted return
    time_limit: Literal["bootstrap", "terminal", "ignore"] = "bootstrap"  # released: terminal (gym), ignore (robomimic)

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: a value outside its range.
        """
        positive = ("actor_learning_rate", "critic_learning_rate", "clip_coef", "clip_base", "clip_rate", "target_kl")
        check_range(self, positive, 0, float("inf"), open_ends=True)
        check_range(self, ("batch_size",), 2, float("inf"))  # the advantages of a minibatch are standardised
        check_range(self, ("update_epochs", "ft_denoising_steps"), 1, float("inf"))
        check_range(self, ("discount", "denoising_discount", "gae_lambda"), 0, 1)
        check_range(self, ("vf_coef", "critic_warmup_iterations"), 0, float("inf"))
        check_widths(self, "critic_hidden_dims")
        check_choice(self, "time_limit", ("bootstrap", "terminal", "ignore"))


ROBOMIMIC: dict[str, Any] = {
    "batch_size": 7500,
    "update_epochs": 10,
    "discount": 0.999,
    "clip_base": 0.001,
    "critic_warmup_iterations": 1,  # n_critic_warmup_itr of 2 counts the evaluation at iteration 0
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "hopper": {},
    "walker2d": {},
    "halfcheetah": {},
    "kitchen": {"batch_size": 5600, "update_epochs": 10},
    "lift": ROBOMIMIC,
    "can": ROBOMIMIC,
    "square": ROBOMIMIC | {"batch_size": 10_000},
    "transport": ROBOMIMIC | {"batch_size": 10_000, "update_epochs": 5},
}
SHORT: dict[str, Any] = {"batch_size": 2000, "update_epochs": 5}
# 50 gradient steps an iteration (with the suites' 5 fine-tuned steps) where the published settings take 200: with
# 5 of them and the published discount the critic cannot follow values that a bootstrapped time limit lets grow, and
# Lift falls from 0.55 to 0.40 (seed 1000).
SHORT_ROBOMIMIC: dict[str, Any] = {
    "batch_size": 500,
    "update_epochs": 10,
    "discount": 0.99,
    "critic_warmup_iterations": 2,
}
# Ten episodes an iteration say little about a gradient: in 80,000 steps Can falls from 0.80 to 0.55 at 1e-4 and to 0.75
# at this rate (seed 1000).
SHORT_LONGER_EPISODES: dict[str, Any] = SHORT_ROBOMIMIC | {"actor_learning_rate": 2e-5}
# The published 50 gradient steps an iteration, on half an episode of each environment.
SHORT_KITCHEN: dict[str, Any] = {
    "batch_size": 1400,
    "update_epochs": 10,
    "critic_warmup_iterations": 4,
    "time_limit": "terminal",  # as released; kitchen-local rises so from 1.3 to 2.15 of 4 (seed 1000)
}
EMBEDDED: dict[str, dict[str, Any]] = {
    "hopper": SHORT,
    "walker2d": SHORT,
    "halfcheetah": SHORT,
    "kitchen": SHORT_KITCHEN,
    "lift": SHORT_ROBOMIMIC,
    "can": SHORT_LONGER_EPISODES,
    "square": SHORT_LONGER_EPISODES,
    "toy": {"batch_size": 1000, "update_epochs": 5, "discount": 0.95, "clip_coef": 0.05, "clip_base": 0.05},
}
