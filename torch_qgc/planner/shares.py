"""The code: how much data each worker answers for, and which."""

from __future__ import annotations

from typing import Any, TypeAlias, cast

import numpy as np
from numpy.typing import ArrayLike
from scipy import sparse

from torch_qgc.errors import PlanError
from torch_qgc.planner.checks import Floats, Ints, per_worker, probabilities

__all__ = [
    "Weights",
    "dense_if_small",
    "dense_rows",
    "diagonal_weights",
    "error_factors",
    "frozen_weights",
    "is_diagonal",
    "load",
    "optimal_shares",
    "partition_fractions",
    "segment_weights",
    "split_components",
    "stored_entries",
    "water_fill",
]

Weights: TypeAlias = "Floats | sparse.csr_array[Any, tuple[int, int]]"

#: Least p + v that is counted with: a worker that is never late and sends without noise would have infinite utility.
LEAST_PROBABILITY = 1e-9

# Up to this many entries weights are a plain array, above it a scipy.sparse.csr_array.
_DENSE_ENTRIES = 1 << 22


def error_factors(straggle_probs: Floats, variance: Floats) -> Floats:
    """Return delta = (p + v) / (1 - p): worker k adds delta_k m_k^2 to the error (Song & Choi eq. (13)).

    Args:
        straggle_probs: [K] or [K, 1], p in [0, 1].
        variance: [K] or [K, m+1], relative variance v of what is sent, inf allowed.
    Returns:
        delta, broadcast; inf where p = 1 or v = inf.
    """
    p = straggle_probs
    with np.errstate(divide="ignore"):
        return np.where(p < 1.0, np.maximum(p + variance, LEAST_PROBABILITY) / (1.0 - p), np.inf)


def optimal_shares(straggle_probs: ArrayLike, variance: ArrayLike, *, max_share: ArrayLike | None = None) -> Floats:
    """Return the shares with the least error under unbiased decoding.

        minimise sum_k delta_k m_k^2,   sum_k m_k = 1,   0 <= m_k <= max_share_k
        with delta_k = (p_k + v_k) / (1 - p_k)

    Without caps m_k = U_k / S with U = 1/delta and S = sum_k U_k, and the error is 1/S: Song & Choi Theorem
    1, eq. (20)-(21), whose l_k is N m_k. With caps m_k = min(max_share_k, tau U_k).

    Args:
        straggle_probs: [K], p_k in [0, 1]; a worker with p = 1 gets share 0.
        variance: scalar or [K], v_k >= 0; inf for a worker that sends nothing.
        max_share: scalar or [K], the largest share a worker can take, or None.
    Returns:
        [K] float64, sum 1.
    Raises:
        PlanError: bad probabilities or variances, no worker that can contribute, caps with sum below 1.
    """
    p = probabilities(straggle_probs)
    v = per_worker(variance, len(p), "variance")
    utility = 1.0 / error_factors(p, v)
    if not utility.any():
        raise PlanError(
            f"expected at least one worker with straggle probability below 1 and finite variance, got none "
            f"of {len(p)}: every worker is certain to be late or sends nothing; extend the deadline"
        )
    caps = None if max_share is None else per_worker(max_share, len(p), "max_share")
    return water_fill(utility, 1.0, caps)


def water_fill(utility: Floats, total: float, caps: Floats | None = None) -> Floats:
    """Return m = min(caps, tau * utility) with sum(m) = total.

    Args:
        utility: [K] >= 0, not all zero.
        total: what is to be shared out, > 0.
        caps: [K] >= 0 or None.
    Raises:
        PlanError: the caps of the workers with positive utility sum to less than `total`.
    """
    if caps is None:
        return np.asarray(utility * (total / utility.sum()))
    usable = np.where(utility > 0, caps, 0.0)
    room = float(usable.sum())
    if room < total * (1.0 - 1e-12):
        raise PlanError(
            f"max_share: expected caps that leave room for {total:.6g} of the data, got {room:.6g} over the "
            f"{np.count_nonzero(utility)} workers that can contribute; raise max_share"
        )
    # Workers reach their caps in the order of caps / utility; find how many have at the common level tau.
    order = np.flatnonzero(utility > 0)
    order = order[np.argsort(caps[order] / utility[order], kind="stable")]
    capped = np.r_[0.0, np.cumsum(caps[order])[:-1]]
    free = np.cumsum(utility[order][::-1])[::-1]
    tau = (total - capped) / free
    below_cap = np.flatnonzero(tau * utility[order] <= caps[order])  # none if the caps just suffice
    shares = np.minimum(usable, tau[below_cap[0] if below_cap.size else -1] * utility)
    return np.asarray(shares * (total / shares.sum()))


