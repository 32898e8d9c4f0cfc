"""Which lever for which cause: from what is measured of the workers to a running job's next plan and deadline."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from torch_qgc.job.courses import Course
from torch_qgc.job.measure import Estimate, Measurements
from torch_qgc.job.stopwatch import Timed
from torch_qgc.kernels import payload_bytes
from torch_qgc.planner import Plan
from torch_qgc.planner.batches import Batches, apportion, choose_batches
from torch_qgc.planner.bits import allocate_bits
from torch_qgc.planner.cadence import JobRounds
from torch_qgc.planner.checks import Floats, Ints
from torch_qgc.planner.deadline import choose_deadline
from torch_qgc.planner.delays import Empirical
from torch_qgc.planner.links import bits_within
from torch_qgc.planner.shares import error_factors
from torch_qgc.planner.variance import PASS_THROUGH_BITS, NoiseRatio, Norm, RunningVariance

__all__ = ["Choice", "Steering"]

#: Steps of a worker from which its speed is known well enough to act on.
LEAST_STEPS = 6

#: Samples that every batch has: as many as a thin one.
LEAST_SAMPLES = 2

# A plan is changed for a batch or a deadline that differs by more than this, and a deadline is set for a gain above it:
# below, estimates differ by chance.
_WORTHWHILE = 0.1
_PATIENCE = 3.0  # rounds of usual length, after which a step closes in any case
_LEAST_RATE = 0.01  # contributions per round that shares reckon with, so that everybody keeps one
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
        downlink_bits: of results.
        every: steps between two plans, if nothing has changed.
        auto_deadline: choose the deadline, too.
        first_step: of the job.
        norm: of the codec.
        most_batch: largest batch of a worker, in mean batches.
    """

    def __init__(
        self,
        workers: int,
        numel: int,
        *,
        downlink_bits: int = PASS_THROUGH_BITS,
        every: int,
        auto_deadline: bool,
        first_step: int = 0,
        norm: Norm = "max",
        most_batch: float = 2.0,
    ) -> None:
        self._most_batch = most_batch
        self._down_bytes = payload_bytes(numel, downlink_bits)
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
            link_s=timed.link_s + (timed.down_s or 0.0),
            nbytes=payload_bytes(self._numel, bits) + (0 if timed.down_s is None else self._down_bytes),
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
        plan = course.plan
        batches = self._batches(estimates, course)
        plan = self._with_noise(dataclasses.replace(plan, batches=batches), plan.bits)
        rounds = JobRounds(Empirical(delays_s=self._delays_s(estimates, plan), caution=0.0))
        deadline_s, late, speedup = course.deadline_s, np.zeros(len(alive)), 1.0
        moves = plan.one_part_each and bool(self._moves[alive].all())
        if self._auto_deadline:
            choice = choose_deadline(rounds, lambda p: _Living(plan, alive, p, moves))
            # Where nothing that was seen is worth a deadline, there is one for what was not: a pause that comes for the
            # first time, or seldom, must not hold everybody up for as long as it lasts.
            deadline_s = _PATIENCE * rounds.waiting().round_s
            if choice.speedup > 1.0 + _WORTHWHILE:
                deadline_s, speedup = choice.deadline_s, choice.speedup
            late = 1.0 - rounds.cadence(deadline_s).rates
        elif deadline_s is not None:
            late = 1.0 - rounds.cadence(deadline_s).rates
        p = np.array(plan.straggle_probs)
        p[alive] = np.clip(late, 0.0, 0.99)
        if moves:
            plan = plan.shared_out(_delivered(plan.batches, p, alive))
        bits = self._bits(plan, p, estimates, batches, deadline_s)
        made = self._with_noise(dataclasses.replace(plan, straggle_probs=p), bits)
        if not self._differs(course, made, deadline_s):
            return None
        return Choice(made, deadline_s, speedup, tuple(self.measurements.causes()))

    # --- levers -------------------------------------------------------------------------------------------------

    def _batches(self, estimates: dict[int, Estimate], course: Course) -> Floats:
        """Return batches that let everybody make the step, or those of the plan if they are about as good."""
        plan, alive = course.plan, list(estimates)
        size = int(self._batch_size[alive].min())
        if not size or len(alive) < 2:
            return plan.batches
        nbytes = [self._bytes(plan.bits[k]) for k in alive]
        now = plan.batches[alive]
        per_batch, most, own_s, link_s = np.array(
            [
                (
                    e.per_batch_s.value,
                    e.per_batch_s.high,
                    e.fixed_s.value + e.per_batch_s.value * batch,
                    e.latency_s.value + e.per_byte_s.value * n,
                )
                for e, batch, n in zip(estimates.values(), now, nbytes)
            ]
        ).T

        def chosen(per_batch: Floats) -> Batches:
            per_batch = np.maximum(per_batch, 1e-9)
            # What the link takes is no time for computing.
            return choose_batches(per_batch, np.maximum(own_s - per_batch * now + link_s, 0.0), most=self._most_batch)

        # All others wait for whoever is thought to be quick with any batch, and sizes that hardly differ cannot tell.
        # So as much of a worker's time counts as the batch's as may be, unless it is late and can make no step.
        late = np.zeros_like(now, dtype=np.bool_) if course.deadline_s is None else own_s + link_s > course.deadline_s
        per_batch = np.where(late & chosen(per_batch).asynchronous, per_batch, np.minimum(most, own_s / now))
        batches = np.ones(plan.num_workers)  # who is gone had perhaps fewer: the mean stays 1, and it may come back
        # Samples come in whole ones.
        batches[alive] = apportion(chosen(per_batch).batches, size, min(size, LEAST_SAMPLES)) / size
        return batches if _far(batches, plan.batches) else plan.batches

    def _bits(
        self, plan: Plan, p: Floats, estimates: dict[int, Estimate], batches: Floats, deadline_s: float | None
    ) -> Ints:
        """Return the bits with the least error that links carry in time, within the budget."""
        if np.all(plan.bits == PASS_THROUGH_BITS):
            return plan.bits
        most = np.full(plan.num_workers, 16)
        if deadline_s is not None:
            for k, e in estimates.items():
                byte_s = max(e.per_byte_s.value, 0.0)
                own_s = e.fixed_s.value + e.per_batch_s.value * batches[k]
                left_s = deadline_s - own_s - e.latency_s.value - byte_s * self._down_bytes
                most[k] = min(int(bits_within(left_s, [byte_s], self._numel)[0]), 16)
        budget = int(plan.spent_bits) if plan.bit_budget is None else plan.bit_budget
        delta = error_factors(p[:, None], self._noise_table(batches))
        with np.errstate(invalid="ignore"):
            table = np.where(np.isfinite(delta), -delta * plan.shares[:, None] ** 2, -np.inf)
        bits = allocate_bits(table, budget, most_bits=most)
        rows = np.arange(plan.num_workers)
        old = np.minimum(plan.bits, most)
        better = float(table[rows, bits].sum()) > (1.0 - _WORTHWHILE) * float(table[rows, old].sum())
        return bits if better or np.any(old < plan.bits) else plan.bits

    def _noise_table(self, batches: Floats) -> Floats:
        """Return the relative variance of workers at each number of bits, [K, 17], batch noise included."""
        q = self.variance.table(16)
        eta = self.noise.ratios(default=1.0, batches=batches)[:, None]
        q[:, :2] = np.inf
        return np.where(np.isinf(q), np.inf, q * (1.0 + eta) + eta)

    def _with_noise(self, plan: Plan, bits: Ints) -> Plan:
        """Return a plan with these bits, and the variance that was measured at them."""
        eta = self.noise.ratios(default=1.0, batches=plan.batches)
        plain = bits == PASS_THROUGH_BITS
        at = self._noise_table(plan.batches)[np.arange(len(bits)), np.where(plain, 16, bits)]
        budget = None if plan.bit_budget is None else max(plan.bit_budget, int(bits.sum()))
        return dataclasses.replace(plan, bits=bits, variance=np.where(plain, eta, at), bit_budget=budget)

    def _delays_s(self, estimates: dict[int, Estimate], plan: Plan) -> Floats:
        """Return [rows, workers] seconds that steps would take: quantiles of each worker's newest steps."""
        levels = (np.arange(_ROWS) + 0.5) / _ROWS
        return np.column_stack(
            [
                np.quantile(estimate.times_s(float(plan.batches[k]), self._bytes(plan.bits[k])), levels)
                for k, estimate in estimates.items()
            ]
        )

    def _bytes(self, bits: int) -> int:
        """Return what a step takes on a link, both ways."""
        return payload_bytes(self._numel, int(bits)) + self._down_bytes

    def _differs(self, course: Course, plan: Plan, deadline_s: float | None) -> bool:
        old = course.plan
        deadlines = (deadline_s, course.deadline_s)
        if None in deadlines:
            other_deadline = deadlines[0] is not deadlines[1]
        else:
            other_deadline = _far(np.array([deadlines[0]]), np.array([deadlines[1]]))
        return other_deadline or bool(np.any(plan.bits != old.bits)) or _far(plan.batches, old.batches)


class _Living:
    """What `choose_deadline` asks of a plan, for the workers that are alive."""

    def __init__(self, plan: Plan, alive: list[int], straggle_probs: Floats, moves: bool) -> None:
        shares = plan.shares[alive]
        if moves:
            shares = plan.batches[alive] * np.clip(1.0 - straggle_probs, _LEAST_RATE, 1.0)
        self.shares: Floats = shares / shares.sum()
        factors = error_factors(np.clip(straggle_probs, 0.0, 1.0), plan.variance[alive])
        self.residual_bound = float(factors[shares > 0] @ self.shares[shares > 0] ** 2)


def _delivered(batches: Floats, straggle_probs: Floats, alive: list[int]) -> Floats:
    """Return [K] each worker's part of the samples that are delivered; next to nothing of one that is gone."""
    rates = np.full_like(batches, _LEAST_RATE)
    rates[alive] = np.clip(1.0 - straggle_probs[alive], _LEAST_RATE, 1.0)
    return batches * rates / (batches @ rates)


def _far(values: Floats, others: Floats) -> bool:
    return bool(np.any(np.abs(np.log(values / others)) > np.log1p(_WORTHWHILE)))
