"""Shared fixtures: small run specifications on the toy task."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmark.methods import ARMS
from benchmark.plan import PlannedRun, prepare
from benchmark.spec import RunSpec, make_spec
from benchmark.store import run_paths

TINY = {"n_envs": 8, "n_steps": 4, "iterations": 6, "eval_every": 2, "eval_episodes": 8}


def toy_spec(method: str, seed: int = 0, **overrides) -> RunSpec:
    """A run of well under a second on the toy task."""
    sampler = {"kind": "ddim", "ddim_steps": 3}
    if method == "dppo":
        overrides = {"ft_denoising_steps": 2, **overrides}
    return make_spec("toy", method, seed, "embedded", TINY, sampler, overrides, threads=1, device="cpu")


@pytest.fixture
def prepared(tmp_path: Path) -> Callable[..., PlannedRun]:
    """Prepare a tiny toy run of a method below the test's folder."""

    def make(method: str, folder: str = "runs", **overrides) -> PlannedRun:
        spec = toy_spec(method, **overrides)
        run = PlannedRun(spec, run_paths(tmp_path / folder, spec.task, spec.method, spec.seed), "missing")
        prepare(run)
        return run

    return make


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for `arm` runs for every registered method and arm."""
    if "arm" in metafunc.fixturenames:
        metafunc.parametrize("arm", list(ARMS))
