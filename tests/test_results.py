"""What is committed below results/ is what the suites of today would run."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmark.plan import make_specs, plan_runs
from benchmark.suites import load_suite

RESULTS = Path(__file__).parents[1] / "results"


@pytest.mark.parametrize(
    ("suite", "folder", "done"),
    [
        ("quick", "quick", 15),
        ("quick-lift", "quick-lift", 15),
        ("local", "local", 125),
        ("otpr-check", "otpr-check", 36),
        ("hopper-check", "hopper-check", 3),
        ("hopper-check-idql", "hopper-check", 1),
    ],
)
def test_committed_runs_have_the_specifications_of_their_suite(suite: str, folder: str, done: int) -> None:
    runs = plan_runs(make_specs([load_suite(suite)], {}, "cpu"), RESULTS / folder)
    assert sum(run.state == "done" for run in runs) == done
