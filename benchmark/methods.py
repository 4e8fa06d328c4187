"""The registry: one line a method or arm. An arm is a method with named settings of its own."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import math
from collections.abc import Collection
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from benchmark.tasks import Task
from otpr.diffusion import DiffusionPolicy
from otpr.method import Demonstrations, Method, TaskShape

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

SettingsT = TypeVar("SettingsT", bound="DataclassInstance")
ENTRY_POINTS = "otpr_bench.methods"  # installed packages add methods under this name, each an `Arm`


@dataclass(frozen=True)
class Arm:
    """Where a method lives and what this arm changes of its settings.

    The module holds the class, its frozen dataclass ``Settings`` and the tables ``PUBLISHED`` and ``EMBEDDED``, which
    map a task family to values.
    """

    module: str
    class_name: str
    values: dict[str, Any] = field(default_factory=dict)
    learns: bool = True  # false: nothing is collected, the curve is the pre-trained policy's

    def load(self) -> ModuleType:
        """Import the module."""
        return importlib.import_module(self.module)

    def build(
        self,
        settings: Any,
        policy: DiffusionPolicy,
        shape: TaskShape,
        generator: torch.Generator,
        demonstrations: Demonstrations | None,
    ) -> Method:
        """Construct the method around a copy of `policy`; `demonstrations` reach those alone that use them.

        Raises:
            ValueError: settings that do not fit the policy, the task or the demonstrations.
        """
        more = (demonstrations,) if uses_demonstrations(settings) else ()
        return getattr(self.load(), self.class_name)(settings, policy, shape, generator, *more)


# OTPR-M: keypoints from expert pairs are part of the method as its paper's abstract states it.
MASKED: dict[str, Any] = {"keypoints": 16, "guide_weight": 0.5, "expert_fraction": 0.25}

ARMS: dict[str, Arm] = {
    "otpr": Arm("otpr.agent", "OTPR", MASKED),
    "otpr-m": Arm("otpr.agent", "OTPR", MASKED),
    "otpr-u": Arm("otpr.agent", "OTPR"),
    "otpr-u-expert": Arm("otpr.agent", "OTPR", {"expert_fraction": 0.25}),
    "otpr-relaxed": Arm("otpr.agent", "OTPR", MASKED | {"action_bound": 4.0}),
    "otpr-conditional": Arm("otpr.agent", "OTPR", MASKED | {"action_bound": 4.0, "row_condition": "candidates"}),
    "otpr-q": Arm("otpr.agent", "OTPR", MASKED | {"guidance": "q"}),
    "otpr-advantage": Arm("otpr.agent", "OTPR", MASKED | {"guidance": "advantage"}),
    "otpr-weighting": Arm("otpr.agent", "OTPR", MASKED | {"selection": False}),
    "otpr-selection": Arm("otpr.agent", "OTPR", MASKED | {"weighting": False}),
    "otpr-released": Arm("otpr.released", "ReleasedOTPR"),
    "dppo": Arm("baselines.dppo", "DPPO"),
    "idql": Arm("baselines.idql", "IDQL"),
    "dql": Arm("baselines.dql", "DQL"),
    "dql-dppo": Arm("baselines.dql", "DQL", {"bc_on": "policy"}),
    "frozen": Arm("baselines.frozen", "Frozen", learns=False),
}


def uses_demonstrations(settings: Any) -> bool:
    """Whether offline data takes part in fine-tuning with these settings."""
    return getattr(settings, "uses_demonstrations", False)


def get_arm(name: str) -> Arm:
    """The arm called `name`: of the table, or of an installed package's entry point.

    Raises:
        ValueError: unknown name, or an entry point that holds no arm.
    """
    if name in ARMS:
        return ARMS[name]
    found = importlib.metadata.entry_points(group=ENTRY_POINTS)
    if name not in found.names:
        raise ValueError(f"unknown method {name!r}; valid: {', '.join([*ARMS, *sorted(found.names)])}")
    arm = found[name].load()
    if not isinstance(arm, Arm):
        raise ValueError(f"entry point {name!r} of {ENTRY_POINTS} must be an Arm, got {arm!r}")
    return arm


def setting_names(name: str) -> tuple[str, ...]:
    """The names of a method's settings.

    Raises:
        ValueError: unknown method.
    """
    return tuple(item.name for item in dataclasses.fields(get_arm(name).load().Settings))


def resolve_settings(name: str, task: Task, protocol: str, overrides: dict[str, Any]) -> Any:
    """The settings of an arm: defaults, then the published table, the embedded table, the arm's values, `overrides`.

    What the task itself brings for a method comes right after the tables.

    Raises:
        ValueError: unknown method, a task family that the method has no settings for, an unknown field or a bad value.
    """
    arm = get_arm(name)
    module = arm.load()
    table = module.PUBLISHED if protocol == "published" else module.EMBEDDED
    if task.family not in table and name not in task.settings:
        raise ValueError(
            f"method {name!r} has no {protocol} settings for {task.family!r}; "
            f"it has them for: {', '.join(table) or 'none'}"
        )
    values = module.PUBLISHED.get(task.family, {}) | table.get(task.family, {}) | dict(task.settings.get(name, {}))
    return build_settings(name, module.Settings, values | arm.values, overrides)


def refuse_idle(name: str, settings: Any, asked: Collection[str]) -> None:
    """Refuse what was asked for a method and would change nothing.

    Raises:
        ValueError: one of the fields `asked` is idle beside the others' values, as the settings say.
    """
    for field_name, reason in getattr(settings, "idle", {}).items():
        if field_name in asked:
            raise ValueError(f"method {name!r}: {field_name} changes nothing with {reason}")


def build_settings(name: str, settings: type, values: dict[str, Any], overrides: dict[str, Any]) -> Any:
    """Construct a settings dataclass from table values and user overrides, checking names and types.

    Raises:
        ValueError: an unknown field, or a value whose type differs from the default's.
    """
    return adjust(f"method {name!r}", settings(**values), overrides)


def adjust(owner: str, settings: SettingsT, overrides: dict[str, Any]) -> SettingsT:
    """The settings dataclass with other values, checking names and types.

    Args:
        owner: whose settings they are, for the messages.

    Raises:
        ValueError: an unknown field, or a value of another type than the present one or out of its range.
    """
    held = vars(settings)
    for field_name in overrides:
        if field_name not in held:
            raise ValueError(f"{owner} has no setting {field_name!r}; valid: {', '.join(held) or 'none'}")
    try:
        changes = {field_name: conform(field_name, value, held[field_name]) for field_name, value in overrides.items()}
        return dataclasses.replace(settings, **changes)
    except ValueError as error:
        raise ValueError(f"{owner}: {error}") from error


def conform(label: str, value: Any, default: Any) -> Any:
    """`value` as the type of `default`: an int may stand for a float, a list for a tuple of the same kind of items.

    Raises:
        ValueError: another type, or a number that is not finite.
    """
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ValueError(f"{label} must be finite, got an integer of {len(str(value))} digits") from None
    if isinstance(default, tuple) and isinstance(value, (list, tuple)):
        return tuple(conform(f"an item of {label}", item, default[0]) if default else item for item in value)
    if type(value) is not type(default):
        raise ValueError(f"{label} must be of type {type(default).__name__}, got {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{label} must be finite, got {value}")
    return value
