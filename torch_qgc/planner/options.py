"""What can be chosen about a plan, and what is chosen if nothing is said: the one place of these defaults."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import ArrayLike

from torch_qgc.errors import PlanError
from torch_qgc.planner.bits import Method
from torch_qgc.planner.checks import Floats, Ints, batch_sizes, per_worker
from torch_qgc.planner.rules import SCALING
from torch_qgc.planner.variance import MOST_BITS, PASS_THROUGH_BITS, Bound, Norm, quantization_variance

__all__ = ["DEFAULT_BITS_PER_COORDINATE", "DEFAULT_NOISE_RATIO", "PlanOptions", "resolve_budget"]

#: Mean bits per coordinate of a plan for which nothing else is said.
DEFAULT_BITS_PER_COORDINATE = 4.0
#: Batch noise over signal that plans reckon with: as much noise as there is gradient.
DEFAULT_NOISE_RATIO = 1.0


@dataclass(frozen=True, kw_only=True, eq=False)
class PlanOptions:
    """Everything about a plan that has a good default: `make_plan`, `QGCState` and `qgc plan` all take these.

    The paper's plan is that of gradients of all the data: noise_ratio=0, second_track=None.

    How noisy a worker is:
        norm: "max" (less noise at the same bits) or "l2" (the paper's scale).
        variance: "typical" (what gradients usually show), "tight" (the worst case), "paper" (its bound), or a
            measured table [K, max_bits + 1] with q of worker k at b bits in column b.
        noise_ratio: scalar or [K], eta >= 0: variance of the gradient of one batch size of samples over the squared
            norm of its mean; more: shares closer to (1 - p_k) B_k, fewer bits for the best. 0: full gradients.
        batches: [K] > 0 with a mean of at least 1, B_k: worker k's batch in units of the batch size, or None: all
            alike. The noise of its gradient is eta / B_k.
        gamma: factor on q, >= 0 (Song & Choi eq. (33)); more: shares and bits follow quantization noise rather than
            straggle probabilities.
    Bits:
        min_bits, max_bits: what a worker may get, in [2, 16]; bits_per_coordinate=32 turns quantization off.
        most_bits: scalar or [K], the most that worker k's link carries (see `bits_within`), or None. Bits that
            nobody may take are not spent. Below 32 it gives a worker at most max_bits where the others send plain fp32.
        allow_drop: may a worker get 0 bits and share 0, if the others use its bits better?
        allocator: see `allocate_bits`.
    Code:
        max_share: scalar or [K], the most data a worker can answer for, or None.
        tolerance: in partitions; more: fewer copies of the data, larger error; see `split_components`.
        placement: [K, N] bool, who holds which partition, or None: anybody may hold any.
        partition_sizes: [N] in any unit, or None: equal.
    Decoding: see `Plan`; second_track "auto" is "hajek" beside a decoder of which it is a multiple, else None.
    """

    norm: Norm = "max"
    variance: Bound | ArrayLike = "typical"
    noise_ratio: ArrayLike = DEFAULT_NOISE_RATIO
    batches: ArrayLike | None = None
    gamma: float = 1.0
    min_bits: int = 2
    max_bits: int = MOST_BITS
    most_bits: ArrayLike | None = None
    allow_drop: bool = False
    allocator: Method = "exact"
    max_share: ArrayLike | None = None
    tolerance: float = 0.0
    placement: ArrayLike | None = None
    partition_sizes: ArrayLike | None = None
    decoder: str = "unbiased"
    burst: float = 1.0
    second_track: str | None = "auto"
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

    def batch_noise(self, num_workers: int) -> Floats:
        """Return eta_k [K] of the batches that workers compute: noise_ratio / batches."""
        eta = per_worker(self.noise_ratio, num_workers, "noise_ratio")
        return eta if self.batches is None else eta / batch_sizes(self.batches, num_workers)

    def chosen_second_track(self) -> str | None:
        """Return `second_track`, with "auto" resolved."""
        automatic = "hajek" if self.decoder in SCALING else None
        return automatic if self.second_track == "auto" else self.second_track

    def caps(self, num_workers: int) -> Ints | None:
        """Return most_bits as [K] int64, checked against min_bits; None: no caps."""
        if self.most_bits is None:
            return None
        caps = per_worker(self.most_bits, num_workers, "most_bits")
        low = np.flatnonzero(caps < self.min_bits)
        if low.size:
            raise PlanError(
                f"most_bits: expected at least {self.min_bits} bits, the least that a worker sends, got "
                f"{caps[low[0]]:g} for worker {low[0]}; give it {self.min_bits}, and a later deadline if its link does "
                "not carry them in time"
            )
        return np.floor(np.minimum(caps, PASS_THROUGH_BITS)).astype(np.int64)

    def variance_table(self, num_workers: int) -> Floats:
        """Return v of worker k at b bits, [K, max_bits + 1]; inf where b is not allowed."""
        columns = np.arange(self.max_bits + 1)
        if isinstance(self.variance, str):
            bound = cast("Bound", self.variance)  # any other name is refused there
            q = np.tile(quantization_variance(columns, norm=self.norm, bound=bound), (num_workers, 1))
        else:
            q = np.array(self.variance, dtype=np.float64)
            if q.shape != (num_workers, self.max_bits + 1):
                raise PlanError(
                    f"variance: expected 'typical', 'tight', 'paper' or a table of shape [K, max_bits + 1] = "
                    f"[{num_workers}, {self.max_bits + 1}], got shape {q.shape}"
                )
            if not np.all(q[:, self.min_bits :] >= 0):
                raise PlanError(
                    "variance: expected a table of values >= 0 from column min_bits on, got a negative one or NaN"
                )
        eta = self.batch_noise(num_workers)[:, None]
        q[:, : self.min_bits] = np.inf
        with np.errstate(invalid="ignore"):
            v = np.where(np.isinf(q), np.inf, self.gamma * q * (1.0 + eta) + eta)
        return np.asarray(v)


def resolve_budget(num_workers: int, bits_per_coordinate: float | None, bit_budget: int | None) -> tuple[int, bool]:
    """Return the bits per coordinate over all workers, and whether gradients are quantized at all."""
    if bit_budget is not None:
        if bits_per_coordinate is not None:
            raise PlanError("expected bits_per_coordinate or bit_budget, got both; give one")
        return int(bit_budget), True
    mean = DEFAULT_BITS_PER_COORDINATE if bits_per_coordinate is None else float(bits_per_coordinate)
    if not 0.0 < mean <= PASS_THROUGH_BITS:
        raise PlanError(f"bits_per_coordinate: expected a number in (0, {PASS_THROUGH_BITS}], got {mean}")
    return math.floor(num_workers * mean + 1e-9), mean < PASS_THROUGH_BITS
