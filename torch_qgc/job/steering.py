"""Which lever for which cause: from what is measured of the workers to a running job's next plan and deadline."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from torch_qgc.job.courses import Course
from torch_qgc.job.levers import WORTHWHILE, Speeds, UsualRounds, choose_bits, cut_batches
from torch_qgc.job.measure import Estimate, Measurements
from torch_qgc.job.stopwatch import Timed
from torch_qgc.kernels import payload_bytes
from torch_qgc.planner import Plan
from torch_qgc.planner.cadence import JobRounds
from torch_qgc.planner.checks import Floats, Ints
from torch_qgc.planner.deadline import DeadlineChoice, DeadlineCosts
from torch_qgc.planner.delays import Empirical
from torch_qgc.planner.shares import error_factors
from torch_qgc.planner.variance import MOST_BITS, PASS_THROUGH_BITS, NoiseRatio, Norm, RunningVariance

__all__ = ["Choice", "Steering"]

#: Steps of a worker from which its speed is known well enough to act on.
LEAST_STEPS = 6

# Until it is measured: the variance of a batch's gradient over the square of the gradient, for most of training.
_NOISE = 8.0
_SURPRISING = 2.0  # contributions per round over what the plan in force expects of a worker
_PATIENCE = 3.0  # rounds of usual length, after which a step closes in any case
_DEADLINES = 24  # that are tried: neighbours differ by a tenth or so
_LEAST_RATE = 0.01  # contributions per round that shares reckon with, so that everybody keeps one
_PANELS = 128  # of the sums behind each
_ROWS = 64  # of the delays that deadlines are chosen from


@dataclass(frozen=True, eq=False)
class Choice:
    """What a job is to do from now on.

    Attributes:
        plan: with new batches, bits and straggle probabilities.
        deadline_s: when steps close; None: they wait for all.
        speedup: how many times sooner a given loss is expected than by waiting for all, with these batches.
        causes: [K] why each worker is slower than the others; see `Measurements.cause`.
    """

    plan: Plan
    deadline_s: float | None
    speedup: float
    causes: tuple[str, ...]

    def __str__(self) -> str:
        deadline = "waits for all" if self.deadline_s is None else f"closes after {self.deadline_s:.3g} s"
        batches, bits = " ".join(f"{b:.2f}" for b in self.plan.batches), " ".join(map(str, self.plan.bits))
        return (
            f"{deadline} ({self.speedup:.2f} times sooner at a loss than by waiting), batches [{batches}], bits "
            f"[{bits}], slow because of [{' '.join(self.causes)}]"
        )


class Steering:
    """Watch the workers of a job, and plan anew when that is due.

    The lever follows from the cause: a slow processor gets a smaller batch, a slow link fewer bits, and what neither
    cures, tails and pauses, is what the deadline is for. Where data can move, every worker's share is what it delivers,
    so that each sample counts alike; else shares stay as they are: they say whose data counts how much.

    Args:
        workers: K.
        numel: coordinates of the gradient.
        every: steps between two plans, if nothing has changed.
        auto_deadline: choose the deadline, too.
        first_step: of the job.
        norm: of the codec.
        most_batch: largest batch of a worker, in mean batches.
        late, max_staleness: of the job's `ClosingRule`.
    """

    def __init__(
        self,
        workers: int,
        numel: int,
        *,
        every: int,
        auto_deadline: bool,
        first_step: int = 0,
        norm: Norm = "max",
        most_batch: float = 2.0,
        late: Literal["fold", "drop"] = "fold",
        max_staleness: int = 32,
    ) -> None:
        self._late, self._max_staleness = late, max_staleness
        self._most_batch = most_batch
        self._numel, self._every, self._auto_deadline = numel, every, auto_deadline
        self.measurements = Measurements(workers)
        self.variance = RunningVariance(workers, norm=norm)
        self.noise = NoiseRatio(workers)
        self._batch_size = np.zeros(workers, dtype=np.int64)  # the mean, where a loader can cut batches; else 0
        self._moves = np.zeros(workers, dtype=np.bool_)  # whose batches any worker could have drawn
        self._last_step = first_step + LEAST_STEPS + 2 - every  # nobody's first steps say anything
        self._changed = False
        self._alive: frozenset[int] | None = None

    def note(self, worker: int, timed: Timed, bits: int) -> None:
        """Enter a step that a worker has delivered in so many bits per coordinate."""
        known = timed.batch_size > 0
        self._batch_size[worker], self._moves[worker] = timed.batch_size, timed.moves
        self._changed |= self.measurements.note(
            worker,
            batch=timed.samples / timed.batch_size if known else 1.0,
            own_s=timed.own_s,
            link_s=timed.link_s,
            nbytes=payload_bytes(self._numel, bits),
            down_s=timed.down_s,
        )

    def is_due(self, step: int, alive: frozenset[int]) -> bool:
        """Tell whether to plan anew: at the set intervals, or because a worker has changed, come or gone."""
        if self._alive is not None and alive != self._alive:
            for worker in alive - self._alive:
                self.measurements.forget(worker)  # another machine, perhaps
            self._changed = True
        self._alive = alive
        wait = LEAST_STEPS if self._changed else self._every
        return step - self._last_step >= wait and all(self.measurements.steps(k) >= LEAST_STEPS for k in alive)

    def choose(self, step: int, course: Course) -> Choice | None:
        """Choose what holds next, or None if that is about what holds now.

        Args:
            step: the newest.
            course: what holds now.
        """
        self._last_step, self._changed = step, False
        assert self._alive is not None
        alive = sorted(self._alive)
        estimates = {k: self.measurements.estimate(k) for k in alive}
        now = self._with_noise(course.plan)
        moves = now.one_part_each and bool(self._moves[alive].all())
        plan = self._with_levers(now, estimates, course.deadline_s, moves)
        costs = self._costs(plan, estimates, moves)
        choice = self._deadline(costs, course.deadline_s)
        deadline_s = None if math.isinf(choice.deadline_s) else choice.deadline_s
        p = np.array(plan.straggle_probs)
        p[alive] = np.clip(choice.straggle_probs, 0.0, 0.99)
        expected = np.maximum(1.0 - np.array([p, now.straggle_probs]), _LEAST_RATE)
        surprising = np.abs(np.log(expected[0] / expected[1])) > np.log(_SURPRISING)
        if deadline_s == course.deadline_s and plan is now and not surprising.any():
            return None
        if moves:
            gone = ~np.isin(np.arange(len(p)), alive)
            plan = plan.shared_out(_delivered(plan.batches, np.where(gone, 1.0, p)))
        made = self._with_noise(dataclasses.replace(plan, straggle_probs=p))
        return Choice(made, deadline_s, choice.speedup, tuple(self.measurements.causes(estimates)))

    # --- levers -------------------------------------------------------------------------------------------------

    def _deadline(self, costs: DeadlineCosts, now_s: float | None) -> DeadlineChoice:
        """Return the deadline that is best, or the one at hand if that is about as good."""
        if not self._auto_deadline:
            return costs.at(now_s)
        best = costs.least(grid=_DEADLINES)
        if best.speedup < WORTHWHILE:
            # Where nothing that was seen is worth a deadline, there is one for what was not: a pause that comes for the
            # first time, or seldom, must not hold everybody up for as long as it lasts.
            best = costs.at(_PATIENCE * costs.waiting.round_time_s)
        if now_s is None or now_s > 1.25 * max(best.deadline_s, _PATIENCE * costs.waiting.round_time_s):
            return best
        now = costs.at(now_s)
        good = len(now.unheard) <= len(best.unheard) and now.objective < WORTHWHILE * best.objective
        return now if good else best

    def _with_levers(self, plan: Plan, estimates: dict[int, Estimate], deadline_s: float | None, moves: bool) -> Plan:
        """Return a plan with batches and bits by what makes each worker slow; the plan itself if it is as good."""
        alive = list(estimates)
        now, shares = plan.batches[alive], plan.shares[alive]
        bits, batches = np.array(plan.bits), np.array(plan.batches)
        speeds = Speeds.of(estimates, now)
        limit_s = math.inf if self._auto_deadline or deadline_s is None else deadline_s
        rounds = UsualRounds(shares=shares / shares.sum(), limit_s=limit_s, folds=self._late == "fold", moves=moves)
        if not np.any(bits == PASS_THROUGH_BITS):
            table = self._noise_table(plan.batches)[alive]
            error = error_factors(plan.straggle_probs[alive, None], table) * shares[:, None] ** 2
            others = int(plan.bits.sum() - bits[alive].sum())
            budget = (int(plan.spent_bits) if plan.bit_budget is None else plan.bit_budget) - others
            bits[alive] = choose_bits(speeds, rounds, now, table, error, budget, self._numel, plan.bits[alive])
        size = int(self._batch_size[alive].min())
        if size and len(alive) > 1:
            ways_s, variance = self._ways_s(speeds, bits[alive]), plan.variance[alive]
            batches[alive] = cut_batches(speeds, rounds, ways_s, variance, now, size, self._most_batch)
        if np.array_equal(bits, plan.bits) and np.array_equal(batches, plan.batches):
            return plan
        gone = np.setdiff1d(np.arange(plan.num_workers), alive)
        batches[gone] = 1.0  # who comes back may be another
        return self._with_noise(dataclasses.replace(plan, batches=batches), bits)

    def _costs(self, plan: Plan, estimates: dict[int, Estimate], moves: bool) -> DeadlineCosts:
        delays = Empirical(delays_s=self._delays_s(estimates, plan), caution=0.0)
        alive = list(estimates)
        speeds = Speeds.of(estimates, plan.batches[alive])
        ways_s = self._ways_s(speeds, plan.bits[alive])
        rounds = JobRounds(delays, late=self._late, max_staleness=self._max_staleness, ways_s=ways_s, panels=_PANELS)
        return DeadlineCosts(rounds, lambda p: _Living(plan, alive, p, moves))

    def _noise_table(self, batches: Floats) -> Floats:
        """Return the relative variance of workers at each number of bits, [K, 17], batch noise included."""
        q = self.variance.table(MOST_BITS)
        eta = self.noise.ratios(default=_NOISE, batches=batches)[:, None]
        q[:, :2] = np.inf
        return np.where(np.isinf(q), np.inf, q * (1.0 + eta) + eta)

    def _with_noise(self, plan: Plan, bits: Ints | None = None) -> Plan:
        """Return a plan with these bits, and the variance that was measured at them."""
        bits = plan.bits if bits is None else bits
        eta = self.noise.ratios(default=_NOISE, batches=plan.batches)
        plain = bits == PASS_THROUGH_BITS
        at = self._noise_table(plan.batches)[np.arange(len(bits)), np.where(plain, MOST_BITS, bits)]
        # What is not spent for now may be spent later.
        budget = int(plan.spent_bits) if plan.bit_budget is None else plan.bit_budget
        return dataclasses.replace(
            plan, bits=bits, variance=np.where(plain, eta, at), bit_budget=max(budget, int(bits.sum()))
        )

    def _ways_s(self, speeds: Speeds, bits: Ints) -> Floats:
        return speeds.ways_s(np.array([self._bytes(b) for b in bits], dtype=np.float64))

    def _bytes(self, bits: int) -> int:
        return payload_bytes(self._numel, int(bits))

    def _delays_s(self, estimates: dict[int, Estimate], plan: Plan) -> Floats:
        """Return [rows, workers] seconds that steps would take: quantiles of each worker's newest steps."""
        levels = (np.arange(_ROWS) + 0.5) / _ROWS
        return np.column_stack(
            [
                np.quantile(e.down_s + e.times_s(float(plan.batches[k]), self._bytes(plan.bits[k])), levels)
                for k, e in estimates.items()
            ]
        )


class _Living:
    """What `choose_deadline` asks of a plan, for the workers that are alive."""

    def __init__(self, plan: Plan, alive: list[int], straggle_probs: Floats, moves: bool) -> None:
        shares = plan.shares[alive]
        self.shares: Floats = _delivered(plan.batches[alive], straggle_probs) if moves else shares / shares.sum()
        factors = error_factors(np.clip(straggle_probs, 0.0, 1.0), plan.variance[alive])
        self.residual_bound = float(factors[shares > 0] @ self.shares[shares > 0] ** 2)


def _delivered(batches: Floats, straggle_probs: Floats) -> Floats:
    """Return each worker's part of the samples that are delivered; next to nothing of one that never delivers."""
    given = batches * np.clip(1.0 - straggle_probs, _LEAST_RATE, 1.0)
    return np.asarray(given / given.sum())
