"""What a deadline makes of a job: how long rounds last, how often each worker contributes, and how late."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import ArrayLike

from torch_qgc.errors import PlanError
from torch_qgc.planner.checks import Floats
from torch_qgc.planner.delays import DelayModel

__all__ = ["Cadence", "IndependentRounds", "JobRounds", "Rounds", "expected_round_time"]

_SELDOM, _OFTEN = 0.01, 0.1  # how often deadlines are missed
_NEVER = 1e-3  # who is late more often than that however long a round lasts does not always come


@dataclass(frozen=True, kw_only=True, eq=False)
class Cadence:
    """How a job goes on.

    Attributes:
        round_s: mean length of a round.
        rates: [K] contributions per round, r_k in [0, 1].
        counted: [K] fraction of payloads that are not lost.
        staleness: [K] mean age of a contribution, in rounds.
    """

    round_s: float
    rates: Floats
    counted: Floats
    staleness: Floats


class Rounds(Protocol):
    """How the rounds of a job follow each other, given the workers' delays."""

    #: Least and largest deadline worth a try.
    search_s: tuple[float, float]
    #: A worker of which a smaller fraction of payloads counts is not heard.
    least_counted: float

    def cadence(self, deadline_s: float) -> Cadence:
        """Return how the job goes on with a deadline."""

    def waiting(self) -> Cadence:
        """Return how it goes on if every round waits for all; round_s is inf if somebody never comes."""


class IndependentRounds:
    """Song & Choi's rounds: everybody begins each of them, p_k = P(D_k > T), and late payloads are lost.

    Args:
        delays: of K workers.
        closes_early: a round ends when all are in; False: at the deadline in any case.
    """

    least_counted = 0.0

    def __init__(self, delays: DelayModel, *, closes_early: bool = True) -> None:
        self._delays, self._closes_early = delays, closes_early
        kinks = delays.breakpoints()
        low, high = float(kinks[kinks > 0].min(initial=np.inf)), _all_in(delays)
        self.search_s = (low if low < high else high * 1e-4, high)

    def cadence(self, deadline_s: float) -> Cadence:
        """Return how the job goes on with a deadline."""
        late = np.atleast_1d(self._delays.straggle_probability(deadline_s))
        round_s = expected_round_time(self._delays, deadline_s) if self._closes_early else deadline_s
        return Cadence(round_s=round_s, rates=1.0 - late, counted=1.0 - late, staleness=np.zeros_like(late))

    def waiting(self) -> Cadence:
        """Return how it goes on if every round waits for all."""
        return _waiting(self._delays, self.search_s[1])


