"""Why a worker is slow: its time per sample, per step and per byte, its tail and its pauses, from its newest steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from torch_qgc.errors import PlanError
from torch_qgc.job.change import ChangeTest
from torch_qgc.job.line import Interval, Line, fit_line
from torch_qgc.job.pace import Pace
from torch_qgc.job.pauses import Pauses, find_pauses, share_of
from torch_qgc.planner.checks import Floats, Mask
from torch_qgc.planner.delays import DelayModel, Empirical
from torch_qgc.planner.goodness import choose_model

__all__ = ["CAUSES", "Estimate", "Measurements"]

#: What may make a worker slow, in the order of `Estimate.parts_s`.
CAUSES = ("compute", "link", "tail", "pauses")

# A worker has a cause if a part of its steps is longer than that of others by this share of a usual step.
_NOTICEABLE = 0.25

# Steps of one batch size from which their own tail is known well enough to leave those of other sizes out.
_ENOUGH = 16


@dataclass(frozen=True, kw_only=True, eq=False)
class Estimate:
    """What a worker's newest steps say about it.

    An ordinary step, one without a pause, with a batch of B mean batches and n bytes of payloads usually takes

        fixed_s + per_batch_s B   of its own,   and   latency_s + per_byte_s n   on the link:

    medians, so that neither tails nor pauses fool them. Intervals are at 95 %; `job.line.fit_line` says how. As long
    as only one batch size was seen, all of the median is attributed to per_batch_s, and fixed_s has the interval from
    0 to the median's upper bound; bytes and latency_s alike. Intervals reach to infinity with fewer than 6 steps.
    They are for the median over the steps at hand: a drift is followed half of the memory late, and if the batch
    changed meanwhile, a part of the drift counts as its effect.

    Attributes:
        per_batch_s: seconds per mean batch. fixed_s: seconds per step.
        per_byte_s: seconds per byte. latency_s: seconds per step.
        down_s: seconds that results are on the way to it, usually; no part of the above.
        pauses: how often it pauses, and how long.
        steps: newest steps it rests on.
        recent: [4, steps] batch, bytes, own and link seconds of each, oldest first.
        ordinary: [steps] which are without a pause.
        quick: lower quartiles of own and link seconds, as lines over batch and bytes.
    """

    per_batch_s: Interval
    fixed_s: Interval
    per_byte_s: Interval
    latency_s: Interval
    down_s: float
    pauses: Pauses
    steps: int
    recent: Floats = field(repr=False)
    ordinary: Mask = field(repr=False)
    quick: tuple[Line, Line] = field(repr=False)

    def usual_s(self, batch: float, nbytes: float) -> float:
        """Return the median time of an ordinary step, in seconds."""
        own, link = self._lines()
        return float(own.at(batch) + link.at(nbytes))

    def usual_own_s(self, batch: float) -> float:
        """Return the part of that which is not for the link."""
        return float(self._lines()[0].at(batch))

    def times_s(self, batch: float, nbytes: float) -> Floats:
        """Return [steps] what the whole of each step would have taken: only its usual time changes with its size."""
        own, link = self._lines()
        return _moved(self.recent, own, link, batch, nbytes)

    def delays(self, batch: float, nbytes: float) -> DelayModel:
        """Return the model of the time of a whole step for a given batch and number of bytes.

        Without pauses it is the shifted exponential or the log-normal, by goodness of fit; else, or if neither fits,
        the times as they were recorded. If enough steps had about this batch, it rests on them alone, so that nothing
        is assumed of how the tail grows with the batch; until then it is taken not to.
        """
        times = self.times_s(batch, nbytes)
        near = np.abs(self.recent[0] - batch) <= 0.1 * batch
        if np.count_nonzero(near) < _ENOUGH:
            near = np.ones_like(near)
        return choose_model(times[near]) if self.ordinary[near].all() else Empirical(delays_s=times[near])

    def parts_s(self, batch: float, nbytes: float) -> Floats:
        """Return the mean time of a step by cause [4], in seconds.

        Compute and link are what its quick steps take (lower quartiles), the latter with results, the tail is by how
        much the mean of ordinary steps exceeds that, and pauses are what they add to the mean.
        """
        own, link = (line.at(size) for line, size in zip(self.quick, (batch, nbytes)))
        times = self.times_s(batch, nbytes)
        ordinary = times[self.ordinary].mean()
        return np.array([own, link + self.down_s, max(ordinary - own - link, 0.0), max(times.mean() - ordinary, 0.0)])

    def _lines(self) -> tuple[Line, Line]:
        return Line(self.per_batch_s, self.fixed_s), Line(self.per_byte_s, self.latency_s)


class Measurements:
    """The newest steps of all workers, and what they say.

    A worker whose newest steps differ from those before by more than chance has changed: what came before is
    forgotten, so that estimates follow at once. `job.change.ChangeTest` is exact for steps that are exchangeable, and a
    change of batch or bytes is not mistaken for a change of the worker.

    Args:
        workers: K.
        memory: newest steps that count, >= 16 (more: narrower intervals, slower to follow a drift).
        false_alarm: chance that a step of a worker which has not changed raises an alarm, at most (more: changes are
            noticed sooner).
    Raises:
        PlanError: out of these ranges.
    """

    def __init__(self, workers: int, *, memory: int = 64, false_alarm: float = 1e-4) -> None:
        if workers < 1 or memory < 16 or not 0.0 < false_alarm < 1.0:
            raise PlanError(
                f"expected workers >= 1, memory >= 16 steps and false_alarm in (0, 1), got {workers}, {memory} and "
                f"{false_alarm}"
            )
        self._memory = memory
        self._test = ChangeTest(memory, 2, false_alarm)
        # Twice as long as the memory, so that it is moved to the front only now and then.
        self._log = np.zeros((workers, 4, 2 * memory))
        self._span = [(0, 0)] * workers  # first and end of what counts
        self._results = [Pace() for _ in range(workers)]

    def note(
        self,
        worker: int,
        *,
        batch: float,
        own_s: float,
        link_s: float,
        nbytes: int,
        down_s: float | None = None,
    ) -> bool:
        """Enter a step; return whether the worker has changed.

        Args:
            worker: in [0, K).
            batch: samples in units of the mean batch, > 0.
            own_s: seconds for loading, forward, backward and update, without waiting for others.
            link_s: seconds that its payloads were on the way, >= 0.
            nbytes: of these payloads together.
            down_s: seconds that the result before was on the way to it; None: not known.
        Raises:
            PlanError: not such numbers; nothing is entered.
        """
        if not (0 <= worker < len(self._span) and batch > 0 and min(own_s, link_s, nbytes) >= 0) or not math.isfinite(
            batch + own_s + link_s + nbytes
        ):
            raise PlanError(
                f"worker {worker} of {len(self._span)}: expected batch > 0 and finite seconds and bytes >= 0, got "
                f"batch={batch}, own_s={own_s}, link_s={link_s}, nbytes={nbytes}"
            )
        log, (first, end) = self._log[worker], self._span[worker]
        if end == log.shape[1]:
            log[:, : end - first] = log[:, first:end]
            first, end = 0, end - first
        log[:, end] = batch, nbytes, own_s, link_s
        first, end = max(first, end + 1 - self._memory), end + 1
        steps = log[:, first:end]
        if down_s is not None:
            self._results[worker].note(down_s)
        newest = self._test.newest(np.maximum(steps[:2], 1e-9), steps[2:])
        self._span[worker] = (end - newest if newest else first), end
        return newest > 0

    def forget(self, worker: int) -> None:
        """Start anew with a worker, for instance because another machine has taken its place."""
        self._span[worker] = 0, 0
        self._results[worker] = Pace()

    def steps(self, worker: int) -> int:
        """Return how many steps an estimate would rest on."""
        first, end = self._span[worker]
        return end - first

    def estimate(self, worker: int) -> Estimate:
        """Return what a worker's newest steps say.

        Raises:
            PlanError: it has none.
        """
        first, end = self._span[worker]
        if first == end:
            raise PlanError(f"worker {worker}: expected at least one step to estimate from, got none; ask again later")
        recent = self._log[worker, :, first:end].copy()
        batch, nbytes, own_s, link_s = recent
        # Quartiles first: they are right even if half of the steps have pauses, and medians are not.
        quick = fit_line(batch, own_s, 0.25), fit_line(nbytes, link_s, 0.25)
        times = _moved(recent, *quick, float(batch[-1]), float(nbytes[-1]))
        paused = find_pauses(times)
        own = fit_line(batch[~paused], own_s[~paused])
        link = fit_line(nbytes[~paused], link_s[~paused])
        count = int(np.count_nonzero(paused))
        length_s = float(np.median(times[paused]) - np.median(times[~paused])) if count else 0.0
        return Estimate(
            per_batch_s=own.slope,
            fixed_s=own.intercept,
            per_byte_s=link.slope,
            latency_s=link.intercept,
            down_s=self._results[worker].usual_s or 0.0,
            pauses=Pauses(share_of(count, len(times)), length_s),
            steps=len(times),
            recent=recent,
            ordinary=~paused,
            quick=quick,
        )

    def causes(self, estimates: Mapping[int, Estimate] | None = None) -> list[str]:
        """Return the cause of every worker's slowness, see `cause`; "none" for workers without steps.

        Args:
            estimates: of the workers to be compared, where they are at hand; default: of all that have steps.
        """
        if estimates is None:
            estimates = {k: self.estimate(k) for k in range(len(self._span)) if self.steps(k)}
        causes = ["none"] * len(self._span)
        if not estimates:
            return causes
        nbytes = float(np.median([np.median(estimate.recent[1]) for estimate in estimates.values()]))
        parts = np.array([estimate.parts_s(1.0, nbytes) for estimate in estimates.values()])
        excess = parts - np.median(parts, axis=0)
        noticeable = _NOTICEABLE * float(np.median(parts.sum(axis=1)))
        for worker, row in zip(estimates, excess):
            if row.max() > noticeable:
                causes[worker] = CAUSES[int(row.argmax())]
        return causes

    def cause(self, worker: int) -> str:
        """Return why a worker is slower than the others: "none", "compute", "link", "tail" or "pauses".

        The mean time of a step with the mean batch and the job's usual number of bytes is split into these four
        parts (`Estimate.parts_s`), and each is compared with the median over workers. The cause is the part with the
        largest excess, if that is more than a quarter of the usual step, the median over workers of the whole.
        """
        return self.causes()[worker]


def _moved(recent: Floats, own: Line, link: Line, batch: float, nbytes: float) -> Floats:
    """Return [steps] own and link seconds together, shifted along the lines to one batch and number of bytes."""
    batches, sizes, own_s, link_s = recent
    times = own_s + link_s + own.at(batch) - own.at(batches) + link.at(nbytes) - link.at(sizes)
    return np.asarray(np.maximum(times, 0.0))
