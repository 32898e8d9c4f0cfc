"""Data that cannot move: the best code when every partition may be served only by those who hold it."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from torch_qgc.errors import PlanError
from torch_qgc.planner.checks import Floats, Ints, Mask, per_worker, probabilities
from torch_qgc.planner.shares import error_factors, partition_fractions, water_fill

__all__ = ["placed_weights"]

# Flows and deficits below this fraction of the data are rounding.
_ROUNDING = 1e-14


def placed_weights(
    straggle_probs: ArrayLike,
    variance: ArrayLike,
    placement: ArrayLike,
    *,
    partition_sizes: ArrayLike | None = None,
    max_share: ArrayLike | None = None,
) -> Floats:
    """Return the code with the least error among those that respect who holds what.

        minimise sum_k delta_k m_k^2,  m_k = sum_n a_kn <= max_share_k
        subject to  a_kn >= 0,  a_kn = 0 where worker k does not hold partition n,  sum_k a_kn = s_n

    Exact, by decomposition. Share the data out freely among the workers (Song & Choi Theorem 1); if a flow
    can carry it, done. Otherwise the minimum cut names the workers that must carry more than that, because
    some partitions are held by nobody else: these partitions go to them, all others to the rest, and the two
    parts are solved on their own (Fujishige's decomposition of separable convex functions over a base
    polytope). At most 2K - 1 flows are solved. At the optimum delta_k m_k is equal inside every part.

    Args:
        straggle_probs: [K] in [0, 1].
        variance: scalar or [K], >= 0 or inf.
        placement: [K, N] bool, who holds which partition.
        partition_sizes: [N] in any unit, or None for equal sizes.
        max_share: scalar or [K], or None.
    Returns:
        [K, N] float64: N a_kn; rows sum to N m_k, columns to N s_n.
    Raises:
        PlanError: wrong shapes; a partition held by nobody who can contribute (named); caps too small.
    """
    p = probabilities(straggle_probs)
    v = per_worker(variance, len(p), "variance")
    holds = np.asarray(placement, dtype=bool)
    if holds.ndim != 2 or holds.shape[0] != len(p) or holds.shape[1] == 0:
        raise PlanError(f"placement: expected shape [{len(p)}, N] (workers, partitions), got {holds.shape}")
    sizes = partition_fractions(holds.shape[1], partition_sizes)
    caps = None if max_share is None else per_worker(max_share, len(p), "max_share")
    utility = 1.0 / error_factors(p, v)
    holds = holds & (utility > 0)[:, None]
    orphans = np.flatnonzero(~holds.any(axis=0))
    if orphans.size:
        names = ", ".join(map(str, orphans[:8])) + (", ..." if orphans.size > 8 else "")
        raise PlanError(
            "placement: expected every partition at a worker that can contribute, got none for partition "
            f"{names}; copy it to a worker with straggle probability below 1, or leave it out"
        )
    flow = _decompose(utility, holds, sizes, caps)
    flow *= sizes / flow.sum(axis=0)  # unbiased to the last digit
    return np.asarray(flow * holds.shape[1])


def _decompose(utility: Floats, holds: Mask, sizes: Floats, caps: Floats | None) -> Floats:
    flow = np.zeros(holds.shape)
    waiting: list[tuple[Ints, Ints]] = [(np.flatnonzero(utility > 0), np.arange(len(sizes)))]
    while waiting:
        workers, parts = waiting.pop()
        if not parts.size:  # workers that hold nothing which the cut has left
            continue
        supply = sizes[parts]
        target = water_fill(utility[workers], float(supply.sum()), None if caps is None else caps[workers])
        part, cut_workers, cut_parts = _max_flow(holds[np.ix_(workers, parts)], supply, target)
        if not cut_parts.any():
            flow[np.ix_(workers, parts)] = part
            continue
        waiting.append((workers[cut_workers], parts[cut_parts]))
        waiting.append((workers[~cut_workers], parts[~cut_parts]))
    return flow


def _max_flow(holds: Mask, supply: Floats, capacity: Floats) -> tuple[Floats, Mask, Mask]:
    """Send as much supply as fits through the workers.

    Args:
        holds: [K, N]; supply: [N] of the partitions; capacity: [K] of the workers.
    Returns:
        flow [K, N], and the workers [K] and partitions [N] of the minimum cut: both empty if all supply fits.
    """
    rounding = _ROUNDING * float(supply.sum())
    flow, need, slack = _segment_flow(holds, supply, capacity)
    while True:
        starts = need > rounding
        if not starts.any():
            return flow, np.zeros(len(capacity), dtype=bool), np.zeros(len(supply), dtype=bool)
        reached, seen, end, to_worker, to_part = _search(holds, flow > rounding, starts, slack > rounding)
        if end < 0:
            return flow, reached, seen
        path = [(end, int(to_worker[end]))]
        while not starts[path[-1][1]]:
            k = int(to_part[path[-1][1]])
            path.append((k, int(to_worker[k])))
        # Forward edges (worker k takes from n), and between them the backward ones (k' gives n back).
        back = [(k, n) for (k, _), (_, n) in zip(path[1:], path[:-1])]
        amount = min([slack[end], need[path[-1][1]], *(flow[k, n] for k, n in back)])
        for k, n in path:
            flow[k, n] += amount
        for k, n in back:
            flow[k, n] -= amount
        slack[end] -= amount
        need[path[-1][1]] -= amount


def _segment_flow(holds: Mask, supply: Floats, capacity: Floats) -> tuple[Floats, Floats, Floats]:
    """Fill workers in order, partition by partition: a maximum flow if everybody holds everything."""
    flow, need, slack = np.zeros(holds.shape), supply.copy(), capacity.copy()
    for n in range(len(supply)):
        able = np.flatnonzero(holds[:, n] & (slack > 0))
        before = np.cumsum(slack[able]) - slack[able]
        take = np.clip(need[n] - before, 0.0, slack[able])
        flow[able, n] = take
        slack[able] -= take
        need[n] -= take.sum()
    return flow, need, slack


def _search(holds: Mask, carries: Mask, starts: Mask, open_workers: Mask) -> tuple[Mask, Mask, int, Ints, Ints]:
    """Search breadth first from the partitions in need for a worker with room.

    Returns:
        reached workers, reached partitions, the worker found or -1, and the tree: for every worker the
        partition, and for every partition the worker, that it was reached from.
    """
    num_workers, num_parts = holds.shape
    reached, seen = np.zeros(num_workers, dtype=bool), starts.copy()
    to_worker, to_part = np.full(num_workers, -1), np.full(num_parts, -1)
    front = np.flatnonzero(starts)
    while front.size:
        edges = holds[:, front] & ~reached[:, None]
        workers = np.flatnonzero(edges.any(axis=1))
        to_worker[workers] = front[edges[workers].argmax(axis=1)]
        reached[workers] = True
        found = workers[open_workers[workers]]
        if found.size:
            return reached, seen, int(found[0]), to_worker, to_part
        edges = carries[workers] & ~seen
        front = np.flatnonzero(edges.any(axis=0))
        to_part[front] = workers[edges[:, front].argmax(axis=0)] if workers.size else -1
        seen[front] = True
    return reached, seen, -1, to_worker, to_part
