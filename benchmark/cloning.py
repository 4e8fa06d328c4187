"""Behaviour cloning of a diffusion policy, as DPPO pre-trains it (Ren et al. 2024, appendix).

Every window of `action_horizon` actions inside an episode is a sample, conditioned on the observation before its first
action; the loss is the squared error of the predicted noise (Ho et al. 2020, eq. 14). What is kept is the exponential
moving average of the weights.
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmark.data.episodes import Episodes
from benchmark.policies import FORMAT, RANGES, Normalizer
from benchmark.store import load_checkpoint, write_bytes
from benchmark.tasks import PretrainSettings, Task
from otpr.diffusion import DiffusionPolicy
from otpr.networks import polyak_update

CHECKPOINT_SECONDS = 120.0  # between checkpoints of a training
_REPORTS = 20  # loss reports per training
# what a checkpoint holds beside the states of its parts
_COUNTERS = ("step", "total", "seconds", "averages", "reports", "circumstances")

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
        self,
        parts: dict[str, Any],
        generator: torch.Generator,
        report_every: int,
        progress: Progress | None,
        kept: int,
    ) -> None:
        """`kept` is how many averages are kept in all."""
        self.parts, self.generator, self.report_every = parts, generator, report_every
        self.progress = progress or (lambda step, loss: None)
        self.circumstances = {"threads": torch.get_num_threads(), "torch": str(torch.__version__), "averages": kept}
        self.step, self.total = 0, 0.0
        self.seconds, self.started = 0.0, time.perf_counter()  # what all attempts took up to then
        self.averages: dict[int, dict[str, Tensor]] = {}  # kept ones, by gradient step
        self.reports: list[tuple[int, float]] = []  # gradient step and mean loss since the last one

    def count(self, loss: float) -> None:
        """Count a gradient step and its loss."""
        self.step, self.total = self.step + 1, self.total + loss
        if self.step % self.report_every == 0:
            self.reports.append((self.step, self.total / self.report_every))
            self.progress(*self.reports[-1])
            self.total = 0.0

    def keep(self, average: DiffusionPolicy) -> None:
        """Keep the average as it is now."""
        self.averages[self.step] = {name: value.clone() for name, value in average.state_dict().items()}

    def clock(self) -> float:
        """The seconds that all attempts took."""
        now = time.perf_counter()
        self.seconds, self.started = self.seconds + now - self.started, now
        return self.seconds

    def save(self, path: Path) -> None:
        """Write everything that changes over time.

        Raises:
            OSError: it cannot be written.
        """
        self.clock()
        counters = {name: getattr(self, name) for name in _COUNTERS}
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        write_bytes(path, file_bytes(parts | counters | {"generator": self.generator.get_state()}))

    def resume(self, path: Path) -> None:
        """Go on from what `save` wrote, repeating its reports; from the start where it is damaged or of other bits."""
        try:
            state = load_checkpoint(path)
        except ValueError:
            return
        if not {*self.parts, *_COUNTERS, "generator"} <= state.keys() or state["circumstances"] != self.circumstances:
            return
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        for name in _COUNTERS:
            setattr(self, name, state[name])
        self.generator.set_state(state["generator"])
        for report in self.reports:
            self.progress(*report)


@dataclass(frozen=True)
class Trained:
    """A trained policy.

    Attributes:
        contents: of its file; see `benchmark.policies`.
        averages: the moving averages of its weights that were kept, by gradient step; the last is the file's.
        seconds: that the training took, in all attempts.
    """

    contents: dict[str, Any]
    averages: dict[int, dict[str, Tensor]]
    seconds: float

    def at(self, step: int) -> dict[str, Any]:
        """The contents with the average of an earlier gradient step."""
        return self.contents | {"ema": self.averages[step]}


def train(
    task: Task,
    episodes: Episodes,
    data_digest: str,
    generator: torch.Generator,
    progress: Progress | None = None,
    checkpoint: Path | None = None,
    averages: int = 1,
) -> Trained:
    """Train a policy; the same arguments on the same machine give the same bits, also in several attempts.

    Args:
        episodes: the data, of the task's dimensions.
        data_digest: what identifies it.
        generator: draws the initial weights, then every batch and its noise.
        progress: called about 20 times; of what earlier attempts did at once.
        checkpoint: where the training is kept every `CHECKPOINT_SECONDS`, and goes on from where it is there.
        averages: how many of the averages to keep, evenly spaced over the gradient steps.

    Raises:
        ValueError: no episode is as long as a chunk, or has the return that is asked for.
        OSError: the checkpoint cannot be written.
    """
    episodes = episodes.of_positive_return() if task.pretraining.positive_returns else episodes
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
    training = Training(parts, generator, report_every, progress, averages)
    keep_at = {settings.gradient_steps * (index + 1) // averages for index in range(averages)}
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
        if training.step in keep_at:
            training.keep(average)
        if checkpoint is not None and time.monotonic() - kept >= CHECKPOINT_SECONDS:
            training.save(checkpoint)
            kept = time.monotonic()
    ranges = {name: torch.from_numpy(getattr(normalizer, name)) for name in RANGES}
    contents = {
        "format": FORMAT, "task": task.name, "denoising_steps": policy.denoising_steps,
        "ema": training.averages[training.step], "normalization": ranges, "data_digest": data_digest,
    }  # fmt: skip
    return Trained(contents, training.averages, training.clock())


def file_bytes(state: dict[str, Any]) -> bytes:
    """Tensors and plain values as the content of a file."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()
