"""What the report says before anybody compares: everything in which its runs are not alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_report import make_run, read_csv, summary_row

from benchmark import report
from benchmark.report import collect, comparisons, guards, summary, texts, writer


def warnings(root: Path) -> list[str]:
    runs = collect.read_runs(root)[0]
    return guards.warnings(summary.summarise(runs), runs)


def edit(directory: Path, name: str, **values: Any) -> None:
    path = directory / name
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | values))


def two_methods(root: Path, change: Callable[[Path], None], task: str = "toy") -> list[str]:
    """The warnings where one run of six is changed."""
    for method in ("otpr", "dppo"):
        for seed in range(3):
            run = make_run(root, task, method, seed, [0, 10])
            edit(run, "provenance.json", git={"commit": "a" * 40, "dirty": None}, packages={"torch": "2.1"}, cpu="X")
    assert warnings(root) == []
    change(root / task / "dppo" / "seed-2")
    return warnings(root)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda run: edit(run, "provenance.json", git={"commit": "b" * 40}), "2 commits (aaaaaaaaa, bbbbbbbbb)"),
        (
            lambda run: edit(run, "provenance.json", git={"commit": "a" * 40, "dirty": "1"}),
            "1 of 6 runs were made with",
        ),
        (lambda run: edit(run, "provenance.json", packages={"torch": "2.2"}), "different versions of torch (2.1, 2.2)"),
        (lambda run: edit(run, "provenance.json", attempts=[{"git": {"commit": "b" * 40}}]), "2 commits (aaaaaaaaa, "),
        (lambda run: edit(run, "provenance.json", attempts=[{"git": {"dirty": "1"}}]), "1 of 6 runs were made with"),
        (lambda run: edit(run, "provenance.json", attempts=[{"cpu": "Y"}, {}]), "different processors (X, Y)"),
        (lambda run: edit(run, "provenance.json", cpu="Y"), "different processors (X, Y): wall-clock times do not"),
        (lambda run: edit(run, "spec.json", protocol="published"), "different protocols"),
        (lambda run: edit(run, "spec.json", threads=2), "different thread counts"),
        (
            lambda run: edit(run, "spec.json", settings={"rate": 2.0}),
            "the seeds of dppo have different settings (rate ",
        ),
        (lambda run: edit(run, "status.json", state="timed-out", error="limit"), "is timed-out (last evaluation at 10"),
    ],
)
def test_runs_that_are_not_alike_are_told(tmp_path: Path, change: Callable[[Path], None], said: str) -> None:
    (line,) = two_methods(tmp_path, change)
    assert said in line


def test_a_setting_that_earlier_seeds_did_not_have_yet_is_no_difference(tmp_path: Path) -> None:
    for value, said in ((0.01, []), (0.02, ["the seeds of dppo have different settings (clip_coef 0.01 / 0.02)"])):
        settings = {"clip_coef": value, "critic_hidden_dims": [256, 256, 256]}
        lines = two_methods(tmp_path / str(value), lambda run, new=settings: edit(run, "spec.json", settings=new))
        assert len(lines) == len(said) and all(words in line for words, line in zip(said, lines, strict=True))


def test_a_run_that_waits_for_its_policy_has_no_protocol_that_could_differ(tmp_path: Path) -> None:
    def wait(run: Path) -> None:
        for path in run.iterdir():
            path.unlink()
        edit(run, "status.json", state="queued", error="its data is not there")

    assert not any("protocols" in line for line in two_methods(tmp_path, wait))


@pytest.mark.parametrize("key", ["policy_digest", "data_digest"])
def test_other_data_or_policies_are_told(tmp_path: Path, key: str) -> None:
    def change(run: Path) -> None:
        for path in sorted(run.parents[1].rglob("spec.json")):
            edit(path.parent, "spec.json", **{key: "x" if path.parent == run else "y"})

    (line,) = two_methods(tmp_path, change)
    assert ("policies" if key == "policy_digest" else "data") in line and "(x, y)" in line


def test_other_starts_and_loops_are_told(tmp_path: Path) -> None:
    def change(run: Path) -> None:
        curve = run / "curve.csv"
        curve.write_text(
            curve.read_text().replace("0,0,0,0.0,20,", "0,0,0,0.0,20,9", 1).replace(",0.02\n", ",0.09\n", 1)
        )
        edit(run, "spec.json", loop={"eval_episodes": 8})
        edit(run.parent / "seed-1", "spec.json", loop={"eval_episodes": 16})

    lines = two_methods(tmp_path, change)
    assert len(lines) == 2 and "different loop.eval_episodes" in lines[0] and "(16, 8)" in lines[0]
    assert "score at step 0 is not the same for all methods on 1 seed(s) (seed 2: dppo 0.09, otpr 0.02)" in lines[1]


@pytest.mark.parametrize("content", ["[]", "7", '{"git": 3, "packages": [1], "cpu": {"a": 1}}', "{", ""])
def test_provenance_may_hold_anything(tmp_path: Path, content: str) -> None:
    run = make_run(tmp_path, "toy", "otpr", 0, [0, 10])
    (run / "provenance.json").write_text(content)
    edit(run, "spec.json", loop=3, settings=[1, {"a": None}], sampler="x")
    made = writer.make_report(tmp_path, writer.Options())
    assert "<table" in texts.html(made, []) and "# Settings" in texts.settings_markdown(made)


def test_pooling_families_and_local_tasks_is_told(tmp_path: Path) -> None:
    for task in ("hopper-local", "lift"):
        for seed in range(3):
            make_run(tmp_path, task, "otpr", seed, [0, 10])
    found = warnings(tmp_path)
    assert any("pool scores of 2 families" in line for line in found)
    assert any("embedded data (hopper-local) and others (lift) are in one report" in line for line in found)
    text = (report.write_report(tmp_path) / "summary.md").read_text()
    assert "### Over 2 tasks of 2 families pooled (locomotion: D4RL score / 100, robomimic: success rate)" in text


def test_the_best_and_what_ties_with_it_are_marked(tmp_path: Path) -> None:
    for seed in range(4):
        make_run(tmp_path, "toy", "otpr", seed, [0, 10], score=0.8)
        # Better on two seeds, worse on two: the difference cannot be told from none.
        make_run(tmp_path, "toy", "dppo", seed, [0, 10], score=0.75 + 0.1 * (seed % 2))
        make_run(tmp_path, "toy", "idql", seed, [0, 10], score=0.7)
    make_run(tmp_path, "toy", "dql", 0, [0, 10], score=0.9)
    result = summary.summarise(collect.read_runs(tmp_path)[0])
    pairs = comparisons.compare_all(result)
    cells = [cell for cell in result.tasks[0].cells if cell.method != "dql"]
    assert comparisons.best_and_tied(cells, pairs) == {"otpr", "dppo"}
    # One seed is the best by its number: nothing can be said.
    assert comparisons.best_and_tied(result.tasks[0].cells, pairs) == frozenset()
    assert comparisons.tested_pairs(pairs) == (3, 0)
    (tmp_path / "toy" / "dql").rename(tmp_path / "dql")
    folder = report.write_report(tmp_path)
    text = (folder / "summary.md").read_text()
    rows = [line.split(" | ")[2] for line in text.splitlines() if line.startswith(("| otpr |", "| dppo |", "| idql |"))]
    assert [cell.startswith("**") for cell in rows[:3]] == [True, True, False]
    marked = {
        method: summary_row(tmp_path, "toy", method, "best_or_tied")["value"] for method in ("otpr", "dppo", "idql")
    }
    assert marked == {"otpr": "1", "dppo": "1", "idql": "0"}
    assert "3 differences have an interval (3 on single tasks, 0 over tasks)" in text
    latex = (folder / "summary.tex").read_text()
    assert latex.count(r"\boldmath") == 2


def test_thresholds_areas_and_best_checkpoints(tmp_path: Path) -> None:
    """Scores 0, .4, .8 at 0, 50, 100 steps, plus a hundredth of the seed."""
    for seed in range(3):
        make_run(tmp_path, "toy", "otpr", seed, [0, 50, 100], score=0.8)
        rising = make_run(tmp_path, "toy", "dppo", seed, [0, 50, 100], score=0.8) / "curve.csv"
        lines = rising.read_text().splitlines()
        lines[3] = lines[3].rsplit(",", 1)[0] + ",0.1"
        rising.write_text("\n".join(lines) + "\n")
    report.write_report(tmp_path)

    def value(method: str, statistic: str) -> float:
        return float(summary_row(tmp_path, "toy", method, statistic)["value"])

    assert value("otpr", "area_under_curve") == pytest.approx(0.41)
    assert value("otpr", "best_checkpoint") == pytest.approx(0.81)
    assert value("dppo", "best_checkpoint") == pytest.approx(0.41)
    assert (value("otpr", "steps_to_0.25"), value("otpr", "wall_seconds_to_0.25")) == (50.0, 0.5)
    assert (value("otpr", "steps_to_0.75"), value("dppo", "runs_reaching_0.75")) == (100.0, 0.0)
    names = {row["statistic"] for row in read_csv(tmp_path / "report" / "summary.csv") if row["method"] == "dppo"}
    assert "steps_to_0.75" not in names  # half or more never reach it


def test_the_settings_come_from_the_specifications(tmp_path: Path) -> None:
    for method, rate in (("otpr", 0.001), ("dppo", 0.01)):
        for seed in range(2):
            run = make_run(tmp_path, "toy", method, seed, [0, 10])
            edit(run, "spec.json", settings={"rate": rate + seed * (method == "dppo")}, loop={"n_envs": 8})
    folder = report.write_report(tmp_path)
    rows = {(row["setting"], row["method"]): row["value"] for row in read_csv(folder / "settings.csv")}
    assert (
        rows["rate", "otpr"] == "0.001" and rows["rate", "dppo"] == "0.01 / 1.01" and rows["loop.n_envs", "otpr"] == "8"
    )
    assert "| rate | 0.001 | 0.01 / 1.01 |" in (folder / "settings.md").read_text()
    assert r"\toprule" in (folder / "settings.tex").read_text()


def test_a_half_written_run_has_no_place_in_the_numbers(tmp_path: Path) -> None:
    for seed in range(3):
        make_run(tmp_path, "toy", "otpr", seed, [0, 10, 20])
    (tmp_path / "toy" / "otpr" / "seed-3").mkdir()
    started = make_run(tmp_path, "toy", "otpr", 4, [0, 10], state="running")
    (started / "metrics.csv").write_text("iteration,time/collect\n1,2.0\n2,3")
    folder = report.write_report(tmp_path)
    row = summary_row(tmp_path, "toy", "otpr", "iqm")
    assert (row["seeds"], row["env_steps"]) == ("3", "20")
    text = (folder / "summary.md").read_text()
    assert "3 of 5 (1 running, 1 unknown)" in text and "| toy | otpr | 3 | unknown | none |" in text
