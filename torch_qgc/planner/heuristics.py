"""Approximate bit allocators: the paper's Algorithm 1 and the heuristics it is compared with.

All take gains [K, m+1], rows that never fall, and a number of bits to hand out, and return [K] int64 steps in
[0, m] that sum to at most that number. "Reliable" workers are those with the largest last entry: at many bits
the utility tends to (1-p)/p, which falls with p.
"""

from __future__ import annotations

import heapq

import numpy as np

from torch_qgc.planner.checks import Floats, Ints

__all__ = ["equal", "greedy", "low_complexity", "relaxation"]


def equal(gains: Floats, budget: int) -> Ints:
    """Give every worker budget // K bits, and one more to the budget mod K most reliable."""
    num_workers, width = gains.shape
    each, extra = divmod(budget, num_workers)
    steps = np.full(num_workers, min(each, width - 1), dtype=np.int64)
    steps[_by_reliability(gains)[:extra]] += int(each < width - 1)
    return steps


def greedy(gains: Floats, budget: int) -> Ints:
    """Give bit after bit to whoever gains most from the next one."""
    num_workers, width = gains.shape
    slopes = np.diff(gains, axis=1)
    steps = np.zeros(num_workers, dtype=np.int64)
    if width == 1:
        return steps
    queue = [(-gain, k) for k, gain in enumerate(slopes[:, 0].tolist())]
    heapq.heapify(queue)
    for _ in range(budget):
        _, k = heapq.heappop(queue)
        steps[k] += 1
        if steps[k] < width - 1:
            heapq.heappush(queue, (-float(slopes[k, steps[k]]), k))
    return steps


def relaxation(gains: Floats, budget: int) -> Ints:
    """Equalise the continuous marginal gains on the concave branch, and round.

    Solve f'_k(r_k) = lambda for all k with sum_k r_k = budget by bisection on lambda; r_k = 0 where lambda
    exceeds worker k's steepest gain. Round down, then up in the order of the largest fractional parts.
    """
    num_workers, width = gains.shape
    if width == 1:
        return np.zeros(num_workers, dtype=np.int64)
    slopes = np.diff(gains, axis=1)
    low, high = 0.0, float(slopes.max())
    for _ in range(60):
        middle = (low + high) / 2.0
        if _demand(slopes, middle).sum() > budget:
            low = middle
        else:
            high = middle
    demand = _demand(slopes, high)
    steps = np.floor(demand + 1e-9).astype(np.int64)
    rank = np.argsort(steps - demand, kind="stable")
    left = budget - int(steps.sum())
    while left > 0:
        room = rank[steps[rank] < width - 1][:left]
        steps[room] += 1
        left -= len(room)
    return steps


def low_complexity(gains: Floats, budget: int) -> Ints:
    """Run Algorithm 1 of Song & Choi, section III-B2.

    For every m the m most reliable workers share all bits: by relaxation or equally, whichever is better, and
    then by 1-bit swaps while one gains. The best m wins.
    """
    num_workers, width = gains.shape
    order = _by_reliability(gains)
    best, best_value = np.zeros(num_workers, dtype=np.int64), -np.inf
    floor = float(gains[:, 0].sum())
    for m in range(1, num_workers + 1):
        active = order[:m]
        part = gains[active]
        budget_m = min(budget, m * (width - 1))
        candidates = (relaxation(part, budget_m), equal(part, budget_m))
        steps = _swap(part, max(candidates, key=lambda s: _value(part, s)))
        value = floor - float(part[:, 0].sum()) + _value(part, steps)
        if value > best_value:
            best_value = value
            best = np.zeros(num_workers, dtype=np.int64)
            best[active] = steps
    return best


def _by_reliability(gains: Floats) -> Ints:
    order: Ints = np.argsort(-gains[:, -1], kind="stable")
    return order


def _value(gains: Floats, steps: Ints) -> float:
    return float(gains[np.arange(len(gains)), steps].sum())


def _demand(slopes: Floats, price: float) -> Floats:
    """Return [K] continuous bits at which the marginal gain has fallen to `price`.

    The increment of step j is the slope at j + 1/2; between two of them the slope is taken as linear.
    """
    num_workers, m = slopes.shape
    above = slopes > price
    last = m - 1 - np.argmax(above[:, ::-1], axis=1)  # the last step still worth its price
    rows = np.arange(num_workers)
    here = slopes[rows, last]
    after = np.where(last + 1 < m, slopes[rows, np.minimum(last + 1, m - 1)], -np.inf)
    with np.errstate(invalid="ignore"):
        part = np.where(np.isfinite(after), (here - price) / np.maximum(here - after, 1e-300), 0.5)
    demand = np.minimum(last + 0.5 + np.clip(part, 0.0, 1.0), m)
    return np.where(above.any(axis=1), demand, 0.0)


def _swap(gains: Floats, steps: Ints) -> Ints:
    """Move single bits between workers while the sum rises."""
    rows = np.arange(len(gains))
    top = gains.shape[1] - 1
    least_gain = 1e-12 * max(float(np.abs(gains).max()), 1e-300)  # below it, rounding could swap for ever
    steps = steps.copy()
    while True:
        here = gains[rows, steps]
        up = np.where(steps < top, gains[rows, np.minimum(steps + 1, top)] - here, -np.inf)
        down = np.where(steps > 0, here - gains[rows, np.maximum(steps - 1, 0)], np.inf)
        receiver, giver = int(np.argmax(up)), int(np.argmin(down))
        if receiver == giver:  # the best pair of two different workers
            up_2, down_2 = up.copy(), down.copy()
            up_2[receiver], down_2[giver] = -np.inf, np.inf
            other_up, other_down = int(np.argmax(up_2)), int(np.argmin(down_2))
            if up_2[other_up] - down[giver] >= up[receiver] - down_2[other_down]:
                receiver = other_up
            else:
                giver = other_down
        if not up[receiver] - down[giver] > least_gain or receiver == giver:
            return steps
        steps[receiver] += 1
        steps[giver] -= 1
