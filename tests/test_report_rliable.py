"""The report's numbers against rliable 1.2.0: random matrices, the published curves and the runs of this repository."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from rliable import library, metrics

from benchmark.report import bootstrap, collect, published, statistics, summary
from benchmark.report.cells import Cell
from benchmark.report.comparisons import compare_all

RESULTS = Path(__file__).parents[1] / "results"
AGGREGATES: dict[str, Callable[[np.ndarray], float]] = {
    "iqm": metrics.aggregate_iqm,
    "median": metrics.aggregate_median,
    "mean": metrics.aggregate_mean,
    "optimality_gap": metrics.aggregate_optimality_gap,
}
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@contextmanager
def global_seed(seed: int) -> Iterator[None]:
    """rliable draws from numpy's global generator only; leave it as it was."""
    state = np.random.get_state()
    try:
        np.random.seed(seed)
        yield
    finally:
        np.random.set_state(state)


def published_cells() -> list[Cell]:
    return [cell for task in summary.summarise(published.read_published()).tasks for cell in task.cells]


def our_cells() -> list[Cell]:
    runs = collect.read_runs(RESULTS / "otpr-check")[0]
    return [cell for task in summary.summarise(runs).tasks for cell in task.cells]


@pytest.mark.parametrize("cells", [published_cells, our_cells])
def test_points_of_real_runs_equal_rliable(cells: Callable[[], list[Cell]]) -> None:
    found = [cell for cell in cells() if cell.scored]
    assert len(found) >= 3
    for cell in found:
        for name, aggregate in AGGREGATES.items():
            assert cell.scores[name].value == pytest.approx(aggregate(cell.matrix), abs=1e-12)


def test_intervals_on_the_published_gym_tasks_agree_with_rliable() -> None:
    gym = [run for run in published.read_published() if run.task.endswith("medium-v2")]
    for cell in summary.summarise(gym).aggregates:
        assert cell.matrix.shape == (3, 3)

        def all_four(sample: np.ndarray) -> np.ndarray:
            return np.array([aggregate(sample) for aggregate in AGGREGATES.values()])

        with global_seed(3):
            _, theirs = library.get_interval_estimates({"x": cell.matrix}, all_four, reps=1000)
        for column, name in enumerate(AGGREGATES):
            ours = cell.scores[name]
            # Three runs on three tasks: few distinct resamples, between which a quantile may jump.
            tolerance = 0.15 * (ours.high - ours.low) + 1e-9
            assert ours.low == pytest.approx(theirs["x"][0, column], abs=tolerance), (cell.method, name)
            assert ours.high == pytest.approx(theirs["x"][1, column], abs=tolerance), (cell.method, name)


@pytest.mark.parametrize("shape", [(3, 1), (4, 3), (7, 5), (10, 10), (5, 1)])
def test_every_resample_has_the_statistics_of_its_scores(shape: tuple[int, int]) -> None:
    """The counts of one resample, written out as scores, give rliable's value of each statistic."""
    scores = np.random.default_rng(0).normal(0.6, 0.4, size=shape)
    scores[0] = scores[1]  # ties
    runs, tasks = shape
    counts = next(bootstrap.resample(runs, tasks, np.random.default_rng(1), 20))
    assert (counts.reshape(-1, tasks, runs).sum(axis=2) == runs).all()
    for name, build in bootstrap.BUILDERS.items():
        ours = build(scores)(counts)
        for row, value in zip(counts.reshape(-1, tasks, runs).astype(int), ours, strict=True):
            columns = [np.repeat(scores[:, task], row[task]) for task in range(tasks)]
            assert value == pytest.approx(AGGREGATES[name](np.stack(columns, axis=1)), abs=1e-12)


def test_probability_of_improvement_is_rliables() -> None:
    draws = np.random.default_rng(5)
    x, y = draws.normal(0.6, 0.3, size=(6, 4)).round(1), draws.normal(0.5, 0.3, size=(8, 4)).round(1)
    ours = statistics.probability_of_improvement(x, y, np.random.default_rng(0), reps=20_000)
    assert ours.value == pytest.approx(float(metrics.probability_of_improvement(x, y)), abs=1e-12)
    with global_seed(4):
        _, theirs = library.get_interval_estimates({"x,y": (x, y)}, metrics.probability_of_improvement, reps=800)
    width = ours.high - ours.low
    assert ours.low == pytest.approx(theirs["x,y"][0, 0], abs=0.1 * width)
    assert ours.high == pytest.approx(theirs["x,y"][1, 0], abs=0.1 * width)
    assert np.isnan(statistics.probability_of_improvement(x[:2], y, np.random.default_rng(0)).low)
    with pytest.raises(ValueError, match="same tasks, not 4 and 3"):
        statistics.probability_of_improvement(x, y[:, :3], np.random.default_rng(0))


def test_performance_profiles_are_rliables() -> None:
    scores = np.random.default_rng(6).normal(0.6, 0.3, size=(6, 4))
    levels = np.linspace(0, 1.2, 13)
    ours = statistics.performance_profile(scores, levels, np.random.default_rng(0), reps=20_000)
    with global_seed(7):
        points, intervals = library.create_performance_profile({"x": scores}, levels, reps=1000)
    assert np.allclose(ours.value, points["x"], atol=1e-12)
    assert np.allclose(ours.low, intervals["x"][0], atol=0.05) and np.allclose(ours.high, intervals["x"][1], atol=0.05)


def test_paired_differences_are_of_the_same_resamples() -> None:
    """A method that is another plus a constant on every seed differs by that constant in every resample."""
    gym = [run for run in published.read_published() if run.task == "hopper-medium-v2" and run.method == "dppo"]
    better = []
    for run in gym:
        rows = tuple(type(row)(**{name: getattr(row, name) for name in row.__slots__} | {"score": row.score + 0.25})
                     for row in run.evaluations)  # fmt: skip
        better.append(type(run)(**vars(run) | {"method": "better", "evaluations": rows}))
    (pair,) = compare_all(summary.summarise([*gym, *better]))
    assert (pair.first, pair.second, pair.paired, pair.wins, pair.pairs) == ("dppo", "better", True, 0.0, 3)
    assert [pair.difference.value, pair.difference.low, pair.difference.high] == pytest.approx([-0.25] * 3, abs=1e-9)


def test_points_of_random_matrices_equal_rliable() -> None:
    draws = np.random.default_rng(11)
    for _ in range(50):
        scores = draws.normal(0.5, 0.5, size=(int(draws.integers(1, 12)), int(draws.integers(1, 8))))
        for name, aggregate in AGGREGATES.items():
            assert statistics.POINTS[name](scores) == pytest.approx(aggregate(scores), abs=1e-12)
