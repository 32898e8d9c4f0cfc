"""From straggle probabilities and a bit budget to a plan."""

from __future__ import annotations

import dataclasses
import difflib
import math
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike

from torch_qgc.errors import PlanError
from torch_qgc.planner.bits import Method, allocate_bits
from torch_qgc.planner.checks import Floats, Ints, Mask, per_worker, probabilities
from torch_qgc.planner.placement import placed_weights
from torch_qgc.planner.plan import Plan
from torch_qgc.planner.shares import (
    Weights,
    error_factors,
    optimal_shares,
    segment_weights,
    split_components,
)
from torch_qgc.planner.variance import MOST_BITS, PASS_THROUGH_BITS, Bound, Norm, quantization_variance

__all__ = ["PlanOptions", "make_plan", "resolve_budget"]

_DEFAULT_BITS_PER_COORDINATE = 4.0


@dataclass(frozen=True, kw_only=True, eq=False)
class PlanOptions:
    """Everything about a plan that has a good default.

    How noisy a worker is:
        norm: "max" (less noise at the same bits) or "l2" (the paper's scale).
        variance: "typical" (what gradients usually show), "tight" (the worst case), "paper" (its bound), or a
            measured table [K, max_bits + 1] with q of worker k at b bits in column b.
        noise_ratio: scalar or [K], eta >= 0: variance of a worker's batch gradient over the squared norm of
            its mean; more: shares closer to (1 - p_k), fewer bits for the best.
        gamma: factor on q, >= 0 (Song & Choi eq. (33)); more: shares and bits follow quantization noise rather than
            straggle probabilities.
    Bits:
        min_bits, max_bits: what a worker may get, in [2, 16]; bits_per_coordinate=32 turns quantization off.
        allow_drop: may a worker get 0 bits and share 0, if the others use its bits better?
        allocator: see `allocate_bits`.
    Code:
        max_share: scalar or [K], the most data a worker can answer for, or None.
        tolerance: in partitions; more: fewer copies of the data, larger error; see `split_components`.
        placement: [K, N] bool, who holds which partition, or None: anybody may hold any.
        partition_sizes: [N] in any unit, or None: equal.
    Decoding: see `Plan`.
    """

    norm: Norm = "max"
    variance: Bound | ArrayLike = "typical"
    noise_ratio: ArrayLike = 0.0
    gamma: float = 1.0
    min_bits: int = 2
    max_bits: int = MOST_BITS
    allow_drop: bool = False
    allocator: Method = "exact"
    max_share: ArrayLike | None = None
    tolerance: float = 0.0
    placement: ArrayLike | None = None
    partition_sizes: ArrayLike | None = None
    decoder: str = "unbiased"
    burst: float = 1.0
    second_track: str | None = None
    second_track_alpha: float = 1.0
    gradient_correlation: float = 0.5

    def __post_init__(self) -> None:
        if not 2 <= self.min_bits <= self.max_bits <= MOST_BITS:
            raise PlanError(
                f"min_bits, max_bits: expected 2 <= min_bits <= max_bits <= {MOST_BITS}, got {self.min_bits} and "
                f"{self.max_bits}: one bit is the sign, so a magnitude needs at least two, and the codec has no more "
                f"than {MOST_BITS}; to send plain fp32 give bits_per_coordinate={PASS_THROUGH_BITS}"
            )
        if not (isinstance(self.gamma, (int, float)) and 0 <= self.gamma < math.inf):
            raise PlanError(f"gamma: expected a finite number >= 0, got {self.gamma!r}")
        fixed = [name for name in ("placement", "max_share", "partition_sizes") if getattr(self, name) is not None]
        if self.tolerance and fixed:
            raise PlanError(
                f"tolerance: expected 0 with {', '.join(fixed)}, got {self.tolerance}: it moves borders "
                "between equal partitions to where shares would like them; drop one of them"
            )


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

        minimise sum_k delta_k m_k^2,   delta_k = (p_k + v_k(b_k)) / (1 - p_k),   v = gamma q (1 + eta) + eta

    over bits b, shares m and weights, such that decoding is unbiased. Without max_share and placement this is
    the global optimum: bits maximise sum_k 1/delta_k(b_k), then shares follow (Song & Choi Theorem 1 and
    Proposition 1; eta is our extension for mini-batches, docs/planner.md). With them bits and shares are
    optimised in turn, each exactly, from two starts: a local optimum.

    Args:
        straggle_probs: [K], p_k in [0, 1], chance that worker k misses a round. At p_k = 1 it gets no data.
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
    variance = _variance_table(len(p), o)
    if quantized:
        bits, shares, weights = _bits_and_code(p, variance, budget, n, o)
        chosen = variance[np.arange(len(p)), bits]
    else:
        bits = np.full(len(p), PASS_THROUGH_BITS, dtype=np.int64)
        chosen = per_worker(o.noise_ratio, len(p), "noise_ratio")
        shares, weights = _code(p, chosen, n, o)
    return Plan(
        straggle_probs=p,
        bits=bits,
        shares=shares,
        weights=weights,
        variance=chosen,
        bit_budget=budget,
        partition_sizes=None if o.partition_sizes is None else np.asarray(o.partition_sizes, dtype=np.float64),
        norm=o.norm,
        decoder=o.decoder,
        burst=o.burst,
        second_track=o.second_track,
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


def resolve_budget(num_workers: int, bits_per_coordinate: float | None, bit_budget: int | None) -> tuple[int, bool]:
    """Return the bits per coordinate over all workers, and whether gradients are quantized at all."""
    if bit_budget is not None:
        if bits_per_coordinate is not None:
            raise PlanError("expected bits_per_coordinate or bit_budget, got both; give one")
        return int(bit_budget), True
    mean = _DEFAULT_BITS_PER_COORDINATE if bits_per_coordinate is None else float(bits_per_coordinate)
    if not 0.0 < mean <= PASS_THROUGH_BITS:
        raise PlanError(f"bits_per_coordinate: expected a number in (0, {PASS_THROUGH_BITS}], got {mean}")
    return math.floor(num_workers * mean + 1e-9), mean < PASS_THROUGH_BITS


def _variance_table(num_workers: int, o: PlanOptions) -> Floats:
    """Return v of worker k at b bits, [K, max_bits + 1]; inf where b is not allowed."""
    columns = np.arange(o.max_bits + 1)
    if isinstance(o.variance, str):
        bound = cast("Bound", o.variance)  # any other name is refused there
        q = np.tile(quantization_variance(columns, norm=o.norm, bound=bound), (num_workers, 1))
    else:
        q = np.array(o.variance, dtype=np.float64)
        if q.shape != (num_workers, o.max_bits + 1):
            raise PlanError(
                f"variance: expected 'typical', 'tight', 'paper' or a table of shape [K, max_bits + 1] = "
                f"[{num_workers}, {o.max_bits + 1}], got shape {q.shape}"
            )
        if not np.all(q[:, o.min_bits :] >= 0):
            raise PlanError(
                "variance: expected a table of values >= 0 from column min_bits on, got a negative one or NaN"
            )
    eta = per_worker(o.noise_ratio, num_workers, "noise_ratio")[:, None]
    q[:, : o.min_bits] = np.inf
    with np.errstate(invalid="ignore"):
        v = np.where(np.isinf(q), np.inf, o.gamma * q * (1.0 + eta) + eta)
    return np.asarray(v)


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


def _bits_and_code(p: Floats, variance: Floats, budget: int, n: int, o: PlanOptions) -> tuple[Ints, Floats, Weights]:
    """Return the best bits [K], shares [K] and weights [K, N] under a budget."""
    delta = error_factors(p[:, None], variance)
    constrained = o.placement is not None or o.max_share is not None
    # Under constraints nobody is dropped before it is known who can do without whom.
    mute = (p >= 1.0) | (o.allow_drop and not constrained)
    bits = allocate_bits(_open_zero(1.0 / delta, mute), budget, o.allocator)
    if not constrained:
        return bits, *_code(p, variance[np.arange(len(p)), bits], n, o)
    fair = allocate_bits(_open_zero(1.0 / delta, mute), budget, "equal")
    solutions = [_alternate(start, p, variance, budget, n, o) for start in (bits, fair)]
    return min(solutions, key=lambda solution: solution[0])[1]


def _open_zero(utility: Floats, may_drop: Mask) -> Floats:
    """Forbid the bits at which nothing can be sent, except 0 bits for those who may be dropped."""
    table = np.where(utility > 0, utility, -np.inf)
    table[may_drop, 0] = 0.0
    return table


def _alternate(
    bits: Ints, p: Floats, variance: Floats, budget: int, n: int, o: PlanOptions
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
        bits = allocate_bits(table, budget, o.allocator)
