"""Promises about the code itself: import direction, importable pins, one shape for every method, tidy sources."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
from pathlib import Path

import pytest

from benchmark.methods import ARMS

ROOT = Path(__file__).parents[1]
ALLOWED = {"otpr": {"otpr"}, "baselines": {"baselines", "otpr"}, "benchmark": {"benchmark", "baselines", "otpr"}}
LONGEST_FUNCTION = 60


def sources() -> list[Path]:
    return [path for package in ALLOWED for path in sorted((ROOT / package).rglob("*.py"))]


def imported(tree: ast.AST) -> set[str]:
    """Top-level packages that a module imports, anywhere in it."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way_only(path: Path) -> None:
    own = path.relative_to(ROOT).parts[0]
    assert not imported(ast.parse(path.read_text())) & (set(ALLOWED) - ALLOWED[own])


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_are_short_and_nothing_unpickles(path: Path) -> None:
    text = path.read_text()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= LONGEST_FUNCTION, f"{node.name} has {length} lines"
    for forbidden in (
        "import pickle",
        "allow_pickle=True",
        "weights_only=False",
        "np.random.seed(",
        "torch.manual_seed(",
        "manual_seed_all",
    ):
        assert forbidden not in text


def test_the_pinned_statistics_import_together() -> None:
    library = importlib.import_module("rliable.library")
    assert hasattr(library, "get_interval_estimates")
    for package, major in (("pandas", "2"), ("arch", "7"), ("rliable", "1.2.0")):
        assert importlib.metadata.version(package).startswith(major)


def test_mujoco_is_within_its_pin() -> None:
    major, minor = (int(part) for part in importlib.metadata.version("mujoco").split(".")[:2])
    assert (3, 3) <= (major, minor) < (3, 10)


def test_every_method_has_the_same_members(arm: str) -> None:
    module = ARMS[arm].load()
    method = getattr(module, ARMS[arm].class_name)
    for member in ("act", "other_rules", "update", "state_dict", "load_state_dict"):
        assert callable(getattr(method, member))
    for table in (module.PUBLISHED, module.EMBEDDED):
        for family, values in table.items():
            module.Settings(**values)
            assert set(values) <= set(module.Settings.__dataclass_fields__), family
