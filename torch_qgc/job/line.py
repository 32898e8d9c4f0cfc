"""A straight line through quantiles of noisy times, and how far to trust it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

from torch_qgc.errors import PlanError
from torch_qgc.planner.checks import Floats, Ints

__all__ = ["LEAST", "Interval", "Line", "fit_line"]

#: Fewer points say nothing about their median: the least and the largest of five enclose it in 94 % of cases only.
LEAST = 6

# More than the 1.96 of a known error: this one is estimated from the same few points. With 2.1 the median of 6 to 64
# exponential or log-normal points is covered in 95 to 98 % of cases.
_Z = 2.1


@dataclass(frozen=True)
class Interval:
    """A number, and bounds that enclose it with 95 % confidence; `high` is inf where nothing bounds it."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Line:
    """y = intercept + slope x, neither of them negative."""

    slope: Interval
    intercept: Interval

    def at(self, x: ArrayLike) -> Floats:
        """Return the estimate of y, of the shape of x."""
        return np.asarray(self.intercept.value + self.slope.value * np.asarray(x, dtype=np.float64))


def fit_line(x: Floats, y: Floats, quantile: float = 0.5) -> Line:
    """Fit the line on which the given quantile of y lies for every x.

    Points of (nearly) equal x form a group: n_j points at x_j with sample quantile y_j. With means weighted by n_j,

        slope = sum_j n_j (x_j - mean x) y_j / sum_j n_j (x_j - mean x)^2,   intercept = mean y - slope mean x

    are linear in the y_j, whose standard errors are read off the order statistics around them (Price and Bonett
    2002, Distribution-free confidence intervals for difference and ratio of medians). So nothing is assumed about the
    noise: it may be skewed, have heavy tails, and differ between groups.

    With one group the split is unknown. Then y is attributed to the slope, and the interval of the intercept reaches
    from 0 to the upper bound of y. With groups that hardly differ in x the estimate is drawn towards that by a prior of
    the size of y (which vanishes as the error does), so that it does not jump when a second group appears. Intervals
    are not drawn, but cut where slope or intercept would be negative.

    Args:
        x: [n], >= 0. y: [n], >= 0.
        quantile: in (0, 1).
    Raises:
        PlanError: no points.
    """
    if not len(x):
        raise PlanError("x: expected at least one point to draw a line through, got none")
    weights, places, heights, errors = np.array([_group(x[g], y[g], quantile, len(x)) for g in _groups(x)]).T
    center, height = float(weights @ places), float(weights @ heights)
    most = height + _Z * _norm(weights * errors)
    if center == 0.0:
        return Line(Interval(0.0, 0.0, math.inf), _interval(height, height, _norm(weights * errors), math.inf))
    spread = float(weights @ (places - center) ** 2)
    if spread == 0.0:
        return Line(Interval(height / center, 0.0, most / center), Interval(0.0, 0.0, most))
    for_slope = weights * (places - center) / spread
    for_intercept = weights - center * for_slope
    intercept, error = float(for_intercept @ heights), _norm(for_intercept * errors)
    drawn = intercept / (1.0 + (error / height) ** 2) if height else 0.0
    drawn = min(max(drawn, 0.0), height)
    return Line(
        _interval((height - drawn) / center, float(for_slope @ heights), _norm(for_slope * errors), most / center),
        _interval(drawn, intercept, error, most),
    )


def _interval(value: float, center: float, error: float, most: float) -> Interval:
    low, high = max(center - _Z * error, 0.0), min(center + _Z * error, most)
    return Interval(value, min(low, value), max(high, value))


def _norm(errors: Floats) -> float:
    """Return the standard error of a sum of independent terms."""
    return float(np.sqrt(errors @ errors))


def _groups(x: Floats) -> list[Ints] | list[slice]:
    """Return the indices of points by x, ascending, with at least LEAST in each group if there are as many."""
    order = np.argsort(x, kind="stable")
    ordered = x[order]
    steps = np.flatnonzero(ordered[1:] - ordered[:-1] > 1e-9 * ordered[-1]) + 1
    if not steps.size:
        return [slice(None)]
    borders = [0]
    for border in steps:
        if min(border - borders[-1], len(x) - border) >= LEAST:
            borders.append(int(border))
    return np.split(order, borders[1:])


def _group(x: Floats, y: Floats, quantile: float, count: int) -> tuple[float, float, float, float]:
    """Return the part of all points that is in a group, its place, its sample quantile, and the standard error of that.

    The error is inf for fewer than LEAST points.
    """
    ordered = np.sort(y)
    low, high, z = _ranks(len(y), quantile)
    error = (ordered[high] - ordered[low]) / (2.0 * z) if len(y) >= LEAST else math.inf
    return len(y) / count, _sample_quantile(np.sort(x), 0.5), _sample_quantile(ordered, quantile), float(error)


def _sample_quantile(ordered: Floats, quantile: float) -> float:
    """Return `np.quantile` of sorted numbers, in a tenth of its time."""
    position = quantile * (len(ordered) - 1)
    below = int(position)
    low, high = float(ordered[below]), float(ordered[min(below + 1, len(ordered) - 1)])
    return low + (position - below) * (high - low)


@lru_cache(maxsize=1024)
def _ranks(count: int, quantile: float) -> tuple[int, int, float]:
    """Return the indices of two order statistics around a quantile, and the z of a normal that they enclose as often.

    They are about two standard deviations of the binomial number of points below the quantile from it.
    """
    reach = 2.0 * math.sqrt(count * quantile * (1.0 - quantile))
    middle = count * quantile + 0.5
    low, high = max(math.floor(middle - reach), 1), min(math.ceil(middle + reach), count)
    below = [math.comb(count, i) * quantile**i * (1.0 - quantile) ** (count - i) for i in range(count + 1)]
    outside = sum(below[:low]) + sum(below[high:])
    return low - 1, high - 1, NormalDist().inv_cdf(1.0 - min(outside, 1.0) / 2.0) if outside < 1.0 else 0.0