def partition_fractions(num_partitions: int, partition_sizes: ArrayLike | None = None) -> Floats:
    """Return [N] float64 fractions of the data, sum 1: equal ones, or `partition_sizes` normalised.

    Raises:
        PlanError: fewer than one partition, wrong shape, or a size that is not positive and finite.
    """
    if num_partitions < 1:
        raise PlanError(f"num_partitions: expected at least 1, got {num_partitions}")
    if partition_sizes is None:
        return np.full(num_partitions, 1.0 / num_partitions)
    sizes = np.asarray(partition_sizes, dtype=np.float64)
    if sizes.shape != (num_partitions,):
        raise PlanError(f"partition_sizes: expected shape [{num_partitions}], got {sizes.shape}")
    if not np.all((sizes > 0) & np.isfinite(sizes)):
        raise PlanError(f"partition_sizes: expected positive sizes, got {sizes[~(sizes > 0)][:1]}; drop empty ones")
    return np.asarray(sizes / sizes.sum())


def segment_weights(shares: ArrayLike, num_partitions: int, *, partition_sizes: ArrayLike | None = None) -> Weights:
    """Lay the workers' shares side by side along the data and cut at the partitions' borders.

        a_kn = length of [m_1 + .. + m_{k-1}, m_1 + .. + m_k) inside partition n;   the result is N a_kn

    Song & Choi eq. (22). At most N + K - 1 entries are not zero, so the load is below 2 when K <= N.

    Args:
        shares: [K], >= 0, sum 1.
        num_partitions: N >= 1.
        partition_sizes: [N] sizes in any unit, or None for equal ones.
    Returns:
        [K, N] float64: rows sum to N m_k, columns to N s_n with s_n the fraction of the data in partition n
        (to 1 if sizes are equal). A scipy.sparse.csr_array if K N > 4 Mi, else an array.
    Raises:
        PlanError: shares negative or not summing to 1; see also `partition_fractions`.
    """
    m = np.asarray(shares, dtype=np.float64)
    if m.ndim != 1 or not np.all(m >= 0) or abs(m.sum() - 1.0) > 1e-9:
        raise PlanError(f"shares: expected [K] values >= 0 with sum 1, got shape {m.shape} with sum {m.sum()!r}")
    fractions = partition_fractions(num_partitions, partition_sizes)
    rows, columns, lengths = _overlaps(m, fractions)
    entries = sparse.csr_array((lengths * num_partitions, (rows, columns)), shape=(len(m), num_partitions))
    return dense_if_small(entries)


def diagonal_weights(shares: Floats) -> Weights:
    """Return the weights of workers that answer for one partition each, of these shares of the data."""
    return dense_if_small(sparse.csr_array(sparse.diags_array(len(shares) * shares)))


def dense_if_small(entries: sparse.csr_array[Any, Any]) -> Weights:
    """Return weights as an array if they are small enough to be one."""
    rows, columns = entries.shape
    return entries.toarray() if rows * columns <= _DENSE_ENTRIES else entries


def frozen_weights(weights: Weights, num_workers: int) -> Weights:
    """Return a read-only copy of weights [K, N], checked for shape."""
    copy: Any = weights.astype(np.float64) if sparse.issparse(weights) else np.array(weights, dtype=np.float64)
    if sparse.issparse(weights):
        copy = copy.tocsr(copy=True)
        copy.sum_duplicates()
        copy.eliminate_zeros()
    if copy.ndim != 2 or copy.shape[0] != num_workers or copy.shape[1] == 0:
        raise PlanError(f"weights: expected shape [{num_workers}, N] (workers, partitions), got {copy.shape}")
    stored_entries(copy).setflags(write=False)
    return cast("Weights", copy)


