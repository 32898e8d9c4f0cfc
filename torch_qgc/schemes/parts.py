"""Codes that cut the gradient into parts: a worker sends one vector of a part's size, which mixes all parts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torch_qgc.errors import PlanError
from torch_qgc.planner import Plan
from torch_qgc.planner.baseline_rules import solve
from torch_qgc.planner.checks import Floats, Ints
from torch_qgc.planner.shares import dense_rows
from torch_qgc.planner.variance import Norm

__all__ = ["PartPlan"]


@dataclass(frozen=True, kw_only=True)
class PartPlan:
    """A plan for each of m equal parts of the gradient, whose mixtures a worker adds up to one payload.

        h_k = sum_u sum_n w_kn^(u) gbar_n^(u) / sum_u sum_n |w_kn^(u)|

    with gbar_n^(u) the u-th part of partition n's mean gradient. A payload has 1/m of the gradient's coordinates and
    may spend m times the bits on each. A part is decoded by the coefficients that yield it and cancel all others; a
    round for which there are none decodes to zero.

    Args:
        plans: m plans of the same workers, partitions, norm and bits, all with decoder "exact".
    """

    plans: tuple[Plan, ...]

    def __post_init__(self) -> None:
        decoders = sorted({plan.decoder for plan in self.plans})
        if decoders != ["exact"]:
            raise PlanError(f"plans: expected one per part, all with decoder 'exact', got {decoders or 'none'}")
        shapes = {(plan.num_workers, plan.num_partitions, plan.norm) for plan in self.plans}
        if len(shapes) > 1 or any(np.any(plan.bits != self.bits) for plan in self.plans):
            raise PlanError(f"plans: expected the same workers, partitions, norm and bits in all parts, got {shapes}")

    @property
    def num_workers(self) -> int:
        """K."""
        return self.plans[0].num_workers

    @property
    def num_partitions(self) -> int:
        """N."""
        return self.plans[0].num_partitions

    @property
    def straggle_probs(self) -> Floats:
        """[K] chance that a worker misses a round."""
        return self.plans[0].straggle_probs

    @property
    def bits(self) -> Ints:
        """[K] bits per coordinate of a payload."""
        return self.plans[0].bits

    @property
    def variance(self) -> Floats:
        """[K] relative variance of a payload."""
        return self.plans[0].variance

    @property
    def norm(self) -> Norm:
        """What the scale of a block is."""
        return self.plans[0].norm

    @property
    def spent_bits(self) -> float:
        """Bits per coordinate of the gradient, summed over workers."""
        return float(self.bits.sum()) / len(self.plans)

    @cached_property
    def weights(self) -> Floats:
        """[K, m N] weights of all parts: columns by part, then partition."""
        return np.concatenate([dense_rows(plan.weights, 0, self.num_workers) for plan in self.plans], axis=1)

    @cached_property
    def shares(self) -> Floats:
        """[K] sum_u sum_n |w_kn^(u)| / (m N)."""
        return np.asarray(np.mean([plan.shares for plan in self.plans], axis=0))

    @cached_property
    def target(self) -> Floats:
        """[m, m N] what every part of the gradient is made of: the partitions' fractions, in its own columns."""
        return np.asarray(np.kron(np.eye(len(self.plans)), self.plans[0].partition_fractions), dtype=np.float64)

    @property
    def load(self) -> float:
        """Mean number of workers that hold a part of a partition's gradient."""
        return float(np.mean([plan.load for plan in self.plans]))

    def coefficients(self, arrived: NDArray[Any]) -> Floats:
        """Return [m, K] coefficients, one row per part; arrived: [K] bool or counts, as `Plan.coefficients` has it."""
        arrived = np.asarray(arrived)
        if arrived.shape != (self.num_workers,):
            raise PlanError(f"arrived: expected shape [{self.num_workers}], got {arrived.shape}")
        return solve(self.weights, self.target, arrived, must_be_exact=True)

    def to_json(self) -> str:
        """Return JSON that `from_json` reads."""
        plans = [json.loads(plan.to_json()) for plan in self.plans]
        return json.dumps({"parts": plans}, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> PartPlan:
        """Return what `to_json` wrote.

        Raises:
            PlanError: anything else.
        """
        try:
            plans = [json.dumps(plan) for plan in json.loads(text)["parts"]]
        except (ValueError, KeyError, TypeError) as error:
            raise PlanError(f"expected JSON written by PartPlan.to_json, got {error!r}") from error
        return cls(plans=tuple(Plan.from_json(plan) for plan in plans))
