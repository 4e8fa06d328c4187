"""Figures of one ablation each: learning curves of its arms alone, as in figure 3 of the OTPR paper."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from benchmark.report.figures import Panel

MINIMUM_ARMS = 2
# By file stem: what each arm stands for, and the names it goes by, the first that is there being shown.
ABLATIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "ablation_guidance": {"H": ("otpr", "otpr-m"), "Q": ("otpr-q",), "A": ("otpr-advantage",)},
    "ablation_mask": {"M": ("otpr-m", "otpr"), "U": ("otpr-u",), "U + expert data": ("otpr-u-expert",)},
    "ablation_parts": {"both": ("otpr",), "weighting": ("otpr-weighting",), "selection": ("otpr-selection",)},
    "ablation_marginal": {
        "strict": ("otpr",),
        "relaxed": ("otpr-relaxed",),
        "relaxed, u(s) from candidates": ("otpr-conditional",),
    },
}


def labels(stem: str, methods: Collection[str]) -> dict[str, str]:
    """The legend of one ablation's arms among `methods`, by method; empty where fewer than `MINIMUM_ARMS` are there."""
    found = {}
    for meaning, names in ABLATIONS[stem].items():
        for name in [name for name in names if name in methods][:1]:
            found[name] = f"{meaning} ({name})"
    return found if len(found) >= MINIMUM_ARMS else {}


def restrict(panels: Sequence[Panel], methods: Collection[str]) -> list[Panel]:
    """The panels with the curves of `methods` alone; those that have none are left out."""
    kept = [replace(panel, curves=tuple(c for c in panel.curves if c.method in methods)) for panel in panels]
    return [panel for panel in kept if panel.curves]
