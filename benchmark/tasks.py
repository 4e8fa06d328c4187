"""The one table of tasks: what each is made of, and the sizes of its training loops.

A name with ``-local`` runs on embedded data and is never to be read as D4RL's or robomimic's task of that name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from otpr.networks import DenoisingMLP

Protocol = Literal["published", "embedded"]


@dataclass(frozen=True)
class NetworkSettings:
    """Sizes of a task's denoising network (DPPO's per-task choice)."""

    hidden_dims: tuple[int, ...] = (512, 512, 512)
    activation: str = "relu"
    time_dim: int = 16
    cond_mlp_dims: tuple[int, ...] = ()


@dataclass(frozen=True)
class PretrainSettings:
    """Behaviour cloning of the diffusion policy (METHODS of DPPO: AdamW, cosine rate, EMA from a late start)."""

    gradient_steps: int = 60_000
    batch_size: int = 256
    learning_rate: float = 1e-3  # at the first step; falls along a cosine
    final_learning_rate: float = 1e-4
    weight_decay: float = 1e-6
    ema_decay: float = 0.995
    ema_every: int = 10  # gradient steps between EMA updates
    ema_start: int = 2_000  # gradient steps before which the average is the model itself


@dataclass(frozen=True)
class LoopSettings:
    """Sizes of the training loop; all methods of a comparison share them."""

    n_envs: int
    n_steps: int  # chunks per environment and iteration
    iterations: int  # training iterations
    eval_every: int  # iterations between evaluations; the last is always evaluated
    eval_episodes: int  # whole episodes per evaluation
    evaluate_rules: bool = False  # each evaluation also records the method's other rules of acting (evaluations.csv)

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: a size below 1.
        """
        for name, value in vars(self).items():
            if name != "evaluate_rules" and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


@dataclass(frozen=True)
class Task:
    """One task. Scores are (return - random_return) / (expert_return - random_return); 1 is the expert."""

    name: str
    family: str  # key of the methods' settings tables
    environment: str  # name known to `benchmark.envs.make_env`
    observation_dim: int
    action_dim: int
    action_horizon: int
    max_episode_steps: int
    random_return: float
    expert_return: float
    success_return: float | None  # least return of a successful episode; None where success has no meaning
    network: NetworkSettings
    pretraining: PretrainSettings
    loops: dict[str, LoopSettings]  # by protocol

    def score(self, episode_return: float) -> float:
        """The normalised score of a mean return."""
        return (episode_return - self.random_return) / (self.expert_return - self.random_return)

    def build_network(self, generator: torch.Generator) -> DenoisingMLP:
        """A freshly initialised denoising network of this task's sizes."""
        sizes = self.network
        return DenoisingMLP(
            self.observation_dim,
            self.action_dim,
            self.action_horizon,
            generator,
            sizes.hidden_dims,
            sizes.activation,
            sizes.time_dim,
            sizes.cond_mlp_dims,
        )

    def loop(self, protocol: str) -> LoopSettings:
        """The loop sizes of a protocol.

        Raises:
            ValueError: this task has no such protocol.
        """
        if protocol not in self.loops:
            raise ValueError(f"task {self.name!r} has no protocol {protocol!r}; valid: {', '.join(self.loops)}")
        return self.loops[protocol]


_GYM_LOOP = LoopSettings(n_envs=40, n_steps=500, iterations=900, eval_every=9, eval_episodes=40)

TASKS: dict[str, Task] = {
    task.name: task
    for task in [
        Task(
            name="hopper-local",
            family="hopper",
            environment="hopper",
            observation_dim=11,
            action_dim=3,
            action_horizon=4,
            max_episode_steps=1000,
            random_return=-20.272305,  # D4RL's reference scores of hopper (d4rl/infos.py)
            expert_return=3234.3,
            success_return=None,
            network=NetworkSettings(),
            pretraining=PretrainSettings(gradient_steps=24_000, batch_size=128),
            loops={
                "published": _GYM_LOOP,
                "embedded": LoopSettings(n_envs=40, n_steps=20, iterations=20, eval_every=5, eval_episodes=16),
            },
        ),
        Task(
            name="toy",
            family="toy",
            environment="toy",
            observation_dim=2,
            action_dim=2,
            action_horizon=4,
            max_episode_steps=48,
            random_return=0.0,
            expert_return=1.0,
            success_return=1.0,
            network=NetworkSettings(hidden_dims=(64, 64, 64), time_dim=8),
            pretraining=PretrainSettings(gradient_steps=8_000, ema_decay=0.98, ema_start=1_000),
            loops={"embedded": LoopSettings(n_envs=64, n_steps=12, iterations=20, eval_every=5, eval_episodes=128)},
        ),
    ]
}


def get_task(name: str) -> Task:
    """The task called `name`.

    Raises:
        ValueError: unknown name.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; valid: {', '.join(sorted(TASKS))}")
    return TASKS[name]
