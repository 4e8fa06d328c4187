"""Pre-train a task's diffusion policy by behaviour cloning, as DPPO does (Ren et al. 2024, appendix).

    python -m benchmark.pretrain --task toy --out toy.pt

Every window of `action_horizon` actions inside an episode is a sample, conditioned on the observation before its first
action; the loss is the squared error of the predicted noise (Ho et al. 2020, eq. 14). What is saved is the exponential
moving average of the weights.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from torch import Tensor

from benchmark.data.access import load_data, read_task_data
from benchmark.data.episodes import Dataset, Episodes
from benchmark.data.registry import cache_dir
from benchmark.evaluation import Played, evaluate
from benchmark.policies import (
    FORMAT,
    RANGES,
    Normalizer,
    Pretrained,
    installed_path,
    load_pretrained,
    policy_path,
    unpack,
)
from benchmark.policies.demonstrations import demonstrations_path, make_demonstrations, save_demonstrations
from benchmark.provenance import version
from benchmark.seeding import BASE_SEED, Streams
from benchmark.store import load_checkpoint, read_json, write_bytes, write_json
from benchmark.tasks import PretrainSettings, Task, get_task
from otpr.diffusion import DiffusionPolicy, SamplerSettings
from otpr.method import ActionChunk
from otpr.networks import polyak_update

EVALUATION_EPISODES = 50
SAMPLERS = {"ddpm-20": SamplerSettings(), "ddim-5": SamplerSettings(kind="ddim")}
CHECKPOINT_SECONDS = 120.0  # between checkpoints of a training
_REPORTS = 20  # loss reports per training
_HELP = """Make a task's pre-trained policy again. It is kept in the cache: asking for the same again returns at once.

