"""When to close a round."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from torch_qgc.errors import PlanError
from torch_qgc.planner.checks import Floats, per_worker
from torch_qgc.planner.delays import DelayModel
from torch_qgc.planner.shares import error_factors

__all__ = ["DeadlineChoice", "choose_deadline", "expected_round_time"]


def expected_round_time(delays: DelayModel, deadline_s: float) -> float:
    """Return how long a round lasts on average if it closes when all are in, or at the deadline.

        E min(T, max_k T_k) = int_0^T (1 - prod_k F_k(t)) dt

    Args:
        deadline_s: T > 0, finite.
    """
    if not 0.0 < deadline_s < np.inf:
        raise PlanError(f"deadline_s: expected a positive, finite number of seconds, got {deadline_s}")
    kinks = delays.breakpoints()
    edges = np.union1d(np.linspace(0.0, deadline_s, 129), kinks[(kinks > 0) & (kinks < deadline_s)])
    nodes, weights = np.polynomial.legendre.leggauss(12 if len(edges) < 1024 else 2)
    half = np.diff(edges) / 2.0
    times = (edges[:-1] + half)[:, None] + half[:, None] * nodes
    late = delays.late_fraction(times).reshape(*times.shape, -1)
    waiting = 1.0 - np.prod(1.0 - late, axis=-1)
    return float(np.sum(waiting * weights * half[:, None]))


@dataclass(frozen=True, kw_only=True, eq=False)
class DeadlineChoice:
    """A deadline, and what it costs: straggle_probs [K], residual rho, round time in seconds, objective J."""

    deadline_s: float
    objective: float
    residual: float
    round_time_s: float
    straggle_probs: Floats


def choose_deadline(
    delays: DelayModel,
    residual: ArrayLike | Callable[[Floats], float],
    *,
    beta: float = 1.0,
    overhead_s: float = 0.0,
    search_s: tuple[float, float] | None = None,
    closes_early: bool = False,
    grid: int = 240,
) -> DeadlineChoice:
    """Choose the deadline that reaches a given loss soonest.

        minimise J(T) = (tau(T) + t0) (beta + rho(T)),   rho(T) = error of the plan for p_k = P(T_k > T)

    Rounds to a given loss grow with E||ghat||^2 <= C N^2 (1 + rho) (Song & Choi Lemma 2, Theorems 2 and 3),
    whence beta = 1; a round lasts tau(T) + t0. beta = 0 would minimise variance per second, which leads to ever
    later deadlines; with large batch noise beta is (||g||^2 + batch variance) / C N^2. J can have several local
    minima: a grid of log-spaced T is searched, then the best cell is refined.

    Args:
        delays: of K workers.
        residual: p [K] -> rho, e.g. `lambda p: make_plan(p, bit_budget=40).residual_bound`, so that bits are
            allotted anew at every T; or fixed variances v, scalar or [K]:
            rho = 1 / sum_k (1 - p_k) / (p_k + v_k).
        beta: >= 0; more: shorter deadlines.
        overhead_s: t0, seconds per round that do not depend on the deadline.
        search_s: least and largest deadline; default: from the first arrival to where all are in.
        closes_early: tau = E min(T, max_k T_k) instead of T.
        grid: number of deadlines tried first.
    Raises:
        PlanError: no deadline in the range at which anybody arrives; a bad range.
    """
    from scipy.optimize import minimize_scalar

    low, high = search_s if search_s is not None else _search_range(delays)
    if not 0.0 < low < high < np.inf:
        raise PlanError(f"search_s: expected 0 < least < largest deadline in seconds, got {low} and {high}")
    rho = residual if callable(residual) else _fixed_variance(residual)

    def evaluate(deadline_s: float) -> DeadlineChoice:
        return _evaluate(delays, rho, deadline_s, beta, overhead_s, closes_early)

    times = np.geomspace(low, high, grid)
    values = [evaluate(float(t)).objective for t in times]
    best = int(np.argmin(values))
    if not np.isfinite(values[best]):
        raise PlanError(f"search_s: expected a deadline at which somebody arrives, got {low} .. {high} s; extend it")
    bracket = (float(times[max(best - 1, 0)]), float(times[min(best + 1, grid - 1)]))
    refined = minimize_scalar(
        lambda t: evaluate(float(t)).objective, bounds=bracket, method="bounded", options={"xatol": 1e-10}
    )
    candidates = [evaluate(float(times[best])), evaluate(float(refined.x))]
    return min(candidates, key=lambda choice: choice.objective)


def _evaluate(
    delays: DelayModel,
    rho: Callable[[Floats], float],
    deadline_s: float,
    beta: float,
    overhead_s: float,
    closes_early: bool,
) -> DeadlineChoice:
    p = np.atleast_1d(delays.straggle_probability(deadline_s))
    error = rho(p) if np.any(p < 1.0) else np.inf
    tau = expected_round_time(delays, deadline_s) if closes_early else deadline_s
    return DeadlineChoice(
        deadline_s=deadline_s,
        objective=(tau + overhead_s) * (beta + error),
        residual=error,
        round_time_s=tau + overhead_s,
        straggle_probs=p,
    )


def _fixed_variance(variance: ArrayLike) -> Callable[[Floats], float]:
    def rho(p: Floats) -> float:
        utility = 1.0 / error_factors(p, per_worker(variance, len(p), "residual"))
        return 1.0 / float(utility.sum())

    return rho


def _search_range(delays: DelayModel) -> tuple[float, float]:
    """Return from the first kink to where every worker misses less than 1 % of rounds, if it ever does."""
    kinks = delays.breakpoints()
    low = float(kinks[kinks > 0].min(initial=np.inf))
    high = 2.0 * float(kinks.max(initial=1e-9))
    while np.any(delays.late_fraction(high) >= 0.01) and np.any(
        delays.late_fraction(2.0 * high) < delays.late_fraction(high)
    ):
        high *= 2.0
    return (low if low < high else high * 1e-4), high
