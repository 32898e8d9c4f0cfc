"""Allot bits to workers: exactly for any table of utilities, or by the heuristics it is compared with."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from torch_qgc.errors import PlanError
from torch_qgc.planner import heuristics
from torch_qgc.planner.checks import Floats, Ints, per_worker

__all__ = ["Method", "allocate_bits"]

Method = Literal["exact", "dp", "low_complexity", "greedy", "relaxation", "equal"]

_ROWS_PER_PASS = 4096  # rows of a table worked on at once, so that they stay in cache


def allocate_bits(
    utility: ArrayLike, budget_bits: int, method: Method = "exact", *, most_bits: ArrayLike | None = None
) -> Ints:
    """Allot bits so that the summed utility is maximal.

        maximise sum_k U_k(b_k)  subject to  sum_k b_k <= budget_bits,  b_k <= most_bits_k

    Song & Choi eq. (23)-(24), with a cap for each worker. "exact" needs no concavity and no monotonicity and costs
    O(K m + m^4): see `_exact`. "dp" is the paper's dynamic program (eq. 25), O(K B m). The rest are heuristics: see
    heuristics.py.

    Args:
        utility: [K, m+1]; utility[k, b] of worker k at b bits, any finite numbers, -inf where b is not
            allowed.
        budget_bits: bits per coordinate summed over all workers.
        method: which allocator.
        most_bits: scalar or [K], the most bits of each worker, or None.
    Returns:
        [K] int64 bits. Among equal utilities of one worker the fewest bits are taken; what caps leave of the budget is
        not spent.
    Raises:
        PlanError: the budget cannot give every worker its least bits, a worker has no allowed bits, NaN or
            +inf in the table, or an unknown method.
    """
    table = np.asarray(utility, dtype=np.float64)
    if most_bits is not None and table.ndim == 2:
        caps = per_worker(most_bits, len(table), "most_bits")
        table = np.where(np.arange(table.shape[1]) <= caps[:, None], table, -np.inf)
    _check_table(table)
    least = np.argmax(table > -np.inf, axis=1)
    spare = int(budget_bits) - int(least.sum())
    if spare < 0:
        raise PlanError(
            f"budget_bits: expected at least {int(least.sum())}, the least bits of all {len(table)} workers, "
            f"got {budget_bits}; raise the budget, or let workers be dropped (allow_drop=True)"
        )
    gains = _gains(table, least)
    try:
        solve = _METHODS[method]
    except KeyError:
        raise PlanError(f"method: expected one of {', '.join(_METHODS)}, got {method!r}") from None
    steps = solve(gains, min(spare, gains.shape[0] * (gains.shape[1] - 1)))
    # A running maximum may be reached with fewer bits than were given: take the fewest.
    rows = np.arange(len(table))
    reached = gains[rows, steps]
    fewest = np.argmax(gains >= reached[:, None], axis=1)
    bits: Ints = least + fewest
    return bits


def _check_table(table: Floats) -> None:
    if table.ndim != 2 or table.size == 0:
        raise PlanError(f"utility: expected a table of shape [K, max_bits + 1], got shape {table.shape}")
    if np.isnan(table).any() or np.isposinf(table).any():
        k, b = np.argwhere(np.isnan(table) | np.isposinf(table))[0]
        raise PlanError(f"utility: expected finite numbers or -inf, got {table[k, b]} for worker {k} at {b} bits")
    closed = np.flatnonzero(np.isneginf(table).all(axis=1))
    if closed.size:
        raise PlanError(
            f"utility: expected at least one allowed number of bits, worker {closed[0]} has none; open one, or raise "
            "most_bits"
        )


def _gains(table: Floats, least: Ints) -> Floats:
    """Shift every row to its least allowed bits and take its running maximum: no -inf is left, no row falls.

    Bits may be left unused, so a row's running maximum has the same optimum as the row, and the whole budget can
    be taken as spent.
    """
    if least.any():
        columns = np.minimum(least[:, None] + np.arange(table.shape[1] - least.min()), table.shape[1] - 1)
        table = np.take_along_axis(table, columns, axis=1)
    return np.maximum.accumulate(table, axis=1)


# ------------------------------------------------------------------------------------------------- exact
class _Base(NamedTuple):
    """A vertex of the linear relaxation: what every worker gets before the last few bits are settled."""

    steps: Ints  # [K] bits above the least
    price: float  # utility per bit at the margin
    left: int  # bits not given out yet, in [0, m)


def _exact(gains: Floats, budget: int) -> Ints:
    """Solve the linear relaxation, then settle its fractional part by a small dynamic program.

    With lambda the marginal price, D_k(j) = max_i (F_k(i) - lambda i) - (F_k(j) - lambda j) >= 0 is what
    worker k loses at j, and EVERY way r to spend the budget has

        sum_k F_k(r_k) = UB - sum_k D_k(r_k).

    So the optimum is the cheapest set of deviations x_k from the base with sum x_k = left. Deviations that
    sum to zero can be undone at no cost, so some optimum has none; ordered so that the running sum stays in
    [1-m, m] its values are distinct, hence at most 2m - 1 workers deviate, and for every x only the 2m - 1
    cheapest workers matter (any other could be swapped for an idle one of those).
    """
    if gains.shape[1] == 1 or budget == 0:
        return np.zeros(len(gains), dtype=np.int64)
    base = _linear_relaxation(gains, budget)
    if base.left == 0:
        return base.steps
    worker, move, cost = _deviations(gains, base)
    chosen = _cheapest_moves(worker, move, cost, base.left, gains.shape[1] - 1)
    steps = base.steps.copy()
    steps[worker[chosen]] += move[chosen]
    return steps


def _linear_relaxation(gains: Floats, budget: int) -> _Base:
    slopes = _envelope_slopes(gains)
    price = -float(np.partition(-slopes.ravel(), budget - 1)[budget - 1])
    steps = np.count_nonzero(slopes > price, axis=1).astype(np.int64)
    tied = np.count_nonzero(slopes == price, axis=1)
    left = budget - int(steps.sum())
    # Whole blocks of slope = price stay on the envelope; the first that does not fit ends the filling.
    filled = np.cumsum(tied) <= left
    steps[filled] += tied[filled]
    return _Base(steps, price, left - int(tied[filled].sum()))


def _envelope_slopes(gains: Floats) -> Floats:
    """Return the [K, m] unit increments of every row's least concave majorant, non-increasing along rows."""
    slopes = np.diff(gains, axis=1)
    for start in range(0, len(slopes), _ROWS_PER_PASS):
        _straighten(gains[start : start + _ROWS_PER_PASS], slopes[start : start + _ROWS_PER_PASS])
    return np.minimum.accumulate(slopes, axis=1)


