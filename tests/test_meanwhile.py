"""What changes between the moment in which a command plans its runs and their end."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest
from test_cli import call

from benchmark import run, status
from benchmark.data.registry import dataset_path
from benchmark.launch.local import Pool
from benchmark.plan import make_specs, plan_runs, prepare
from benchmark.policies import FOLDER
from benchmark.store import read_status, write_json
from benchmark.suites import load_suite
from benchmark.tasks import Task


@pytest.fixture
def no_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which the policy of the toy task is looked for, and is not; its data is made on this machine."""
    monkeypatch.setattr("benchmark.policies.FOLDER", tmp_path)
    monkeypatch.setenv("OTPR_BENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_runs_that_can_start_do_not_wait_for_a_policy_that_is_trained(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("OTPR_BENCH_CACHE", str(tmp_path / "cache"))
    write_json(dataset_path("hopper-medium-v2"), {})
    seen = []

    def train(task: Task, progress: object) -> None:
        seen.append([read_status(paths)["state"] for paths in status.find_runs(tmp_path / "out")])

        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(run, "ensure_policy", train)
    file = tmp_path / "mine.toml"
    file.write_text('tasks = ["hopper-medium-v2", "hopper-local"]\nmethods = ["frozen"]\n[loop]\neval_episodes = 1\n')
    assert call(tmp_path / "out", suite=str(file)) == 1
    assert seen == [["done"]] and "disk full" in capsys.readouterr().err
    warnings = (tmp_path / "out" / "report" / "summary.md").read_text()
    assert "hopper-medium-v2" in warnings and "different protocols" not in warnings


def test_a_suite_edited_while_a_policy_trains_is_run_as_read(no_policy: Path, tmp_path: Path, monkeypatch) -> None:
    file, content = tmp_path / "mine.toml", 'protocol = "embedded"\ntasks = ["toy"]\nmethods = ["frozen"]\n'
    file.write_text(content)

    def train(task: Task, progress: object) -> None:
        file.write_text(content.replace("frozen", "dppo"))
        for name in ("toy.pt", "toy.json"):
            shutil.copy(FOLDER / name, no_policy)

    monkeypatch.setattr(run, "ensure_policy", train)
    assert call(tmp_path / "out", suite=str(file), seeds="1") == 0
    assert [paths.root.parts[-2] for paths in status.find_runs(tmp_path / "out")] == ["frozen"]


def test_runs_whose_policy_is_gone_again_wait(no_policy: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(run, "ensure_policy", lambda task, progress: None)
    assert call(tmp_path / "out", methods=("frozen",)) == 1
    assert "gone again" in capsys.readouterr().err
    (paths,) = status.find_runs(tmp_path / "out")
    assert read_status(paths)["state"] == "queued" and not paths.spec.exists()


def test_a_machine_that_fails_after_runs_were_done_is_exit_1_with_a_report(tmp_path: Path, capsys, monkeypatch) -> None:
    pool = Pool.run

    def fails(self: Pool, roots: list[Path]) -> None:
        pool(self, roots[:1])
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(Pool, "run", fails)
    assert call(tmp_path / "out", methods=("frozen",), seeds="2", launcher="local") == 1
    assert (tmp_path / "out" / "report" / "summary.md").exists()
    assert "Resource temporarily unavailable" in capsys.readouterr().err


def test_another_commands_run_is_not_taken_for_the_own_one(tmp_path: Path) -> None:
    """Both have looked at an empty directory; the second to prepare its runs is refused."""
    own, other = (
        plan_runs(make_specs([load_suite("smoke")], {"dppo": {"clip_coef": value}}, "cpu"), tmp_path)
        for value in (0.1, 0.2)
    )
    chosen = [next(run for run in runs if run.spec.method == "dppo") for runs in (own, other)]
    prepare(chosen[0])
    with pytest.raises(ValueError, match=r"settings.clip_coef is 0.1 there and 0.2 here"):
        prepare(chosen[1])
    prepare(chosen[0])
