"""Evaluate a checkpoint alone: the policy of a run, or the one that a task starts from.

    python -m benchmark.evaluate --run runs/quick/hopper-local/otpr/seed-0
    python -m benchmark.evaluate --task hopper-local --episodes 50 --video hopper.mp4
    python -m benchmark.evaluate --task hopper-local --ddim-steps 5

With the run's own number of episodes and seed, the figures are those of the evaluation at its checkpoint.
Exit status 0: done; 2: bad input, an action that is not finite, or a simulator's process that died.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from benchmark import video
from benchmark.evaluation import Diverged
from benchmark.finetune import Trainer
from benchmark.launch.execute import numeric_settings
from benchmark.plan import resolve_device
from benchmark.policies import load_pretrained
from benchmark.seeding import Streams
from benchmark.spec import RunSpec, load_spec
from benchmark.store import OWN_RULE, RunPaths
from benchmark.tasks import get_task
from otpr.diffusion import SamplerSettings
from otpr.method import ActionChunk, Rule


@dataclass(frozen=True)
class Arguments:
    """Command line of `benchmark.evaluate`."""

    run: Path | None = None
    """Directory of a run: its checkpoint is evaluated."""
    task: str | None = None
    """Instead of a run, a task: the policy that it starts from is evaluated."""
    episodes: int | None = None
    """Whole episodes (default: as many as the run's, or the task's, evaluations have)."""
    seed: int | None = None
    """Draws other episodes (default: the run's seed; 0 for a task)."""
    ddim_steps: int | None = None
    """Of a task: so many DDIM steps, 5 in the suites on embedded data (default: all steps of the chain)."""
    rule: str = OWN_RULE
    """How to act: the method's own way, or another that it has (actor, best_q)."""
    video: Path | None = None
    """Film of the first episode: .mp4 (needs imageio-ffmpeg) or .gif."""
    threads: int | None = None
    """Threads of a task's evaluation (default: 1); a run has its own."""


def main(arguments: Arguments) -> int:
    """Film and evaluate.

    Returns:
        The exit status.
    """
    try:
        if arguments.video:
            video.check_format(arguments.video)
        spec = check(arguments)
        with numeric_settings(spec):
            trainer = Trainer(spec)
            try:
                evaluate_checkpoint(trainer, arguments)
            finally:
                trainer.close()
    except (ValueError, OSError, RuntimeError, Diverged) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def check(arguments: Arguments) -> RunSpec:
    """The specification to evaluate: the run's, or one of the frozen policy of the task.

    Raises:
        ValueError: bad input.
    """
    if (arguments.run is None) == (arguments.task is None):
        raise ValueError("give either --run DIR or --task NAME")
    for name, least in (("episodes", 1), ("seed", 0), ("threads", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} must be at least {least}, got {value}")
    if arguments.run is None:
        spec = pretrained_spec(arguments.task or "", arguments.threads or 1, arguments.ddim_steps)
    elif arguments.ddim_steps is not None:
        raise ValueError(f"--ddim-steps {arguments.ddim_steps} is an option of --task; a run has its own sampler")
    elif arguments.threads is not None:
        raise ValueError(f"--threads {arguments.threads} is an option of --task; a run has its own")
    else:
        paths = RunPaths(arguments.run)
        spec = load_spec(paths.spec)
        if not paths.has_checkpoint:
            again = f"python -m benchmark.run --from-spec {paths.spec} --out DIR"
            raise ValueError(f"{paths.root} has no checkpoint.pt (results/ has none); make it again: {again}")
        resolve_device(spec.device)
    return replace(spec, loop=replace(spec.loop, eval_episodes=arguments.episodes or spec.loop.eval_episodes))


def pretrained_spec(task_name: str, threads: int, ddim_steps: int | None) -> RunSpec:
    """A run without training, so that a task's policy is evaluated as row 0 of every run is.

    Raises:
        ValueError: unknown task, no usable policy, or more steps than the chain has.
    """
    task, sampler = get_task(task_name), SamplerSettings()
    if ddim_steps is not None:
        sampler = replace(sampler, kind="ddim", ddim_steps=ddim_steps)
    pretrained = load_pretrained(task, sampler)
    protocol, loop = next(iter(task.loops.items()))
    return RunSpec(
        task=task_name,
        method="frozen",
        seed=0,
        protocol=protocol,
        loop=replace(loop, n_envs=1, n_steps=1),
        sampler=sampler,
        settings={},
        policy_digest=pretrained.digest,
        data_digest=pretrained.data_digest,
        threads=threads,
    )


def evaluate_checkpoint(trainer: Trainer, arguments: Arguments) -> None:
    """Restore, film where asked for, play the episodes, print.

    Raises:
        ValueError: an unusable checkpoint, an unknown rule, or nothing to draw with.
        OSError: the film cannot be written.
        Diverged: an action is not finite.
    """
    spec = trainer.spec
    if arguments.run:
        trainer.restore(RunPaths(arguments.run))
    if arguments.seed is not None:
        trainer.streams = Streams(spec.base_seed, spec.task, arguments.seed)
    rule = acting_rule(trainer, arguments.rule)
    if arguments.video:
        film(trainer, rule, arguments.video)
        print(f"{arguments.video}: the first episode")
    row = trainer.play(rule)
    if arguments.run:
        print(f"{arguments.run}: {spec.method} on {spec.task} after {trainer.env_steps:,} steps, rule {arguments.rule}")
    else:
        sampler = spec.sampler
        chain = f"{sampler.ddim_steps} DDIM steps" if sampler.kind == "ddim" else f"all {sampler.denoising_steps} steps"
        print(f"{spec.task}: the policy that it starts from, {chain} of its chain")
    print(describe(row))


def acting_rule(trainer: Trainer, name: str) -> Rule:
    """A way to act, by name; before the first iteration the own one is the pre-trained policy's, as in row 0.

    Raises:
        ValueError: the method has no rule of that name.
    """
    method = trainer.method if trainer.iteration else trainer.pretrained
    rules: dict[str, Rule] = {OWN_RULE: lambda observations, generator: method.act(observations, False, generator)}
    rules |= method.other_rules()
    if name not in rules:
        raise ValueError(f"{trainer.spec.method!r} has no rule {name!r}; valid: {', '.join(rules)}")
    return rules[name]


def film(trainer: Trainer, rule: Rule, path: Path) -> None:
    """Write a film of the first evaluation episode.

    Raises:
        ValueError: it cannot be drawn.
        OSError: the file cannot be written.
    """
    spec = trainer.spec
    arguments = load_pretrained(trainer.task, spec.sampler).arguments
    env = replace(trainer.task, action_horizon=1).make_env(1, 1, arguments)
    first, generator = np.zeros(1, dtype=np.int64), trainer.streams.torch("evaluation-actions", spec.device)
    seed = int(trainer.streams.episodes("evaluation-episode", first, first)[0])

    def act(observations: Any) -> ActionChunk:
        return rule(observations, generator)

    try:
        video.write_film(path, video.film_episode(env, act, trainer.normalizer, seed, spec.device))
    finally:
        env.close()


def describe(row: dict[str, Any]) -> str:
    """The evaluation columns, one a line, in the digits of `curve.csv`."""
    return "\n".join(f"  {name:14}{value if value != '' else '-'}" for name, value in row.items())


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments, description=__doc__, prog="python -m benchmark.evaluate")))