def _straighten(gains: Floats, slopes: Floats) -> None:
    """Replace increments by the envelope's, in place: walk from vertex to vertex along the steepest chord."""
    m = slopes.shape[1]
    if m == 1:
        return
    rising = np.diff(slopes, axis=1) > 0
    # From this step on a row's increments only fall: its own increments are the envelope there.
    concave_from = np.where(rising.any(axis=1), m - 1 - np.argmax(rising[:, ::-1], axis=1), 0)
    rows = np.flatnonzero(concave_from > 0)
    at = np.zeros(len(rows), dtype=np.int64)
    steps = np.arange(1, m + 1)
    while rows.size:
        rise = gains[rows, 1:] - gains[rows, at][:, None]
        run = steps - at[:, None]
        chord = np.where(run > 0, rise / np.maximum(run, 1), -np.inf)
        end = m - np.argmax(chord[:, ::-1], axis=1)  # the farthest of equally steep chords
        slope = chord[np.arange(len(rows)), end - 1]
        inside = (steps > at[:, None]) & (steps <= end[:, None])
        slopes[rows] = np.where(inside, slope[:, None], slopes[rows])
        going = end < concave_from[rows]
        rows, at = rows[going], end[going]


def _deviations(gains: Floats, base: _Base) -> tuple[Ints, Ints, Floats]:
    """Return (worker, move, cost) of every deviation that can be part of an optimum."""
    m = gains.shape[1] - 1
    reduced = gains - base.price * np.arange(m + 1)
    cost = np.maximum(reduced[np.arange(len(gains)), base.steps][:, None] - reduced, 0.0)
    single = base.steps + base.left
    can = np.flatnonzero(single <= m)
    incumbent = cost[can, single[can]].min() if can.size else np.inf
    worker, step = np.nonzero(cost <= incumbent)
    move = step - base.steps[worker]
    keep = []
    for x in np.unique(move[move != 0]):
        of_x = np.flatnonzero(move == x)
        if of_x.size > 2 * m - 1:
            of_x = of_x[np.argpartition(cost[worker[of_x], step[of_x]], 2 * m - 2)[: 2 * m - 1]]
        keep.append(of_x)
    kept = np.sort(np.concatenate(keep))
    return worker[kept], move[kept], cost[worker[kept], step[kept]]


def _cheapest_moves(worker: Ints, move: Ints, cost: Floats, left: int, m: int) -> Ints:
    """Choose at most one move per worker with moves summing to `left` at least cost; return their indices."""
    offset = m * m + m  # positive moves sum to at most m^2 + m, negative ones to at most m^2: the window
    width = 2 * offset + 1
    best = np.full(width, np.inf)
    best[offset] = 0.0
    starts = np.flatnonzero(np.r_[True, worker[1:] != worker[:-1]])
    ends = np.r_[starts[1:], len(worker)]
    took = np.full((len(starts), width), -1, dtype=np.int64)
    for group, (start, end) in enumerate(zip(starts, ends)):
        before = best.copy()
        for i in range(start, end):
            x = int(move[i])
            to = slice(max(x, 0), width + min(x, 0))
            candidate = before[max(-x, 0) : width - max(x, 0)] + cost[i]
            better = candidate < best[to]
            best[to][better] = candidate[better]
            took[group, to][better] = i
    chosen = []
    at = offset + left
    for group in range(len(starts) - 1, -1, -1):
        i = took[group, at]
        if i >= 0:
            chosen.append(i)
            at -= int(move[i])
    return np.array(chosen, dtype=np.int64)


# ------------------------------------------------------------------------------------- dynamic program
def _dynamic_program(gains: Floats, budget: int) -> Ints:
    """Solve J(k, R) = max_r J(k-1, R-r) + F_k(r) over all workers: Song & Choi eq. (25), with capped r."""
    num_workers, width = gains.shape
    best = np.zeros(budget + 1)
    took = np.zeros((num_workers, budget + 1), dtype=np.int16)
    for k in range(num_workers):
        before = best
        best = before + gains[k, 0]
        for r in range(1, min(width - 1, budget) + 1):
            candidate = before[: budget + 1 - r] + gains[k, r]
            better = candidate > best[r:]
            best[r:][better] = candidate[better]
            took[k, r:][better] = r
    steps = np.zeros(num_workers, dtype=np.int64)
    left = budget
    for k in range(num_workers - 1, -1, -1):
        steps[k] = took[k, left]
        left -= int(steps[k])
    return steps


_METHODS = {
    "exact": _exact,
    "dp": _dynamic_program,
    "low_complexity": heuristics.low_complexity,
    "greedy": heuristics.greedy,
    "relaxation": heuristics.relaxation,
    "equal": heuristics.equal,
}
