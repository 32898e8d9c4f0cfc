"""Who is in which round, and when it closes: the virtual clock. Nothing here knows what payloads hold."""

from __future__ import annotations

import heapq
import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple, Protocol, cast

import numpy as np
from numpy.typing import ArrayLike

from torch_qgc.errors import ConfigError
from torch_qgc.job.rounds import Fate, Rounds
from torch_qgc.planner import Plan
from torch_qgc.planner.checks import Floats, Mask
from torch_qgc.planner.delays import DelayModel
from torch_qgc.protocol.contract import ClosingRule

__all__ = ["Arrivals", "Contribution", "DelaySource", "IndependentRounds", "JobRounds", "RoundOutcome"]

_STREAM = 0xDE1A  # keeps the delays' random numbers apart from the data's


class Contribution(NamedTuple):
    """A payload in a round: whose, made for which step, and how many of its slices came through."""

    worker: int
    made_for: int
    slices: int


@dataclass(frozen=True)
class RoundOutcome:
    """A closed round.

    Attributes:
        began: workers that began to compute a gradient at this step's parameters, in time or not.
        contributions: in decode order: by worker, then by the step they were made for.
        rates: [K] expected contributions per round to decode with; None: the plan's 1 - p_k.
        closed_at_s: seconds on the virtual clock.
    """

    began: list[int]
    contributions: list[Contribution]
    rates: Floats | None
    closed_at_s: float


class Arrivals(Protocol):
    """The virtual clock of one run; it pickles between two steps."""

    def close(self, step: int) -> RoundOutcome:
        """Let time pass until the step closes; steps are asked for in order."""


class DelaySource:
    """Delays of all workers in a step: the same for every scheme that is compared, and drawn afresh for each step.

    Args:
        delays: a model, or recorded seconds [rounds, K] that are taken row by row, again and again; inf: never comes.
        workers: K.
        seed: of the run.
    Raises:
        ConfigError: they are not for K workers.
    """

    def __init__(self, delays: DelayModel | ArrayLike, workers: int, seed: int) -> None:
        self._workers, self._seed = workers, seed
        self._model: DelayModel | None = None
        if hasattr(delays, "sample"):
            self._model = cast(DelayModel, delays)
            drawn = self._model.sample(np.random.default_rng(0), 1)
            if drawn.shape not in ((1,), (1, workers)):
                raise ConfigError(
                    f"delays: expected a model of one worker or of all {workers}, got one that draws shape "
                    f"{drawn.shape[1:]}: give its parameters as scalars or as [{workers}]"
                )
        else:
            self._recorded = np.asarray(delays, dtype=np.float64)
            if self._recorded.ndim != 2 or self._recorded.shape[1:] != (workers,) or not np.all(self._recorded >= 0):
                raise ConfigError(
                    f"delays: expected a delay model or seconds >= 0 of shape [rounds, {workers}], got shape "
                    f"{self._recorded.shape}"
                )

    def draw(self, step: int) -> Floats:
        """Return [K] seconds."""
        if self._model is None:
            return np.asarray(self._recorded[step % len(self._recorded)])
        rng = np.random.default_rng([_STREAM, self._seed, step])
        drawn = self._model.sample(rng, 1)
        return np.asarray(drawn[0] if drawn.ndim == 2 else self._model.sample(rng, self._workers))


class IndependentRounds:
    """Song & Choi's rounds: everybody begins every step, and is in it if its delay is at most the deadline.

    A step takes until all are in, or the deadline. What is late is lost.

    Args:
        delays: of the run.
        deadline_s: None waits for all.
        active: [K] bool; the others (with no share of the data) are not waited for.
        done: [M] at which multiple of its delay a worker is through with each slice of its payload, rising; [1.0] for
            payloads in one piece.
    """

    def __init__(self, delays: DelaySource, deadline_s: float | None, active: Mask, done: Floats) -> None:
        self._delays, self._deadline_s, self._done = delays, deadline_s, done
        self._active = np.flatnonzero(active)
        self._now = 0.0

    def close(self, step: int) -> RoundOutcome:
        """See `Arrivals`."""
        ready = self._delays.draw(step)[:, None] * self._done  # [K, M]
        limit_s = math.inf if self._deadline_s is None else self._deadline_s
        duration = min(float(ready[self._active].max(initial=0.0)), limit_s)
        if not math.isfinite(duration):
            raise ConfigError(f"delays: step {step} waits for a payload that never comes: set a deadline")
        # Who is not waited for may come until the deadline: some rules count arrivals, whatever they hold.
        slices = np.sum(ready <= limit_s, axis=1)
        self._now += duration
        return RoundOutcome(
            began=self._active.tolist(),
            contributions=[Contribution(int(k), step, int(slices[k])) for k in np.flatnonzero(slices)],
            rates=None if self._deadline_s is not None else np.ones(len(slices)),
            closed_at_s=self._now,
        )