class JobRounds:
    """The rounds of a running job: a late worker misses those that close while it is at work.

    With D_k the delay of a worker, S_k its tail and F_k = 1 - S_k, a step of worker k takes a round if it is in time
    and D_k if it is late, and a round awaits those that have begun it with the others:

        L_k = E[D_k; D_k > T] = T S_k(T) + int_T^inf S_k(t) dt
        r_k = tau / (tau F_k(T) + L_k)                                       renewal reward: contributions per round
        tau = int_0^T (1 - prod_k (1 - a_k S_k(t))) dt / (1 - prod_k (1 - a_k)),   a_k = r_k F_k(T)
        staleness of a contribution: L_k / tau rounds

    So all r_k are 1 if nobody is late, and a worker that always is contributes once in D_k / tau rounds. The fixed
    point in tau is found by iteration, from the longest round down. A payload older than `max_staleness` is lost, and
    then its worker finds no way back into the rounds of the others, unless it is late in less than 1 % of steps. Where
    late payloads are dropped all of them are lost, and their worker waits for the next round: half of one on average.
    A late worker computes again while its payload and the next result are on the way: in r_k, its steps take the
    largest of their parts and not the sum. Where a way is busy for longer than the worker and a round are, payloads
    queue until they are `max_staleness` rounds old.
    Integrals are sums over panels, good to a thousandth of a round. What comes later than the largest deadline of
    `search_s` is taken to come then; what never comes is lost, and its worker goes on then.

    Args:
        delays: of K workers: all the time from a step's beginning to the arrival of its payload.
        late: what becomes of late payloads: "fold" lets them enter a later round, "drop" loses them.
        max_staleness: how many rounds old a payload may be that is folded.
        panels: more: finer sums, and more to compute.
        ways_s: [W, K] seconds of each delay that a payload, and a result, are on the way; none: too few to matter.
    """

    def __init__(
        self,
        delays: DelayModel,
        *,
        late: Literal["fold", "drop"] = "fold",
        max_staleness: int = 8,
        ways_s: ArrayLike = (),
        panels: int = 384,
    ) -> None:
        if late not in ("fold", "drop") or max_staleness < 0:
            raise PlanError(
                f"expected late = 'fold' or 'drop' and max_staleness >= 0 rounds, got {late!r} and {max_staleness}"
            )
        self._delays, self._folds, self._max_staleness = delays, late == "fold", max_staleness
        ways = np.asarray(ways_s, dtype=np.float64)
        self._on_the_way_s: Floats = ways.sum(axis=0)
        self._busy_s: Floats = ways.max(axis=0, initial=0.0)
        self.least_counted = 0.5 if self._folds else 0.05  # who drops late payloads has chosen to lose many
        longest_s = _all_in(delays)
        kinks = delays.breakpoints()
        kinks = kinks[(kinks > 0) & (kinks < longest_s)]
        if len(kinks) > panels * 2 // 3:
            kinks = np.quantile(kinks, np.linspace(0.0, 1.0, panels * 2 // 3))
        self._edges = np.union1d(np.append(0.0, np.geomspace(1e-4 * longest_s, longest_s, panels)), kinks)
        self._widths = np.diff(self._edges)
        middles = self._edges[:-1] + self._widths / 2.0
        self._tails = delays.late_fraction(middles).reshape(len(middles), -1)  # [panels, K]
        areas = np.cumsum(self._tails * self._widths[:, None], axis=0)
        self._areas = np.concatenate([np.zeros_like(areas[:1]), areas])
        last = np.atleast_1d(delays.late_fraction(longest_s))
        self._all_come = not last.any()
        self._never = np.where(np.atleast_1d(delays.late_fraction(2.0 * longest_s)) < last, 0.0, last)
        # A round closes on no fewer than half of the workers.
        half = np.flatnonzero(np.sum(1.0 - self._tails, axis=1) >= max(self._tails.shape[1] // 2, 1) - 1e-9)
        self.search_s = (float(self._edges[half[0]]) if half.size and half[0] else longest_s * 1e-4, longest_s)

    def cadence(self, deadline_s: float) -> Cadence:
        """Return how the job goes on with a deadline."""
        late = np.atleast_1d(self._delays.straggle_probability(deadline_s))
        spent_late_s = deadline_s * late + self._areas[-1] - self._area(deadline_s)
        own_s = spent_late_s - late * self._on_the_way_s  # of late steps, like those
        spent_s = np.maximum(own_s, late * self._busy_s) if self._folds else spent_late_s
        round_s, begun = self._settle(deadline_s, late, spent_s)
        lost, staleness = late, np.zeros_like(late)
        if self._folds:
            lost = np.where(late > _SELDOM, np.maximum(self._too_old(deadline_s, late, round_s), self._never), late)
            queues = late * self._busy_s > np.maximum(own_s, late * round_s) * (1.0 + 1e-9)
            staleness = np.where(queues, late * self._max_staleness, spent_late_s / round_s)
        return Cadence(round_s=round_s, rates=begun * (1.0 - lost), counted=1.0 - lost, staleness=staleness)

    def waiting(self) -> Cadence:
        """Return how it goes on if every round waits for all."""
        if not self._all_come:
            return _waiting(self._delays, self.search_s[1])
        everybody = np.ones_like(self._never)
        round_s = self._longest_wait(self.search_s[1], everybody)
        return Cadence(round_s=round_s, rates=everybody, counted=everybody, staleness=np.zeros_like(everybody))

    def _too_old(self, deadline_s: float, late: Floats, round_s: float) -> Floats:
        """Return [K] the chance that a payload is more than `max_staleness` rounds late, begun anywhere in a round."""
        mostly_in_time = late <= _OFTEN
        if mostly_in_time.any():  # so short are rounds while the others are elsewhere
            round_s = min(round_s, self._longest_wait(deadline_s, mostly_in_time.astype(np.float64)))
        oldest_s = self._max_staleness * round_s
        return (self._area(oldest_s + round_s) - self._area(oldest_s)) / round_s

    def _settle(self, deadline_s: float, late: Floats, spent_late_s: Floats) -> tuple[float, Floats]:
        """Return the length of a round, and [K] the steps that each worker begins per round."""
        round_s = self._longest_wait(deadline_s, np.ones_like(late))
        while True:
            waits_s = 0.0 if self._folds else 0.5 * round_s * late
            begun = np.minimum(round_s / (round_s * (1.0 - late) + spent_late_s + waits_s), 1.0)
            on_time = begun * (1.0 - late) if self._folds else begun
            shorter = self._longest_wait(deadline_s, on_time)
            if not shorter < round_s * (1.0 - 1e-6):
                return round_s, begun
            round_s = shorter

    def _longest_wait(self, deadline_s: float, begun: Floats) -> float:
        """Return E max min(T, D_k) over those that begin the round, each with a chance of its own, if anybody does."""
        panel, part = self._place(deadline_s)
        begun = np.maximum(begun, 1e-9)
        waiting = (1.0 - np.prod(1.0 - begun * self._tails[: panel + 1], axis=1)) / (1.0 - np.prod(1.0 - begun))
        return float(waiting @ np.append(self._widths[:panel], part * self._widths[panel]))

    def _area(self, time_s: float) -> Floats:
        """Return [K] the integral of the tails up to a time."""
        panel, part = self._place(time_s)
        return np.asarray(self._areas[panel] + part * (self._areas[panel + 1] - self._areas[panel]))

    def _place(self, time_s: float) -> tuple[int, float]:
        """Return the panel that a time lies in, and the part of it that has passed."""
        panel = min(int(np.searchsorted(self._edges, time_s, side="right")) - 1, len(self._widths) - 1)
        return panel, min((time_s - self._edges[panel]) / self._widths[panel], 1.0)


def expected_round_time(delays: DelayModel, deadline_s: float) -> float:
    """Return how long a round lasts that everybody begins and that closes when all are in, or at the deadline.

        E min(T, max_k T_k) = int_0^T (1 - prod_k F_k(t)) dt

    Args:
        deadline_s: T > 0, finite.
    """
    if not 0.0 < deadline_s < np.inf:
        raise PlanError(f"deadline_s: expected a positive, finite number of seconds, got {deadline_s}")
    kinks = delays.breakpoints()
    kinks = kinks[(kinks > 0) & (kinks < deadline_s)]
    few = len(kinks) < 1024  # of so many steps each is small
    if not few:
        kinks = np.quantile(kinks, np.linspace(0.0, 1.0, 512))
    edges = np.union1d(np.linspace(0.0, deadline_s, 129), kinks)
    nodes, weights = np.polynomial.legendre.leggauss(12 if few else 2)
    half = np.diff(edges) / 2.0
    times = (edges[:-1] + half)[:, None] + half[:, None] * nodes
    late = delays.late_fraction(times).reshape(*times.shape, -1)
    waiting = 1.0 - np.prod(1.0 - late, axis=-1)
    return float(np.sum(waiting * weights * half[:, None]))


def _waiting(delays: DelayModel, longest_s: float) -> Cadence:
    late = np.atleast_1d(delays.late_fraction(longest_s))
    while np.any(late > _NEVER**2) and np.any(np.atleast_1d(delays.late_fraction(2.0 * longest_s)) < late):
        longest_s *= 2.0
        late = np.atleast_1d(delays.late_fraction(longest_s))
    round_s = expected_round_time(delays, longest_s) if np.all(late < _NEVER) else np.inf
    everybody = np.ones_like(late)
    return Cadence(round_s=round_s, rates=everybody, counted=everybody, staleness=np.zeros_like(late))


def _all_in(delays: DelayModel) -> float:
    """Return a time by which every worker is late in less than 1 % of steps, or as seldom as it ever is."""
    high = 2.0 * float(delays.breakpoints().max(initial=1e-9))
    while np.any((late := delays.late_fraction(high)) * (delays.late_fraction(2.0 * high) < late) >= _SELDOM):
        high *= 2.0
    return high
