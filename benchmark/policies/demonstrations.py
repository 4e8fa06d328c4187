"""Expert pairs of each task: chunks of its data's best episodes, normalised as the pre-trained policy sees them.

``TASK-expert.pt`` is a plain dictionary (`FORMAT` 1): ``task``, ``observations`` (M, O), ``actions`` (M, H, A),
``ranks`` (M,) and ``data_digest``; see `otpr.method.Demonstrations`. Made from the data by

    python -m benchmark.policies.demonstrations --task hopper-local
"""

from __future__ import annotations

import hashlib
import io
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

from benchmark.data.access import load_data
from benchmark.data.episodes import Dataset
from benchmark.policies import REPAIR, Normalizer, load_pretrained, policy_path
from benchmark.seeding import BASE_SEED, derive_seed
from benchmark.store import write_bytes
from benchmark.tasks import Task, get_task
from otpr.method import Demonstrations

FORMAT = 1
HELD_SHARE = 0.25  # of the episodes, the best: the largest share that an arm can ask for
HELD_PAIRS = 4096


@dataclass(frozen=True)
class HeldDemonstrations:
    """Expert pairs with the SHA-256 of their file."""

    pairs: Demonstrations
    digest: str


def demonstrations_path(task: Task) -> Path:
    """Where the expert pairs of a task are looked for: beside its policy."""
    path = policy_path(task)
    return path.with_name(f"{path.stem}-expert.pt")


def load_demonstrations(task: Task, path: Path | None = None) -> HeldDemonstrations:
    """Load a task's expert pairs.

    Raises:
        ValueError: missing or unreadable file, or one of another task or other sizes.
    """
    path = demonstrations_path(task) if path is None else path
    try:
        content = path.read_bytes()
    except OSError as error:
        hint = f"make them with: python -m benchmark.policies.demonstrations --task {task.name}"
        raise ValueError(f"{path}: no expert pairs ({error.strerror}); {hint}") from error
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        pairs = Demonstrations(state["observations"], state["actions"], state["ranks"])
        count = len(pairs.ranks)
        fits = state["format"] == FORMAT and state["task"] == task.name
        fits &= pairs.observations.shape == (count, task.observation_dim)
        fits &= pairs.actions.shape == (count, task.action_horizon, task.action_dim)
    except Exception as error:
        raise ValueError(f"{path}: unreadable expert pairs ({type(error).__name__}); {REPAIR}") from error
    if not fits:
        raise ValueError(f"{path}: not expert pairs of {task.name!r} in format {FORMAT}")
    return HeldDemonstrations(pairs, hashlib.sha256(content).hexdigest())


def choose_demonstrations(task: Task, dataset: Dataset, normalizer: Normalizer) -> Demonstrations:
    """`HELD_PAIRS` windows drawn without replacement from the best `HELD_SHARE` of episodes.

    Best is by return; where rewards are sparse, by steps to the first success, since such a return counts the steps
    that were recorded after it.

    Raises:
        ValueError: no episode of these is as long as a chunk.
    """
    episodes, size = dataset.episodes, task.action_horizon
    starts = episodes.window_starts(size)
    cost = -episodes.returns if task.success_reward is None else episodes.steps_to(task.success_reward)
    rank = (np.argsort(np.argsort(cost, kind="stable"), kind="stable") + 1) / len(cost)  # (E,), best first
    ranks = np.repeat(rank, episodes.lengths)[starts]
    starts, ranks = starts[ranks <= HELD_SHARE], ranks[ranks <= HELD_SHARE]
    if not len(starts):
        raise ValueError(f"the best {HELD_SHARE:.0%} of episodes have no window of {size} steps")
    generator = np.random.default_rng(derive_seed(BASE_SEED, task.name, 0, "expert-pairs"))
    picks = np.sort(generator.choice(len(starts), min(HELD_PAIRS, len(starts)), replace=False))
    rows = starts[picks]
    actions = normalizer.normalize_actions(episodes.actions[rows[:, None] + np.arange(size)])
    observations = normalizer.normalize_observations(episodes.observations[rows])
    return Demonstrations(*(torch.from_numpy(np.float32(x)) for x in (observations, actions, ranks[picks])))


def save_demonstrations(task: Task, dataset: Dataset, normalizer: Normalizer, path: Path) -> Demonstrations:
    """Choose the expert pairs of a task and write them to `path`.

    Raises:
        ValueError: no good episode is as long as a chunk.
        OSError: the file cannot be written.
    """
    pairs = choose_demonstrations(task, dataset, normalizer)
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "task": task.name, "data_digest": dataset.digest, **vars(pairs)}, buffer)
    write_bytes(path, buffer.getvalue())
    return pairs


def make_demonstrations(task: Task, path: Path) -> Demonstrations:
    """Make a task's expert pairs from its data, generated where missing, as its pre-trained policy sees them.

    Raises:
        ValueError: data that is missing, damaged or not what the policy was trained on, or no policy.
        OSError: the file cannot be written.
    """
    dataset, pretrained = load_data(task.name), load_pretrained(task)
    if pretrained.data_digest not in ("", dataset.digest):  # an imported policy names no data
        raise ValueError(f"{task.name}: the pre-trained policy was trained on other data than is made today")
    return save_demonstrations(task, dataset, pretrained.normalizer, path)


def main(task: str, out: Path | None = None) -> int:
    """Make a task's expert pairs again from its data, generated where missing; returns the exit status.

    Args:
        task: name of the task.
        out: the file to write, by default the one that comes with the benchmark.
    """
    try:
        chosen, path = get_task(task), out or demonstrations_path(get_task(task))
        pairs = make_demonstrations(chosen, path)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{path}: {len(pairs.ranks)} pairs of the best {float(pairs.ranks.max()):.0%} of episodes")
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main, prog="python -m benchmark.policies.demonstrations"))
