"""When to close a round."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike

from torch_qgc.errors import PlanError
from torch_qgc.planner.cadence import Cadence, Rounds
from torch_qgc.planner.checks import Floats, Mask

__all__ = ["DeadlineChoice", "DeadlineCosts", "Outlook", "choose_deadline"]


class Outlook(Protocol):
    """What a deadline's cost depends on: a `Plan` says it, for one."""

    @property
    def shares(self) -> Floats:
        """[K] fractions of the data, sum 1."""

    @property
    def residual_bound(self) -> float:
        """Bound on the error of what is decoded; see `Plan.residual_bound`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class DeadlineChoice:
    """A deadline, and what it costs.

    Attributes:
        deadline_s: T.
        objective: J in seconds, proportional to the time to a given loss.
        waiting_objective: what J would be if every round waited for all; inf if somebody never comes.
        residual: rho, the error of the plan for these straggle_probs.
        round_time_s: mean length of a round, with overhead.
        straggle_probs: [K], what `make_plan` is to be told: one minus the contributions per round.
        staleness: [K], mean age of a contribution, in rounds.
        unheard: workers whose payloads are mostly lost. There are some only if bounds on the deadline leave nothing
            better: raise the upper one, or `max_staleness`.
    """

    deadline_s: float
    objective: float
    waiting_objective: float
    residual: float
    round_time_s: float
    straggle_probs: Floats
    staleness: Floats
    unheard: tuple[int, ...]

    @property
    def speedup(self) -> float:
        """How many times sooner a loss is reached than by waiting for all; if it is about 1, better wait."""
        return self.waiting_objective / self.objective


def choose_deadline(
    rounds: Rounds,
    plan: Callable[[Floats], Outlook],
    *,
    beta: float = 1.0,
    staleness_weight: float = 1.0,
    overhead_s: float = 0.0,
    search_s: tuple[float, float] | None = None,
    must_hear: ArrayLike | None = None,
    slack: float = 0.05,
    grid: int = 64,
) -> DeadlineChoice:
    """Choose the deadline that reaches a given loss soonest.

        minimise J(T) = (tau(T) + t0) (beta (1 + w sum_k m_k s_k(T)) + rho(T))

    Rounds to a given loss grow with E||ghat||^2 <= C N^2 (1 + rho) (Song & Choi Lemma 2, Theorems 2 and 3), whence
    beta = 1. rho is the error of the plan for p_k = 1 - r_k: a contribution of weight m_k / r_k and variance v_k that
    is in a round with chance r_k varies by m_k^2 (1 - r_k + v_k) / r_k from round to round, and that is delta_k m_k^2.
    What is stale by s rounds on average multiplies the noiseless part of the rounds by 1 + s (Stich & Karimireddy, JMLR
    2020; Koloskova et al., NeurIPS 2022). J can have several local minima: a grid of log-spaced T is searched, then the
    best cell is refined. Around the minimum J is flat, and steep beyond: of the deadlines next to it that cost at most
    `slack` more the middle one is taken, where errors of the estimated delays do least harm.

    A deadline at which a worker is not heard, because more than half of its payloads come more than max_staleness
    rounds late, is taken only if the bounds leave no other: the job would ignore the worker in silence, as it does with
    a deadline far below a slow link's transfer time.

    Args:
        rounds: `JobRounds(delays)` of a running job; `IndependentRounds(delays)` are Song & Choi's.
        plan: p [K] -> plan: `make_plan`, or `lambda p: make_plan(p, bit_budget=40)`, so that bits and shares are chosen
            anew at every T.
        beta: >= 0; more: shorter deadlines. With large batch noise it is (||g||^2 + batch variance) / C N^2; 0 would
            minimise variance per second, which leads to ever later deadlines.
        staleness_weight: w >= 0; more: later deadlines. 1 for Adam, about 2 for SGD with a momentum of .9.
        overhead_s: t0, seconds per round that do not depend on the deadline.
        search_s: least and largest deadline; default: `rounds.search_s`.
        must_hear: [K] bool, workers that have to be heard; default: all that ever come.
        slack: how much more than the least the deadline may cost, as a fraction; 0: the exact minimum.
        grid: number of deadlines tried first.
    Raises:
        PlanError: no deadline in the range at which anybody arrives; a bad range; whatever `plan` raises.
    """
    costs = DeadlineCosts(
        rounds,
        plan,
        beta=beta,
        staleness_weight=staleness_weight,
        overhead_s=overhead_s,
        must_hear=must_hear,
    )
    return costs.least(search_s, slack=slack, grid=grid)


class DeadlineCosts:
    """What deadlines cost: J(T), and everything that it is made of.

    Args:
        rounds, plan, beta, staleness_weight, overhead_s, must_hear: as in `choose_deadline`.
    Attributes:
        waiting: what it costs to wait for all in every round; its deadline_s is inf, and its objective if somebody
            never comes.
    """

    def __init__(
        self,
        rounds: Rounds,
        plan: Callable[[Floats], Outlook],
        *,
        beta: float = 1.0,
        staleness_weight: float = 1.0,
        overhead_s: float = 0.0,
        must_hear: ArrayLike | None = None,
    ) -> None:
        self._rounds, self._plan = rounds, plan
        self._beta, self._staleness_weight, self._overhead_s = beta, staleness_weight, overhead_s
        ever = rounds.cadence(rounds.search_s[1]).counted >= max(rounds.least_counted, 1e-9)
        self._must_hear: Mask = ever if must_hear is None else ever & np.asarray(must_hear, dtype=bool)
        waiting = rounds.waiting()
        self._waiting_objective = self._cost(waiting)[0]
        self.waiting = self._choice(np.inf, waiting)

    def at(self, deadline_s: float | None) -> DeadlineChoice:
        """Return what a deadline costs; None waits for all."""
        return self.waiting if deadline_s is None else self._choice(deadline_s, self._rounds.cadence(deadline_s))

    def least(
        self, search_s: tuple[float, float] | None = None, *, slack: float = 0.05, grid: int = 64
    ) -> DeadlineChoice:
        """Return the deadline that costs least, or hardly more; see `choose_deadline`."""
        from scipy.optimize import minimize_scalar

        low, high = self._rounds.search_s if search_s is None else search_s
        if not 0.0 < low < high < np.inf:
            raise PlanError(f"search_s: expected 0 < least < largest deadline in seconds, got {low} and {high}")
        times = np.geomspace(low, high, grid)
        tried = [self.at(float(t)) for t in times]
        best = min(range(grid), key=lambda i: _rank(tried[i]))
        if not np.isfinite(tried[best].objective):
            raise PlanError(
                f"search_s: expected a deadline at which somebody arrives, got {low} .. {high} s; extend it"
            )
        bracket = (float(times[max(best - 1, 0)]), float(times[min(best + 1, grid - 1)]))
        # Where hardly more may be paid, the exact minimum is not worth many looks.
        accuracy = 1e-10 + 2.0 * slack * (bracket[1] - bracket[0])
        refined = minimize_scalar(
            lambda t: self.at(float(t)).objective, bounds=bracket, method="bounded", options={"xatol": accuracy}
        )
        exact = min(tried[best], self.at(float(refined.x)), key=_rank)
        return self._middle(tried, best, exact, slack) if slack else exact

    def _middle(self, tried: list[DeadlineChoice], best: int, least: DeadlineChoice, slack: float) -> DeadlineChoice:
        """Return the middle, on a log scale, of the deadlines around the best one that cost hardly more.

        It is at most twice the shortest of them, because a worker that hangs holds a round up for that long.
        """

        def good(choice: DeadlineChoice) -> bool:
            return len(choice.unheard) == len(least.unheard) and choice.objective <= least.objective * (1.0 + slack)

        first = last = best
        while first > 0 and good(tried[first - 1]):
            first -= 1
        while last + 1 < len(tried) and good(tried[last + 1]):
            last += 1
        shortest, longest = tried[first].deadline_s, tried[last].deadline_s
        middle = self.at(min(float(np.sqrt(shortest * longest)), 2.0 * shortest))
        return middle if good(middle) else least

    def _choice(self, deadline_s: float, cadence: Cadence) -> DeadlineChoice:
        cost, residual = self._cost(cadence)
        return DeadlineChoice(
            deadline_s=deadline_s,
            objective=cost,
            waiting_objective=self._waiting_objective,
            residual=residual,
            round_time_s=cadence.round_s + self._overhead_s,
            straggle_probs=1.0 - cadence.rates,
            staleness=cadence.staleness,
            unheard=tuple(np.flatnonzero(self._must_hear & (cadence.counted < self._rounds.least_counted)).tolist()),
        )

    def _cost(self, cadence: Cadence) -> tuple[float, float]:
        """Return J, and the plan's residual."""
        if not cadence.rates.any() or np.isinf(cadence.round_s):
            return np.inf, np.inf
        plan = self._plan(np.clip(1.0 - cadence.rates, 0.0, 1.0))
        stale = float(plan.shares @ cadence.staleness)
        noiseless = self._beta * (1.0 + self._staleness_weight * stale)
        return (cadence.round_s + self._overhead_s) * (noiseless + plan.residual_bound), plan.residual_bound


def _rank(choice: DeadlineChoice) -> tuple[int, float]:
    return len(choice.unheard), choice.objective
