"""The one table of tasks: what each is made of, and the sizes of its training loops.

A name with ``-local`` runs on embedded data and is never to be read as D4RL's or robomimic's task of that name.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from benchmark.envs import VectorEnv, make_env
from otpr.denoisers import DenoisingMLP
from otpr.method import TaskShape

Protocol = Literal["published", "embedded"]
SUCCESS_RULES = ("any_step", "whole_chunk")
ENTRY_POINTS = "otpr_bench.tasks"  # installed packages add tasks under this name, each a `Task`


@dataclass(frozen=True)
class NetworkSettings:
    """Sizes of a task's denoising network (DPPO's per-task choice)."""

    hidden_dims: tuple[int, ...] = (512, 512, 512)
    activation: str = "relu"
    time_dim: int = 16
    cond_mlp_dims: tuple[int, ...] = ()


@dataclass(frozen=True)
class PretrainSettings:
    """Behaviour cloning of the diffusion policy (as in DPPO: AdamW, cosine rate, EMA from a late start)."""

    gradient_steps: int = 60_000
    batch_size: int = 256
    learning_rate: float = 1e-3  # at the first step; falls along a cosine
    final_learning_rate: float = 1e-4
    weight_decay: float = 1e-6
    ema_decay: float = 0.995
    ema_every: int = 10  # gradient steps between EMA updates
    ema_start: int = 2_000  # gradient steps before which the average is the model itself
    warmup_steps: int = 0  # gradient steps in which the rate rises from the final one to the first one
    epochs: int = 0  # passes over all windows, instead of `gradient_steps`; 0: as many steps as that says
    warmup_epochs: int = 0  # instead of `warmup_steps`, where `epochs` is given
    ema_start_epochs: int = 0  # instead of `ema_start`, where `epochs` is given
    positive_returns: bool = False  # leave out episodes whose return is not above 0

    def in_steps(self, windows: int) -> PretrainSettings:
        """The same for data of `windows` chunks, with every duration in gradient steps."""
        if not self.epochs:
            return self
        per_epoch = math.ceil(windows / self.batch_size)
        return replace(
            self,
            gradient_steps=self.epochs * per_epoch,
            warmup_steps=self.warmup_epochs * per_epoch,
            ema_start=self.ema_start_epochs * per_epoch,
            epochs=0,
        )


@dataclass(frozen=True)
class LoopSettings:
    """Sizes of the training loop; all methods of a comparison share them."""

    n_envs: int
    n_steps: int  # chunks per environment and iteration
    iterations: int  # training iterations
    eval_every: int  # iterations between evaluations; the last is always evaluated
    eval_episodes: int  # whole episodes per evaluation
    evaluate_rules: bool = False  # each evaluation also records the method's other rules of acting (evaluations.csv)
    reset_at_iteration: bool = False  # new episodes in every environment at each iteration (DPPO's robomimic)
    success_rule: Literal["any_step", "whole_chunk"] = "any_step"  # robomimic's definition, or DPPO's: all of a chunk

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: a size below 1, or an unknown rule.
        """
        for name in ("n_envs", "n_steps", "iterations", "eval_every", "eval_episodes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.success_rule not in SUCCESS_RULES:
            raise ValueError(f"unknown success_rule {self.success_rule!r}; valid: {', '.join(SUCCESS_RULES)}")


@dataclass(frozen=True)
class Task:
    """One task.

    Its score is (return - random_return) / (expert_return - random_return), so that 1 is the expert; where
    `success_reward` is set, it is the success rate.
    """

    name: str
    family: str  # key of the methods' settings tables
    environment: str  # name known to `benchmark.envs.make_env`
    observation_dim: int
    action_dim: int
    action_horizon: int
    max_episode_steps: int
    random_return: float
    expert_return: float
    success_return: float | None  # least return of a successful episode; None where success has no such meaning
    network: NetworkSettings
    pretraining: PretrainSettings
    loops: dict[str, LoopSettings]  # by protocol
    success_reward: float | None = None  # reward of a step in which the task is solved, where rewards are sparse
    published_start: float | None = None  # return or success of the pre-trained policy in the papers
    policy: str = ""  # file of the pre-trained policy, where it comes with another package
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # of methods, beyond their own tables
    observation_clip: float = math.inf  # largest magnitude of a normalised observation

    def score(self, mean_return: float, success_rate: float | None) -> float:
        """The normalised score of a mean return, or of a success rate where that is the score."""
        if self.success_reward is not None and success_rate is not None:
            return success_rate
        return (mean_return - self.random_return) / (self.expert_return - self.random_return)

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

    def make_env(self, num_envs: int, threads: int = 1, arguments: Mapping[str, Any] | None = None) -> VectorEnv:
        """`num_envs` environments of this task; `arguments` are the simulator's that came with the data."""
        return make_env(self.environment, num_envs, self.action_horizon, threads, arguments, self.max_episode_steps)

    def shape(self, loop: LoopSettings) -> TaskShape:
        """What a method needs to know of the task and of the loop."""
        sizes = (self.observation_dim, self.action_dim, self.action_horizon)
        return TaskShape(*sizes, loop.n_envs, loop.n_steps, loop.reset_at_iteration)

    def loop(self, protocol: str) -> LoopSettings:
        """The loop sizes of a protocol.

        Raises:
            ValueError: this task has no such protocol.
        """
        if protocol not in self.loops:
            raise ValueError(f"task {self.name!r} has no protocol {protocol!r}; valid: {', '.join(self.loops)}")
        return self.loops[protocol]


@dataclass(frozen=True)
class Simulator:
    """What all tasks on one simulated robot share; fields as in `Task`."""

    environment: str
    observation_dim: int
    action_dim: int
    max_episode_steps: int
    random_return: float = 0.0
    expert_return: float = 1.0
    success_return: float | None = None
    success_reward: float | None = None
    action_horizon: int = 4


_HOPPER = Simulator("hopper", 11, 3, 1000, -20.272305, 3234.3)  # random and expert: D4RL's reference scores, infos.py
_WALKER2D = Simulator("walker2d", 17, 6, 1000, 1.629008, 4592.3)
_HALFCHEETAH = Simulator("halfcheetah", 17, 6, 1000, -280.178953, 12135.0)
_KITCHEN = Simulator("kitchen-microwave-kettle-light-slider", 60, 9, 280, expert_return=4.0, success_return=4.0)
_KITCHEN_MIXED = replace(_KITCHEN, environment="kitchen-microwave-kettle-bottomburner-light")
_LIFT = Simulator("lift", 19, 7, 300, success_reward=1.0)
_CAN = Simulator("can", 23, 7, 300, success_reward=1.0)
_SQUARE = Simulator("square", 23, 7, 400, success_reward=1.0)
_TRANSPORT = Simulator("transport", 59, 14, 800, success_reward=1.0, action_horizon=8)

# Training iterations: DPPO's n_train_itr less its evaluations, which are every 10th iteration from 0 on.
_GYM_LOOP = LoopSettings(n_envs=40, n_steps=500, iterations=900, eval_every=9, eval_episodes=40)
_KITCHEN_LOOP = LoopSettings(n_envs=40, n_steps=70, iterations=270, eval_every=9, eval_episodes=40)
_LIFT_LOOP = LoopSettings(
    n_envs=50, n_steps=300, iterations=72, eval_every=9, eval_episodes=200, reset_at_iteration=True
)
_CAN_LOOP = replace(_LIFT_LOOP, iterations=135)
_SQUARE_LOOP = replace(_LIFT_LOOP, n_steps=400, iterations=180)

_GYM_NETWORK = NetworkSettings()
_KITCHEN_NETWORK = NetworkSettings((256, 256, 256), "mish", 16, (128, 32))
_LIFT_NETWORK = NetworkSettings((512, 512, 512), "mish", 16)
_SQUARE_NETWORK = NetworkSettings((1024, 1024, 1024), "mish", 32, (512, 64))
_TRANSPORT_NETWORK = NetworkSettings((1024, 1024, 1024), "mish", 32)

# Pre-training as in DPPO v0.8: epochs, with the average of the weights kept from the 20th on.
_KITCHEN_PRETRAINING = PretrainSettings(epochs=3000, batch_size=128, warmup_epochs=1, ema_start_epochs=20)
_GYM_PRETRAINING = replace(_KITCHEN_PRETRAINING, epochs=200, positive_returns=True)
_ROBOMIMIC_PRETRAINING = PretrainSettings(
    epochs=3000, batch_size=256, learning_rate=1e-4, final_learning_rate=1e-5, warmup_epochs=100, ema_start_epochs=20
)


def _published(
    name: str,
    family: str,
    simulator: Simulator,
    network: NetworkSettings,
    pretraining: PretrainSettings,
    loop: LoopSettings,
    start: float | None = None,
) -> Task:
    """A task of the papers."""
    return Task(
        name, family, network=network, pretraining=pretraining, loops={"published": loop}, published_start=start,
        **vars(simulator),
    )  # fmt: skip


def _local(
    family: str,
    simulator: Simulator,
    network: NetworkSettings,
    pretraining: PretrainSettings,
    embedded: LoopSettings,
    published: LoopSettings | None = None,
) -> Task:
    """The stand-in of a family on embedded data."""
    loops = {"embedded": embedded} | ({"published": published} if published else {})
    return Task(f"{family}-local", family, network=network, pretraining=pretraining, loops=loops, **vars(simulator))


_GYM_LOCAL = PretrainSettings(gradient_steps=24_000, batch_size=128)
_WALK_LOCAL = PretrainSettings(gradient_steps=80_000, batch_size=256)
_GYM_SHORT = LoopSettings(n_envs=40, n_steps=20, iterations=20, eval_every=5, eval_episodes=16)

TASKS: dict[str, Task] = {
    task.name: task
    for task in [
        _published("hopper-medium-v2", "hopper", _HOPPER, _GYM_NETWORK, _GYM_PRETRAINING, _GYM_LOOP, 1437.0),
        _published("walker2d-medium-v2", "walker2d", _WALKER2D, _GYM_NETWORK, _GYM_PRETRAINING, _GYM_LOOP, 2772.0),
        _published("halfcheetah-medium-v2", "halfcheetah", _HALFCHEETAH, _GYM_NETWORK, _GYM_PRETRAINING, _GYM_LOOP,
                   4170.0),
        _published("kitchen-complete-v0", "kitchen", _KITCHEN, _KITCHEN_NETWORK, _KITCHEN_PRETRAINING, _KITCHEN_LOOP),
        _published("kitchen-partial-v0", "kitchen", _KITCHEN, _KITCHEN_NETWORK,
                   replace(_KITCHEN_PRETRAINING, weight_decay=1e-5), _KITCHEN_LOOP),
        _published("kitchen-mixed-v0", "kitchen", _KITCHEN_MIXED, _KITCHEN_NETWORK,
                   replace(_KITCHEN_PRETRAINING, batch_size=256), _KITCHEN_LOOP),
        _published("lift", "lift", _LIFT, _LIFT_NETWORK, _ROBOMIMIC_PRETRAINING, _LIFT_LOOP),
        _published("can", "can", _CAN, _LIFT_NETWORK, _ROBOMIMIC_PRETRAINING, _CAN_LOOP, 0.615),
        _published("square", "square", _SQUARE, _SQUARE_NETWORK, _ROBOMIMIC_PRETRAINING, _SQUARE_LOOP, 0.44),
        _published("transport", "transport", _TRANSPORT, _TRANSPORT_NETWORK, _ROBOMIMIC_PRETRAINING, _SQUARE_LOOP,
                   0.18),
        _local("hopper", _HOPPER, _GYM_NETWORK, _GYM_LOCAL, _GYM_SHORT, _GYM_LOOP),
        _local("walker2d", _WALKER2D, _GYM_NETWORK, _WALK_LOCAL, _GYM_SHORT, _GYM_LOOP),
        _local("halfcheetah", _HALFCHEETAH, _GYM_NETWORK, _WALK_LOCAL, _GYM_SHORT, _GYM_LOOP),
        # Its demonstrator never touches some objects, so that their positions move by 1e-4 of noise in the data; where
        # an exploring policy hits one it would be seen at thousands (a test in tests/test_local_tasks.py shows it).
        replace(_local("kitchen", _KITCHEN, _KITCHEN_NETWORK, replace(_GYM_LOCAL, gradient_steps=20_000),
                       replace(_GYM_SHORT, n_steps=35, eval_episodes=20)), observation_clip=5.0),
        _local("lift", replace(_LIFT, max_episode_steps=100), _LIFT_NETWORK,
               replace(_GYM_LOCAL, gradient_steps=4_000),  # stopped early, to leave something to improve, as in DPPO
               LoopSettings(n_envs=20, n_steps=25, iterations=15, eval_every=5, eval_episodes=20)),
        _local("can", replace(_CAN, max_episode_steps=200), _LIFT_NETWORK, replace(_GYM_LOCAL, gradient_steps=12_000),
               LoopSettings(n_envs=20, n_steps=25, iterations=20, eval_every=10, eval_episodes=20)),
        _local("square", replace(_SQUARE, max_episode_steps=200), _LIFT_NETWORK,
               replace(_GYM_LOCAL, gradient_steps=60_000, batch_size=256),
               LoopSettings(n_envs=20, n_steps=25, iterations=20, eval_every=10, eval_episodes=20)),
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
}  # fmt: skip


def get_task(name: str) -> Task:
    """The task called `name`: of the table, or of an installed package's entry point.

    Raises:
        ValueError: unknown name, or an entry point that holds no task of its name.
    """
    if name in TASKS:
        return TASKS[name]
    found = importlib.metadata.entry_points(group=ENTRY_POINTS)
    if name not in found.names:
        raise ValueError(f"unknown task {name!r}; valid: {', '.join(sorted({*TASKS, *found.names}))}")
    task = found[name].load()
    if not isinstance(task, Task) or task.name != name:
        raise ValueError(f"entry point {name!r} of {ENTRY_POINTS} must be a Task of that name, got {task!r}")
    return task
