"""From runs to figures: paired comparisons with waiting, each method at its own best learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from scipy import stats

from lever_runs.training import LRS, SEEN, Outcome

__all__ = ["Figures", "Measured", "best_lr", "figures", "time_to"]

#: seed -> outcome of one method in one setting, at its best learning rate.
Measured: TypeAlias = dict[int, Outcome]


@dataclass(frozen=True)
class Figures:
    """A method in one setting, over seeds. Intervals are Student's, at 95 %, of differences within a seed.

    Attributes:
        lr: the best learning rate; at_edge: a better one may lie outside of those tried.
        reached: the part of the seeds in which it reached waiting's final loss within the horizon.
        time: mean time to that loss, over the horizon, and half its interval; inf if some seed did not reach it.
        loss: final loss over waiting's, geometric mean, and the ends of its interval.
        slow_accuracy: mean accuracy on the slow workers' classes, and half the interval of its difference to waiting's.
        against_best: final loss over that of the better one of waiting and ignoring, as `loss`.
    """

    lr: float
    at_edge: bool
    reached: float
    time: tuple[float, float]
    loss: tuple[float, float, float]
    slow_accuracy: tuple[float, float]
    against_best: tuple[float, float, float]

    @property
    def worse(self) -> bool:
        """Worse than the better one of waiting and ignoring, beyond noise."""
        return self.against_best[1] > 1.0


def best_lr(tuned: dict[float, Sequence[Outcome]]) -> float:
    """Return the learning rate with the least mean of final losses."""
    return min(tuned, key=lambda lr: float(np.mean([outcome.loss[-1] for outcome in tuned[lr]])))


def time_to(loss: float, outcome: Outcome) -> float:
    """Return when a run first reached a loss, as a part of its horizon, between two looks by interpolation; or inf."""
    reached = np.flatnonzero(np.array(outcome.loss) <= loss)
    if not reached.size:
        return math.inf
    i = int(reached[0])
    if i == 0:
        return float(SEEN[0])
    above, below = outcome.loss[i - 1], outcome.loss[i]
    part = (above - loss) / (above - below) if math.isfinite(above) else 1.0
    return float(SEEN[i - 1] * (SEEN[i] / SEEN[i - 1]) ** part)


def figures(method: Measured, waiting: Measured, ignoring: Measured, *, optimizer: str, lr: float) -> Figures:
    """Compare the runs of a method with those of waiting and of ignoring that have the same seeds."""
    seeds = sorted(set(method) & set(waiting) & set(ignoring))
    times = np.array([time_to(waiting[s].loss[-1], method[s]) for s in seeds])
    best = min((waiting, ignoring), key=lambda runs: float(np.mean([runs[s].loss[-1] for s in seeds])))
    slow = np.array([method[s].slow_accuracy for s in seeds])
    gained = slow - np.array([waiting[s].slow_accuracy for s in seeds])
    return Figures(
        lr=lr,
        at_edge=lr in (LRS[optimizer][0], LRS[optimizer][-1]),
        reached=float(np.isfinite(times).mean()),
        time=_interval(times) if np.isfinite(times).all() else (math.inf, math.nan),
        loss=_ratio(method, waiting, seeds),
        slow_accuracy=(float(slow.mean()), _interval(gained)[1]),
        against_best=_ratio(method, best, seeds),
    )


def _ratio(runs: Measured, others: Measured, seeds: Sequence[int]) -> tuple[float, float, float]:
    """Return the geometric mean of ratios of final losses within a seed, and the ends of its interval."""
    logs = np.array([math.log(runs[s].loss[-1] / others[s].loss[-1]) for s in seeds])
    middle, half = _interval(logs)
    return math.exp(middle), math.exp(middle - half), math.exp(middle + half)


def _interval(values: np.ndarray) -> tuple[float, float]:
    """Return the mean and half the width of Student's interval for it."""
    n = len(values)
    half = stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / math.sqrt(n) if n > 1 else math.inf
    return float(values.mean()), float(half)
