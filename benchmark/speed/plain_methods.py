"""Plain methods: DPPO, IDQL and DQL as one writes them in eager PyTorch, in the manner of DPPO's released code.

Each is built from a method of ours, takes over its settings, weights and generator, and draws the same random numbers
in the same order: the results are equal but for the rounding of float32. Nothing of our networks, sampler or update is
used. As in DPPO's code the whole network, with the embedding of the denoising step of every row, is evaluated in every
step of the chain, a minibatch is one forward and one backward pass, the optimiser is torch.optim.AdamW as it comes, and
old log-probabilities are computed anew. What that code does at more cost and to no effect is left out: the frozen
network is not evaluated where the fine-tuned one is, and losses are not brought to the host.

They act while exploring and are past their warm-up; they are not meant for anything but comparing speed.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines.dppo import DPPO, generalised_advantages
from baselines.dql import DQL
from baselines.idql import IDQL
from benchmark.speed.plain_networks import PlainPolicy, frozen_twin, move_target, plain_adamw, plain_layers
from otpr.method import ActionChunk, Rollout
from otpr.offpolicy import OffPolicy
from otpr.replay import Batch

LOGPROB_BATCH = 10_000  # pairs in one evaluation of old log-probabilities


class PlainDPPO:
    """Proximal policy optimisation of the last K' denoising steps."""

    def __init__(self, ours: DPPO, activation: str) -> None:
        """`activation` is the policy's."""
        self.settings, self.generator, self.gradient_steps = ours.settings, ours.generator, 0
        self.actor = PlainPolicy(ours.actor, activation)
        self.frozen = PlainPolicy(ours.frozen, activation).requires_grad_(False)
        self.critic = plain_layers(ours.critic.Q1, "mish")
        self.actor_optimizer = plain_adamw(self.actor, self.settings.actor_learning_rate)
        self.critic_optimizer = plain_adamw(self.critic, self.settings.critic_learning_rate)
        self.reward_scaler, self.first = ours.reward_scaler, ours.first

    @torch.no_grad()
    def act(self, observations: Tensor, explore: bool, generator: torch.Generator) -> ActionChunk:
        """Chunks for (N, O) with the end of their chain."""
        keep = self.settings.ft_denoising_steps
        chain = self.actor.sample_chain(observations, generator, self.frozen, keep)
        return ActionChunk(chain[:, -1], {"chain": chain})

    def log_probability(self, observations: Tensor, before: Tensor, after: Tensor, index: Tensor) -> Tensor:
        """Mean clamped log-density of transitions (B, H, A) of the fine-tuned steps `index` (B,), (B,)."""
        timesteps = self.settings.ft_denoising_steps - 1 - index
        mean, std = self.actor.mean_std(before, timesteps, observations, self.actor.sampler.logprob_std_floor)
        return torch.distributions.Normal(mean, std).log_prob(after).clamp(-5, 2).flatten(1).mean(1)

    @torch.no_grad()
    def old_log_probabilities(self, observations: Tensor, chains: Tensor) -> Tensor:
        """Those of all transitions of chains (B, K' + 1, H, A), (B, K')."""
        steps, parts = self.settings.ft_denoising_steps, []
        size = max(LOGPROB_BATCH // steps, 1)
        for obs, chain in zip(observations.split(size), chains.split(size), strict=True):
            before, after = chain[:, :-1].flatten(0, 1), chain[:, 1:].flatten(0, 1)
            index = torch.arange(steps).repeat(len(obs))
            parts.append(self.log_probability(obs.repeat_interleave(steps, 0), before, after, index).view(-1, steps))
        return torch.cat(parts)

    @torch.no_grad()
    def advantages(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Advantages and returns of scaled rewards, time limits bootstrapped, both (T * N,)."""
        ended = rollout.terminated | rollout.truncated
        first = torch.cat([self.first[None], ended[:-1]])
        self.first = ended[-1]
        rewards = self.reward_scaler(rollout.rewards, first) if self.settings.reward_scaling else rollout.rewards
        values = self.critic(rollout.observations)[..., 0]
        following = self.critic(rollout.next_observations)[..., 0] * ~rollout.terminated
        discount, gae_lambda = self.settings.discount, self.settings.gae_lambda
        advantages = generalised_advantages(rewards, values, following, ended, discount, gae_lambda)
        return advantages.flatten(), (advantages + values).flatten()

    def update(self, rollout: Rollout) -> dict[str, float]:
        """`update_epochs` passes over all pairs of chunk and denoising step."""
        observations, chains = rollout.observations.flatten(0, 1), rollout.extras["chain"].flatten(0, 1)
        advantages, returns = self.advantages(rollout)
        old = self.old_log_probabilities(observations, chains)
        size, total = self.settings.batch_size, old.numel()
        for _ in range(self.settings.update_epochs):
            order, divergences = torch.randperm(total, generator=self.generator), []
            for start in range(0, max(total // size, 1) * size, size):
                picks = order[start : start + size]
                rows, index = torch.unravel_index(picks, old.shape)
                batch = (observations[rows], chains[rows, index], chains[rows, index + 1], index)
                loss, divergence = self.loss(batch, advantages[rows], returns[rows], old[rows, index])
                self.actor_optimizer.zero_grad()
                self.critic_optimizer.zero_grad()
                loss.backward()
                self.actor_optimizer.step()
                self.critic_optimizer.step()
                self.gradient_steps += 1
                divergences.append(divergence)
            if torch.stack(divergences).max() > self.settings.target_kl:
                break
        return {}

    def loss(
        self, batch: tuple[Tensor, ...], advantages: Tensor, returns: Tensor, old: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Policy and value loss of a minibatch (observations, before, after, index), and the approximate divergence."""
        settings, index = self.settings, batch[3]
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        advantages = advantages * settings.denoising_discount ** (settings.ft_denoising_steps - 1 - index)
        log_ratio = self.log_probability(*batch) - old
        ratio = log_ratio.exp()
        fraction = index / max(settings.ft_denoising_steps - 1, 1)
        growth = (torch.exp(settings.clip_rate * fraction) - 1) / (math.exp(settings.clip_rate) - 1)
        width = settings.clip_base + (settings.clip_coef - settings.clip_base) * growth
        unclipped, clipped = -advantages * ratio, -advantages * torch.clamp(ratio, 1 - width, 1 + width)
        values = self.critic(batch[0])[:, 0]
        value_loss = 0.5 * ((values - returns) ** 2).mean()
        loss = torch.max(unclipped, clipped).mean() + settings.vf_coef * value_loss
        return loss, (ratio - 1 - log_ratio).detach().mean()


class PlainReplay:
    """A ring of transitions, one tensor a column, each gathered by itself."""

    def __init__(self, capacity: int, observation_dim: int, chunk_shape: tuple[int, int]) -> None:
        self.capacity, self.added = capacity, 0
        self.observations, self.next_observations = (torch.empty(capacity, observation_dim) for _ in range(2))
        self.actions = torch.empty(capacity, *chunk_shape)
        self.rewards, self.terminated = torch.empty(capacity), torch.empty(capacity)

    def add(self, rollout: Rollout, reward_scale: float) -> None:
        """Append all transitions; no more than the capacity."""
        places = torch.arange(self.added, self.added + rollout.rewards.numel()) % self.capacity
        self.observations[places] = rollout.observations.flatten(0, 1)
        self.next_observations[places] = rollout.next_observations.flatten(0, 1)
        self.actions[places] = rollout.actions.flatten(0, 1)
        self.rewards[places] = rollout.rewards.flatten() * reward_scale
        self.terminated[places] = rollout.terminated.flatten().float()
        self.added += len(places)

    def sample(self, size: int, generator: torch.Generator) -> Batch:
        """`size` transitions with replacement."""
        picks = torch.randint(min(self.added, self.capacity), (size,), generator=generator)
        columns = (self.observations, self.actions, self.rewards, self.terminated, self.next_observations)
        return Batch(*(column[picks] for column in columns), places=picks)


class PlainOffPolicy(ABC):
    """What plain IDQL and DQL share: replay, and an iteration's gradient steps on batches from it."""

    def __init__(self, ours: OffPolicy, activation: str) -> None:
        """`activation` is the policy's."""
        self.base_settings, self.generator = ours.base_settings, ours.generator
        self.gradient_steps, self.steps_per_iteration = 0, ours.steps_per_iteration
        self.actor = PlainPolicy(ours.actor, activation)
        self.actor_optimizer = plain_adamw(self.actor, self.base_settings.actor_learning_rate)
        chunk_shape = (ours.shape.action_horizon, ours.shape.action_dim)
        self.replay = PlainReplay(self.base_settings.replay_capacity, ours.shape.observation_dim, chunk_shape)

    def update(self, rollout: Rollout) -> dict[str, float]:
        """Store the rollout and learn: critic, then actor, on every batch."""
        self.replay.add(rollout, self.base_settings.reward_scale)
        for _ in range(self.steps_per_iteration):
            batch = self.replay.sample(self.base_settings.batch_size, self.generator)
            self.critic_step(batch)
            loss = self.actor_loss(batch)
            self.actor_optimizer.zero_grad()
            loss.backward()
            self.actor_optimizer.step()
        self.gradient_steps += self.steps_per_iteration
        return {}

    @abstractmethod
    def critic_step(self, batch: Batch) -> None:
        """One gradient step of everything that estimates values."""

    @abstractmethod
    def actor_loss(self, batch: Batch) -> Tensor:
        """The actor's loss on a batch."""


def heads(networks: nn.Module, observations: Tensor, actions: Tensor) -> Iterator[Tensor]:
    """What both networks say of observations (B, O) and chunks (B, H, A), (B,) each."""
    features = torch.cat([observations, actions.flatten(1)], dim=-1)
    return (network(features)[:, 0] for network in networks.children())


def regression_loss(networks: nn.Module, batch: Batch, following: Tensor, discount: float) -> Tensor:
    """Squared errors of both Q to r + discount (1 - terminated) following (B,)."""
    target = batch.rewards + discount * (1 - batch.terminated) * following
    q1, q2 = heads(networks, batch.observations, batch.actions)
    return F.mse_loss(q1, target) + F.mse_loss(q2, target)


class PlainIDQL(PlainOffPolicy):
    """Implicit Q-learning, a cloned actor, a choice among its candidates."""

    def __init__(self, ours: IDQL, activation: str) -> None:
        super().__init__(ours, activation)
        self.settings = ours.settings
        self.q = nn.ModuleList([plain_layers(head, "mish") for head in (ours.critic.q.Q1, ours.critic.q.Q2)])
        self.target_q = frozen_twin(self.q)
        self.value = plain_layers(ours.critic.value_net.Q1, "mish")
        self.q_optimizer = plain_adamw(self.q, self.settings.critic_learning_rate)
        self.value_optimizer = plain_adamw(self.value, self.settings.critic_learning_rate)

    @torch.no_grad()
    def act(self, observations: Tensor, explore: bool, generator: torch.Generator) -> ActionChunk:
        """Of a state's candidates one, drawn by whether its Q exceeds V."""
        number, weight = self.settings.candidates, self.settings.exploration_weight
        repeated = observations.repeat_interleave(number, 0)
        candidates = self.actor.sample(repeated, generator)
        q = torch.min(*heads(self.target_q, repeated, candidates)).view(-1, number)
        weights = torch.where(q > self.value(observations), weight, 1 - weight)
        picks = torch.multinomial(weights, 1, generator=generator)[:, 0]
        return ActionChunk(candidates.unflatten(0, (-1, number))[torch.arange(len(picks)), picks])

    def critic_step(self, batch: Batch) -> None:
        """V, Q and target."""
        with torch.no_grad():
            target = torch.min(*heads(self.target_q, batch.observations, batch.actions))
        advantages = target - self.value(batch.observations)[:, 0]
        weights = torch.where(advantages > 0, self.settings.expectile, 1 - self.settings.expectile)
        value_loss = (weights * advantages**2).mean()
        self.value_optimizer.zero_grad()
        value_loss.backward()
        self.value_optimizer.step()
        with torch.no_grad():
            following = self.value(batch.next_observations)[:, 0]
        q_loss = regression_loss(self.q, batch, following, self.settings.discount)
        self.q_optimizer.zero_grad()
        q_loss.backward()
        self.q_optimizer.step()
        move_target(self.target_q, self.q, self.settings.critic_tau)

    def actor_loss(self, batch: Batch) -> Tensor:
        """Behaviour cloning of the replay."""
        return self.actor.bc_loss(batch.actions, batch.observations, self.generator)


class PlainDQL(PlainOffPolicy):
    """Twin Q; the actor climbs it through the denoising chain."""

    def __init__(self, ours: DQL, activation: str) -> None:
        super().__init__(ours, activation)
        self.settings = ours.settings
        self.q = nn.ModuleList([plain_layers(head, "mish") for head in (ours.critic.Q1, ours.critic.Q2)])
        self.target_q = frozen_twin(self.q)
        self.q_optimizer = plain_adamw(self.q, self.settings.critic_learning_rate)

    @torch.no_grad()
    def act(self, observations: Tensor, explore: bool, generator: torch.Generator) -> ActionChunk:
        """One sample a state."""
        return ActionChunk(self.actor.sample(observations, generator))

    def critic_step(self, batch: Batch) -> None:
        """Q and its target."""
        with torch.no_grad():
            actions = self.actor.sample(batch.next_observations, self.generator)
            following = torch.min(*heads(self.target_q, batch.next_observations, actions))
        loss = regression_loss(self.q, batch, following, self.settings.discount)
        self.q_optimizer.zero_grad()
        loss.backward()
        self.q_optimizer.step()
        move_target(self.target_q, self.q, self.settings.target_ema)

    def actor_loss(self, batch: Batch) -> Tensor:
        """Cloning and the normalised Q of fresh actions."""
        actions = self.actor.sample(batch.observations, self.generator)
        q1, q2 = heads(self.q, batch.observations, actions)
        if torch.rand((), generator=self.generator) > 0.5:
            q_loss = -q1.mean() / q2.abs().mean().detach()
        else:
            q_loss = -q2.mean() / q1.abs().mean().detach()
        cloned = batch.actions if self.settings.bc_on == "replay" else actions
        return self.actor.bc_loss(cloned, batch.observations, self.generator) + self.settings.eta * q_loss


PLAIN = {"dppo": PlainDPPO, "idql": PlainIDQL, "dql": PlainDQL}


def compile_networks(method: PlainDPPO | PlainOffPolicy) -> None:
    """Have torch.compile translate what a user would: the denoising steps, the cloning loss's network, the critics."""
    for part in list(vars(method).values()):
        if isinstance(part, PlainPolicy):
            part.network.compile()
            part.mean_std = torch.compile(part.mean_std)
        elif isinstance(part, nn.ModuleList):
            for network in part:
                network.compile()
        elif isinstance(part, nn.Sequential):
            part.compile()
