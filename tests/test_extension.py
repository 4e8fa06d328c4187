"""A method and a task of another installed package, found by entry points: run, evaluated, in gymnasium."""

from __future__ import annotations

import csv
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmark import evaluate, run
from benchmark.methods import get_arm
from benchmark.policies import FORMAT, load_pretrained
from benchmark.store import write_json
from benchmark.tasks import get_task
from otpr.diffusion import DiffusionPolicy

ROOT = Path(__file__).parents[1]
pytest.importorskip("setuptools", reason="builds the example package")
pytest.importorskip("pip", reason="installs the example package")


def python(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python with the example package installed, away from its source."""
    environment = os.environ | {"PYTHONPATH": str(site), "OTPR_BENCH_CACHE": str(site.parent / "cache")}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the example package installed in it."""
    folder = tmp_path_factory.mktemp("extension")
    source = shutil.copytree(ROOT / "tests" / "extension", folder / "source")  # building leaves files beside it
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    done = python(folder / "site", "-m", "pip", "install", *options, "--target", str(folder / "site"), str(source))
    assert done.returncode == 0, done.stderr
    return folder / "site"


@pytest.fixture
def policy(site: Path, monkeypatch) -> Path:
    """A policy file of the example's task, freshly initialised."""
    monkeypatch.syspath_prepend(str(site))
    task = get_task("line")
    network = task.build_network(torch.Generator().manual_seed(0))
    path, one = Path(task.policy), torch.ones(1)
    state = {
        "format": FORMAT,
        "task": task.name,
        "denoising_steps": 20,
        "ema": DiffusionPolicy(network).state_dict(),
        "normalization": {
            "observation_min": -one, "observation_max": one, "action_min": -one, "action_max": one,
        },
        "data_digest": "",
    }  # fmt: skip
    torch.save(state, path)
    write_json(path.with_suffix(".json"), {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()})
    load_pretrained(task)
    return path


def test_entry_points_give_the_method_and_the_task(policy: Path) -> None:
    assert get_arm("elite").class_name == "Elite"
    assert get_task("line").environment == "otpr_extension:LineEnv"
    with pytest.raises(ValueError, match=r"valid: .*elite"):
        get_arm("elitist")
    with pytest.raises(ValueError, match=r"valid: .*line"):
        get_task("lines")


def test_a_comparison_on_both_and_on_each(site: Path, policy: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "runs"
    command = ["-m", "benchmark.run", "--suite", "smoke", "--methods", "elite", "frozen", "--tasks", "line"]
    done = python(site, *command, "--seeds", "1", "--launcher", "inline", "--out", str(out))
    assert done.returncode == 0, done.stderr
    curves = {method: read(out / "line" / method / "seed-0" / "curve.csv") for method in ("elite", "frozen")}
    assert [int(row["env_steps"]) for row in curves["elite"]] == [0, 1280, 2560]
    assert [int(row["gradient_steps"]) for row in curves["elite"]] == [0, 60, 120]  # the task's own setting, 30
    assert curves["elite"][0]["return_mean"] == curves["frozen"][0]["return_mean"]
    assert (out / "report" / "summary.csv").exists()
    assert evaluate.main(evaluate.Arguments(run=out / "line" / "elite" / "seed-0")) == 0
    assert curves["elite"][-1]["return_mean"] in capsys.readouterr().out
    planned = run.Arguments(
        suite="smoke", methods=("elite",), set=("elite.steps=1",), out=tmp_path / "toy", dry_run=True
    )
    assert run.main(planned) == 0
    assert "elite" in capsys.readouterr().out


def read(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_the_task_is_in_gymnasium_too(site: Path) -> None:
    code = """import gymnasium
from gymnasium.utils.env_checker import check_env
env = gymnasium.make("benchmark.gym:otpr_bench/line")
check_env(env.unwrapped, skip_render_check=True)
print(env.reset(seed=0)[0].shape)"""
    done = python(site, "-c", code)
    assert done.stdout == "(1,)\n", done.stderr
