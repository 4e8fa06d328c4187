"""The settings of every method, from the specifications of its runs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from benchmark.methods import get_arm
from benchmark.report.cells import method_key
from benchmark.report.records import Run
from benchmark.report.table import Table, words

# Identity and digests: what a run is, not how it is set.
_OMITTED = frozenset(
    {"task", "method", "seed", "digest", "data_digest", "policy_digest", "format", "demonstrations_digest"}
)
_LISTED = 3


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as `loop.n_envs`, each value as JSON (words without quotes)."""
    found: dict[str, str] = {}
    for key, item in value.items():
        name = f"{prefix}{key}"
        if isinstance(item, Mapping):
            found |= _flat(item, "" if name == "settings" else f"{name}.")
        elif name not in _OMITTED:
            found[name] = item if isinstance(item, str) else json.dumps(item, default=str)
    return found


def differing_settings(runs: Sequence[Run]) -> dict[str, str]:
    """By setting of their method, the different values that `runs` have; those that are alike are left out.

    A specification from before there was a setting has its old behaviour, which is its default.
    """
    found = ((run.method, run.spec.get("settings", {})) for run in runs if run.spec)
    flat = [_defaults(method) | _flat(settings) for method, settings in found if isinstance(settings, Mapping)]
    values = {name: _value(flat, name) for name in dict.fromkeys(name for spec in flat for name in spec)}
    return {name: value for name, value in values.items() if len({spec.get(name) for spec in flat}) > 1}


def _defaults(method: str) -> dict[str, str]:
    """The defaults of a method's settings; none where no such method is installed."""
    try:
        fields = dataclasses.fields(get_arm(method).load().Settings)
    except (ValueError, ImportError):
        return {}
    return _flat({field.name: field.default for field in fields if field.default is not dataclasses.MISSING})


def _value(runs: Sequence[Mapping[str, str]], name: str) -> str:
    """What all `runs` say, or the different values; empty where none has the setting."""
    values = dict.fromkeys(run[name] for run in runs if name in run)
    shown = list(values)[:_LISTED] + (["…"] if len(values) > _LISTED else [])
    return " / ".join(shown)


def settings_table(runs: Sequence[Run], task: str, index: int) -> Table | None:
    """One row a setting, one column a method of `task`; None where no specification can be read.

    Where the runs of a method differ in a setting, every value is listed.
    """
    members = [run for run in runs if run.task == task and run.spec]
    methods = sorted({run.method for run in members}, key=method_key)
    if not methods:
        return None
    flat = {method: [_flat(run.spec) for run in members if run.method == method] for method in methods}
    names = dict.fromkeys(name for specs in flat.values() for spec in specs for name in spec)
    ordered = sorted(names, key=lambda name: ("." in name, name))
    rows = tuple((words(name), *(words(_value(flat[method], name)) for method in methods)) for name in ordered)
    columns = ("Setting", *methods)
    return Table(f"settings-{index}", f"Settings on {task}", columns, rows, left=len(columns))
