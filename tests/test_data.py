"""The local datasets are made as registered, only once, and the command line tells what it finds in one line."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from data_cases import random_episodes, write_published_minari

import benchmark.data.__main__ as command
from benchmark.data import make, registry
from benchmark.data.access import data_present, load_data, verify_data
from benchmark.data.demonstrator import Demonstrator, save_demonstrator
from benchmark.data.episodes import Episodes
from benchmark.data.registry import LocalData, cache_dir, dataset_path
from benchmark.envs import make_env
from benchmark.policies import FOLDER
from benchmark.store import read_json

# What the shipped policies were trained on; another recipe would cut them off from their data.
SHIPPED = {
    "hopper-local": "0c63d5bd8e918eaa2ca786cf01a561600266a148a6f002aa3d2b4401a19e65ea",
    "toy": "450b2386a1e534f416f620f9a7ec078fbb5b2eedd2da90c30c96e432f93aebda",
}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTPR_BENCH_CACHE", str(tmp_path / "cache"))


def local(name: str) -> LocalData:
    data = registry.get_dataset(name)
    assert isinstance(data, LocalData)
    return data


@pytest.mark.parametrize("name", SHIPPED)
def test_recipes_of_shipped_policies_never_change(name: str) -> None:
    assert local(name).digest() == SHIPPED[name] == read_json(FOLDER / f"{name}.json")["data_digest"]


def test_a_scripted_demonstrator_is_known_by_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    script = pytest.importorskip("benchmark.data.manipulation")
    data = local("can-local")
    assert data.recipe()["demonstrator_sha256"] == f"scripted-{script.SCRIPT_VERSION}"
    digest = data.digest()
    monkeypatch.setattr(script, "SCRIPT_VERSION", script.SCRIPT_VERSION + 1)
    assert data.digest() != digest


def test_toy_is_generated_once_and_verifies() -> None:
    data = local("toy")
    assert data_present("toy")
    first = load_data("toy")
    assert dataset_path("toy").is_relative_to(cache_dir())
    written = dataset_path("toy").stat().st_mtime_ns
    second = load_data("toy")
    assert dataset_path("toy").stat().st_mtime_ns == written
    assert first.digest == second.digest == data.digest()
    assert verify_data("toy").episodes.content_digest() == make.make_episodes(data).content_digest()
    assert len(first.episodes.lengths) == data.episodes


def test_an_older_recipe_is_refused_and_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = local("toy")
    path = make.make_dataset(data, tmp_path / "toy.hdf5")
    older = load_data("toy").digest
    monkeypatch.setattr(registry, "GENERATOR_VERSION", registry.GENERATOR_VERSION + 1)
    with pytest.raises(ValueError, match="differs in generator_version"):
        verify_data("toy", path)
    assert load_data("toy").digest == data.digest() != older


def test_roll_out_records_whole_episodes(tmp_path: Path) -> None:
    policy = Demonstrator(11, 3, 16, torch.Generator().manual_seed(0))

    def collect() -> Episodes:
        env = make_env("hopper", 6, action_horizon=1)
        return make.roll_out(env, policy, np.arange(6), torch.Generator().manual_seed(1))

    episodes = collect()
    assert len(episodes.lengths) == 6
    assert (episodes.terminals | episodes.timeouts).sum() == 6
    assert np.abs(episodes.actions).max() <= 1
    assert episodes.content_digest() == collect().content_digest()
    env = make_env("hopper", 6, action_horizon=1)  # replay the recorded actions of one episode
    start, stop = episodes.boundaries[2:4]
    observation = env.reset(np.array([2]), np.array([2]))
    for step in range(start, stop):
        np.testing.assert_array_equal(observation[0].astype(np.float32), episodes.observations[step])
        outcome = env.step(np.array([2]), episodes.actions[step][None, None])
        assert np.float32(outcome.rewards[0, 0]) == episodes.rewards[step]
        assert outcome.terminated[0] == episodes.terminals[step]
        observation = outcome.observations


def test_recipe_refuses_a_demonstrator_that_is_not_of_its_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "DEMONSTRATORS", tmp_path)
    data = local("hopper-local")
    with pytest.raises(ValueError, match="no demonstrator"):
        data.recipe()
    save_demonstrator(Demonstrator(11, 3, 8, torch.Generator()), tmp_path / "hopper.pt", {})
    digest = data.digest()
    save_demonstrator(Demonstrator(11, 3, 8, torch.Generator().manual_seed(5)), tmp_path / "other.pt", {})
    (tmp_path / "other.pt").rename(tmp_path / "hopper.pt")
    with pytest.raises(ValueError, match="not the file that its card describes"):
        data.recipe()
    (tmp_path / "other.json").rename(tmp_path / "hopper.json")
    assert data.digest() != digest


@pytest.mark.parametrize("name", [p.stem for p in FOLDER.glob("*.json")])
def test_every_shipped_policy_has_a_dataset(name: str) -> None:
    assert registry.get_dataset(name).task == name


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run the command line; returns its exit status, output and errors."""

    def execute(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["data", *arguments])
        status = command.main()
        return status, *capsys.readouterr()

    return execute


