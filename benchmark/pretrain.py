"""Pre-train a task's diffusion policy by behaviour cloning, as DPPO does (Ren et al. 2024, appendix).

    python -m benchmark.pretrain --task toy --out toy.pt

The training is in `benchmark.cloning`. A task with a published start takes the one of `CHECKPOINTS` averages whose
return or success is nearest to it, so that fine-tuning has as much to improve as it had there; DPPO stopped the
pre-training of Lift and Can early to the same end. Any other task takes the last.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from numpy.typing import NDArray

from benchmark.cloning import Progress, Trained, file_bytes, train
from benchmark.data.access import load_data, read_task_data
from benchmark.data.episodes import Dataset
from benchmark.data.registry import cache_dir
from benchmark.evaluation import Diverged, Played, evaluate
from benchmark.launch.lease import waited_for
from benchmark.plan import check_writable
from benchmark.policies import FORMAT, Pretrained, installed_path, load_pretrained, policy_path, unpack, write_policy
from benchmark.policies.demonstrations import demonstrations_path, make_demonstrations, save_demonstrations
from benchmark.provenance import version
from benchmark.seeding import BASE_SEED, Streams
from benchmark.store import read_json
from benchmark.tasks import Task, get_task
from otpr.diffusion import DiffusionPolicy, SamplerSettings
from otpr.method import ActionChunk

EVALUATION_EPISODES = 50
SAMPLERS = {"ddpm-20": SamplerSettings(), "ddim-5": SamplerSettings(kind="ddim")}
_UNFINISHED = ".unfinished.pt"
CHECKPOINTS = 10  # evenly spaced over a training, among which one is chosen by the published start
_HELP = """Make a task's pre-trained policy again. It is kept in the cache: asking for the same again returns at once.

