"""Aggregates against rliable, the bootstrap's repeatability and its guards."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from rliable import library, metrics

from benchmark.report import statistics as stats

SHAPES = [(3, 1), (5, 8), (10, 3), (1, 1), (7, 1), (4, 2)]


def scores(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Scores around 0.6, some above 1."""
    return np.random.default_rng(seed).normal(0.6, 0.3, size=shape)


def global_key() -> np.ndarray:
    """The state of numpy's global generator."""
    state = np.random.get_state(legacy=False)
    assert isinstance(state, dict)
    return state["state"]["key"]


@pytest.mark.parametrize("shape", SHAPES)
def test_point_estimates_equal_rliable(shape: tuple[int, int]) -> None:
    array = scores(shape)
    found = stats.estimates(array, np.random.default_rng(0), reps=10)
    expected = {
        "iqm": metrics.aggregate_iqm(array),
        "median": metrics.aggregate_median(array),
        "mean": metrics.aggregate_mean(array),
        "optimality_gap": metrics.aggregate_optimality_gap(array),
    }
    assert set(expected) == set(stats.STATISTICS)
    for name, value in expected.items():
        assert found[name].value == pytest.approx(value, abs=1e-12)
        assert getattr(stats, name)(array) == pytest.approx(value, abs=1e-12)
    assert stats.iqm(array) == pytest.approx(scipy.stats.trim_mean(array.ravel(), 0.25), abs=1e-12)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_intervals_agree_with_rliable() -> None:
    array = scores((6, 4), seed=3)

    def all_four(sample: np.ndarray) -> np.ndarray:
        names = (metrics.aggregate_iqm, metrics.aggregate_median, metrics.aggregate_mean)
        return np.array([*(aggregate(sample) for aggregate in names), metrics.aggregate_optimality_gap(sample)])

    state = np.random.get_state()
    try:
        np.random.seed(1)  # rliable draws from the global generator only
        _, theirs = library.get_interval_estimates({"x": array}, all_four, reps=4000)
    finally:
        np.random.set_state(state)
    ours = stats.estimates(array, np.random.default_rng(2), reps=20_000)
    for column, name in enumerate(("iqm", "median", "mean", "optimality_gap")):
        width = ours[name].high - ours[name].low
        # More than three standard deviations of a 2.5 % quantile of 4,000 normal draws.
        assert ours[name].low == pytest.approx(theirs["x"][0, column], abs=0.04 * width)
        assert ours[name].high == pytest.approx(theirs["x"][1, column], abs=0.04 * width)


def test_runs_are_resampled_within_each_task() -> None:
    array = np.array([[0.0, 10.0]] * 4)
    assert stats.estimates(array, np.random.default_rng(0), reps=100)["mean"] == stats.Estimate(5.0, 5.0, 5.0)


def test_same_seed_same_digits_and_global_state_untouched() -> None:
    array = scores((5, 3))
    before = global_key().copy()
    first = stats.estimates(array, np.random.default_rng(4))
    assert first == stats.estimates(array, np.random.default_rng(4))
    assert first != stats.estimates(array, np.random.default_rng(5))
    curve = stats.iqm_curve(scores((5, 2, 7)), np.random.default_rng(4))
    again = stats.iqm_curve(scores((5, 2, 7)), np.random.default_rng(4))
    assert np.array_equal(curve.low, again.low) and np.array_equal(curve.high, again.high)
    assert np.array_equal(before, global_key())


@pytest.mark.parametrize("shape", [(3, 1, 9), (8, 1, 5), (5, 3, 4)])
def test_curve_equals_the_aggregate_at_each_time(shape: tuple[int, int, int]) -> None:
    array = scores(shape, seed=1)
    curve = stats.iqm_curve(array, np.random.default_rng(0), reps=20_000)
    for time in range(shape[2]):
        single = stats.estimates(array[:, :, time], np.random.default_rng(time + 1), ("iqm",), reps=20_000)["iqm"]
        assert curve.value[time] == pytest.approx(single.value, abs=1e-12)
        width = single.high - single.low
        # Three runs give few distinct resamples, between which a quantile may jump.
        tolerance = 0.03 * width if shape[0] > 3 else 0.12 * width
        assert curve.low[time] == pytest.approx(single.low, abs=tolerance)
        assert curve.high[time] == pytest.approx(single.high, abs=tolerance)


@pytest.mark.parametrize("runs", [1, 2])
def test_no_interval_below_three_runs(runs: int) -> None:
    for estimate in stats.estimates(scores((runs, 4)), np.random.default_rng(0)).values():
        assert np.isfinite(estimate.value) and np.isnan(estimate.low) and np.isnan(estimate.high)
    curve = stats.iqm_curve(scores((runs, 1, 6)), np.random.default_rng(0))
    assert np.isfinite(curve.value).all() and np.isnan(curve.low).all() and np.isnan(curve.high).all()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([[1.0, 2.0], [1.0]], "rectangular"),
        ([["x"]], "rectangular"),
        ([1.0, 2.0], "dimensions"),
        (np.zeros((0, 3)), "empty"),
        ([[1.0], [np.nan]], "1 of 2"),
        ([[1.0], [np.inf]], "finite"),
    ],
)
def test_bad_scores_are_refused(bad: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stats.estimates(bad, np.random.default_rng(0))  # type: ignore[arg-type]


def test_bad_options_are_refused() -> None:
    array = scores((3, 1))
    with pytest.raises(ValueError, match="iqm, median"):
        stats.estimates(array, np.random.default_rng(0), ("mode",))
    with pytest.raises(ValueError, match="reps"):
        stats.estimates(array, np.random.default_rng(0), reps=0)


def test_coverage_of_the_mean_interval() -> None:
    """Percentile intervals of 20 normal scores hold the true mean in about 93 % of cases (a little under 95 %)."""
    draws = np.random.default_rng(8)
    held = 0
    for _ in range(300):
        interval = stats.estimates(draws.normal(size=(20, 1)), draws, ("mean",), reps=500)["mean"]
        held += interval.low <= 0.0 <= interval.high
    assert 0.88 <= held / 300 <= 0.97
