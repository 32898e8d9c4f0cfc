"""Block coordinate gradient codes: every slice of the gradient has a code of its own."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from torch_qgc.errors import PlanError
from torch_qgc.planner import Plan
from torch_qgc.planner.checks import Floats, Ints
from torch_qgc.planner.delays import DelayModel, ShiftedExponential
from torch_qgc.schemes.exact import cyclic_mds, fractional_repetition
from torch_qgc.schemes.setting import Options, Setting

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["BlockPlan", "block_coordinate"]

_DRAWS = 20_000  # of the workers' delays, for the means of their order statistics


@dataclass(frozen=True, kw_only=True)
class BlockPlan:
    """Plans for consecutive slices of the gradient, which one payload carries.

    Args:
        fractions: [M] > 0, sum 1: of the coordinates in each slice.
        plans: M plans of the same workers, partitions and bits; their straggle probabilities are those of the slice.
    """

    fractions: tuple[float, ...]
    plans: tuple[Plan, ...]

    def __post_init__(self) -> None:
        if len(self.fractions) != len(self.plans) or not self.plans:
            raise PlanError(f"expected one plan per slice, got {len(self.plans)} for {len(self.fractions)} slices")
        if min(self.fractions) <= 0 or abs(sum(self.fractions) - 1.0) > 1e-9:
            raise PlanError(f"fractions: expected positive numbers with sum 1, got {self.fractions}")
        shapes = {(plan.num_workers, plan.num_partitions) for plan in self.plans}
        if len(shapes) > 1 or any(np.any(plan.bits != self.bits) for plan in self.plans):
            raise PlanError(f"plans: expected the same workers, partitions and bits in all slices, got {shapes}")

    @property
    def bits(self) -> Ints:
        """[K] bits per coordinate."""
        return self.plans[0].bits

    @property
    def num_workers(self) -> int:
        """K."""
        return self.plans[0].num_workers

    @property
    def num_partitions(self) -> int:
        """N."""
        return self.plans[0].num_partitions

    @property
    def load(self) -> float:
        """Mean number of workers that compute a coordinate of a partition's gradient."""
        return float(np.dot(self.fractions, [plan.load for plan in self.plans]))

    @property
    def spent_bits(self) -> float:
        """Bits per coordinate of the gradient, summed over workers."""
        return float(self.bits.sum())

    def coefficients(self, arrived: NDArray[Any]) -> Floats:
        """Return [M, K] coefficients; arrived: [K], or [M, K] if workers came through with some slices only."""
        arrived = np.broadcast_to(np.asarray(arrived), (len(self.plans), self.num_workers))
        return np.stack([plan.coefficients(row) for plan, row in zip(self.plans, arrived)])

    def to_json(self) -> str:
        """Return JSON that `from_json` reads."""
        plans = [json.loads(plan.to_json()) for plan in self.plans]
        return json.dumps({"fractions": self.fractions, "plans": plans}, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> BlockPlan:
        """Return what `to_json` wrote.

        Raises:
            PlanError: anything else.
        """
        try:
            values = json.loads(text)
            fractions, plans = tuple(values["fractions"]), [json.dumps(plan) for plan in values["plans"]]
        except (ValueError, KeyError, TypeError) as error:
            raise PlanError(f"expected JSON written by BlockPlan.to_json, got {error!r}") from error
        return cls(fractions=fractions, plans=tuple(Plan.from_json(plan) for plan in plans))


def block_coordinate(
    straggle_probs: ArrayLike | None = None,
    *,
    delays: DelayModel | None = None,
    deadline_s: float = 2.0,
    **options: Unpack[Options],
) -> BlockPlan:
    """Code slice n of the gradient against n stragglers, n = 0 .. K-1; workers finish slice after slice.

        t_(K-n) sum_{i <= n} (i+1) x_i  equal for all n with x_n > 0,   t_(j) = E of the j-th fastest worker's delay

    A slice against n stragglers costs a worker n + 1 partitions' gradients of its x_n coordinates, so slice n is in
    after T_k sum_{i <= n} (i+1) x_i. Only such n occur for which a well conditioned real code is known: K - n odd
    (`cyclic_mds`), or n + 1 a divisor of K (`fractional_repetition`). The x above minimises the time when delays are
    at their means. Q. Wang, Y. Cui, C. Li, J. Zou and H. Xiong, "Optimization-based block coordinate gradient coding",
    GLOBECOM 2021.

    Args:
        straggle_probs: [K] in (0, 1), chance that a worker is late with one partition's full gradient: its delays are
            then 1 s plus an exponential, so that this holds at `deadline_s` (Song & Choi eq. (37)). Or
        delays: T_k, the seconds for one partition's full gradient.
        deadline_s: when the round closes; with `straggle_probs` it must be above 1.
        options: see `Setting`.
    """
    late = _late(straggle_probs, delays, deadline_s)
    model = ShiftedExponential(mu=-np.log(late) / (deadline_s - 1.0)) if delays is None else delays
    setting = Setting(straggle_probs=late, **options)
    k = setting.workers
    ordered = np.sort(model.sample(np.random.default_rng(setting.seed), _DRAWS).reshape(_DRAWS, k), axis=1)
    kept = np.array([n for n in range(k) if k % (n + 1) == 0 or (k - n) % 2])
    pace = 1.0 / ordered.mean(axis=0)[k - 1 - kept]  # of the slowest that is waited for
    steps = np.diff(pace, prepend=0.0)
    slices = kept[steps > 1e-12 * pace[-1]]
    cost = pace[steps > 1e-12 * pace[-1]]
    fractions = np.diff(cost, prepend=0.0) / (slices + 1)
    cost, fractions = cost / fractions.sum(), fractions / fractions.sum()
    plans = []
    for n, done in zip(slices, cost):
        in_time = model.late_fraction(deadline_s / done)
        code = fractional_repetition if k % (n + 1) == 0 else cyclic_mds
        plans.append(code(in_time, stragglers=int(n), **options))
    return BlockPlan(fractions=tuple(fractions.tolist()), plans=tuple(plans))


def _late(straggle_probs: ArrayLike | None, delays: DelayModel | None, deadline_s: float) -> Floats:
    if (straggle_probs is None) == (delays is None):
        raise PlanError("expected straggle_probs or delays, got both or neither; give one")
    if delays is not None:
        return np.atleast_1d(delays.late_fraction(deadline_s))
    late = np.asarray(straggle_probs, dtype=np.float64)
    if not deadline_s > 1.0 or late.ndim != 1 or not np.all((late > 0) & (late < 1)):
        raise PlanError(
            f"expected straggle probabilities in (0, 1) and deadline_s above the delays' least, 1 s, got {late} and "
            f"{deadline_s}; give delays to say otherwise"
        )
    return late
