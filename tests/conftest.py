"""Shared fixtures: small run specifications on the toy task."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmark.methods import ARMS
from benchmark.plan import PlannedRun, prepare
from benchmark.spec import RunSpec, make_spec
from benchmark.store import run_paths

torch.set_num_threads(1)  # what is tested is too small for more, which would only wait for each other

TINY = {"n_envs": 8, "n_steps": 4, "iterations": 6, "eval_every": 2, "eval_episodes": 8}


def toy_spec(method: str, seed: int = 0, loop: dict[str, Any] | None = None, **overrides) -> RunSpec:
    """A run of well under a second on the toy task."""
    sampler = {"kind": "ddim", "ddim_steps": 4}
    if method == "dppo":
        overrides = {"ft_denoising_steps": 2, **overrides}
    return make_spec("toy", method, seed, "embedded", TINY | (loop or {}), sampler, overrides, threads=1, device="cpu")


@pytest.fixture
def prepared(tmp_path: Path) -> Callable[..., PlannedRun]:
    """Prepare a tiny toy run of a method below the test's folder."""

    def make(method: str, folder: str = "runs", **overrides) -> PlannedRun:
        spec = toy_spec(method, **overrides)
        run = PlannedRun(spec, run_paths(tmp_path / folder, spec.task, spec.method, spec.seed), "missing")
        prepare(run)
        return run

    return make


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of the tests' own, so that they neither read nor leave anything in the user's."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("OTPR_BENCH_CACHE", str(folder))
        yield folder


def wait_for_end(pids: Iterable[int], seconds: float = 10.0) -> None:
    """Fail unless all processes end within these seconds; a zombie, which init may leave for long, has ended."""
    deadline = time.monotonic() + seconds
    for pid in pids:
        status = Path(f"/proc/{pid}/stat")
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            while status.read_text().rpartition(")")[2].split()[0] != "Z":
                assert time.monotonic() < deadline, f"process {pid} still runs"
                time.sleep(0.05)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread, also after a test that takes more."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


# One arm for each way through the code: the first of each class, and those of OTPR that differ in more than numbers.
FIRST_OF_CLASS = {(arm.module, arm.class_name): name for name, arm in reversed(ARMS.items())}
DISTINCT_ARMS = (*reversed(FIRST_OF_CLASS.values()), "otpr-u", "otpr-conditional")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for `arm` runs for every registered method and arm, for `distinct_arm` for `DISTINCT_ARMS`."""
    for name, arms in (("arm", tuple(ARMS)), ("distinct_arm", DISTINCT_ARMS)):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, arms)