Example: python -m benchmark.pretrain --task hopper-local --out policy.pt"""


def evaluate_start(
    task: Task, pretrained: Pretrained, episodes: int, sampler: SamplerSettings, threads: int = 1
) -> Played:
    """Whole, seeded episodes in evaluation mode, all stepped side by side."""
    streams = Streams(BASE_SEED, task.name, 0)
    generator, everyone = streams.torch("start-actions"), np.arange(episodes)
    actor = DiffusionPolicy(pretrained.policy.network, sampler)
    env = task.make_env(episodes, threads, pretrained.arguments)
    try:
        return evaluate(
            env,
            lambda observations: ActionChunk(actor.sample(observations, False, generator)),
            pretrained.normalizer,
            streams.episodes("start-resets", everyone, np.zeros_like(everyone)),
            "cpu",
        )
    finally:
        env.close()


def choose_checkpoint(task: Task, trained: Trained) -> tuple[int, dict[str, float]]:
    """The gradient step of the average from which fine-tuning starts.

    The published successes count episodes with a whole rewarded chunk.

    Returns:
        The step of the average whose return (or success rate, where that is the score) with the sampler of the
        pre-training is nearest `task.published_start`, and those of all averages by step; without a published
        start the last step and nothing.
    """
    steps = sorted(trained.averages)
    if task.published_start is None:
        return steps[-1], {}
    starts: dict[int, float] = {}
    for step in steps:
        pretrained = unpack(task, file_bytes(trained.at(step)), SamplerSettings(), f"the average of step {step}")
        played = evaluate_start(task, pretrained, EVALUATION_EPISODES, SAMPLERS["ddpm-20"], torch.get_num_threads())
        row = played.row(task, "whole_chunk")
        starts[step] = float(row["return_mean"] if task.success_reward is None else row["success_rate"])
    published = task.published_start
    chosen = min(steps, key=lambda step: abs(starts[step] - published))
    return chosen, {str(step): round(start, 3) for step, start in starts.items()}


def training_key(task: Task, data_digest: str, seed: int) -> str:
    """SHA-256 of all that decides the weights: the data, the sizes, the settings and the seed."""
    parts = {
        "format": FORMAT, "task": task.name, "data_digest": data_digest, "seed": seed,
        "action_horizon": task.action_horizon, "network": dataclasses.asdict(task.network),
        "pretraining": dataclasses.asdict(task.pretraining),
        "denoising_steps": SamplerSettings().denoising_steps,
    }  # fmt: skip
    if task.published_start is not None:
        parts |= {"start": task.published_start, "checkpoints": CHECKPOINTS, "episodes": EVALUATION_EPISODES}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def make_policy(task: Task, dataset: Dataset, seed: int, progress: Progress | None = None) -> tuple[Path, bool]:
    """The cached policy file for this data and seed, trained and evaluated first where there is none.

    Returns:
        The file, whose card lies beside it, and whether it was there already.

    Raises:
        ValueError: data that does not fit the task, or a damaged file in the cache.
        OSError: the cache cannot be written.
    """
    key = training_key(task, dataset.digest, seed)
    path = cache_dir() / "policies" / f"{task.name}-{key[:16]}.pt"
    if _cached(task, path):  # before anything is locked: the cache may be read-only
        return path, True
    path.parent.mkdir(parents=True, exist_ok=True)
    with waited_for(path.with_suffix(".lock")):  # whoever trains it already
        if _cached(task, path):
            return path, True
        content, card = _trained(task, dataset, seed, path, progress)
        write_policy(path, content, card | {"key": key})
        path.with_suffix(_UNFINISHED).unlink(missing_ok=True)
    return path, False


def _cached(task: Task, path: Path) -> bool:
    """Whether the policy is there with its card; raises ValueError where it is damaged."""
    there = path.exists() and path.with_suffix(".json").exists()
    if there:
        load_pretrained(task, path=path)
    return there


def _trained(
    task: Task, dataset: Dataset, seed: int, path: Path, progress: Progress | None
) -> tuple[bytes, dict[str, Any]]:
    """The contents of a policy file and of its card; the training is kept beside `path` while it lasts."""
    losses: list[float] = []

    def record(step: int, loss: float) -> None:
        losses.append(loss)
        if progress is not None:
            progress(step, loss)

    generator = Streams(BASE_SEED, task.name, seed).torch("pretraining")
    unfinished = path.with_suffix(_UNFINISHED)
    kept = 1 if task.published_start is None else CHECKPOINTS
    trained = train(task, dataset.episodes, dataset.digest, generator, record, unfinished, kept)
    if "env_args" in dataset.attributes:
        trained.contents["arguments"] = dataset.attributes["env_args"]
    step, starts = choose_checkpoint(task, trained)
    content = file_bytes(trained.at(step))
    pretrained = unpack(task, content, SamplerSettings(), str(path))
    card = make_card(task, dataset, seed, pretrained)
    if starts:
        card |= {"published_start": task.published_start, "checkpoint": step, "checkpoint_starts": starts}
    return content, card | {"seconds": round(trained.seconds, 1), "loss": [round(loss, 5) for loss in losses]}


def make_card(task: Task, dataset: Dataset, seed: int, pretrained: Pretrained) -> dict[str, Any]:
    """What is to be known about a policy file, with its returns under each sampler of `SAMPLERS`."""
    start, threads = {}, torch.get_num_threads()
    for name, sampler in SAMPLERS.items():
        played = evaluate_start(task, pretrained, EVALUATION_EPISODES, sampler, threads)
        row = played.row(task, "any_step")
        success = {} if row["success_rate"] == "" else {"success_rate": row["success_rate"]}
        start[name] = {"episodes": row["episodes"], **_statistics(played.returns), **success}
    lengths, windows = dataset.episodes.lengths, dataset.episodes.window_starts(task.action_horizon)
    return {
        "task": task.name,
        "command": f"python -m benchmark.pretrain --task {task.name} --seed {seed} --threads {threads}",
        "seed": seed,
        "base_seed": BASE_SEED,
        "network": dataclasses.asdict(task.network),
        "settings": dataclasses.asdict(task.pretraining),
        "data_digest": dataset.digest,
        "data": {
            "episodes": len(lengths), "steps": int(lengths.sum()), "windows": len(windows),
            "return": _statistics(dataset.episodes.returns), "attributes": dataset.attributes,
        },
        "start_return": start,
        "sha256": pretrained.digest,
        "threads": threads,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("torch", "numpy")}},
    }  # fmt: skip


def _statistics(values: NDArray[np.float64]) -> dict[str, float]:
    summary = {"mean": values.mean(), "std": values.std(), "min": values.min(), "max": values.max()}
    return {name: round(float(value), 3) for name, value in summary.items()}


def run(task_name: str, data: Path | None, out: Path | None, seed: int) -> None:
    """Make a policy and print what it is; it goes to `out`, and by default to the task where that has none.

    Raises:
        ValueError: unknown task, bad data, or a damaged file.
        OSError: a file cannot be written.
    """
    task = get_task(task_name)
    if out is not None:
        check_writable(out.parent)
    dataset = load_data(task.name) if data is None else read_task_data(task.name, data)
    path, cached = make_policy(task, dataset, seed, lambda step, loss: print(f"step {step}  loss {loss:.4f}"))
    card = read_json(path.with_suffix(".json"))
    held = policy_path(task).with_suffix(".json")
    same = held.exists() and read_json(held).get("sha256") == card["sha256"]
    if out is not None:
        install(task, dataset, path, out)
    elif not held.exists() and install_missing(task, dataset, path):
        out = installed_path(task)
    print(f"{out or path}: {'from the cache, ' if cached else ''}trained in {card['seconds']:.0f} s")
    for name, values in card["start_return"].items():
        success = f", success {values['success_rate']:.2f}" if "success_rate" in values else ""
        spread = f"{values['mean']:.2f} +- {values['std']:.2f} ({values['episodes']} episodes{success})"
        print(f"  start return, {name}: {spread}")
    if held != (out or path).with_suffix(".json"):
        print(f"  {'the same bits as' if same else 'not the bits of'} the policy that the task starts from")


def install(task: Task, dataset: Dataset, source: Path, target: Path) -> None:
    """Write a policy file to `target`, with its card and, beside it, the expert pairs of the same data.

    Raises:
        ValueError: the file is damaged.
        OSError: a file cannot be written.
    """
    pretrained = load_pretrained(task, path=source)
    write_policy(target, source.read_bytes(), read_json(source.with_suffix(".json")))
    save_demonstrations(task, dataset, pretrained.normalizer, target.with_name(f"{target.stem}-expert.pt"))


def install_missing(task: Task, dataset: Dataset, source: Path) -> bool:
    """`install` for the task to start from, unless another command has done so in the meantime; whether it did."""
    target = installed_path(task)
    with waited_for(target.with_suffix(".lock")):
        missing = not target.exists()
        if missing:
            install(task, dataset, source, target)
    return missing


def ensure_policy(task: Task, progress: Progress | None = None) -> None:
    """Train and install the policy of a task that has data but no policy yet, or make the expert pairs that it lacks.

    Raises:
        ValueError: the data is missing or damaged, or not what the policy was trained on.
        OSError: a file cannot be written.
    """
    if not policy_path(task).exists():
        dataset = load_data(task.name)
        install_missing(task, dataset, make_policy(task, dataset, 0, progress)[0])
    if not demonstrations_path(task).exists():
        make_demonstrations(task, demonstrations_path(task))


def main(
    task: str,
    data: Path | None = None,
    out: Path | None = None,
    seed: int = 0,
    threads: Annotated[int, tyro.conf.arg(help="CPU threads; they may change the last bits of the weights")] = 1,
) -> int:
    """Make a task's pre-trained policy; returns the exit status.

    Args:
        task: name of the task.
        data: demonstrations of the task in D4RL's, robomimic's or Minari's layout; by default the task's own,
            generated where missing.
        out: where to write the policy as well, with its card and the expert pairs beside it.
        seed: index of the training.
    """
    try:
        if threads < 1:
            raise ValueError(f"--threads must be at least 1, got {threads}")
        torch.set_num_threads(threads)
        run(task, data, out, seed)
    except (ValueError, OSError, RuntimeError, Diverged) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main, prog="python -m benchmark.pretrain", description=_HELP))
