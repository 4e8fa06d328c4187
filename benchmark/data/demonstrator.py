"""Demonstrators: medium-quality locomotion policies whose stochastic roll-outs are this repository's offline data.

A soft actor-critic agent (Haarnoja et al. 2018, "Soft Actor-Critic Algorithms and Applications") is trained from
scratch on a gymnasium MuJoCo task and stopped at about a third of expert performance, as D4RL's "medium" policies were.

    python -m benchmark.data.demonstrator hopper --seed 0 --out benchmark/data/demonstrators/hopper.pt

The same command gives the same weights on the same processor and library versions; elsewhere rounding may differ.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import itertools
import json
import math
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gymnasium
import mujoco
import numpy as np
import torch
from gymnasium.spaces import flatdim
from torch import Tensor, nn
from torch.nn import functional as F

from benchmark.store import write_bytes, write_json
from otpr.networks import linear, polyak_update

LOG_STD_RANGE = (-5.0, 2.0)
CRITICS = 2
STOPPING_SEED, REPORT_SEED = 1_000_000, 2_000_000  # the report's episodes are not those that chose the policy


@dataclass(frozen=True)
class Target:
    """When training stops: all three ranges hold for the mean over the evaluated stochastic episodes."""

    env_id: str
    returns: tuple[float, float]  # undiscounted return of an episode
    lengths: tuple[float, float]  # steps of an episode; the upper end rules out a gait that never falls
    step_reward: float  # least reward per step; rules out standing still, which earns the healthy reward alone

    def met_by(self, statistics: dict[str, float]) -> bool:
        """Whether the statistics of `evaluate` end the training."""
        returns = self.returns[0] <= statistics["return_mean"] <= self.returns[1]
        lengths = self.lengths[0] <= statistics["length_mean"] <= self.lengths[1]
        return returns and lengths and statistics["step_reward"] >= self.step_reward


TARGETS = {
    "hopper": Target("Hopper-v4", (1400.0, 1750.0), (350.0, 620.0), 2.6),
    "walker2d": Target("Walker2d-v4", (2500.0, 3200.0), (600.0, 1000.0), 2.6),
    "halfcheetah": Target("HalfCheetah-v4", (4300.0, 5200.0), (1000.0, 1000.0), 4.0),
}


@dataclass(frozen=True)
class Settings:
    """Hyper-parameters of the training: smaller and faster-learning than in the paper, to fit minutes of one core."""

    actor_width: int = 128  # two hidden ReLU layers; small enough to keep the weights under version control
    critic_width: int = 128  # two hidden ReLU layers in each of the two critics
    learning_rate: float = 1e-3  # Adam, for actor, critics and temperature
    discount: float = 0.99  # per environment step
    target_rate: float = 0.005  # Polyak rate of the target critics
    batch_size: int = 128  # transitions per gradient step; one gradient step per environment step
    start_steps: int = 5_000  # uniformly random actions before learning begins
    max_steps: int = 400_000  # environment steps after which training gives up
    evaluate_every: int = 5_000  # environment steps between evaluations
    evaluation_episodes: int = 20  # stochastic episodes of an evaluation


class Demonstrator(nn.Module):
    """Tanh-Gaussian policy: observation (N, O) -> action (N, A) in [-1, 1]."""

    def __init__(self, observation_dim: int, action_dim: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.body = nn.Sequential(
            linear(observation_dim, width, generator), nn.ReLU(), linear(width, width, generator), nn.ReLU(),
            linear(width, 2 * action_dim, generator),
        )  # fmt: skip

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation, (N, A) each, of the Gaussian before the tanh."""
        mean, log_std = self.body(observations).chunk(2, dim=-1)
        return mean, log_std.clamp(*LOG_STD_RANGE)

    def sample(self, observations: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Reparameterised actions (N, A) and their log densities (N,), by the change of variables of the tanh."""
        mean, log_std = self(observations)
        noise = torch.randn(mean.shape, generator=generator)
        raw = mean + log_std.exp() * noise
        gaussian = -0.5 * noise.square() - log_std - 0.5 * math.log(2.0 * math.pi)
        squash = 2.0 * (math.log(2.0) - raw - F.softplus(-2.0 * raw))  # log(1 - tanh(raw)^2), stable for large raw
        return raw.tanh(), (gaussian - squash).sum(-1)

    @torch.no_grad()
    def act(self, observations: np.ndarray, generator: torch.Generator, noise: float = 1.0) -> np.ndarray:
        """Actions (N, A) float32 in [-1, 1] for raw observations (N, O); the policy's deviation times `noise`."""
        inputs = torch.as_tensor(observations, dtype=torch.float32)
        mean, log_std = self(inputs)
        mean = mean + noise * log_std.exp() * torch.randn(mean.shape, generator=generator)
        return mean.tanh().numpy()


class TwinCritic(nn.Module):
    """Two Q networks evaluated as one batched product, which on a CPU is faster than two calls."""

    def __init__(self, inputs: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        sizes = (inputs, width, width, 1)
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for fan_in, fan_out in itertools.pairwise(sizes):
            bound = 1.0 / math.sqrt(fan_in)
            self.weights.append(torch.empty(CRITICS, fan_in, fan_out).uniform_(-bound, bound, generator=generator))
            self.biases.append(torch.empty(CRITICS, 1, fan_out).uniform_(-bound, bound, generator=generator))

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Values (2, B) of observations (B, O) and actions (B, A)."""
        hidden = torch.cat([observations, actions], -1).expand(CRITICS, -1, -1)
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            hidden = torch.baddbmm(bias, hidden, weight).relu()
        return torch.baddbmm(self.biases[-1], hidden, self.weights[-1]).squeeze(-1)


class SoftActorCritic:
    """Soft actor-critic with twin critics and automatic temperature on one environment; all arrays on the CPU."""

    def __init__(self, observation_dim: int, action_dim: int, settings: Settings, generator: torch.Generator) -> None:
        self.settings, self.generator = settings, generator
        self.actor = Demonstrator(observation_dim, action_dim, settings.actor_width, generator)
        self.critic = TwinCritic(observation_dim + action_dim, settings.critic_width, generator)
        self.target = TwinCritic(observation_dim + action_dim, settings.critic_width, generator).requires_grad_(False)
        self.target.load_state_dict(self.critic.state_dict())
        self.averaged = list(self.target.parameters()), list(self.critic.parameters())
        self.log_temperature = torch.zeros(1, requires_grad=True)
        self.entropy_target = -float(action_dim)
        groups = (list(self.actor.parameters()), list(self.critic.parameters()), [self.log_temperature])
        self.optimisers = [torch.optim.Adam(group, lr=settings.learning_rate, fused=True) for group in groups]
        # One row a transition: observation, action, next observation, reward, whether the episode terminated.
        self.splits = (observation_dim, action_dim, observation_dim, 1, 1)
        self.replay = torch.empty(settings.max_steps, sum(self.splits))
        self.stored = 0

    def store(self, *parts: np.ndarray | list[float]) -> None:
        """Append one transition, its parts in the order of `splits`."""
        self.replay[self.stored] = torch.from_numpy(np.concatenate(parts).astype(np.float32))
        self.stored += 1

    def update(self) -> None:
        """One gradient step on critics, actor and temperature (equations 5, 9 and 18 of the paper)."""
        settings, generator = self.settings, self.generator
        rows = torch.randint(self.stored, (settings.batch_size,), generator=generator)
        observations, actions, following, reward, ended = self.replay[rows].split(self.splits, -1)
        temperature = self.log_temperature.detach().exp()
        with torch.no_grad():
            next_actions, next_density = self.actor.sample(following, generator)
            soft_value = self.target(following, next_actions).amin(0) - temperature * next_density
            goal = reward.squeeze(-1) + settings.discount * (1.0 - ended.squeeze(-1)) * soft_value
        self._descend(1, (self.critic(observations, actions) - goal).square().mean(-1).sum())
        new_actions, density = self.actor.sample(observations, generator)
        self._descend(0, (temperature * density - self.critic(observations, new_actions).amin(0)).mean())
        self._descend(2, -(self.log_temperature.exp() * (density.detach() + self.entropy_target)).mean())
        polyak_update(*self.averaged, settings.target_rate)

    def _descend(self, index: int, loss: Tensor) -> None:
        parameters = self.optimisers[index].param_groups[0]["params"]
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient
        self.optimisers[index].step()


def evaluate(policy: Demonstrator, env_id: str, episodes: int, seed: int, noise: float = 1.0) -> dict[str, float]:
    """Statistics of `episodes` seeded episodes, stepped side by side: return, length (steps) and reward per step."""
    envs = [gymnasium.make(env_id) for _ in range(episodes)]
    generator = torch.Generator().manual_seed(seed)
    observations = np.stack([env.reset(seed=seed + i)[0] for i, env in enumerate(envs)])
    returns, lengths, live = np.zeros(episodes), np.zeros(episodes), np.arange(episodes)
    while live.size:
        actions = policy.act(observations[live], generator, noise)
        ended = []
        for i, action in zip(live, actions, strict=True):
            observations[i], reward, terminated, truncated, _ = envs[i].step(action)
            returns[i] += float(reward)
            lengths[i] += 1
            ended += [i] if terminated or truncated else []
        live = np.setdiff1d(live, ended)
    for env in envs:
        env.close()
    summary = {"episodes": episodes, "step_reward": returns.sum() / lengths.sum(), "length_mean": lengths.mean()}
    summary |= {"length_min": lengths.min(), "length_max": lengths.max(), "return_mean": returns.mean()}
    summary |= {"return_std": returns.std(), "return_min": returns.min(), "return_max": returns.max()}
    return {name: round(float(value), 3) for name, value in summary.items()}


def save_demonstrator(policy: Demonstrator, path: Path, card: dict[str, Any]) -> None:
    """Write the weights to `path` and, beside it as .json, the card completed with their digest."""
    buffer = io.BytesIO()
    torch.save(dict(policy.state_dict()), buffer)
    card = card | {"sha256": hashlib.sha256(buffer.getvalue()).hexdigest()}
    write_bytes(path, buffer.getvalue())
    write_json(path.with_suffix(".json"), card)


def load_demonstrator(path: str | Path) -> Demonstrator:
    """The policy saved at `path`; its sizes are read off the weights."""
    weights = torch.load(path, map_location="cpu", weights_only=True)
    width, observation_dim = weights["body.0.weight"].shape
    policy = Demonstrator(observation_dim, weights["body.4.weight"].shape[0] // 2, width, torch.Generator())
    policy.load_state_dict(weights)
    return policy.eval()


def train(task: str, seed: int, settings: Settings) -> tuple[Demonstrator, int]:
    """Train until an evaluation satisfies the task's target; returns the policy and its environment steps.

    Raises RuntimeError where `settings.max_steps` pass without one.
    """
    target = TARGETS[task]
    env = gymnasium.make(target.env_id)
    observation_dim, action_dim = (flatdim(space) for space in (env.observation_space, env.action_space))
    agent = SoftActorCritic(observation_dim, action_dim, settings, torch.Generator().manual_seed(seed))
    observation, _ = env.reset(seed=seed)
    for step in range(1, settings.max_steps + 1):
        if step <= settings.start_steps:
            action = 2.0 * torch.rand(action_dim, generator=agent.generator).numpy() - 1.0
        else:
            action = agent.actor.act(observation[None], agent.generator)[0]
        following, reward, terminated, truncated, _ = env.step(action)
        agent.store(observation, action, following, [float(reward)], [float(terminated)])
        observation = env.reset()[0] if terminated or truncated else following
        if step > settings.start_steps:
            agent.update()
        if step % settings.evaluate_every == 0:
            statistics = evaluate(agent.actor, target.env_id, settings.evaluation_episodes, STOPPING_SEED)
            print(step, json.dumps(statistics), flush=True)
            if target.met_by(statistics):
                return agent.actor, step
    raise RuntimeError(f"no evaluation met {target} in {settings.max_steps} steps; try another --seed")


def describe(policy: Demonstrator, task: str, seed: int, steps: int, settings: Settings) -> dict[str, Any]:
    """The card of a demonstrator: how it was made, and what 100 fresh episodes of it are worth."""
    target = TARGETS[task]
    packages = (("torch", torch), ("mujoco", mujoco), ("gymnasium", gymnasium), ("numpy", np))
    return {
        "command": f"python -m benchmark.data.demonstrator {task} --seed {seed} --out FILE",
        "env_id": target.env_id,
        "seed": seed,
        "environment_steps": steps,
        "settings": asdict(settings),
        "target": asdict(target),
        "stopping_evaluation": evaluate(policy, target.env_id, settings.evaluation_episodes, STOPPING_SEED),
        "stochastic": evaluate(policy, target.env_id, 100, REPORT_SEED),
        "deterministic": evaluate(policy, target.env_id, 100, REPORT_SEED, noise=0.0),
        "versions": {"python": platform.python_version()} | {name: module.__version__ for name, module in packages},
    }


def main(arguments: list[str] | None = None) -> None:
    """Command line: train one demonstrator and write its weights and card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=sorted(TARGETS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="the weights, .pt; the card goes beside them, .json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # networks this small are slower on several threads
    settings = Settings()
    policy, steps = train(options.task, options.seed, settings)
    card = describe(policy, options.task, options.seed, steps, settings)
    save_demonstrator(policy, options.out, card)
    print(json.dumps(card, indent=2))


if __name__ == "__main__":
    main()
