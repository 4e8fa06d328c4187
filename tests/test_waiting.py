"""A task that cannot start leaves the others running, and says why."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path

from test_cli import call

from benchmark import run, status
from benchmark.data.registry import dataset_path
from benchmark.plan import make_specs, plan_runs
from benchmark.policies import policy_path
from benchmark.spec import load_spec
from benchmark.store import read_status, run_paths, write_json
from benchmark.suites import load_suite
from benchmark.tasks import get_task


def no_call(*_: object) -> None:
    raise AssertionError("called")


def test_damaged_data_of_a_task_leaves_the_others_running(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("OTPR_BENCH_CACHE", str(tmp_path / "cache"))
    place = dataset_path("hopper-medium-v2")
    place.parent.mkdir(parents=True)
    place.write_bytes(b"no data")
    file = tmp_path / "mine.toml"
    file.write_text('tasks = ["hopper-medium-v2", "hopper-local"]\nmethods = ["frozen"]\n[loop]\neval_episodes = 1\n')
    assert call(tmp_path / "out", suite=str(file)) == 1
    error = capsys.readouterr().err
    assert f"hopper-medium-v2: {place}" in error and "1 runs wait" in error
    runs = [(paths.root.parts[-3], read_status(paths)["state"]) for paths in status.find_runs(tmp_path / "out")]
    assert runs == [("hopper-local", "done"), ("hopper-medium-v2", "queued")]
    assert status.main(status.Arguments(out=tmp_path / "out")) == 1
    assert str(place) in json.loads((tmp_path / "out/hopper-medium-v2/frozen/seed-0/status.json").read_text())["error"]
    capsys.readouterr()
    assert status.main(status.Arguments(out=tmp_path / "out", watch=True)) == 1  # it does not wait for data
    assert "hopper-medium-v2" in (tmp_path / "out" / "report" / "summary.md").read_text()


def test_a_damaged_policy_of_a_task_leaves_the_others_running(tmp_path: Path, capsys, monkeypatch) -> None:
    policies, file, out = tmp_path / "policies", tmp_path / "mine.toml", tmp_path / "out"
    policies.mkdir()
    for name in ("toy", "hopper-local"):
        for path in (policy_path(get_task(name)), policy_path(get_task(name)).with_suffix(".json")):
            shutil.copy(path, policies)
    (policies / "toy.pt").write_bytes(b"no policy")
    monkeypatch.setattr("benchmark.policies.FOLDER", policies)
    file.write_text(
        'protocol = "embedded"\ntasks = ["toy", "hopper-local"]\nmethods = ["frozen"]\n[loop]\neval_episodes = 1\n'
    )
    assert call(out, suite=str(file), dry_run=True) == 0
    damage = f"{policies / 'toy.pt'}: not the file that its card describes"
    assert damage in capsys.readouterr().out and not out.exists()
    assert call(out, suite=str(file)) == 1
    error = capsys.readouterr().err
    assert "1 runs wait" in error and damage in error and "remove it to have it made" in error
    assert damage in read_status(run_paths(out, "toy", "frozen", 0))["error"]
    assert read_status(run_paths(out, "hopper-local", "frozen", 0))["state"] == "done"
    assert call(out, suite=str(file)) == 1  # though all that is pending is damaged now
    assert "data that is not there" not in capsys.readouterr().err


def test_runs_whose_policy_is_gone_are_left_as_they_are(tmp_path: Path, capsys, monkeypatch) -> None:
    assert call(tmp_path, methods=("frozen",)) == 0
    begun = run_paths(tmp_path, "toy", "frozen", 1)
    shutil.copytree(run_paths(tmp_path, "toy", "frozen", 0).root, begun.root)
    write_json(begun.spec, replace(load_spec(begun.spec), seed=1).as_dict())
    write_json(begun.status, read_status(begun) | {"state": "running"})
    monkeypatch.setattr("benchmark.policies.FOLDER", tmp_path / "none")
    monkeypatch.setattr(run, "make_start", no_call)  # another policy than the one with which they began
    assert call(tmp_path, methods=("frozen",)) == 0  # it is done
    again = run.Arguments(from_spec=run_paths(tmp_path, "toy", "frozen", 0).spec, out=tmp_path, launcher="inline")
    assert run.main(again) == 0
    capsys.readouterr()
    for seeds in ("0-1", "0-2"):  # one that was begun, one that was not
        assert call(tmp_path, methods=("frozen",), seeds=seeds) == 1
        assert "toy                   runs here began with its policy, since gone" in capsys.readouterr().err
    assert read_status(begun)["state"] == "running"
    assert call(tmp_path, methods=("frozen",), dry_run=True) == 0
    assert "0 to do" in (said := capsys.readouterr().out) and "trained" not in said
    assert call(tmp_path, methods=("frozen",), precision="bfloat16") == 2  # other settings are refused still


def test_a_simulator_that_dies_while_a_policy_is_made_is_a_reason_to_wait(tmp_path: Path, capsys, monkeypatch) -> None:
    def fail(name: str, threads: int) -> None:
        raise RuntimeError("robosuite worker 1 of 2 ended\nwithout an answer")

    monkeypatch.setattr("benchmark.policies.FOLDER", tmp_path / "none")
    monkeypatch.setattr(run, "make_start", fail)
    assert call(tmp_path, methods=("frozen",)) == 1
    assert "toy: robosuite worker 1 of 2 ended without an answer\n" in capsys.readouterr().err
    assert "worker 1 of 2" in read_status(run_paths(tmp_path, "toy", "frozen", 0))["error"]


def test_where_all_runs_wait_for_data_it_is_said_how_to_get_it(tmp_path: Path, capsys) -> None:
    assert call(tmp_path, suite="kitchen", methods=("frozen",), seeds="1") == 1
    error = capsys.readouterr().err
    assert (
        "3 runs wait" in error and "benchmark.data get kitchen-complete-v0 kitchen-partial-v0 kitchen-mixed-v0" in error
    )
    assert status.main(status.Arguments(out=tmp_path)) == 1
    assert capsys.readouterr().out.count("its data is not there") == 3


def test_a_simulator_that_is_not_installed_leaves_the_other_tasks_running(tmp_path: Path, capsys, monkeypatch) -> None:
    def no_version(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr("importlib.metadata.version", no_version)
    file = tmp_path / "mine.toml"
    file.write_text('protocol = "embedded"\ntasks = ["lift-local", "toy"]\nmethods = ["frozen"]\n')
    assert call(tmp_path / "out", suite=str(file), dry_run=True) == 0
    assert "lift-local            robosuite tasks need robosuite 1.4.1: pip" in capsys.readouterr().out
    assert call(tmp_path / "out", suite=str(file)) == 1
    assert "1 runs wait" in (error := capsys.readouterr().err) and "pip install" in error
    runs = {paths.root.parts[-3]: read_status(paths) for paths in status.find_runs(tmp_path / "out")}
    assert [runs[task]["state"] for task in ("toy", "lift-local")] == ["done", "queued"]
    assert call(tmp_path / "out", suite=str(file), tasks=("toy",)) == 0
    monkeypatch.undo()
    assert "pip install" in runs["lift-local"]["error"]
    planned = plan_runs(make_specs([load_suite(str(file))], {}, "cpu"), tmp_path / "out")
    assert {item.spec.task: item.state for item in planned} == {"toy": "done", "lift-local": "missing"}
