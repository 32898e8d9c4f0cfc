"""Lines through quantiles of noisy times: their intervals cover, and say so where nothing is known."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_qgc.errors import PlanError
from torch_qgc.job.line import LEAST, Interval, fit_line

Draw = Callable[[np.random.Generator, int], np.ndarray]

# Noise with its median.
NOISE: dict[str, tuple[Draw, float]] = {
    "exponential": (lambda rng, n: rng.exponential(0.5, n), 0.5 * math.log(2)),
    "log-normal": (lambda rng, n: rng.lognormal(-1.0, 0.8, n), math.exp(-1.0)),
    "uniform": (lambda rng, n: rng.random(n), 0.5),
}
LAYOUTS = [((1.0, 0.5), (32, 32)), ((0.4, 1.0), (10, 54)), ((1.0, 0.8, 0.5), (20, 20, 24)), ((1.0, 0.3), (7, 7))]


def covers(interval: Interval, truth: float) -> bool:
    return interval.low <= truth <= interval.high


@pytest.mark.parametrize("scaled", [False, True], ids=["equal noise", "noise that grows with x"])
@pytest.mark.parametrize("noise", list(NOISE))
def test_intervals_cover_the_median_line_at_their_stated_rate(noise: str, scaled: bool) -> None:
    draw, median = NOISE[noise]
    rng, runs = np.random.default_rng(0), 250
    intercept, slope = (0.4, 1.2 + median) if scaled else (0.4 + median, 1.2)
    covered = np.zeros(2)
    for places, counts in LAYOUTS:
        x = np.repeat(places, counts)
        for _ in range(runs):
            line = fit_line(x, 0.4 + 1.2 * x + draw(rng, len(x)) * (x if scaled else 1.0))
            covered += covers(line.slope, slope), covers(line.intercept, intercept)
    share = covered / (runs * len(LAYOUTS))
    assert np.all(share > 0.95 - 3 * math.sqrt(0.95 * 0.05 / (runs * len(LAYOUTS))))
    assert np.all(share < 0.99)  # nor are they much wider than they must be


@pytest.mark.parametrize("quantile", [0.25, 0.5])
def test_the_line_is_the_weighted_least_squares_line_of_the_groups_quantiles(quantile: float) -> None:
    rng = np.random.default_rng(1)
    x = np.repeat([1.0, 0.25, 0.5], [20, 12, 32])
    y = 0.5 + 2.0 * x + 0.001 * rng.exponential(size=64)
    line = fit_line(x, y, quantile)
    heights = [np.quantile(y[x == place], quantile) for place in (1.0, 0.25, 0.5)]
    slope, intercept = np.polyfit([1.0, 0.25, 0.5], heights, 1, w=np.sqrt([20, 12, 32]))
    assert line.slope.value == pytest.approx(slope, rel=1e-5)
    assert line.intercept.value == pytest.approx(intercept, rel=1e-5)
    np.testing.assert_allclose(line.at([0.0, 2.0]), line.intercept.value + np.array([0.0, 2.0]) * line.slope.value)


def test_with_one_x_all_is_attributed_to_the_slope_and_the_intervals_say_so() -> None:
    rng = np.random.default_rng(2)
    runs, reached = 400, 0
    for _ in range(runs):
        y = 1.0 + rng.exponential(size=30)
        line = fit_line(np.full(30, 0.8), y)
        assert line.slope.value == pytest.approx(np.median(y) / 0.8)
        assert (line.intercept.value, line.intercept.low, line.slope.low) == (0.0, 0.0, 0.0)
        assert line.slope.high == pytest.approx(line.intercept.high / 0.8)
        reached += line.intercept.high >= 1.0 + math.log(2)
    assert reached / runs > 0.975 - 3 * math.sqrt(0.975 * 0.025 / runs)  # one bound of a two-sided 95 %


def test_at_x_zero_nothing_is_known_of_the_slope() -> None:
    line = fit_line(np.zeros(20), np.linspace(1.0, 2.0, 20))
    assert line.slope == Interval(0.0, 0.0, math.inf)
    assert line.intercept.value == pytest.approx(1.5)
    assert 1.0 < line.intercept.low < 1.5 < line.intercept.high < 2.0


def test_few_points_bound_nothing() -> None:
    line = fit_line(np.ones(LEAST - 1), np.ones(LEAST - 1))
    assert line.slope == Interval(1.0, 0.0, math.inf)
    assert line.intercept == Interval(0.0, 0.0, math.inf)
    assert fit_line(np.ones(LEAST), np.ones(LEAST)).slope == Interval(1.0, 0.0, 1.0)
    with pytest.raises(PlanError, match="at least one point"):
        fit_line(np.zeros(0), np.zeros(0))


def test_a_second_x_close_by_does_not_make_the_estimate_jump() -> None:
    """Where the split is not known it stays with the slope; as the x move apart it goes over to what is measured."""
    rng = np.random.default_rng(3)
    noise = rng.exponential(0.3, size=60)
    drawn, sure = [], []
    for gap in (1e-6, 0.01, 0.7):
        x = np.repeat([1.0, 1.0 - gap], 30)
        line = fit_line(x, 1.0 + 1.0 * x + noise)
        drawn.append(line.intercept.value)
        sure.append(line.intercept.high - line.intercept.low)
    assert drawn[0] == pytest.approx(0.0, abs=1e-3)
    assert drawn[2] == pytest.approx(1.0 + 0.3 * math.log(2), abs=0.25)
    assert sure[0] > 2.0 > 1.0 > sure[2]


@given(st.integers(0, 2**32 - 1), st.integers(1, 70), st.integers(1, 4), st.floats(0.1, 1e6), st.floats(1e-6, 10.0))
@settings(max_examples=150, deadline=None)
def test_values_lie_within_their_intervals_and_follow_the_units(
    seed: int, count: int, places: int, per_x: float, per_y: float
) -> None:
    rng = np.random.default_rng(seed)
    x = rng.choice(rng.random(places), size=count)
    y = rng.lognormal(0.0, 1.0, size=count)
    line, scaled = fit_line(x, y), fit_line(per_x * x, per_y * y)
    for interval in (line.slope, line.intercept):
        assert 0.0 <= interval.low <= interval.value <= interval.high
    for field in ("value", "low", "high"):
        slope, intercept = getattr(line.slope, field), getattr(line.intercept, field)
        tiny = 1e-9 * float(y.max())
        assert getattr(scaled.intercept, field) == pytest.approx(per_y * intercept, rel=1e-6, abs=per_y * tiny)
        assert getattr(scaled.slope, field) * per_x == pytest.approx(per_y * slope, rel=1e-6, abs=1e3 * per_y * tiny)
