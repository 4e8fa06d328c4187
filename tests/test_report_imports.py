"""Curves from elsewhere: imported tables of every kind, and the published curves carried along."""

from __future__ import annotations

import csv
import io
import random
import shutil
import subprocess
import warnings
from pathlib import Path

import pytest
from test_report import make_run, read_csv, summary_row

from benchmark import report, tables
from benchmark.report import __main__ as program
from benchmark.report import collect, curves, imported, published, style, summary

HEADER = "task,method,seed,env_steps,score\n"
HOSTILE = ["a/b", "<script>alert(1)</script>", "x" * 300, "x" * 301, r"\input{x} $a_b^c$ #%&~{}", "emoji 😀 中文 ü"]
HOSTILE += ["_under", "'quo\"te'", "tab\there", "../../up"]


def curve(method: str, seed: int, scores: list[float], task: str = "t") -> str:
    return "".join(f"{task},{method},{seed},{10 * index},{score}\n" for index, score in enumerate(scores))


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    return path


def hostile_csv(path: Path, tasks: tuple[str, ...] = ("one/two <b>", "hopper 😀"), step: int = 10) -> Path:
    """Every name as a method on each task, with columns in another order and one too many."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["score", "seed", "extra", "env_steps", "method", "task"])
    for name in HOSTILE:
        for task in tasks:
            for seed in range(3):
                writer.writerows([0.1 * index + 0.01 * seed, seed, "?", step * index, name, task] for index in range(4))
    return write(path, text.getvalue())


def test_a_report_of_imported_curves_alone(tmp_path: Path) -> None:
    text = HEADER + "".join(curve(method, seed, [0.1, 0.3, 0.5 + 0.1 * seed]) for method in "ab" for seed in range(3))
    path = write(tmp_path / "mine.csv", text)
    out = tmp_path / "out"
    assert program.main(["--out", str(out), "--import", str(path)]) == 0
    assert float(summary_row(out, "t", "a", "iqm")["value"]) == pytest.approx(0.6)
    assert summary_row(out, "t", "a", "iqm")["protocol"] == "imported: mine.csv"
    assert float(summary_row(out, "t", "a", "area_under_curve")["value"]) == pytest.approx((0.2 + 0.45) / 2)
    pairs = {row["statistic"]: row for row in read_csv(out / "report" / "comparisons.csv")}
    assert pairs["iqm_difference"]["paired"] == "yes" and float(pairs["iqm_difference"]["value"]) == 0.0
    assert float(pairs["probability_of_improvement"]["value"]) == 0.5


def test_order_of_rows_and_columns_does_not_matter(tmp_path: Path) -> None:
    rows = [f"{seed},{score},t,{step},m,junk" for seed in (0, 7) for step, score in ((0, 0.1), (20, 0.4), (10, 0.2))]
    random.Random(0).shuffle(rows)
    path = write(tmp_path / "a.csv", "seed,score,task,env_steps,method,note\n" + "\n".join(rows))
    runs, notes = imported.read_curves(path)
    assert notes == [] and [run.name for run in runs] == ["t/m/seed-0", "t/m/seed-7"]
    assert [(row.env_steps, row.score) for row in runs[1].evaluations] == [(0, 0.1), (10, 0.2), (20, 0.4)]


@pytest.mark.parametrize(
    ("text", "note", "steps"),
    [
        (
            HEADER + "t,m,0,0,.1\nt,m,0,10,nan\nt,m,0,20,inf\nt,m,0,30,-inf\nt,m,0,40,.2\n",
            "3 row(s) left out, without",
            [0, 40],
        ),
        (
            HEADER + "t,m,0,0,.1\nt,m,x,10,1\nt,m,0,-5,1\nt,m,0,1.5,1\n,m,0,3,1\nt,,0,3,1\n",
            "5 row(s) left out, without",
            [0],
        ),
        (HEADER + "t,m,0,0,.1\nt,m,0,0,.3\nt,m,0,10,.2\n", "1 row(s) left out, because a later one", [0, 10]),
        (HEADER + "t,m,0,0,.1\nt,m,0,10,.2,8,9\nt,m,0\n", "1 row(s) left out, without", [0, 10]),
        (b"\xef\xbb\xbf" + HEADER.encode() + b"t,m,0,0,.1\nt,\xff\xfe,0,0,.1\n", "", [0]),
    ],
)
def test_rows_that_cannot_be_used_are_left_out_and_counted(
    tmp_path: Path, text: str | bytes, note: str, steps: list[int]
) -> None:
    runs, notes = imported.read_curves(write(tmp_path / "a.csv", text))
    assert [row.env_steps for row in runs[0].evaluations] == steps
    assert any(note in line for line in notes) if note else notes == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no column task, method, seed, env_steps, score"),
        (HEADER, "has no row that can be used"),
        ("task,method,seed,score\nt,m,0,1\n", "has no column env_steps"),
        (HEADER + "t,m,0,0,abc\n", "no row that can be used"),
        (HEADER + 't,"m,0,0,0.1\n', "not a CSV file"),
        (bytes(range(256)) * 8, "has no column"),
        (None, "cannot read"),
    ],
)
def test_files_that_cannot_be_used_are_one_line(
    tmp_path: Path, text: str | bytes | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.csv"
    if text is not None:
        write(path, text)
    assert program.main(["--out", str(tmp_path / "out"), "--import", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error and not (tmp_path / "out").exists()


def test_hostile_names_everywhere(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folder = report.write_report(tmp_path / "out", report.Options((hostile_csv(tmp_path / "a.csv"),)))
    page, latex = ((folder / name).read_text() for name in ("index.html", "summary.tex"))
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)" in page
    assert "\\input{x}" not in latex and "U+1F600" in latex and "😀" not in latex and "ü" in latex
    names = {row["method"] for row in read_csv(folder / "data.csv")}
    assert names == {tables.printable(name) for name in HOSTILE}
    assert {path.parent for path in tmp_path.rglob("*") if path.is_file()} == {tmp_path, folder}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex installed")
@pytest.mark.parametrize("alone", [True, False])
def test_latex_compiles(tmp_path: Path, alone: bool) -> None:
    folder = report.write_report(tmp_path / "out", report.Options((hostile_csv(tmp_path / "a.csv"),)))
    make_run(tmp_path / "runs", "toy", "otpr", 0, [0, 10])
    names = [folder / "summary.tex", report.write_report(tmp_path / "runs") / "settings.tex"]
    for path in names:
        source = path
        if not alone:
            head = r"\documentclass{article}\usepackage{booktabs}\begin{document}"
            source = write(tmp_path / "paper.tex", f"{head}\\input{{{path}}}\\end{{document}}")
        command = ["pdflatex", "-draftmode", "-interaction=nonstopmode", "-halt-on-error", str(source)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, errors="replace")
        assert done.returncode == 0, done.stdout[-2000:]


def test_a_run_that_is_there_twice_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "out", "t", "m", 0, [0, 10])
    path = write(tmp_path / "a.csv", HEADER + curve("m", 0, [0.1, 0.2]))
    assert program.main(["--out", str(tmp_path / "out"), "--import", str(path)]) == 2
    assert "t/m/seed-0 is in 'the results directory' and 'a.csv'" in capsys.readouterr().err
    assert not (tmp_path / "out" / "report").exists()


def test_imported_runs_are_not_paired_with_ours_nor_taken_for_tuning(tmp_path: Path) -> None:
    for seed in range(3):
        make_run(tmp_path / "out", "t", "ours", seed, [0, 10])
    text = HEADER + "".join(curve("theirs", seed, [0.1, 0.2 + seed / 1e5]) for seed in (0, 1, 3407))
    options = report.Options((write(tmp_path / "a.csv", text),))
    folder = report.write_report(tmp_path / "out", options)
    assert summary_row(tmp_path / "out", "t", "theirs", "iqm")["seeds"] == "3"
    assert {row["paired"] for row in read_csv(folder / "comparisons.csv")} == {"no"}
    assert summary_row(tmp_path / "out", "t", "ours", "runs_without_score")["value"] == "0"
    assert "curves from elsewhere (a.csv) are not paired with ours" in (folder / "summary.md").read_text()


def test_runs_of_one_name_from_two_places_are_told(tmp_path: Path) -> None:
    make_run(tmp_path / "out", "t", "m", 0, [0, 10])
    options = report.Options((write(tmp_path / "a.csv", HEADER + curve("m", 1, [0.1, 0.2])),))
    text = (report.write_report(tmp_path / "out", options) / "summary.md").read_text()
    assert "t: m puts runs of different origin together (a.csv, here)" in text


def test_a_large_file_is_read_in_bounded_pieces(tmp_path: Path) -> None:
    """More points than a figure draws: the curve is thinned, its ends and the score stay."""
    scores = [index / 5000 for index in range(5001)]
    path = write(tmp_path / "a.csv", HEADER + "".join(curve("m", seed, scores) for seed in range(3)))
    runs, _ = imported.read_curves(path)
    (task,) = summary.summarise(runs).tasks
    (drawn,) = curves.curves(task, "score")
    assert len(drawn.x) == curves.MAXIMUM_POINTS and (drawn.x[0], drawn.x[-1]) == (0, 50_000)
    assert task.cells[0].scores["iqm"].value == 1.0


def test_published_curves_stand_where_their_protocol_puts_them() -> None:
    runs = published.read_published()
    by_name = {run.name: run for run in runs}
    assert len(by_name) == len(runs) > 60
    hopper = by_name["hopper-medium-v2/dppo/seed-42"]
    assert [row.env_steps for row in hopper.evaluations[:3]] == [
        0,
        720_000,
        1_440_000,
    ] and hopper.last_step == 71_280_000
    assert hopper.evaluations[-1].score == pytest.approx((3258.6774 + 20.272305) / (3234.3 + 20.272305), abs=1e-6)
    assert by_name["kitchen-mixed-v0/dppo/seed-0"].evaluations[-1].score == 1.0
    assert by_name["kitchen-mixed-v0/dppo/seed-0"].last_step == 3_024_000
    assert by_name["square/otpr/seed-0"].evaluations[-1].success_rate == 0.985
    # The published dql stands beside dql-dppo; image tasks without stated steps are left out.
    assert "dql" not in {run.method for run in runs} and "hopper-medium-v2/dql-dppo/seed-0" in by_name
    assert not any(run.task == "can-image" and run.source == published.REINFLOW.label for run in runs)


def test_published_curves_behind_ours(tmp_path: Path) -> None:
    for seed in range(3):
        for method in ("dppo", "dql", "dql-dppo"):
            make_run(tmp_path, "hopper-local", method, seed, [0, 1_000_000, 2_000_000])
    folder = report.write_report(tmp_path, report.Options(published=True))
    (task,) = summary.summarise(collect.read_runs(tmp_path)[0]).tasks
    behind = curves.behind(task, published.read_published(), "return_mean")
    assert [(curve.method, curve.x[-1], curve.seeds) for curve in behind] == [
        ("dppo", 1_440_000, 3),
        ("dql-dppo", 1_440_000, 3),
    ]
    text = (folder / "summary.md").read_text()
    assert (
        "| hopper-local | hopper-medium-v2 | dql-dppo |" in text
        and "| hopper-local | hopper-medium-v2 | dql |" not in text
    )
    assert "mujoco-py 2.1" in text and "time limits are terminal" in text
    assert "| hopper-local | hopper-medium-v2 | idql | 1,349 | 3,150 | 3,150 | 990 | 71,280,000 | 8.830 |" in text
    assert "| can |" not in text and "DPPO_mine" in text
    # They are no runs of this comparison.
    assert {row["source"] for row in read_csv(folder / "data.csv")} == {""}
    plain = report.write_report(tmp_path)
    assert "Published" not in (plain / "index.html").read_text()


def test_published_curves_alone(tmp_path: Path) -> None:
    folder = report.write_report(tmp_path / "out", report.Options(published=True))
    assert {row["task"] for row in read_csv(folder / "summary.csv")} >= {
        "hopper-medium-v2",
        "kitchen-partial-v0",
        "square",
    }
    assert (
        "| square | square | dppo | 0.440 | 0.995 | 1.000 | – | 14,400,000 | 2.680 |"
        in (folder / "summary.md").read_text()
    )


def test_colours_of_methods_from_elsewhere_differ_and_stay() -> None:
    names = [f"new-{index}" for index in range(6)]
    looks = style.styles([*names, "otpr", "dppo"])
    assert len({look.colour for look in looks.values()}) == 8
    assert looks["otpr"] == style.style("otpr")
    assert style.styles(reversed([*names, "otpr", "dppo"])) == looks