def stored_entries(weights: Weights) -> Floats:
    """Return the stored entries: all of an array, the non-zero ones of a sparse one."""
    return weights if isinstance(weights, np.ndarray) else np.asarray(weights.data)


def is_diagonal(weights: Weights) -> bool:
    """Tell whether every worker answers for one partition, which is nobody else's."""
    rows, columns = weights.nonzero()
    return weights.shape[0] == weights.shape[1] == len(rows) and bool(np.all(rows == columns))


def dense_rows(weights: Weights, start: int, stop: int) -> Floats:
    """Return rows [start, stop) as an array."""
    rows = weights[start:stop]
    return np.asarray(rows if isinstance(rows, np.ndarray) else rows.toarray())


def _overlaps(shares: Floats, fractions: Floats) -> tuple[Ints, Ints, Floats]:
    """Return (worker, partition, length) of every piece between two neighbouring borders."""
    ends, borders = np.cumsum(shares), np.cumsum(fractions)
    ends *= 1.0 / ends[-1]
    borders *= 1.0 / borders[-1]
    # A worker's border within rounding of a partition's is moved there, so that nobody gets a sliver of a partition.
    near = np.minimum(np.searchsorted(borders, ends - 1e-13), len(borders) - 1)
    ends = np.where(np.abs(borders[near] - ends) <= 1e-13, borders[near], ends)
    cuts = np.unique(np.concatenate([[0.0], ends, borders]))
    lengths = np.diff(cuts)
    middles = cuts[:-1] + lengths / 2.0
    rows = np.searchsorted(ends, middles).astype(np.int64)
    columns = np.searchsorted(borders, middles).astype(np.int64)
    return rows, columns, lengths


def load(weights: Weights) -> float:
    """Return the mean number of workers that hold a partition: non-zero entries / N (Song & Choi II-A)."""
    return float(np.count_nonzero(stored_entries(weights))) / float(weights.shape[1])


def split_components(utility: ArrayLike, num_partitions: int, *, tolerance: float = 0.0) -> list[tuple[Ints, int]]:
    """Split workers, in their order, into groups that answer for whole numbers of partitions, each group for its own.

    With shares proportional to utility, side by side along the data, a border between two workers that lies within
    `tolerance` of one between partitions is moved there. A group R with c partitions needs |R| + c - 1 entries, so
    with g groups the load is (K + N - g) / N: Song & Choi eq. (34). Inside groups shares stay optimal, and the error
    becomes sum_i (c_i / N)^2 / sum_{k in R_i} U_k instead of 1 / sum_k U_k. With tolerance 0 and probabilities as they
    come there is one group.

    Args:
        utility: [K] >= 0 with positive sum; U_k, or anything proportional (row sums, shares).
        num_partitions: N >= 1.
        tolerance: in partitions, >= 0; more: smaller load, larger error.
    Returns:
        (workers, partitions) of every group: [|R_i|] int64 worker indices, and how many partitions they
        share. Workers of utility 0 are in no group.
    Raises:
        PlanError: utility negative, not finite or all zero, or tolerance negative.
    """
    u = np.asarray(utility, dtype=np.float64)
    if u.ndim != 1 or not np.all((u >= 0) & (u < np.inf)) or not u.sum() > 0:
        raise PlanError(f"utility: expected [K] finite values >= 0, not all zero, got {u!r}")
    if not tolerance >= 0:
        raise PlanError(f"tolerance: expected a number of partitions >= 0, got {tolerance}")
    workers = np.flatnonzero(u > 0).astype(np.int64)
    borders = np.cumsum(u[workers])[:-1] * (num_partitions / u.sum())
    whole = np.round(borders).astype(np.int64)
    off = np.abs(borders - whole)
    near = np.flatnonzero((off <= max(tolerance, 1e-9)) & (whole >= 1) & (whole < num_partitions))
    near = near[np.argsort(off[near], kind="stable")]
    counts, first = np.unique(whole[near], return_index=True)  # of several workers near a border the nearest
    groups = np.split(workers, near[first] + 1)
    return list(zip(groups, np.diff(counts, prepend=0, append=num_partitions).tolist()))
