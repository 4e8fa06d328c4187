"""The report on run directories of every kind: whole, ragged, broken, hostile and none."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmark import report, store, tables
from benchmark.report import __main__ as command
from benchmark.report import collect, compare, curves, longform, records, style, summary

OVER_TASKS = ("aggregates", "sample_efficiency", "performance_profiles", "probability_of_improvement")
FILES = {"index.html", "data.csv", "comparisons.csv"}
FILES |= {f"{stem}.{kind}" for stem in ("summary", "settings") for kind in ("csv", "md", "tex")}
HEADER = "iteration,env_steps,gradient_steps,wall_seconds,episodes,return_mean,return_std,success_rate,score"


def make_run(
    root: Path,
    task: str,
    method: str,
    seed: int,
    steps: list[int],
    state: str = "done",
    score: float = 0.5,
    error: str | None = None,
) -> Path:
    """Write a run whose score rises from 0 to `score` along `steps`."""
    directory = root / task / method / f"seed-{seed}"
    directory.mkdir(parents=True)
    spec = {"task": task, "method": method, "seed": seed, "protocol": "embedded", "digest": "0", "threads": 1}
    (directory / "spec.json").write_text(json.dumps(spec))
    (directory / "status.json").write_text(json.dumps({"state": state, "error": error}))
    lines = [HEADER]
    for index, step in enumerate(steps):
        value = score * index / max(1, len(steps) - 1) + 0.01 * seed
        lines.append(f"{index},{step},{step // 2},{step / 100},20,{3000 * value},5.0,{min(value, 1)},{value}")
    (directory / "curve.csv").write_text("\n".join(lines) + "\n")
    return directory


def pictures(*stems: str) -> set[str]:
    return {f"{stem}.{kind}" for stem in stems for kind in ("png", "pdf")}


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def summary_row(root: Path, task: str, method: str, statistic: str) -> dict[str, str]:
    rows = read_csv(root / "report" / "summary.csv")
    found = [r for r in rows if (r["task"], r["method"], r["statistic"]) == (task, method, statistic)]
    assert len(found) == 1
    return found[0]


def test_full_report(tmp_path: Path) -> None:
    for task in ("hopper-local", "lift-local"):
        for method in ("otpr", "dppo", "frozen"):
            for seed in range(3):
                make_run(tmp_path, task, method, seed, [0, 50, 100], score=0.0 if method == "frozen" else 0.8)
    directory = report.write_report(tmp_path)
    assert directory == tmp_path / "report"
    assert {path.name for path in directory.iterdir()} == FILES | pictures("curves", "curves_wall_clock", *OVER_TASKS)
    row = summary_row(tmp_path, "hopper-local", "otpr", "iqm")
    assert list(row) == list(longform.SUMMARY_COLUMNS)
    assert float(row["value"]) == pytest.approx(0.81)
    assert float(row["low"]) < 0.81 < float(row["high"])
    assert (row["scope"], row["seeds"], row["env_steps"], row["protocol"]) == ("task", "3", "100", "embedded")
    assert float(summary_row(tmp_path, "hopper-local", "otpr", "return_mean")["value"]) == pytest.approx(2430)
    assert summary_row(tmp_path, "all", "otpr", "optimality_gap")["scope"] == "aggregate"
    assert float(summary_row(tmp_path, "all", "otpr", "optimality_gap")["value"]) == pytest.approx(0.19)
    data = read_csv(directory / "data.csv")
    assert len(data) == 2 * 3 * 3 * 3 and tuple(data[0]) == longform.DATA_COLUMNS
    text = (directory / "summary.md").read_text()
    assert "Wall-clock" in text and "Gradient steps" in text and "No run is wanting" in text
    assert text.index("| otpr") < text.index("| dppo") < text.index("| frozen")
    assert (directory / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (directory / "curves.pdf").read_bytes().startswith(b"%PDF")


def test_same_runs_same_bytes(tmp_path: Path) -> None:
    for seed in range(3):
        make_run(tmp_path, "toy", "otpr", seed, [0, 10])
    first = {path.name: path.read_bytes() for path in report.write_report(tmp_path).iterdir()}
    make_run(tmp_path, "toy", "unrelated", 0, [0, 10])
    interval = summary_row(tmp_path, "toy", "otpr", "iqm")
    report.write_report(tmp_path)
    assert summary_row(tmp_path, "toy", "otpr", "iqm") == interval
    for path in sorted((tmp_path / "toy" / "unrelated").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    (tmp_path / "toy" / "unrelated").rmdir()
    assert {path.name: path.read_bytes() for path in report.write_report(tmp_path).iterdir()} == first


def test_one_task_aggregate_equals_its_task(tmp_path: Path) -> None:
    for seed in range(4):
        make_run(tmp_path, "toy", "otpr", seed, [0, 10])
    report.write_report(tmp_path)
    for name in ("iqm", "median", "mean", "optimality_gap"):
        task, over = summary_row(tmp_path, "toy", "otpr", name), summary_row(tmp_path, "all", "otpr", name)
        assert [task[key] for key in ("value", "low", "high")] == [over[key] for key in ("value", "low", "high")]


def test_common_step_of_ragged_runs(tmp_path: Path) -> None:
    for seed in range(3):
        make_run(tmp_path, "toy", "otpr", seed, [0, 10, 20, 30, 40], score=0.8)
        make_run(tmp_path, "toy", "dppo", seed, [0, 20, 40, 60] if seed else [0, 20], score=0.6)
    report.write_report(tmp_path)
    assert summary_row(tmp_path, "toy", "otpr", "iqm")["env_steps"] == "20"
    assert float(summary_row(tmp_path, "toy", "otpr", "iqm")["value"]) == pytest.approx(0.4 + 0.01)
    assert float(summary_row(tmp_path, "toy", "dppo", "mean")["value"]) == pytest.approx((0.6 + 0.2 + 0.2) / 3 + 0.01)
    assert (
        "unequal budgets, compared at 20 env steps; the longest run has reached 60"
        in (tmp_path / "report/summary.md").read_text()
    )


def test_broken_and_starting_runs_do_not_pull_the_step_down(tmp_path: Path) -> None:
    for seed in range(3):
        make_run(tmp_path, "toy", "otpr", seed, [0, 10, 20])
        make_run(tmp_path, "toy", "dppo", seed, [0, 10], state="diverged", error="loss is not finite")
        make_run(tmp_path, "toy", "idql", seed, [0], state="running")
        make_run(tmp_path, "toy", "frozen", seed, [0])
    make_run(tmp_path, "toy", "dql", 0, [0, 10, 20], state="running")
    report.write_report(tmp_path)
    assert summary_row(tmp_path, "toy", "otpr", "iqm")["env_steps"] == "20"
    assert summary_row(tmp_path, "toy", "frozen", "iqm")["seeds"] == "3"
    assert summary_row(tmp_path, "toy", "dql", "iqm")["low"] == ""
    for method, wanting in (("dppo", "3"), ("idql", "3"), ("dql", "2"), ("otpr", "0")):
        assert summary_row(tmp_path, "toy", method, "runs_without_score")["value"] == wanting
        assert summary_row(tmp_path, "toy", method, "runs_planned")["value"] == "3"
    text = (tmp_path / "report" / "summary.md").read_text()
    assert "0 of 3 (3 diverged)" in text and "0 of 3 (3 running)" in text and "1 of 3 (2 missing)" in text
    assert "| toy | dppo | 0 | diverged | 10 | loss is not finite |" in text
    assert "| toy | dql | 1, 2 | missing |" in text
    assert "toy/dql/seed-0 counts, but is running" in text
    latex = (tmp_path / "report" / "summary.tex").read_text()
    assert "3 diverged, 2 missing, 3 running" in latex


def test_steps_that_never_meet(tmp_path: Path) -> None:
    for seed in range(3):
        make_run(tmp_path, "toy", "otpr", seed, [0, 10, 20, 30], score=0.9)
        make_run(tmp_path, "toy", "dppo", seed, [0, 14, 28], score=0.5)
    report.write_report(tmp_path)
    assert float(summary_row(tmp_path, "toy", "otpr", "mean")["value"]) == pytest.approx(0.6 + 0.01)
    assert summary_row(tmp_path, "toy", "dppo", "mean")["env_steps"] == "28"
    assert "never meet" in (tmp_path / "report" / "summary.md").read_text()


@pytest.mark.parametrize("seeds", [1, 2])
def test_fewer_than_three_seeds_give_no_interval(tmp_path: Path, seeds: int) -> None:
    for seed in range(seeds):
        make_run(tmp_path, "toy", "otpr", seed, [0, 10])
    report.write_report(tmp_path)
    rows = read_csv(tmp_path / "report" / "summary.csv")
    assert rows and all(row["low"] == row["high"] == "" for row in rows)
    assert "fewer than 3 seeds" in (tmp_path / "report" / "summary.md").read_text()


def test_tuning_seeds_are_not_mixed(tmp_path: Path) -> None:
    for seed in (0, 1, 2, 1000, 1001):
        make_run(tmp_path, "toy", "otpr", seed, [0, 10])
    report.write_report(tmp_path)
    assert summary_row(tmp_path, "toy", "otpr", "iqm")["seeds"] == "3"
    assert {row["seed"] for row in read_csv(tmp_path / "report" / "data.csv")} == {"0", "1", "2"}
    assert "2 tuning run(s)" in (tmp_path / "report" / "summary.md").read_text()
    runs, note = compare.select_seeds([run for run in collect.read_runs(tmp_path)[0] if run.seed >= 1000])
    assert len(runs) == 2 and "tuning" in note


def test_a_method_without_a_task_is_left_out_over_tasks(tmp_path: Path) -> None:
    for seed in range(3):
        make_run(tmp_path, "toy", "otpr", seed, [0, 10])
        make_run(tmp_path, "lift", "otpr", seed, [0, 10])
        make_run(tmp_path, "toy", "dppo", seed, [0, 10])
    report.write_report(tmp_path)
    rows = [row for row in read_csv(tmp_path / "report" / "summary.csv") if row["scope"] == "aggregate"]
    assert {row["method"] for row in rows} == {"otpr"}
    text = (tmp_path / "report" / "summary.md").read_text()
    assert "dppo: not in the table over tasks, no score on lift" in text.replace("\\", "")
    assert "| lift | dppo | 0, 1, 2 | missing |" in text


def test_an_ablation_beside_a_comparison_is_left_out_over_tasks(tmp_path: Path) -> None:
    """As in the suite `all`: arms of OTPR on a task that the other methods are not run on, and do not miss."""
    for seed in range(3):
        for method in ("otpr", "dppo"):
            for task in ("toy", "lift"):
                make_run(tmp_path, task, method, seed, [0, 10])
        for method in ("otpr", "otpr-q"):
            make_run(tmp_path, "hopper-local", method, seed, [0, 10])
    report.write_report(tmp_path)
    rows = [row for row in read_csv(tmp_path / "report" / "summary.csv") if row["scope"] == "aggregate"]
    assert {row["method"] for row in rows} == {"otpr", "dppo"}
    text = (tmp_path / "report" / "summary.md").read_text().replace("\\", "")
    assert "hopper-local: arms of one method alone, left out over tasks" in text and "Over 2 tasks" in text
    assert "missing" not in text and "None: every run counts." in text
    pairs = [row for row in read_csv(tmp_path / "report" / "comparisons.csv") if row["task"] == "hopper-local"]
    assert {(row["first"], row["second"]) for row in pairs} == {("otpr", "otpr-q")}


def test_half_written_and_garbage_rows(tmp_path: Path) -> None:
    running = make_run(tmp_path, "toy", "otpr", 0, [0, 10], state="running")
    with (running / "curve.csv").open("a") as file:
        file.write("x,y\n2,20,1,1,1,1,1,1,nan\n-1,30,1,1,1,1,1,1,0.5\n3,1e400,,,,,,,0.5\n4,40,20,0.4,20,1,1,1,0.1")
    finished = make_run(tmp_path, "toy", "otpr", 1, [0, 10])
    text = (finished / "curve.csv").read_text()
    (finished / "curve.csv").write_text(text.removesuffix("\n"))
    (make_run(tmp_path, "toy", "otpr", 2, [0]) / "curve.csv").write_bytes(b"\xff\xfe\0garbage\n1,2\n")
    first, second, third = collect.read_runs(tmp_path)[0]
    assert [e.env_steps for e in first.evaluations] == [0, 10]
    assert len(first.notes) == 1 and "5 row(s) left out" in first.notes[0] and "and 2 more" in first.notes[0]
    assert [e.env_steps for e in second.evaluations] == [0, 10] and not second.notes
    assert third.evaluations == () and "no column" in third.notes[0]
    report.write_report(tmp_path)
    shown = (tmp_path / "report" / "summary.md").read_text()
    assert "5 row(s) left out" in shown and "| toy | otpr | 2 | done | none |" in shown


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", '{"state": 7}', "[" * 100_000, '{"state": "done"'])
def test_bad_json_is_noted(tmp_path: Path, content: str) -> None:
    directory = make_run(tmp_path, "toy", "otpr", 0, [0, 10])
    (directory / "status.json").write_text(content)
    run = collect.read_run(directory)
    assert run.state == records.UNKNOWN and len(run.notes) == 1 and "status.json" in run.notes[0]
    assert len(run.evaluations) == 2


def test_missing_files_and_a_spec_of_another_run(tmp_path: Path) -> None:
    directory = make_run(tmp_path, "toy", "otpr", 0, [0, 10])
    (directory / "spec.json").write_text('{"task": "lift", "method": "otpr", "seed": 0}')
    (directory / "status.json").unlink()
    (directory / "curve.csv").unlink()
    (directory / "curve.csv").mkdir()
    run = collect.read_run(directory)
    assert (run.task, run.state, run.protocol) == ("toy", records.UNKNOWN, records.UNKNOWN)
    assert run.notes == ("spec.json says task 'lift'", "status.json is missing", "curve.csv is not a regular file")


def test_hostile_names_and_errors(tmp_path: Path) -> None:
    names = [
        "_a|b$x^2$\\input{evil}",
        "<script>alert(1)</script>".replace("/", ""),
        "line\nbreak",
        "a" * 200,
        "[*]&%#~",
    ]
    for name in names:
        for seed in range(3):
            make_run(tmp_path, "t_$&%", name, seed, [0, 10], error="bad | \n row\x1b[31m", state="failed")
    directory = report.write_report(tmp_path)
    text = (directory / "summary.md").read_text()
    for block in text.split("\n\n"):
        assert len({line.replace("\\|", "").count("|") for line in block.splitlines() if line.startswith("|")}) <= 1
    assert "<script" not in text and "\x1b" not in text and "line\\\\nbreak" in text
    latex = (directory / "summary.tex").read_text()
    assert "\\input{" not in latex and "\\textbackslash{}input\\{evil\\}" in latex
    rows = latex[latex.index(r"\toprule") : latex.index(r"\bottomrule")].splitlines()
    assert all(line.endswith((r"\\", r"\midrule", r"\toprule")) for line in rows)
    assert {row["method"] for row in read_csv(directory / "summary.csv")} == {tables.printable(n) for n in names}


def test_escaping() -> None:
    assert tables.escape_latex(r"a_b & 50% $x$ {y} #1 ~ ^ \z") == (
        r"a\_b \& 50\% \$x\$ \{y\} \#1 \textasciitilde{} \textasciicircum{} \textbackslash{}z"
    )
    assert tables.escape_latex("[a]*--->") == r"{[}a{]}{*}-{}-{}-\textgreater{}"
    assert tables.escape_latex("dql-dppo") == tables.escape_markdown("dql-dppo") == "dql-dppo"
    assert tables.escape_markdown("a|b_c\n<i>&") == r"a\|b\_c\\n&lt;i&gt;&amp;"
    assert "\n" not in tables.escape_markdown("a\nb") and "|" not in tables.escape_markdown("|").removeprefix("\\|")
    assert tables.printable("abcdef", 4) == "abc…"
    assert [tables.number(v) for v in (0.12345, 123.45, -12345.6, float("nan"))] == [
        "0.123",
        "123.5",
        "-12,346",
        tables.DASH,
    ]


def test_styles_are_fixed_and_distinct() -> None:
    known = [style.style(name) for name in ("otpr", "dppo", "idql", "dql", "dql-dppo", "frozen")]
    assert len({look.colour for look in known}) == len({look.marker for look in known}) == 6
    assert known[-1].line == "--" and known[-1].marker == ""
    assert style.style("someone-elses") == style.style("someone-elses")


def test_curves_show_raw_return_for_locomotion_and_success_otherwise(tmp_path: Path) -> None:
    for task in ("hopper-local", "kitchen-partial-v0", "lift"):
        for seed in range(3):
            make_run(tmp_path, task, "otpr", seed, [0, 10])
    result = summary.summarise(collect.read_runs(tmp_path)[0])
    assert [curves.curve_quantity(task) for task in result.tasks] == ["return_mean", "score", "success_rate"]
    (curve,) = curves.curves(result.tasks[0], "return_mean")
    assert np.allclose(curve.estimate.value, [30, 1530]) and (curve.estimate.low <= curve.estimate.value).all()


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for name in ("absent", "file", "empty"):
        assert command.main(["--out", str(tmp_path / name)]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and name in err
    make_run(tmp_path / "early", "toy", "otpr", 0, [], state="queued")
    make_run(tmp_path / "early", "toy", "otpr", 1, [], state="failed")
    assert command.main(["--out", str(tmp_path / "early")]) == 1
    assert "2 run(s), 1 failed, 1 queued" in capsys.readouterr().err
    assert not (tmp_path / "early" / "report").exists()


def test_command_line(tmp_path: Path) -> None:
    make_run(tmp_path, "toy", "otpr", 0, [0, 10])
    command = [sys.executable, "-m", "benchmark.report"]
    root = Path(__file__).parents[1]
    done = subprocess.run([*command, "--out", str(tmp_path)], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "summary.md" in done.stdout, done.stderr
    wrong = subprocess.run([*command, "--outt", "x"], cwd=root, capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    shown = subprocess.run([*command, "--help"], cwd=root, capture_output=True, text=True, check=False)
    assert shown.returncode == 0 and "results/quick" in shown.stdout


def test_nothing_half_written_is_left(tmp_path: Path) -> None:
    store.write_text(tmp_path / "a", "old")
    with pytest.raises(TypeError):
        store.write_bytes(tmp_path / "a", "\udc80")  # type: ignore[arg-type]
    assert (tmp_path / "a").read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["a"]
