"""What the commands refuse in one line: repeated options, names too long, folders that cannot be read, odd seeds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmark import pretrain, run, status
from benchmark.command_line import refuse_repeated
from benchmark.report import __main__ as report_command
from benchmark.suites import LARGEST_SEED, parse_seeds


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> None:
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in words), error


@pytest.mark.parametrize("words", [("--methods", "a", "--methods", "b"), ("--methods=a", "--methods", "b")])
def test_an_option_that_takes_several_values_is_not_given_twice(words: tuple[str, ...], capsys) -> None:
    refuse_repeated(words, ("--tasks",))
    refuse_repeated(("--methods", "a", "b"), ("--methods",))
    with pytest.raises(SystemExit) as ended:
        refuse_repeated(words, ("--tasks", "--methods"))
    assert ended.value.code == 2
    refused(capsys, "--methods is given twice", "--methods A B")


def test_the_commands_refuse_it(tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        report_command.main(["--out", str(tmp_path), "--import", "a.csv", "--import", "b.csv"])
    assert ended.value.code == 2
    refused(capsys, "--import is given twice")
    command = (
        sys.executable,
        "-m",
        "benchmark.run",
        "--suite",
        "smoke",
        "--dry-run",
        "--tasks",
        "toy",
        "--tasks",
        "toy",
    )
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stderr.startswith("error: --tasks is given twice")


def test_names_that_are_too_long_are_one_line(tmp_path: Path, capsys) -> None:
    out = tmp_path / ("x" * 300)
    assert run.main(run.Arguments(suite="smoke", out=out, dry_run=True)) == 2
    refused(capsys, "error: ", "too long")
    assert report_command.main(["--out", str(out)]) == 2
    refused(capsys, "too long")


def test_folders_that_cannot_be_searched_are_one_line(tmp_path: Path, monkeypatch, capsys) -> None:
    def exists(path: Path) -> bool:  # as for anybody but the superuser below a folder of mode 700
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "exists", exists)
        assert run.main(run.Arguments(suite="smoke", out=tmp_path / "out", dry_run=True)) == 2
    refused(capsys, "error: ", "Permission denied")


def test_status_watches_or_prints_json(tmp_path: Path, capsys) -> None:
    assert status.main(status.Arguments(out=tmp_path, watch=True, json=True)) == 2
    refused(capsys, "--watch", "--json")


def test_seeds_have_an_end() -> None:
    assert parse_seeds(f"{LARGEST_SEED}-{LARGEST_SEED}") == [LARGEST_SEED]
    for text in (f"{LARGEST_SEED + 1}-{LARGEST_SEED + 1}", str(10**15)):
        with pytest.raises(ValueError, match=f"B <= {LARGEST_SEED}, got '{text}'"):
            parse_seeds(text)


def test_pre_training_looks_first_whether_it_can_write(tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(pretrain, "load_data", lambda name: pytest.fail("read the data first"))
    assert pretrain.main("toy", out=tmp_path / "file" / "toy.pt") == 2
    refused(capsys, "not a directory")
