"""DPPO's checkpoint files: bring one in as a task's pre-trained policy, write a task's policy out as one.

DPPO (github.com/irom-princeton/dppo) saves a pre-trained policy as ``epoch``, ``model`` and ``ema``; ``ema`` is what it
fine-tunes. It saves a fine-tuned one as ``itr`` and ``model``, in which ``actor`` is the frozen network of the early
denoising steps and ``actor_ft`` the one of the last. The ranges of the data lie apart, in ``normalization.npz``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import zipfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor

from benchmark.policies import FORMAT, installed_path, load_pretrained, policy_path, unpack, write_policy
from benchmark.policies.demonstrations import demonstrations_path
from benchmark.store import read_json, write_bytes
from benchmark.tasks import Task, get_task
from otpr.denoisers import TwoStageMLP
from otpr.diffusion import SamplerSettings

FT_DENOISING_STEPS = 10  # DPPO's K' in all its published settings of state-based tasks
NORMALIZATION = "normalization.npz"
_ENTRIES = {"obs_min": "observation_min", "obs_max": "observation_max", "action_min": "action_min",
            "action_max": "action_max"}  # fmt: skip
_LARGEST = 1 << 20  # bytes that a file of four short vectors may unpack to


def read_dppo_checkpoint(path: Path) -> dict[str, Any]:
    """The contents of a checkpoint file of DPPO's own format.

    Pre-trained files hold ``epoch``, ``model`` and ``ema``; fine-tuned ones ``itr`` and ``model``.

    Raises:
        ValueError: missing or unreadable file, or one without a ``model`` of named tensors.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise ValueError(f"{path}: no DPPO checkpoint ({error.strerror})") from error
    except Exception as error:
        raise ValueError(f"{path}: not a DPPO checkpoint ({type(error).__name__})") from error
    parts = [checkpoint[key] for key in ("model", "ema") if key in checkpoint] if isinstance(checkpoint, dict) else []
    if not parts or not all(isinstance(part, dict) and all(isinstance(key, str) for key in part) for part in parts):
        raise ValueError(f"{path}: not a DPPO checkpoint (holds no weights under 'model')")
    return checkpoint


def dppo_network_state(path: Path, part: Literal["ema", "actor", "actor_ft"]) -> dict[str, Tensor]:
    """Weights of one denoising network from a checkpoint file of DPPO's own format, keys without prefix.

    Pre-trained files hold ``ema``; fine-tuned ones hold ``actor`` (frozen) and ``actor_ft``.

    Raises:
        ValueError: unreadable file, or no such part in it.
    """
    checkpoint = read_dppo_checkpoint(path)
    source, prefix = ("ema", "network.") if part == "ema" else ("model", f"{part}.")
    weights = checkpoint.get(source, {})
    state = {key[len(prefix) :]: value for key, value in weights.items() if key.startswith(prefix)}
    if not state:
        raise ValueError(f"{path}: holds no weights named {prefix}* under {source!r}")
    return state


def import_policy(
    path: Path, task: Task, normalization: Path | None = None, ft_denoising_steps: int = FT_DENOISING_STEPS
) -> Path:
    """Install a checkpoint of DPPO as the task's pre-trained policy.

    Args:
        normalization: DPPO's file of the data's ranges, by default `NORMALIZATION` beside `path`.
        ft_denoising_steps: K' of a fine-tuned checkpoint, in steps of the noise schedule; the file does not hold it.

    Returns:
        The installed file; its card lies beside it.

    Raises:
        ValueError: a missing or unreadable file, one of another network, numbers that are not finite, a K' beyond the
            noise schedule.
        OSError: the installed file cannot be written.
    """
    checkpoint, statistics = read_dppo_checkpoint(path), normalization or path.with_name(NORMALIZATION)
    fine_tuned = "ema" not in checkpoint
    state: dict[str, Any] = {
        "format": FORMAT, "task": task.name, "denoising_steps": SamplerSettings().denoising_steps, "data_digest": "",
        "normalization": read_normalization(statistics, task),
    }  # fmt: skip
    card = {
        "task": task.name,
        "kind": "fine-tuned" if fine_tuned else "pre-trained",
        "source": path.name,
        "source_sha256": _digest(path),
        "normalization": statistics.name,
        "normalization_sha256": _digest(statistics),
        "network": dataclasses.asdict(task.network),
        "data_digest": "",
    }
    if fine_tuned:
        state |= _two_stages(path, ft_denoising_steps)
        card |= {"itr": _count(path, checkpoint, "itr"), "ft_denoising_steps": ft_denoising_steps}
    else:
        state["ema"] = _named("network", dppo_network_state(path, "ema"))
        card["epoch"] = _count(path, checkpoint, "epoch")
    return _install(task, state, card, str(path))


def _two_stages(path: Path, late_steps: int) -> dict[str, Any]:
    """The entries of a policy file that describe a fine-tuned policy."""
    total = SamplerSettings().denoising_steps
    if not 1 <= late_steps <= total:
        raise ValueError(f"ft_denoising_steps must be in 1..{total}, got {late_steps}")
    early, late = (_named("network", dppo_network_state(path, part)) for part in ("actor", "actor_ft"))
    return {"ema": late, "early": early, "late_steps": late_steps}


