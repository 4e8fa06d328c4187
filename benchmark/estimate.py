"""Rough hours and memory of a run, for plans and jobs: simulation, sampling and gradient steps at measured rates.

The rates were measured on the machine of results/speed; another core may be several times slower or faster.
"""

from __future__ import annotations

from itertools import pairwise

from benchmark.envs import ROBOSUITE
from benchmark.methods import get_arm
from benchmark.spec import RunSpec
from benchmark.tasks import Task, get_task

# Environment steps per second and core.
SIMULATION_RATES = {
    "hopper": 11_000.0,
    "walker2d": 6_000.0,
    "halfcheetah": 14_000.0,
    "kitchen-microwave-kettle-light-slider": 575.0,
    "kitchen-microwave-kettle-bottomburner-light": 575.0,
    "lift": 920.0,
    "can": 420.0,
    "square": 330.0,
    "transport": 150.0,
    "toy": 500_000.0,
}
BASE_MEMORY = 1.5  # GiB
ROBOSUITE_MEMORY = 1.0  # GiB, of 100 environments
FLOPS = 58e9  # float32 operations per second and core, of DPPO's Hopper iteration at the published sizes


def run_hours(spec: RunSpec) -> float:
    """Hours of one run on its `threads` cores, evaluations included; whole episodes are assumed to last to the limit.

    A method of another package counts with its acting alone.
    """
    task, loop, settings = get_task(spec.task), spec.loop, spec.settings
    learns = get_arm(spec.method).learns
    evaluations = 1 + (-(-loop.iterations // loop.eval_every) if learns else 0)
    evaluated = evaluations * loop.eval_episodes * task.max_episode_steps
    collected = loop.iterations * loop.n_envs * loop.n_steps * task.action_horizon if learns else 0
    sampling = spec.sampler.ddim_steps if spec.sampler.kind == "ddim" else spec.sampler.denoising_steps
    chunks = (collected + evaluated) / task.action_horizon
    acting = chunks * sampling * settings.get("candidates", 1) * 2 * weights_per_row(task)
    updates = collected / task.action_horizon * gradient_work(spec, task, sampling)
    simulation = (collected + evaluated) / SIMULATION_RATES.get(task.environment, float("inf"))
    return (simulation + (acting + updates) / FLOPS) / spec.threads / 3600


def run_memory(spec: RunSpec) -> float:
    """GiB that a run may need: interpreter and libraries, simulators, and the replay twice, for its checkpoint."""
    task, loop = get_task(spec.task), spec.loop
    stored = loop.iterations * loop.n_envs * loop.n_steps if get_arm(spec.method).learns else 0
    transitions = min(spec.settings.get("replay_capacity", 0), stored)
    row = 2 * task.observation_dim + task.action_horizon * task.action_dim + 2
    simulators = ROBOSUITE_MEMORY if task.environment in ROBOSUITE else 0.0
    return BASE_MEMORY + simulators + 2 * 4 * row * transitions / 2**30


def gradient_work(spec: RunSpec, task: Task, sampling_steps: int) -> float:
    """Floating-point operations of the gradient steps per collected chunk: 6 per weight, forward and backward."""
    settings, actor = spec.settings, 6.0 * weights_per_row(task)
    if settings.keys() >= {"update_epochs", "ft_denoising_steps"}:  # DPPO: every denoising step of every chunk
        return settings["update_epochs"] * settings["ft_denoising_steps"] * actor
    if not settings.keys() >= {"replay_ratio", "critic_hidden_dims"}:  # of another package, or nothing is learnt
        return 0.0
    widths = (task.observation_dim + task.action_horizon * task.action_dim, *settings["critic_hidden_dims"], 1)
    critics = 3 * 6.0 * sum(a * b for a, b in pairwise(widths))
    chain = sampling_steps * (actor + actor / 3) if "eta" in settings else 0.0  # DQL: through the chain, and its target
    return settings["replay_ratio"] * (actor + critics + chain)


def weights_per_row(task: Task) -> int:
    """Weights by which the denoising network multiplies a row: with one residual block one hidden layer's less.

    The product that stands for its skip connection is left out: it has as few columns as a chunk.
    """
    network, chunk = task.network, task.action_horizon * task.action_dim
    condition = network.cond_mlp_dims[-1] if network.cond_mlp_dims else task.observation_dim
    hidden = network.hidden_dims[1:] if len(network.hidden_dims) == 3 else network.hidden_dims
    widths = (chunk + network.time_dim + condition, *hidden, chunk)
    return sum(a * b for a, b in pairwise(widths))