def test_command_line(run, tmp_path: Path) -> None:
    status, output, _ = run("list")
    assert status == 0
    for part in ("not made yet: python -m benchmark.data make toy", "CC BY 4.0; 152.8 MB; d4rl file from http://rail",
                 "missing: python -m benchmark.data get lift", "observations 59, actions 14"):  # fmt: skip
        assert part in output
    assert run("verify", "toy")[0] == 2
    assert run("make", "toy")[0] == 0
    assert "timed out" in run("verify", "toy")[1]
    assert f"there: {dataset_path('toy')}" in run("list")[1]
    assert run("make", "toy", "--cache", str(tmp_path / "elsewhere"))[0] == 0
    assert (tmp_path / "elsewhere" / "data" / "toy.hdf5").exists()


def test_import_by_the_command_line(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_published_minari(tmp_path / "set", random_episodes(observation_dim=11, action_dim=3))
    data = dataclasses.replace(registry.DATASETS["hopper-medium-v2"], episodes=3, steps=17)
    monkeypatch.setitem(registry.DATASETS, "hopper-medium-v2", data)
    assert run("import", str(tmp_path / "set"), "--task", "hopper-medium-v2")[0] == 0
    assert "episodes 3" in run("verify", "hopper-medium-v2")[1]
    assert list(json.loads((cache_dir() / "data" / "digests.json").read_text())) == ["hopper-medium-v2"]
    assert data_present("hopper-medium-v2")


def test_bad_input_is_one_line_and_status_2(run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for arguments, message in (
        (("make", "nope"), "unknown dataset 'nope'; valid: can,"),
        (("make", "lift"), "'lift' is published"),
        (("make", "toy", "--out", str(tmp_path / "file" / "a.hdf5")), "cannot be written|Not a directory|File exists"),
        (("make", "toy", "--threads", "0"), "--threads must be at least 1"),
        (("get",), "name the datasets to download, or all"),
        (("get", "nope"), "cannot download 'nope' .unknown.; valid: all, hopper-medium-v2"),
        (("get", "lift", "toy"), "cannot download 'toy' .generated: use make"),
        (("verify", "lift"), "data that is not there: lift .* python -m benchmark.run --suite local"),
        (("verify", "toy", str(tmp_path / "file")), "unreadable HDF5 file"),
        (("import", str(tmp_path / "file"), "--task", "toy"), "unreadable HDF5 file"),
        (("import", str(tmp_path / "file"), "--task", "nope"), "unknown dataset 'nope'"),
        (("import", str(tmp_path), "--task", "toy"), "not a Minari dataset"),
    ):
        status, _, errors = run(*arguments)
        assert status == 2
        assert errors.startswith("error: ")
        assert errors.count("\n") == 1
        assert re.search(message, errors), errors
