"""The suite of transport problems with exact answers: its command line, its files, and the figures that must hold."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmark import run, toy_transport
from benchmark.toy_transport import figures, sampling
from benchmark.toy_transport import solve as solving
from benchmark.toy_transport.problems import EXTENT, plane, smooth
from otpr.potentials import TransportSettings

TINY = TransportSettings(block_size=32, first_steps=20, hidden_dims=(16, 16))
SIZES = toy_transport.Sizes(TINY, diffusion_steps=2)
COLUMNS = (
    "problem,size,regulariser,epsilon,masked,cost_scale,cost_offset,solver,points,"
    "exact_value,dual_value,relative_gap,marginal_error,seconds,required"
)


def call(out: Path, **fields) -> int:
    return run.main(run.Arguments(suite="toy-transport", out=out, **fields))


def test_a_dry_run_says_what_it_would_do_and_writes_nothing(tmp_path: Path, capsys) -> None:
    assert call(tmp_path / "out", dry_run=True) == 0
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "toy-transport" in said and str(tmp_path / "out" / "report") in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fields", "option"),
    [
        ({"methods": ("otpr",)}, "--methods"),
        ({"tasks": ("toy",)}, "--tasks"),
        ({"set": ("otpr.epsilon=1",)}, "--set"),
        ({"seeds": "0-1"}, "--seeds"),
        ({"max_parallel": 0}, "--max-parallel"),
        ({"retry_failed": True}, "--retry-failed"),
        ({"device": "cuda"}, "--device"),
        ({"from_spec": Path("spec.json")}, "--from-spec"),
    ],
)
def test_options_of_runs_are_one_line_and_exit_2(fields: dict, option: str, tmp_path: Path, capsys) -> None:
    assert call(tmp_path / "out", **fields) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and option in error
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_written_is_exit_2(tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("in the way")
    assert call(tmp_path / "file" / "out") == 2
    assert "not a directory" in capsys.readouterr().err


def test_the_command_writes_the_whole_report(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(solving, "SCALES", (1.0,))
    monkeypatch.setattr(solving, "LIMITS", (("entropic", 1.0),))
    monkeypatch.setattr(sampling, "POOL", 64)
    monkeypatch.setattr(figures, "SHOWN", 32)
    monkeypatch.setattr(toy_transport, "Sizes", lambda: SIZES)
    assert call(tmp_path) == 1  # 20 steps are too few for what is required
    names = {path.name for path in (tmp_path / "report").iterdir()}
    drawn = {f"{stem}.{kind}" for stem in ("toy_transport", "plan_matrix") for kind in ("png", "pdf")}
    assert names == drawn | {"transport.csv", "transport.md"}
    text = (tmp_path / "report" / "transport.csv").read_text()
    assert text.splitlines()[0] == COLUMNS
    rows = list(csv.DictReader(text.splitlines()))
    assert {row["points"] for row in rows} == {"fitted", "fresh"}
    assert {row["masked"] for row in rows} == {"yes", "no"}
    assert [row["solver"] for row in rows if row["required"] == "yes"] == ["neural"] * 4
    for row in rows:
        if row["solver"] == "exact":
            assert float(row["marginal_error"]) < 1e-5
            assert float(row["relative_gap"]) < 1e-4
    assert "MISSED" in capsys.readouterr().out  # twenty steps are not enough, and the suite says so


def test_the_independent_plan_is_the_reference_of_the_gap() -> None:
    cost = torch.arange(64.0, dtype=torch.float64).view(8, 8)
    for regulariser, penalty in (("l2", 0.3), ("entropic", 0.0)):
        settings = replace(TINY, regulariser=regulariser, epsilon=0.3)
        assert solving.independent_value(cost, settings, 0) == pytest.approx(cost.mean().item() + penalty)
    # One keypoint of 8 has density 8; the 49 other pairs have 8 / 7, so that every row still has mean 1.
    inner = (cost[0, 0] + cost[1:, 1:].sum() / 7).item() * 8 / 64
    square = 0.3 * (64 + 49 * (8 / 7) ** 2) / 64
    assert solving.independent_value(cost, replace(TINY, epsilon=0.3), 1) == pytest.approx(inner + square)


def test_resampling_follows_the_density_and_leaves_empty_states_out() -> None:
    density = torch.tensor([[0.0, 4.0], [0.0, 0.0], [1.0, 3.0]])
    states, chunks = sampling.resample(density, 4000, torch.Generator().manual_seed(0))
    assert states.tolist() == [0, 2]
    assert chunks[0].eq(1).all()
    assert chunks[1].double().mean().item() == pytest.approx(0.75, abs=0.03)


@pytest.mark.parametrize("target", ["8gaussians", "swiss-roll"])
def test_pairs_come_first_and_lie_on_the_target(target: str) -> None:
    problem = plane(target, paired=True)
    states, chunks = problem.draw(400, torch.Generator().manual_seed(0))
    assert (states.shape, chunks.shape, problem.pairs) == ((400, 2), (400, 1, 2), 8)
    distance = torch.cdist(chunks[:8, 0], chunks[8:, 0]).amin(1)
    assert distance.max().item() < 0.25
    assert chunks.norm(dim=-1).max().item() < EXTENT


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("scale", "offset"), [(0.1, 100.0), (100.0, 0.0)])
def test_the_required_figures_hold(scale: float, offset: float, masked: bool) -> None:
    case = solving.Case(smooth(scale, offset, masked), solving.SETTINGS, scale, offset, required=True)
    rows = solving.solve_case(case).rows
    assert rows[0]["required"] == "yes"
    assert not solving.missed(rows), rows[0]
