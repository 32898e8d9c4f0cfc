"""What a plan holds: the fields that rules, checks and JSON read. `plan.py` says what they mean."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torch_qgc.errors import PlanError
from torch_qgc.planner.checks import Floats, Ints, batch_sizes, per_worker, probabilities
from torch_qgc.planner.shares import Weights, error_factors, frozen_weights, is_diagonal, partition_fractions
from torch_qgc.planner.variance import MOST_BITS, PASS_THROUGH_BITS, Norm, quantization_variance

__all__ = ["PlanFields"]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class PlanFields:
    """The fields of `Plan`, each by itself of the right shape and range; arrays are read-only copies.

    Raises:
        PlanError: a field of the wrong shape, type or range.
    """

    straggle_probs: Floats
    bits: Ints
    shares: Floats
    weights: Weights
    variance: Floats = field(default_factory=lambda: np.empty(0))
    batches: Floats = field(default_factory=lambda: np.empty(0))
    partition_sizes: Floats | None = None
    bit_budget: int | None = None
    norm: Norm = "max"
    decoder: str = "unbiased"
    burst: float = 1.0
    second_track: str | None = None
    second_track_alpha: float = 1.0
    gradient_correlation: float = 0.5

    def __post_init__(self) -> None:
        p = probabilities(self.straggle_probs)
        bits = _integer_bits(self.bits, len(p))
        typical, equal = np.size(self.variance) == 0, np.size(self.batches) == 0
        arrays: dict[str, NDArray[Any]] = {
            "straggle_probs": p,
            "bits": bits,
            "shares": per_worker(self.shares, len(p), "shares"),
            "variance": quantization_variance(bits, norm=self.norm)
            if typical
            else per_worker(self.variance, len(p), "variance"),
            "batches": np.ones(len(p)) if equal else batch_sizes(self.batches, len(p)),
        }
        object.__setattr__(self, "weights", frozen_weights(self.weights, len(p)))
        if self.partition_sizes is not None:
            arrays["partition_sizes"] = np.array(self.partition_sizes, dtype=np.float64)
        for name, values in arrays.items():
            values.setflags(write=False)
            object.__setattr__(self, name, values)

    @property
    def num_workers(self) -> int:
        """K."""
        return len(self.shares)

    @property
    def num_partitions(self) -> int:
        """N."""
        return int(self.weights.shape[1])

    @cached_property
    def partition_fractions(self) -> Floats:
        """[N] fractions s_n of the data, sum 1."""
        return partition_fractions(self.num_partitions, self.partition_sizes)

    @cached_property
    def one_part_each(self) -> bool:
        """Every worker answers for one partition, which is nobody else's: no code."""
        return is_diagonal(self.weights)

    @property
    def spent_bits(self) -> float:
        """Bits per coordinate of the gradient, summed over workers."""
        return float(self.bits.sum())

    @cached_property
    def residual_bound(self) -> float:
        """Bound on E||ghat - g||^2 with unbiased decoding, in units of the largest ||gbar_n||^2.

        sum_k delta_k m_k^2, delta_k = (p_k + v_k) / (1 - p_k): Song & Choi Lemma 1, and 1/S at their optimum.
        It is attained when all partitions have the same gradient.
        """
        used = self.shares > 0
        factors = error_factors(self.straggle_probs[used], self.variance[used])
        return float(np.sum(factors * self.shares[used] ** 2))


def _integer_bits(bits: Any, num_workers: int) -> Ints:
    """Return a copy of `bits` as [K] int64 that the codec takes, or 0."""
    values = np.array(bits)
    if values.shape != (num_workers,) or not np.issubdtype(values.dtype, np.integer):
        raise PlanError(f"bits: expected [{num_workers}] integers, got shape {values.shape} of {values.dtype}")
    bad = np.flatnonzero(((values < 0) | (values > MOST_BITS)) & (values != PASS_THROUGH_BITS))
    if bad.size:
        raise PlanError(
            f"bits: expected 0 .. {MOST_BITS}, or {PASS_THROUGH_BITS} for plain fp32, got {values[bad[0]]} for worker "
            f"{bad[0]}: the codec has no others"
        )
    return values.astype(np.int64)
