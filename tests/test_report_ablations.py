"""The report on ablations: offline data, rules of acting, and figures of an ablation's arms alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_report import FILES, OVER_TASKS, make_run, pictures, read_csv, summary_row

from benchmark import report, tables
from benchmark.methods import ARMS
from benchmark.report import ablations, collect, curves, figures, records, rules, style, summary
from benchmark.suites import load_suite

HEADER = "iteration,env_steps,rule,episodes,return_mean,return_std,success_rate,score"


def add_rules(directory: Path, steps: list[int], **scores: float) -> None:
    """Write evaluations.csv with a constant score under each rule."""
    lines = [f"1,{step},{rule},16,{1000 * score},2.0,,{score}" for step in steps for rule, score in scores.items()]
    (directory / "evaluations.csv").write_text("\n".join([HEADER, *lines]) + "\n")


def set_digest(directory: Path, digest: str) -> None:
    spec = json.loads((directory / "spec.json").read_text())
    (directory / "spec.json").write_text(json.dumps(spec | {"demonstrations_digest": digest}))


def table_row(text: str, method: str, heading: str = "## ") -> list[str]:
    """The cells of the first table line on `method` behind `heading`."""
    lines = text[text.index(heading) :].splitlines()
    return next(line for line in lines if line.startswith(f"| {method} ")).strip("| ").split(" | ")


def test_offline_data_per_method(tmp_path: Path) -> None:
    for seed in range(3):
        set_digest(make_run(tmp_path, "toy", "otpr", seed, [0, 10]), "abc")
        set_digest(make_run(tmp_path, "toy", "otpr-u", seed, [0, 10]), "")
        make_run(tmp_path, "toy", "dppo", seed, [0, 10])
        set_digest(make_run(tmp_path, "toy", "idql", seed, [0, 10]), "abc" if seed else "")
        (make_run(tmp_path, "toy", "dql", seed, [0, 10]) / "spec.json").write_text("{")
    directory = report.write_report(tmp_path)
    wanted = {"otpr": "yes", "otpr-u": "no", "dppo": "no", "idql": "mixed", "dql": records.UNKNOWN}
    text, latex = ((directory / name).read_text() for name in ("summary.md", "summary.tex"))
    for method, answer in wanted.items():
        assert table_row(text, method)[1] == answer
        assert f"\n{method} & {answer} & " in latex
    assert "| Method | Offline data | IQM" in text and "Method & Offline data & IQM" in latex
    data = {(row["method"], row["seed"]): row["offline_data"] for row in read_csv(directory / "data.csv")}
    assert data["idql", "0"] == "no" and data["idql", "1"] == "yes" and data["dql", "2"] == records.UNKNOWN
    assert [summary_row(tmp_path, "toy", name, "offline_data")["value"] for name in ("otpr", "dppo")] == ["1", "0"]
    given = {row["method"] for row in read_csv(directory / "summary.csv") if row["statistic"] == "offline_data"}
    assert given == {"otpr", "otpr-u", "dppo"}


def test_a_method_without_runs_on_a_task_has_no_answer(tmp_path: Path) -> None:
    set_digest(make_run(tmp_path, "toy", "otpr", 0, [0, 10]), "abc")
    set_digest(make_run(tmp_path, "lift", "otpr", 0, [0, 10]), "abc")
    make_run(tmp_path, "lift", "dppo", 0, [0, 10])
    text = (report.write_report(tmp_path) / "summary.md").read_text()
    assert table_row(text, "dppo", "## toy")[1] == tables.DASH and table_row(text, "otpr", "## Over 2")[1] == "yes"


def test_rules_side_by_side(tmp_path: Path) -> None:
    for seed in range(3):
        directory = make_run(tmp_path, "toy", "otpr", seed, [0, 10, 20], score=0.5)
        add_rules(directory, [10, 20], best_q=0.75 + 0.125 * seed, actor=0.3)
        make_run(tmp_path, "toy", "dppo", seed, [0, 10, 20])
    add_rules(make_run(tmp_path, "toy", "idql", 0, [0, 10, 20]), [10], actor=0.1)
    directory = report.write_report(tmp_path)
    text = (directory / "summary.md").read_text()
    section = "## Rules of acting"
    header = table_row(text, "Method", section)
    assert header[1:] == [f"{what}, {rule}" for what in ("Return", "Score") for rule in ("own", "actor", "best\\_q")]
    cells = table_row(text, "otpr", section)
    assert cells[1] == table_row(text, "otpr")[6] and cells[4] == table_row(text, "otpr")[4]
    assert cells[2] == "300.0 [300.0, 300.0]" and cells[6].startswith("0.875 [0.7")
    assert table_row(text, "dppo", section)[2:4] == [tables.DASH] * 2
    # Recorded, but not at the common step.
    assert table_row(text, "idql", section)[2] == tables.DASH
    rows = [row for row in read_csv(directory / "rules.csv") if (row["method"], row["seed"]) == ("otpr", "1")]
    assert tuple(rows[0]) == rules.COLUMNS
    named = [(row["env_steps"], row["rule"]) for row in rows]
    assert named == [("0", "own"), *((step, rule) for step in ("10", "20") for rule in ("own", "actor", "best_q"))]
    assert (rows[-1]["score"], rows[-1]["return_mean"], rows[-1]["episodes"]) == ("0.875", "875", "16")


def test_fewer_seeds_under_a_rule_are_told(tmp_path: Path) -> None:
    for seed in range(3):
        directory = make_run(tmp_path, "toy", "otpr", seed, [0, 10])
        if seed:
            add_rules(directory, [10], actor=0.25)
    text = (report.write_report(tmp_path) / "summary.md").read_text()
    assert table_row(text, "otpr", "## Rules")[2] == "250.0" and "actor is recorded for 2 of 3 seeds" in text


def test_damaged_rules_are_noted(tmp_path: Path) -> None:
    directory = make_run(tmp_path, "toy", "otpr", 0, [0, 10], state="running")
    add_rules(directory, [10], actor=0.25)
    bad = ["1,10,own,16,1,1,,0.5", "1,10,<b>|,16,1,1,,0.5", "1,10,,16,1,1,,0.5", "1,x,actor,16,1,1,,0.5", "1,10"]
    with (directory / "evaluations.csv").open("a") as file:
        file.write("\n".join([*bad, "1,10,actor,16,,,,nan", "1,10,best_q,16,750.0,1,,0.75", "1,20,actor,16,9,9,,0."]))
    other = make_run(tmp_path, "toy", "otpr", 1, [0, 10])
    (other / "evaluations.csv").write_text("iteration,env_steps,score\n1,10,0.5\n")
    folder = make_run(tmp_path, "toy", "otpr", 2, [0, 10])
    (folder / "evaluations.csv").mkdir()
    first, second, third = collect.read_runs(tmp_path)[0]
    assert [(row.env_steps, row.rule) for row in first.rules] == [(10, "actor"), (10, "best_q")]
    assert len(first.notes) == 1 and "evaluations.csv: 7 row(s) left out" in first.notes[0]
    assert second.rules == third.rules == () and "evaluations.csv has no column rule" in second.notes[0]
    assert third.notes == ("evaluations.csv is not a regular file",)
    text = (report.write_report(tmp_path) / "summary.md").read_text()
    assert "7 row(s) left out" in text and table_row(text, "otpr", "## Rules")[5:] == ["0.250", "0.750"]


def test_without_other_rules_there_is_no_file_of_them(tmp_path: Path) -> None:
    directory = make_run(tmp_path, "toy", "otpr", 0, [0, 10])
    make_run(tmp_path, "toy", "otpr-q", 0, [0, 10])
    add_rules(directory, [10], actor=0.25)
    first = {path.name for path in report.write_report(tmp_path).iterdir()}
    assert {"rules.csv", "ablation_guidance.png", "ablation_guidance.pdf"} <= first
    (directory / "evaluations.csv").unlink()
    (tmp_path / "toy" / "otpr-q").rename(tmp_path / "toy" / "dppo")
    left = {path.name for path in report.write_report(tmp_path).iterdir()}
    assert left == FILES | pictures("curves", "curves_wall_clock", *OVER_TASKS)
    assert "## Rules" not in (tmp_path / "report" / "summary.md").read_text()


def test_labels_of_ablations() -> None:
    everything = set(ARMS)
    assert ablations.labels("ablation_guidance", everything) == {
        "otpr": "H (otpr)",
        "otpr-q": "Q (otpr-q)",
        "otpr-advantage": "A (otpr-advantage)",
    }
    assert list(ablations.labels("ablation_guidance", {"otpr-m", "otpr-q"})) == ["otpr-m", "otpr-q"]
    assert ablations.labels("ablation_mask", everything) == {
        "otpr-m": "M (otpr-m)",
        "otpr-u": "U (otpr-u)",
        "otpr-u-expert": "U + expert data (otpr-u-expert)",
    }
    assert ablations.labels("ablation_mask", {"otpr", "otpr-u"})["otpr"] == "M (otpr)"
    assert ablations.labels("ablation_parts", everything)["otpr"] == "both (otpr)"
    assert ablations.labels("ablation_marginal", everything)["otpr-relaxed"] == "relaxed (otpr-relaxed)"
    assert ablations.labels("ablation_marginal", {"otpr", "dppo"}) == {}
    assert {name for table in ablations.ABLATIONS.values() for names in table.values() for name in names} <= everything


def test_an_ablation_shows_its_arms_alone(tmp_path: Path) -> None:
    for method in ("otpr", "otpr-relaxed", "dppo"):
        make_run(tmp_path, "toy", method, 0, [0, 10])
    make_run(tmp_path, "lift", "dppo", 0, [0, 10])
    make_run(tmp_path, "toy", "otpr-u", 0, [], state="queued")
    directory = report.write_report(tmp_path)
    drawn = {path.name for path in directory.iterdir() if path.name.startswith("ablation")}
    assert drawn == {"ablation_marginal.png", "ablation_marginal.pdf"}
    tasks = summary.summarise(collect.read_runs(tmp_path)[0]).tasks
    panels = [figures.Panel(task.task, "score", tuple(curves.curves(task, "score"))) for task in tasks]
    labels = ablations.labels("ablation_marginal", {"otpr", "otpr-relaxed", "dppo"})
    (panel,) = ablations.restrict(panels, labels)
    assert panel.title == "toy" and [curve.method for curve in panel.curves] == ["otpr", "otpr-relaxed"]
    (legend,) = figures.curve_figure([panel], labels, style.styles(labels)).legends
    assert [text.get_text() for text in legend.get_texts()] == ["strict (otpr)", "relaxed (otpr-relaxed)"]


def test_arms_are_told_apart() -> None:
    looks = style.styles(ARMS).values()
    assert len({look.colour for look in looks}) == len({(look.marker, look.line) for look in looks}) == len(ARMS)


@pytest.mark.parametrize("count", [1, 12, 24])
def test_a_long_legend_stays_inside_and_leaves_the_panel_its_height(count: int) -> None:
    labels = {f"otpr-method-{index}": f"otpr-method-{index}" for index in range(count)}
    figure = figures.curve_figure([figures.Panel("toy", "score", ())], labels, style.styles(labels))
    (legend,), (axes,) = figure.legends, figure.axes
    box, panel = legend.get_window_extent(), axes.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0 and box.y1 < panel.y0
    assert panel.height / figure.dpi > 2.2


@pytest.mark.parametrize("name", ["ablation-guidance", "ablation-mask"])
def test_suites_of_ablations_hold_what_their_figure_shows(name: str) -> None:
    suite = load_suite(name)
    assert len(ablations.labels(name.replace("-", "_"), suite.methods)) == len(suite.methods)
    assert suite.loop == {"iterations": 96, "eval_every": 16, "evaluate_rules": True}
    assert (suite.sampler["ddim_steps"], suite.seeds, suite.protocol) == (5, "0-2", "embedded")
