"""Diagnosis of a checkpoint: every solver's row, and bad input in one line."""

from __future__ import annotations

import csv
import dataclasses
import math
from pathlib import Path

import pytest

from benchmark import diagnose
from benchmark.diagnose import SOLVERS, Arguments, main
from benchmark.launch.execute import execute


def test_every_solver_and_bound_has_a_row_on_one_and_the_same_checkpoint(
    prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diagnose, "FITS", 1)
    run, out = prepared("idql"), tmp_path / "diagnosis.csv"
    execute(run.paths.root)
    before = run.paths.checkpoint.read_bytes()
    assert main(Arguments(run.paths.root, out, bounds=(1.0, 2.0))) == 0
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["rule"] for row in rows] == ["actor", "best_q"] + ["sample_h"] * 6
    assert [row["solver"] for row in rows[2:]] == list(SOLVERS) * 2
    exact = [row for row in rows if row["solver"] == "exact"]
    assert all(float(row["marginal_error"]) < 1e-4 for row in exact)
    assert all(float(row["empty"]) == 0 for row in rows if row["solver"] == "conditional")
    assert all(math.isfinite(float(row[name])) for row in rows[2:] for name in ("correlation", "entropy", "gain"))
    assert run.paths.checkpoint.read_bytes() == before


@pytest.mark.parametrize("method", ["dppo", "dql"])
def test_methods_without_q_and_v_are_refused(method: str, prepared, tmp_path: Path, capsys) -> None:
    run, out = prepared(method), tmp_path / "diagnosis.csv"
    execute(run.paths.root)
    assert main(Arguments(run.paths.root, out)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and method in error
    assert not out.exists()


def test_a_run_without_checkpoint_and_an_unknown_solver_are_refused(prepared, tmp_path: Path, capsys) -> None:
    run, out = prepared("idql"), tmp_path / "diagnosis.csv"
    assert main(Arguments(run.paths.root, out)) == 2
    assert "checkpoint" in capsys.readouterr().err
    execute(run.paths.root)
    assert main(Arguments(run.paths.root, out, solvers=("guess",))) == 2
    assert "neural" in capsys.readouterr().err
    for more, words in (
        ({"bounds": (1.0, 0.5)}, ["action_bound", "0.5"]),
        ({"epsilons": (0.1, 0.0)}, ["epsilon", "0.0"]),
        ({"bounds": ()}, ["--bounds"]),
        ({"out": tmp_path}, ["--out", "directory"]),
    ):
        assert main(dataclasses.replace(Arguments(run.paths.root, out), **more)) == 2
        error = capsys.readouterr()
        assert all(word in error.err for word in words) and error.err.count("\n") == 1
        assert not error.out and not out.exists()


def test_rows_are_written_as_they_come(prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    run, out = prepared("idql"), tmp_path / "diagnosis.csv"
    execute(run.paths.root)

    def fail(*_: object) -> None:
        raise RuntimeError("the exact solver\ngives up")

    monkeypatch.setattr(diagnose, "solve", fail)
    assert main(Arguments(run.paths.root, out)) == 2
    assert capsys.readouterr().err == "error: the exact solver gives up\n"
    assert [line.split(",")[4] for line in out.read_text().splitlines()] == ["rule", "actor", "best_q"]
