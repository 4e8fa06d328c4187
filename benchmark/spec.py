"""What a run is: everything that decides its bytes, and the digest of that."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmark.methods import adjust, build_settings, get_arm, resolve_settings, uses_demonstrations
from benchmark.policies import load_pretrained
from benchmark.policies.demonstrations import load_demonstrations
from benchmark.seeding import BASE_SEED
from benchmark.store import read_json
from benchmark.tasks import LoopSettings, get_task
from otpr.checks import check_choice, check_range
from otpr.diffusion import DiffusionPolicy, SamplerSettings
from otpr.method import Demonstrations
from otpr.precision import PRECISIONS

FORMAT = 1  # of spec.json


@dataclass(frozen=True)
class RunSpec:
    """One run. Written as ``spec.json``; two runs with equal digests give equal curves on one type of machine."""

    task: str
    method: str  # method or arm
    seed: int  # index of the replication; 1000 and up are for tuning
    protocol: str  # which settings tables: "published" or "embedded"
    loop: LoopSettings
    sampler: SamplerSettings
    settings: dict[str, Any]  # every resolved field of the method's settings
    policy_digest: str  # of the pre-trained policy's file
    data_digest: str  # of the data that it was trained on
    threads: int = 1
    device: str = "cpu"
    base_seed: int = BASE_SEED
    demonstrations_digest: str = ""  # of the expert pairs that take part in fine-tuning; empty where none do
    precision: str = "float32"  # of matrix products, or "bfloat16"

    def __post_init__(self) -> None:
        """Check what no part checks by itself.

        Raises:
            ValueError: no thread, or an unknown precision.
        """
        check_range(self, ("threads",), 1, float("inf"))
        check_choice(self, "precision", PRECISIONS)

    def method_settings(self) -> Any:
        """The method's settings dataclass.

        Raises:
            ValueError: the method is unknown, or does not accept these settings.
        """
        return build_settings(self.method, get_arm(self.method).load().Settings, {}, self.settings)

    def as_dict(self) -> dict[str, Any]:
        """The JSON object, with format and digest."""
        content = {"format": FORMAT, **dataclasses.asdict(self)}
        return {**json.loads(_canonical(content)), "digest": _digest(content)}

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON."""
        return self.as_dict()["digest"]

    @staticmethod
    def from_dict(value: dict[str, Any]) -> RunSpec:
        """Read what `as_dict` made, also before a setting was added: what it lacks has the default, its old behaviour.

        Raises:
            ValueError: another format, missing or unknown fields, or a digest that does not fit.
        """
        content = {key: item for key, item in value.items() if key != "digest"}
        if value.get("format") != FORMAT or value.get("digest") != _digest(content):
            raise ValueError(f"specification of format {value.get('format')} whose digest does not fit its content")
        fields = {key: item for key, item in content.items() if key != "format"}
        try:
            fields["loop"] = LoopSettings(**fields["loop"])
            fields["sampler"] = SamplerSettings(**fields["sampler"])
            spec = RunSpec(**fields)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a run's specification ({error})") from error
        return dataclasses.replace(spec, settings=dataclasses.asdict(spec.method_settings()))


def load_spec(path: Path) -> RunSpec:
    """Read a ``spec.json``.

    Raises:
        ValueError: it is missing or not a run's specification; the file is named.
    """
    value = read_json(path)
    try:
        return RunSpec.from_dict(value)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _canonical(content: dict[str, Any]) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"))


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(_canonical(content).encode()).hexdigest()


def make_spec(
    task_name: str,
    method: str,
    seed: int,
    protocol: str,
    loop_values: dict[str, Any],
    sampler_values: dict[str, Any],
    overrides: dict[str, Any],
    threads: int,
    device: str,
    plan_only: bool = False,
    precision: str = "float32",
) -> RunSpec:
    """Resolve all settings of one run.

    Args:
        loop_values, sampler_values: what a suite changes of the task's loop sizes and of the sampler.
        overrides: what the user changes of the method's settings.
        plan_only: accept a task whose policy or expert pairs are missing or damaged; such a spec cannot be run.

    Raises:
        ValueError: an unknown name or a bad value, settings that do not fit the task or the sampler, or a
            pre-trained policy that is missing or damaged.
    """
    task = get_task(task_name)
    resolved = resolve_settings(method, task, protocol, overrides)
    loop = adjust("the loop", task.loop(protocol), loop_values)
    sampler = adjust("the sampler", SamplerSettings(), sampler_values)
    pretrained = demonstrations = None
    try:
        pretrained = load_pretrained(task, sampler)
        demonstrations = load_demonstrations(task) if uses_demonstrations(resolved) else None
    except ValueError:
        if not plan_only:
            raise
    policy = pretrained.policy if pretrained else DiffusionPolicy(task.build_network(torch.Generator()), sampler)
    spec = RunSpec(
        task=task_name,
        method=method,
        seed=seed,
        protocol=protocol,
        loop=loop,
        sampler=sampler,
        settings=dataclasses.asdict(resolved),
        policy_digest=pretrained.digest if pretrained else "",
        data_digest=pretrained.data_digest if pretrained else "",
        threads=threads,
        device=device,
        demonstrations_digest="" if demonstrations is None else demonstrations.digest,
        precision=precision,
    )
    if demonstrations or not uses_demonstrations(resolved):
        _check_fit(spec, policy, None if demonstrations is None else demonstrations.pairs)
    return spec


def _check_fit(spec: RunSpec, policy: DiffusionPolicy, pairs: Demonstrations | None) -> None:
    """Raise ValueError where the method cannot be made of its settings: found by trial."""
    shape = get_task(spec.task).shape(spec.loop)
    try:
        get_arm(spec.method).build(spec.method_settings(), policy, shape, torch.Generator(), pairs)
    except (ValueError, RuntimeError, MemoryError) as error:  # the last two: too large for the memory
        hint = f"settings are changed by --set {spec.method}.FIELD=VALUE, or by [settings.{spec.method}] of a suite"
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{spec.task}, {spec.method}: {reason}; {hint}") from error