class JobRounds:
    """Rounds of a running job: who is late misses the steps it is late for, and rates are measured.

    The job's own rules (`torch_qgc.job.rounds.Rounds`, `ClosingRule`) under a virtual clock; what is simulated is when
    workers come and when payloads arrive. A worker computes, sends, replays in no time what closed without it, and
    joins the open step as in training. A delay is all the time between BEGIN and the payload's arrival.
    Not simulated: deaths, restarts, chunks that arrive one by one.

    Args:
        delays: of the run; a worker that begins step t takes the t-th draw.
        rule: when rounds close, and what becomes of late payloads.
        active: [K] bool; the others are no part of the job.
        plan: its shares and its prior rates 1 - p_k.
        log_steps: a worker that is that far behind is waited for.
    """

    def __init__(self, delays: DelaySource, rule: ClosingRule, active: Mask, plan: Plan, *, log_steps: int) -> None:
        self._delays, self._rule = delays, rule
        self._rounds: Rounds[None] = Rounds(rule, plan.shares, 1.0 - plan.straggle_probs, log_steps=log_steps)
        for worker in np.flatnonzero(~active).tolist():
            self._rounds.leave(worker, 0.0)
        self._waiting = set(np.flatnonzero(active).tolist())  # not computing: sent already, or wait for the next step
        self._own_times_s: dict[int, deque[float]] = {k: deque(maxlen=16) for k in self._waiting}
        self._events: list[tuple[float, int, int, int]] = []  # (time, kind, worker, step)
        self._now = 0.0
        self._began: list[int] = []  # in the open step
        self._delays_s: Floats = np.empty(0)  # of the open step

    def close(self, step: int) -> RoundOutcome:
        """See `Arrivals`."""
        self._began, self._delays_s = [], self._delays.draw(step)
        coming, self._waiting = sorted(self._waiting), set()
        for worker in coming:
            self._come(worker)
        while not (closed := self._rounds.close_due(self._now)):
            if not self._events:
                raise ConfigError(f"delays: step {step} waits for a payload that never comes: lower the quorum")
            self._now, kind, worker, event_step = heapq.heappop(self._events)
            if kind == _ARRIVAL:
                self._arrive(worker, event_step)
            elif kind == _JOIN and event_step == step and worker in self._waiting:
                self._begin(worker)
        (closing,) = closed
        contributions = [Contribution(worker, made_for, 1) for worker, made_for, _ in closing.payloads]
        return RoundOutcome(sorted(self._began), contributions, closing.rates, self._now)

    def _come(self, worker: int) -> None:
        """Let a worker that has nothing to do begin the open step, or wait for the next one."""
        step, times_s = self._rounds.newest, self._own_times_s[worker]
        began_at_s = self._rounds.began_at_s.get(step)
        patience_s = self._rule.wait_before_joining_s(
            step,
            None if began_at_s is None else self._now - began_at_s,
            statistics.median(times_s) if times_s else None,
        )
        if patience_s > 0.0:
            self._waiting.add(worker)
            heapq.heappush(self._events, (self._now + patience_s, _JOIN, worker, step))
        else:
            self._begin(worker)

    def _begin(self, worker: int) -> None:
        step = self._rounds.newest
        if self._rounds.begin(worker, step, self._now) and self._rule.deadline_s is not None:
            heapq.heappush(self._events, (self._now + self._rule.deadline_s, _DEADLINE, -1, step))
        self._waiting.discard(worker)
        self._began.append(worker)
        delay_s = float(self._delays_s[worker])
        self._own_times_s[worker].append(delay_s)
        if math.isfinite(delay_s):
            heapq.heappush(self._events, (self._now + delay_s, _ARRIVAL, worker, step))

    def _arrive(self, worker: int, made_for: int) -> None:
        if self._rounds.arrive(worker, made_for, 0, None, self._now) is Fate.IN_TIME:
            self._waiting.add(worker)
        else:
            self._come(worker)


_ARRIVAL, _JOIN, _DEADLINE = range(3)  # in this order when they happen at the same time
