"""The pre-trained policy of each task: weights, normalisation statistics and, beside them as JSON, the card.

``TASK.pt`` is a plain dictionary of tensors and strings (`FORMAT` 1): ``task``, ``ema`` (DPPO's parameter names),
``denoising_steps``, ``normalization`` (four tensors), ``data_digest`` and, for robosuite, ``arguments``: those of the
simulator, as its dataset describes them, in JSON. Of a policy that DPPO fine-tuned, ``ema`` takes the last
``late_steps`` denoising steps and ``early`` those before. ``TASK.json`` says how it was made and holds its SHA-256.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmark.data.registry import cache_dir
from benchmark.store import read_json, write_bytes, write_json
from benchmark.tasks import Task
from otpr.denoisers import DenoisingMLP, TwoStageMLP
from otpr.diffusion import DiffusionPolicy, SamplerSettings

FORMAT = 1
FOLDER = Path(__file__).parent
RANGES = ("observation_min", "observation_max", "action_min", "action_max")  # of a `Normalizer`, in policy files
REPAIR = "bring it back, or remove it to have it made from the task's data"  # of a damaged file
_RANGE_OFFSET = 1e-6  # DPPO's; keeps dimensions that never change from dividing by zero


@dataclass(frozen=True)
class Normalizer:
    """Per-dimension ranges of the data, which the policy sees as [-1, 1].

    Attributes:
        observation_min, observation_max: (O,) float32, in the environment's units.
        action_min, action_max: (A,) float32, in the environment's units.
        observation_clip: largest magnitude of a normalised observation; infinite in DPPO, which does not clip.
    """

    observation_min: NDArray[np.float32]
    observation_max: NDArray[np.float32]
    action_min: NDArray[np.float32]
    action_max: NDArray[np.float32]
    observation_clip: float = math.inf

    def normalize_observations(self, observations: NDArray[Any]) -> NDArray[np.float32]:
        """2 (x - min) / (max - min + 1e-6) - 1 of (..., O), clipped: computed in float64, returned as float32."""
        normalized = _normalize(observations, self.observation_min, self.observation_max)
        if math.isinf(self.observation_clip):
            return normalized
        return normalized.clip(-self.observation_clip, self.observation_clip)

    def normalize_actions(self, actions: NDArray[Any]) -> NDArray[np.float32]:
        """The same for actions (..., A)."""
        return _normalize(actions, self.action_min, self.action_max)

    def denormalize_actions(self, actions: NDArray[Any]) -> NDArray[np.float32]:
        """(a + 1) / 2 (max - min) + min of (..., A) clipped to [-1, 1]: float32 in the environment's units.

        As in DPPO the 1e-6 of `normalize_actions` is left out, so that 1 becomes the maximum itself; the two are
        inverse to within 1e-6.
        """
        low, high = self.action_min.astype(np.float64), self.action_max.astype(np.float64)
        clipped = np.clip(np.asarray(actions, dtype=np.float64), -1.0, 1.0)
        return ((clipped + 1.0) / 2.0 * (high - low) + low).astype(np.float32)


def _normalize(values: NDArray[Any], low: NDArray[np.float32], high: NDArray[np.float32]) -> NDArray[np.float32]:
    low64, high64 = low.astype(np.float64), high.astype(np.float64)
    values64 = np.asarray(values, dtype=np.float64)
    # A constant is divided by 1e-6 alone: the simulator's float64 must be rounded as the data were, or it comes out
    # up to 0.02 beside what the policy was trained on.
    values64 = np.where(low == high, values64.astype(np.float32), values64)
    scaled = 2.0 * (values64 - low64) / (high64 - low64 + _RANGE_OFFSET) - 1.0
    return scaled.astype(np.float32)


@dataclass(frozen=True)
class Pretrained:
    """A loaded policy with what identifies it.

    Attributes:
        policy: on the CPU, in evaluation mode.
        digest: SHA-256 of the file.
        data_digest: identifies the data that it was trained on.
        arguments: of the simulator, as the data describes them; None for the task's own.
    """

    policy: DiffusionPolicy
    normalizer: Normalizer
    digest: str
    data_digest: str
    arguments: dict[str, Any] | None = None


def installed_path(task: Task) -> Path:
    """Where a policy that was imported, or trained for a task that comes without one, is kept."""
    return cache_dir() / "policies" / f"{task.name}.pt"


def policy_path(task: Task) -> Path:
    """Where the policy of a task is looked for: the installed one, else the one that the task comes with.

    The card lies beside it as ``.json``.
    """
    installed = installed_path(task)
    return installed if installed.exists() else Path(task.policy) if task.policy else FOLDER / f"{task.name}.pt"


def write_policy(path: Path, content: bytes, card: Mapping[str, Any]) -> None:
    """Write a policy file and its card in the place of earlier ones, which stay where one of them cannot be written.

    Raises:
        OSError: one of them cannot be written.
    """
    new, new_card = path.with_suffix(".new.pt"), path.with_suffix(".new.json")
    try:
        write_bytes(new, content)
        write_json(new_card, card)
        path.unlink(missing_ok=True)  # whoever is stopped from here on leaves no policy, not one with another's card
        new_card.replace(path.with_suffix(".json"))
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
        new_card.unlink(missing_ok=True)


def load_pretrained(task: Task, sampler: SamplerSettings | None = None, path: Path | None = None) -> Pretrained:
    """Load a task's pre-trained policy.

    Args:
        sampler: how the policy samples, by default `SamplerSettings()`; its `denoising_steps` must be the trained ones.
        path: the file, by default the one of `policy_path`.

    Raises:
        ValueError: file or card missing or unreadable, made for another task or other sizes, or not the file that the
            card describes.
    """
    path = policy_path(task) if path is None else path
    try:
        content = path.read_bytes()
    except OSError as error:
        hint = f"make it with: python -m benchmark.pretrain --task {task.name}"
        raise ValueError(f"{path}: no pre-trained policy ({error.strerror}); {hint}") from error
    digest = hashlib.sha256(content).hexdigest()
    if read_json(path.with_suffix(".json")).get("sha256") != digest:
        raise ValueError(f"{path}: not the file that its card describes (SHA-256 {digest[:12]}...); {REPAIR}")
    return unpack(task, content, sampler or SamplerSettings(), str(path))


def unpack(task: Task, content: bytes, sampler: SamplerSettings, label: str) -> Pretrained:
    """Build the policy from a file's bytes; `label` names the file in errors.

    Raises:
        ValueError: not a policy file of `FORMAT`, or one for another task, other sizes or another noise schedule.
    """
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{label}: unreadable policy file ({type(error).__name__})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{label}: not a policy file of format {FORMAT}")
    if state.get("task") != task.name:
        raise ValueError(f"{label}: is a policy of task {state.get('task')!r}, not of {task.name!r}")
    if state.get("denoising_steps") != sampler.denoising_steps:
        trained = state.get("denoising_steps")
        raise ValueError(f"{label}: trained with {trained} denoising steps, asked for {sampler.denoising_steps}")
    network = _build_network(task, state.get("ema"), label)
    if "early" in state:
        late_steps = state.get("late_steps")
        if type(late_steps) is not int or not 1 <= late_steps <= sampler.denoising_steps:
            raise ValueError(f"{label}: late_steps must be in 1..{sampler.denoising_steps}, got {late_steps!r}")
        network = TwoStageMLP(_build_network(task, state["early"], f"{label}: early stage"), network, late_steps)
    policy = DiffusionPolicy(network, sampler)
    normalizer = _read_normalizer(task, state.get("normalization"), label)
    data_digest = state.get("data_digest")
    if not isinstance(data_digest, str):
        raise ValueError(f"{label}: holds no data digest")
    arguments = _read_arguments(state.get("arguments"), label)
    return Pretrained(policy.eval(), normalizer, hashlib.sha256(content).hexdigest(), data_digest, arguments)


def _read_arguments(text: Any, label: str) -> dict[str, Any] | None:
    try:
        arguments = None if text is None else json.loads(text)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{label}: its simulator's arguments are no JSON") from error
    if arguments is not None and not isinstance(arguments, dict):
        raise ValueError(f"{label}: its simulator's arguments must be a JSON object, got {text!r}")
    return arguments


def _build_network(task: Task, weights: Any, label: str) -> DenoisingMLP:
    """The task's network with `weights`, a dictionary of DPPO's parameter names."""
    network = task.build_network(torch.Generator())
    expected = {f"network.{name}": value for name, value in network.state_dict().items()}
    if not isinstance(weights, dict):
        raise ValueError(f"{label}: its weights are not those of this task's network: it holds none")
    for name in (*expected, *weights):
        if name not in weights or name not in expected:
            fault = "lacks" if name in expected else "has"
            raise ValueError(f"{label}: its weights are not those of this task's network: {fault} {name}")
    for name, target in expected.items():
        _check_tensor(f"{label}: weight {name}", weights[name], tuple(target.shape))
    network.load_state_dict({name: weights[f"network.{name}"] for name in network.state_dict()})
    return network


def _read_normalizer(task: Task, statistics: Any, label: str) -> Normalizer:
    sizes = {"observation_min": task.observation_dim, "observation_max": task.observation_dim,
             "action_min": task.action_dim, "action_max": task.action_dim}  # fmt: skip
    if not isinstance(statistics, dict) or statistics.keys() != sizes.keys():
        raise ValueError(f"{label}: its normalisation must hold {', '.join(sizes)}")
    for name, size in sizes.items():
        _check_tensor(f"{label}: {name}", statistics[name], (size,))
    return Normalizer(**{name: statistics[name].numpy() for name in sizes}, observation_clip=task.observation_clip)


def _check_tensor(label: str, value: Any, shape: tuple[int, ...]) -> None:
    if not isinstance(value, torch.Tensor) or value.dtype != torch.float32 or tuple(value.shape) != shape:
        found = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise ValueError(f"{label} must be torch.float32 {shape}, got {found}")
    if not torch.isfinite(value).all():
        raise ValueError(f"{label} holds a value that is not finite")
