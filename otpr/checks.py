"""Checks of settings, shared by all methods: one line that names the bad value and the valid ones."""

from __future__ import annotations


def check_range(settings: object, names: tuple[str, ...], low: float, high: float, open_ends: bool = False) -> None:
    """Raise ValueError unless every named field lies in [low, high], or in (low, high) with `open_ends`."""
    brackets = "()" if open_ends else "[]"
    for name in names:
        value = getattr(settings, name)
        if not (low < value < high if open_ends else low <= value <= high):
            raise ValueError(f"{name} must be in {brackets[0]}{low}, {high}{brackets[1]}, got {value}")


def check_choice(settings: object, name: str, valid: tuple[str, ...]) -> None:
    """Raise ValueError unless the named field is one of `valid`."""
    value = getattr(settings, name)
    if value not in valid:
        raise ValueError(f"unknown {name} {value!r}; valid: {', '.join(valid)}")


def check_widths(settings: object, name: str) -> None:
    """Raise ValueError unless the named field is a tuple of at least one positive width."""
    widths = getattr(settings, name)
    if not widths or min(widths) < 1:
        raise ValueError(f"{name} must be positive widths, got {widths}")