def _install(task: Task, state: dict[str, Any], card: dict[str, Any], label: str) -> Path:
    """Check a policy file's contents and put it, with its card, where the task looks for it."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    checked, target = unpack(task, buffer.getvalue(), SamplerSettings(), label), installed_path(task)
    write_policy(target, buffer.getvalue(), card | {"sha256": checked.digest})
    demonstrations_path(task).unlink(missing_ok=True)  # pairs beside an earlier policy have that one's normalisation
    return target


def read_normalization(path: Path, task: Task) -> dict[str, Tensor]:
    """Ranges of a task's data from DPPO's ``normalization.npz``, under this benchmark's names, float32.

    Raises:
        ValueError: missing or unreadable file, a missing or unfit vector, or a minimum above its maximum.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > _LARGEST:
            raise ValueError(f"it unpacks to {size} bytes")
        with np.load(path, allow_pickle=False) as archive:
            found = {theirs: np.asarray(archive[theirs]) for theirs in _ENTRIES}
    except OSError as error:
        raise ValueError(f"{path}: no normalisation statistics ({error.strerror or error})") from error
    except Exception as error:
        raise ValueError(f"{path}: not a {NORMALIZATION} of DPPO ({' '.join(str(error).split())})") from error
    statistics = {}
    for theirs, ours in _ENTRIES.items():
        shape, values = (task.observation_dim if theirs.startswith("obs") else task.action_dim,), found[theirs]
        if values.shape != shape or not np.issubdtype(values.dtype, np.floating):
            raise ValueError(f"{path}: {theirs} must be floating-point {shape}, got {values.dtype} {values.shape}")
        statistics[ours] = torch.from_numpy(values.astype(np.float32))
        if not torch.isfinite(statistics[ours]).all():
            raise ValueError(f"{path}: {theirs} holds a value that is not finite")
    for kind, name in (("obs", "observation"), ("action", "action")):
        crossed = torch.nonzero(statistics[f"{name}_min"] > statistics[f"{name}_max"])
        if len(crossed):
            raise ValueError(f"{path}: {kind}_min is above {kind}_max in dimension {int(crossed[0, 0])}")
    return statistics


def export_policy(task: Task, out: Path) -> Path:
    """Write the task's policy as a checkpoint of DPPO's own, `NORMALIZATION` beside it; returns the latter's path.

    A pre-trained policy gets its average weights as ``model`` too, a fine-tuned one no critic: neither is kept here.

    Raises:
        ValueError: the task has no usable policy, or the folder of `out` holds the normalisation of another.
        OSError: a file cannot be written.
    """
    pretrained, card = load_pretrained(task), read_json(policy_path(task).with_suffix(".json"))
    network = pretrained.policy.network
    if isinstance(network, TwoStageMLP):
        early, late = network.early.state_dict(), network.late.state_dict()
        parts = {"network": early, "actor": early, "actor_ft": late}
        model = {name: value for part, weights in parts.items() for name, value in _named(part, weights).items()}
        checkpoint = {"itr": card.get("itr", 0), "model": model}
    else:
        weights = _named("network", network.state_dict())
        checkpoint = {"epoch": card.get("epoch", 0), "model": weights, "ema": weights}
    ranges, buffer = io.BytesIO(), io.BytesIO()
    np.savez(ranges, **{theirs: getattr(pretrained.normalizer, ours) for theirs, ours in _ENTRIES.items()})
    statistics = out.with_name(NORMALIZATION)
    if out.is_dir():
        raise ValueError(f"{out} is a directory; give the file to write in it")
    if statistics.exists() and statistics.read_bytes() != ranges.getvalue():
        raise ValueError(f"{statistics}: is there already and differs from this policy's; choose another folder")
    torch.save(checkpoint, buffer)
    write_bytes(statistics, ranges.getvalue())
    write_bytes(out, buffer.getvalue())
    return statistics


def _named(part: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{part}.{name}": value for name, value in weights.items()}


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _count(path: Path, checkpoint: dict[str, Any], name: str) -> int:
    """The epoch or iteration that a checkpoint was saved at."""
    value = checkpoint.get(name)
    if type(value) is not int:
        raise ValueError(f"{path}: its {name} must be a whole number, got {value!r}")
    return value


def import_policy_command(
    file: tyro.conf.Positional[Path],
    task: str,
    normalization: Path | None = None,
    ft_denoising_steps: int = FT_DENOISING_STEPS,
) -> None:
    """Start a task from a checkpoint of DPPO, pre-trained or fine-tuned.

    Example: python -m benchmark.data import-policy state_3000.pt --task hopper-medium-v2

    Args:
        file: the checkpoint.
        task: the task that starts from it from now on.
        normalization: the ranges of its data, by default normalization.npz beside it.
        ft_denoising_steps: last denoising steps that the fine-tuned network takes, in steps of the noise schedule.
    """
    target = import_policy(file, get_task(task), normalization, ft_denoising_steps)
    card = read_json(target.with_suffix(".json"))
    at = f"itr {card['itr']}" if "itr" in card else f"epoch {card['epoch']}"
    print(f"{target}: {card['kind']} policy ({at}) that {task} starts from now; delete it to undo this")
    print(f"expert pairs, which some methods need: python -m benchmark.policies.demonstrations --task {task}")


def export_policy_command(task: tyro.conf.Positional[str], out: Path) -> None:
    """Write the policy that a task starts from as a checkpoint of DPPO.

    Example: python -m benchmark.data export-policy hopper-local --out dppo/state_0.pt

    Args:
        task: the task.
        out: the checkpoint to write; normalization.npz goes beside it.
    """
    statistics = export_policy(get_task(task), out)
    print(f"{out}: the policy of {task}; its normalisation: {statistics}")
