"""The evaluations in other tools' formats, read back by these tools."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_report import make_run, read_csv
from test_report_imports import HEADER, curve, hostile_csv

from benchmark import report
from benchmark.report import __main__ as command
from benchmark.report import exports, imported


def test_open_rl_benchmarks_columns(tmp_path: Path) -> None:
    make_run(tmp_path, "toy", "otpr", 0, [0, 50])
    folder = report.write_report(tmp_path, report.Options(exports=("openrlbenchmark",)))
    rows = read_csv(folder / "openrlbenchmark.csv")
    assert [row["global_step"] for row in rows] == ["0", "50"]
    named = {"env_id": "toy", "exp_name": "otpr", "seed": "0", "global_step": "50", "_runtime": "0.5"}
    values = {"charts/episodic_return": "1500", "charts/success_rate": "0.5", "charts/score": "0.5"}
    assert rows[1] == named | values


def test_the_long_table_comes_back_as_an_import(tmp_path: Path) -> None:
    for seed in range(2):
        make_run(tmp_path, "toy", "otpr", seed, [0, 50, 100])
    runs, notes = imported.read_curves(report.write_report(tmp_path) / "data.csv")
    assert notes == [] and [run.name for run in runs] == ["toy/otpr/seed-0", "toy/otpr/seed-1"]
    assert [row.score for row in runs[1].evaluations] == [0.01, 0.26, 0.51]


def test_an_export_without_its_package_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path, "toy", "otpr", 0, [0, 50])
    monkeypatch.setitem(exports.EXPORTS, "parquet", exports.Export("no_such_package", lambda runs, folder: None))
    assert command.main(["--out", str(tmp_path), "--export", "parquet"]) == 2
    assert 'needs no_such_package: pip install "otpr-bench[export]"' in capsys.readouterr().err
    assert not (tmp_path / "report").exists()
    with pytest.raises(ValueError, match="valid: parquet, tensorboard, wandb, openrlbenchmark"):
        exports.check_exports(["excel"])


def test_parquet_reads_back(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    make_run(tmp_path, "toy", "otpr", 0, [0, 50])
    frame = pandas.read_parquet(report.write_report(tmp_path, report.Options(exports=("parquet",))) / "data.parquet")
    assert frame["score"].tolist() == [0.0, 0.5] and frame["env_steps"].dtype == "int64"
    assert tuple(frame.columns) == tuple(read_csv(tmp_path / "report" / "data.csv")[0])


def test_tensorboard_reads_back(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    path = hostile_csv(tmp_path / "a.csv")
    path.write_text(path.read_text() + "0.5,0,?,0,..,..\n0.75,0,?,10,..,..\n")
    folder = report.write_report(tmp_path / "out", report.Options((path,), exports=("tensorboard",)))
    found = sorted((folder / "tensorboard").rglob("events.*"))
    assert len(found) == len({file.parent for file in found}) == 61
    reader = events.EventAccumulator(str(folder / "tensorboard" / "%2E%2E" / "%2E%2E" / "seed-0"))
    reader.Reload()
    assert [(event.step, event.value) for event in reader.Scalars("evaluation/score")] == [(0, 0.5), (10, 0.75)]


def test_wandb_writes_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    path = tmp_path / "a.csv"
    path.write_text(HEADER + curve("m", 0, [0.1, 0.2]) + curve("n", 0, [0.1, 0.2]))
    for _ in range(2):
        folder = report.write_report(tmp_path / "out", report.Options((path,), exports=("wandb",)))
    assert len(list((folder / "wandb").glob("offline-run-*/*.wandb"))) == 2
