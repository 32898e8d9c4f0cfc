"""From straggle probabilities and a bit budget to a plan."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from torch_qgc.errors import PlanError
from torch_qgc.planner.bits import Method, allocate_bits
from torch_qgc.planner.checks import Floats, Ints, Mask, probabilities
from torch_qgc.planner.options import PlanOptions, resolve_budget
from torch_qgc.planner.placement import placed_weights
from torch_qgc.planner.plan import Plan
from torch_qgc.planner.shares import (
    Weights,
    error_factors,
    optimal_shares,
    segment_weights,
    split_components,
)
from torch_qgc.planner.variance import PASS_THROUGH_BITS

__all__ = ["make_plan"]

#: (utility [K, max_bits + 1], which allocator) -> bits [K] within the budget and the caps.
Allot: TypeAlias = Callable[[Floats, Method], Ints]


def make_plan(
    straggle_probs: ArrayLike,
    *,
    bits_per_coordinate: float | None = None,
    bit_budget: int | None = None,
    num_partitions: int | None = None,
    options: PlanOptions | None = None,
    **overrides: Any,
) -> Plan:
    """Choose bits, shares and weights with the least error under the budget.

        minimise sum_k delta_k m_k^2,   delta_k = (p_k + v_k(b_k)) / (1 - p_k)
        v_k = gamma q_k (1 + eta_k) + eta_k,   eta_k = noise_ratio / batches_k

    over bits b, shares m and weights, such that decoding is unbiased. Without max_share and placement this is
    the global optimum: bits maximise sum_k 1/delta_k(b_k), then shares follow (Song & Choi Theorem 1 and
    Proposition 1; eta is our extension for mini-batches, docs/planner.md). With them bits and shares are
    optimised in turn, each exactly, from two starts: a local optimum.

    Args:
        straggle_probs: [K], p_k in [0, 1], chance that worker k misses a round; in a job that folds late payloads one
            minus its contributions per round. At p_k = 1 it gets no data.
        bits_per_coordinate: mean over workers; the budget is floor(K * it). 32: gradients are sent
            unquantized. Default 4 if no budget is given.
        bit_budget: or the budget itself, in bits per coordinate summed over workers.
        num_partitions: N; default K, or what `placement` or `partition_sizes` say. More: smaller load.
        options: what has a default; each may also be given as a keyword: make_plan(p, norm="l2").
    Returns:
        A plan that passes `Plan.check_trainable`, unless its second track is no multiple of the first.
    Raises:
        PlanError: nothing can be planned from this; the message names a remedy.
    """
    o = _merge(options, overrides)
    p = probabilities(straggle_probs)
    n = _count_partitions(len(p), num_partitions, o)
    budget, quantized = resolve_budget(len(p), bits_per_coordinate, bit_budget)
    variance, caps = o.variance_table(len(p)), o.caps(len(p))
    if quantized:
        bits, shares, weights = _bits_and_code(
            p, variance, lambda utility, method: allocate_bits(utility, budget, method, most_bits=caps), n, o
        )
        chosen = variance[np.arange(len(p)), bits]
    else:
        bits, chosen = _plain(variance, caps, o)
        shares, weights = _code(p, chosen, n, o)
    return Plan(
        straggle_probs=p,
        bits=bits,
        shares=shares,
        weights=weights,
        variance=chosen,
        batches=np.empty(0) if o.batches is None else np.asarray(o.batches, dtype=np.float64),
        bit_budget=budget,
        partition_sizes=None if o.partition_sizes is None else np.asarray(o.partition_sizes, dtype=np.float64),
        norm=o.norm,
        decoder=o.decoder,
        burst=o.burst,
        second_track=o.chosen_second_track(),
        second_track_alpha=o.second_track_alpha,
        gradient_correlation=o.gradient_correlation,
    )


# ------------------------------------------------------------------------------------ reading arguments
def _merge(options: PlanOptions | None, overrides: dict[str, Any]) -> PlanOptions:
    known = {field.name for field in dataclasses.fields(PlanOptions)}
    for name in overrides:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise PlanError(f"make_plan: expected an option out of {', '.join(sorted(known))}, got {name!r}{hint}")
    return dataclasses.replace(options or PlanOptions(), **overrides)


def _count_partitions(num_workers: int, num_partitions: int | None, o: PlanOptions) -> int:
    counts = {
        "num_partitions": num_partitions,
        "placement": None if o.placement is None else np.shape(np.asarray(o.placement))[-1],
        "partition_sizes": None if o.partition_sizes is None else np.size(np.asarray(o.partition_sizes)),
    }
    given = {name: int(count) for name, count in counts.items() if count is not None}
    if len(set(given.values())) > 1:
        raise PlanError(f"expected one number of partitions, got {given}")
    count = next(iter(given.values()), num_workers)
    if count < 1:
        raise PlanError(f"num_partitions: expected at least 1, got {count}")
    return count


# --------------------------------------------------------------------------------------- optimisation
def _code(p: Floats, variance: Floats, n: int, o: PlanOptions) -> tuple[Floats, Weights]:
    """Return the best shares [K] and weights [K, N] for given variances."""
    if o.placement is not None:
        weights: Weights = placed_weights(
            p, variance, o.placement, partition_sizes=o.partition_sizes, max_share=o.max_share
        )
    else:
        shares = optimal_shares(p, variance, max_share=o.max_share)
        if o.tolerance:
            for workers, count in split_components(shares, n, tolerance=o.tolerance):
                shares[workers] *= count / n / shares[workers].sum()
        weights = segment_weights(shares, n, partition_sizes=o.partition_sizes)
    # Shares as they were laid out: one below rounding got no data, so it is 0.
    return np.asarray(weights.sum(axis=1)) / n, weights


def _plain(variance: Floats, caps: Ints | None, o: PlanOptions) -> tuple[Ints, Floats]:
    """Return bits and variance [K] without quantization, except where a link does not carry that."""
    bits = np.full(len(variance), PASS_THROUGH_BITS, dtype=np.int64)
    chosen = o.batch_noise(len(variance))
    if caps is not None:
        narrow = np.flatnonzero(caps < PASS_THROUGH_BITS)
        bits[narrow] = np.minimum(caps[narrow], o.max_bits)
        chosen[narrow] = variance[narrow, bits[narrow]]
    return bits, chosen


def _bits_and_code(p: Floats, variance: Floats, allot: Allot, n: int, o: PlanOptions) -> tuple[Ints, Floats, Weights]:
    """Return the best bits [K], shares [K] and weights [K, N] under a budget."""
    delta = error_factors(p[:, None], variance)
    constrained = o.placement is not None or o.max_share is not None
    # Under constraints nobody is dropped before it is known who can do without whom.
    utility = _open_zero(1.0 / delta, (p >= 1.0) | (o.allow_drop and not constrained))
    bits = allot(utility, o.allocator)
    if not constrained:
        return bits, *_code(p, variance[np.arange(len(p)), bits], n, o)
    solutions = [_alternate(start, p, variance, allot, n, o) for start in (bits, allot(utility, "equal"))]
    return min(solutions, key=lambda solution: solution[0])[1]


def _open_zero(utility: Floats, may_drop: Mask) -> Floats:
    """Forbid the bits at which nothing can be sent, except 0 bits for those who may be dropped."""
    table = np.where(utility > 0, utility, -np.inf)
    table[may_drop, 0] = 0.0
    return table


def _alternate(
    bits: Ints, p: Floats, variance: Floats, allot: Allot, n: int, o: PlanOptions
) -> tuple[float, tuple[Ints, Floats, Weights]]:
    """Optimise the code for the bits and the bits for the code in turn, while the error falls."""
    rows = np.arange(len(p))
    delta = error_factors(p[:, None], variance)
    best_error, best = np.inf, None
    while True:
        shares, weights = _code(p, variance[rows, bits], n, o)
        used = shares > 0
        error = float(np.sum(delta[rows, bits][used] * shares[used] ** 2))
        if best is not None and error >= best_error * (1.0 - 1e-12):
            return best_error, best
        best_error, best = error, (bits, shares, weights)
        with np.errstate(invalid="ignore"):
            table = np.where(np.isfinite(delta), -delta * shares[:, None] ** 2, -np.inf)
        table[(p >= 1.0) | (o.allow_drop & ~used), 0] = 0.0
        bits = allot(table, o.allocator)
