"""What every scheme is told, and what it has in common with the others: equal bits, and a plan around a code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
from numpy.typing import ArrayLike

from torch_qgc.errors import PlanError
from torch_qgc.planner import Plan, quantization_variance
from torch_qgc.planner.checks import Floats, Ints, probabilities
from torch_qgc.planner.options import resolve_budget
from torch_qgc.planner.shares import Weights
from torch_qgc.planner.variance import MOST_BITS, PASS_THROUGH_BITS, Bound, Norm

__all__ = ["Options", "Setting", "to_sum_n"]


class Options(TypedDict, total=False):
    """Keywords that every scheme takes; see `Setting`."""

    bits_per_coordinate: float
    bit_budget: int
    num_partitions: int
    norm: Norm
    variance: Bound | ArrayLike
    seed: int


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The job that a scheme is made for.

    Args:
        straggle_probs: [K] in [0, 1].
        bits_per_coordinate: mean over workers, default 4; 32: unquantized. Or
        bit_budget: bits per coordinate summed over workers.
        num_partitions: N, default K.
        norm, variance: as in `make_plan`; a table is [K, max_bits + 1].
        seed: of random codes.
    """

    straggle_probs: ArrayLike
    bits_per_coordinate: float | None = None
    bit_budget: int | None = None
    num_partitions: int | None = None
    norm: Norm = "max"
    variance: Bound | ArrayLike = "typical"
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "straggle_probs", probabilities(self.straggle_probs))
        if self.partitions < 1:
            raise PlanError(f"num_partitions: expected at least 1, got {self.num_partitions}")

    @property
    def late(self) -> Floats:
        """[K] straggle probabilities."""
        return np.asarray(self.straggle_probs)

    @property
    def workers(self) -> int:
        """K."""
        return len(self.late)

    @property
    def partitions(self) -> int:
        """N."""
        return self.workers if self.num_partitions is None else int(self.num_partitions)

    def random(self) -> np.random.Generator:
        """Return the generator that the scheme draws its code from."""
        return np.random.default_rng(self.seed)

    def equal_bits(self, parts: int = 1) -> tuple[Ints, int]:
        """Return equal bits [K], one more for the most reliable while the budget lasts, and the budget.

        Args:
            parts: payloads have 1/parts of the gradient's coordinates and may spend as many times the bits on each.
        """
        budget, quantized = resolve_budget(self.workers, self.bits_per_coordinate, self.bit_budget)
        if not quantized:
            return np.full(self.workers, PASS_THROUGH_BITS, dtype=np.int64), budget
        each, extra = divmod(budget * parts, self.workers)
        if each < 2:
            raise PlanError(
                f"expected a budget of at least 2 bits for each of {self.workers} workers, got {budget}: this scheme "
                "gives everybody the same; raise bits_per_coordinate, or use qgc(allow_drop=True)"
            )
        bits = np.full(self.workers, each, dtype=np.int64)
        bits[np.argsort(self.late, kind="stable")[:extra]] += 1
        return np.minimum(bits, MOST_BITS), budget

    def noise(self, bits: Ints) -> Floats:
        """Return the relative variance [K] of the quantizer at these bits."""
        if isinstance(self.variance, str):
            bound: Bound = self.variance  # type: ignore[assignment]  # any other name is refused there
            return quantization_variance(bits, norm=self.norm, bound=bound)
        table = np.asarray(self.variance, dtype=np.float64)
        if table.ndim != 2 or len(table) != self.workers or table.shape[1] <= int(bits.max()):
            raise PlanError(
                f"variance: expected a name or a table of shape [{self.workers}, at least {int(bits.max()) + 1}], "
                f"got shape {table.shape}"
            )
        return np.asarray(table[np.arange(self.workers), bits])

    def plan(
        self,
        weights: Weights,
        decoder: str,
        *,
        bits: Ints | None = None,
        variance: Floats | None = None,
    ) -> Plan:
        """Return the plan of a code: equal bits unless given, shares as the rows of `weights` say.

        Args:
            weights: [K, N], of any sign and balance that the decode rule takes.
        """
        magnitudes: Any = abs(weights)
        equal, budget = self.equal_bits() if bits is None else (bits, int(bits.sum()))
        return Plan(
            straggle_probs=self.late,
            bits=equal,
            shares=np.asarray(magnitudes.sum(axis=1)) / weights.shape[1],
            weights=weights,
            variance=self.noise(equal) if variance is None else variance,
            bit_budget=budget,
            norm=self.norm,
            decoder=decoder,
        )

    def spread(self, code: Floats) -> Floats:
        """Return a code over M groups of partitions as one over N = c M partitions, scaled by `to_sum_n`.

        Raises:
            PlanError: N is not a multiple of M.
        """
        groups = code.shape[1]
        if self.partitions % groups:
            raise PlanError(
                f"num_partitions: expected a multiple of {groups}, the groups of data this code is made of, got "
                f"{self.partitions}"
            )
        return to_sum_n(np.repeat(code, self.partitions // groups, axis=1))


def to_sum_n(weights: Floats) -> Floats:
    """Scale weights so that shares sum to one; rules that solve for coefficients do not depend on it."""
    return np.asarray(weights * (weights.shape[1] / np.abs(weights).sum()))