Example: python -m benchmark.pretrain --task hopper-local --out policy.pt"""

Progress = Callable[[int, float], None]  # called with the gradient step and the mean loss since the last call


def fit_normalizer(episodes: Episodes) -> Normalizer:
    """The per-dimension ranges of observations and actions."""
    return Normalizer(
        observation_min=episodes.observations.min(axis=0),
        observation_max=episodes.observations.max(axis=0),
        action_min=episodes.actions.min(axis=0),
        action_max=episodes.actions.max(axis=0),
    )


class Windows:
    """All windows of one length inside the episodes, normalised, as batches."""

    def __init__(self, episodes: Episodes, normalizer: Normalizer, size: int) -> None:
        self.starts = torch.from_numpy(episodes.window_starts(size))  # (W,)
        self.offsets = torch.arange(size)
        self.observations = torch.from_numpy(normalizer.normalize_observations(episodes.observations))
        self.actions = torch.from_numpy(normalizer.normalize_actions(episodes.actions))

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """`size` windows drawn uniformly with replacement: actions (size, H, A), observations (size, O)."""
        rows = self.starts[torch.randint(len(self.starts), (size,), generator=generator)]
        return self.actions[rows[:, None] + self.offsets], self.observations[rows]


def cosine_rate(settings: PretrainSettings, step: int) -> float:
    """Learning rate of gradient step `step` in [0, gradient_steps): linear warm-up, then half a cosine."""
    warmup = settings.warmup_steps
    if step < warmup:
        share = step / warmup
    else:
        share = 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / (settings.gradient_steps - warmup)))
    return settings.final_learning_rate + (settings.learning_rate - settings.final_learning_rate) * share


class Training:
    """What a training needs to go on: its parts with a state, its generator, and how far it is."""

    def __init__(
        self, parts: dict[str, Any], generator: torch.Generator, report_every: int, progress: Progress | None
    ) -> None:
        self.parts, self.generator, self.report_every = parts, generator, report_every
        self.progress = progress or (lambda step, loss: None)
        self.step, self.total = 0, 0.0
        self.reports: list[tuple[int, float]] = []  # gradient step and mean loss since the last one

    def count(self, loss: float) -> None:
        """Count a gradient step and its loss."""
        self.step, self.total = self.step + 1, self.total + loss
        if self.step % self.report_every == 0:
            self.reports.append((self.step, self.total / self.report_every))
            self.progress(*self.reports[-1])
            self.total = 0.0

    def save(self, path: Path) -> None:
        """Write everything that changes over time.

        Raises:
            OSError: it cannot be written.
        """
        counters = {"step": self.step, "total": self.total, "reports": self.reports, "machine": _machine()}
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        write_bytes(path, file_bytes(parts | counters | {"generator": self.generator.get_state()}))

    def resume(self, path: Path) -> None:
        """Go on from what `save` wrote, repeating its reports; from the start where it is damaged or of other bits."""
        try:
            state = load_checkpoint(path)
        except ValueError:
            return
        if state.get("machine") != _machine():
            return
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.step, self.total, self.reports = state["step"], state["total"], state["reports"]
        self.generator.set_state(state["generator"])
        for report in self.reports:
            self.progress(*report)


def _machine() -> dict[str, Any]:
    """What changes the last bits of a training, beside what its file is named after."""
    return {"threads": torch.get_num_threads(), "torch": str(torch.__version__)}


def pretrain(
    task: Task,
    episodes: Episodes,
    data_digest: str,
    generator: torch.Generator,
    progress: Progress | None = None,
    checkpoint: Path | None = None,
) -> dict[str, Any]:
    """Train a policy; the same arguments on the same machine give the same bits, also in several attempts.

    Args:
        episodes: the data, of the task's dimensions.
        data_digest: what identifies it.
        generator: draws the initial weights, then every batch and its noise.
        progress: called about 20 times; of what earlier attempts did at once.
        checkpoint: where the training is kept every `CHECKPOINT_SECONDS`, and goes on from where it is there.

    Returns:
        The contents of a policy file; see `benchmark.policies`.

    Raises:
        ValueError: no episode is as long as a chunk.
        OSError: the checkpoint cannot be written.
    """
    normalizer = fit_normalizer(episodes)
    windows = Windows(episodes, normalizer, task.action_horizon)
    settings = task.pretraining.in_steps(len(windows.starts))
    policy = DiffusionPolicy(task.build_network(generator))
    average = policy.clone().requires_grad_(False)
    averaged = list(average.parameters()), list(policy.parameters())
    optimiser = torch.optim.AdamW(
        policy.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
    )
    report_every, kept = max(1, settings.gradient_steps // _REPORTS), time.monotonic()
    parts = {"policy": policy, "average": average, "optimiser": optimiser}
    training = Training(parts, generator, report_every, progress)
    if checkpoint is not None and checkpoint.exists():
        training.resume(checkpoint)
    for step in range(training.step, settings.gradient_steps):
        optimiser.param_groups[0]["lr"] = cosine_rate(settings, step)
        loss = policy.bc_losses(*windows.batch(settings.batch_size, generator), generator).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if (step + 1) % settings.ema_every == 0 or step + 1 == settings.gradient_steps:
            polyak_update(*averaged, 1.0 if step < settings.ema_start else 1.0 - settings.ema_decay)
        training.count(loss.item())
        if checkpoint is not None and time.monotonic() - kept >= CHECKPOINT_SECONDS:
            training.save(checkpoint)
            kept = time.monotonic()
    return {
        "format": FORMAT,
        "task": task.name,
        "denoising_steps": policy.denoising_steps,
        "ema": {name: value.clone() for name, value in average.state_dict().items()},
        "normalization": {name: torch.from_numpy(getattr(normalizer, name)) for name in RANGES},
        "data_digest": data_digest,
    }


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


def training_key(task: Task, data_digest: str, seed: int) -> str:
    """SHA-256 of all that decides the weights: the data, the sizes, the settings and the seed."""
    parts = {
        "format": FORMAT, "task": task.name, "data_digest": data_digest, "seed": seed,
        "action_horizon": task.action_horizon, "network": dataclasses.asdict(task.network),
        "pretraining": dataclasses.asdict(task.pretraining),
        "denoising_steps": SamplerSettings().denoising_steps,
    }  # fmt: skip
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
    if path.exists() and path.with_suffix(".json").exists():
        load_pretrained(task, path=path)
        return path, True
    losses: list[float] = []

    def record(step: int, loss: float) -> None:
        losses.append(loss)
        if progress is not None:
            progress(step, loss)

    started = time.perf_counter()
    generator = Streams(BASE_SEED, task.name, seed).torch("pretraining")
    unfinished = path.with_suffix(".unfinished.pt")
    state = pretrain(task, dataset.episodes, dataset.digest, generator, record, unfinished)
    if "env_args" in dataset.attributes:
        state["arguments"] = dataset.attributes["env_args"]
    seconds = time.perf_counter() - started
    content = file_bytes(state)
    pretrained = unpack(task, content, SamplerSettings(), str(path))
    card = make_card(task, dataset, seed, pretrained)
    card |= {"key": key, "seconds": round(seconds, 1), "loss": [round(loss, 5) for loss in losses]}
    write_bytes(path, content)
    write_json(path.with_suffix(".json"), card)
    unfinished.unlink(missing_ok=True)
    return path, False


def file_bytes(state: dict[str, Any]) -> bytes:
    """Tensors and plain values as the content of a file."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


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
    dataset = load_data(task.name) if data is None else read_task_data(task.name, data)
    path, cached = make_policy(task, dataset, seed, lambda step, loss: print(f"step {step}  loss {loss:.4f}"))
    card = read_json(path.with_suffix(".json"))
    held = policy_path(task).with_suffix(".json")
    same = held.exists() and read_json(held).get("sha256") == card["sha256"]
    if out is None and not held.exists():
        out = installed_path(task)
    if out is not None:
        install(task, dataset, path, out)
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
    write_bytes(target, source.read_bytes())
    write_json(target.with_suffix(".json"), read_json(source.with_suffix(".json")))
    save_demonstrations(task, dataset, pretrained.normalizer, target.with_name(f"{target.stem}-expert.pt"))


def ensure_policy(task: Task, progress: Progress | None = None) -> None:
    """Train and install the policy of a task that has data but no policy yet, or make the expert pairs that it lacks.

    Raises:
        ValueError: the data is missing or damaged, or not what the policy was trained on.
        OSError: a file cannot be written.
    """
    if not policy_path(task).exists():
        dataset = load_data(task.name)
        install(task, dataset, make_policy(task, dataset, 0, progress)[0], installed_path(task))
    elif not demonstrations_path(task).exists():
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
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main, prog="python -m benchmark.pretrain", description=_HELP))
