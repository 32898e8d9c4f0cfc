"""The virtual clock: which workers are in which round, and when a round closes. Payloads play no part here."""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol, cast

import numpy as np
from numpy.typing import ArrayLike

from torch_qgc.errors import ConfigError
from torch_qgc.job.courses import Courses
from torch_qgc.job.pace import Pace
from torch_qgc.job.rounds import Fate, Rounds
from torch_qgc.planner import Plan
from torch_qgc.planner.checks import Floats, Mask
from torch_qgc.planner.delays import DelayModel
from torch_qgc.protocol.contract import ClosingRule

__all__ = ["Arrivals", "Contribution", "DelaySource", "IndependentRounds", "JobRounds", "RoundOutcome"]

_STREAM = 0xDE1A  # makes the random numbers of the delays others than those of the data
_ARRIVAL, _JOIN = "arrival", "join"  # events of workers; of two at the same time the first in the alphabet is first


class Contribution(NamedTuple):
    """A payload in a round: which worker sent it, for which step it was made, and how many of its slices arrived."""

    worker: int
    made_for: int
    slices: int


@dataclass(frozen=True)
class RoundOutcome:
    """A closed round.

    Attributes:
        began: workers that began to compute a gradient at this step's parameters, whether it was in time or not.
        contributions: payloads of the round in decode order: by worker, then by the step they were made for.
        rates: [K] expected contributions per round that decoding takes; None stands for the plan's 1 - p_k.
        closed_at_s: when the round closed, in seconds on the virtual clock.
    """

    began: list[int]
    contributions: list[Contribution]
    rates: Floats | None
    closed_at_s: float


class Arrivals(Protocol):
    """The virtual clock of one run. It can be pickled between two steps."""

    def close(self, step: int) -> RoundOutcome:
        """Let time pass until the step closes. Steps are asked for in order."""


class DelaySource:
    """The delays of all workers in a step. Every scheme that is compared gets the same ones.

    Args:
        delays: a model from which each step draws, or recorded seconds [rounds, K], of which step t takes row
            t mod rounds; inf means that the payload never arrives.
        workers: K.
        seed: the seed of the run.
    Raises:
        ConfigError: the delays are not those of K workers.
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
    """The rounds of Song & Choi: every worker begins every step, and is in it if its delay is at most the deadline.

    A step ends when all active workers are in, or at the deadline. Late payloads are lost.

    Args:
        delays: the delays of the run.
        deadline_s: the deadline of a step; None waits for all active workers.
        active: [K] bool, the workers that have a share of the data. The others are not waited for.
        done: [M], rising: a worker has finished slice i of its payload after done[i] times its delay. Payloads in one
            piece have [1.0].
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
        # Inactive workers count as arrived if they come before the deadline: some decode rules count arrivals.
        slices = np.sum(ready <= limit_s, axis=1)
        self._now += duration
        return RoundOutcome(
            began=self._active.tolist(),
            contributions=[Contribution(int(k), step, int(slices[k])) for k in np.flatnonzero(slices)],
            rates=None if self._deadline_s is not None else np.ones(len(slices)),
            closed_at_s=self._now,
        )


class JobRounds:
    """The rounds of a running job: a late worker misses the steps that close meanwhile, and rates are measured.

    `torch_qgc.job.rounds.Rounds` decides who is in and when a round closes, as it does in training. This class supplies
    the events: when a worker begins a step, and when its payload arrives. A worker computes, sends, replays in no time
    the steps that closed without it, and then joins the open step or waits for the next one, as `ClosingRule` says.
    The delay of a worker is all the time between its BEGIN and the arrival of its payload.
    Deaths, restarts, and chunks that arrive one by one are not simulated.

    Args:
        delays: the delays of the run; a worker that begins step t takes its delay of draw t.
        rule: when rounds close, and what becomes of late payloads.
        active: [K] bool, the workers that take part in the job.
        plan: the plan, for its shares and for 1 - p_k as the prior of the measured rates.
        log_steps: steps that the job's log holds; a worker that lacks nearly as many is waited for.
    """

    def __init__(self, delays: DelaySource, rule: ClosingRule, active: Mask, plan: Plan, *, log_steps: int) -> None:
        self._delays, self._courses = delays, Courses(rule, plan)
        self._rounds: Rounds[None] = Rounds(self._courses, log_steps=log_steps)
        for worker in np.flatnonzero(~active).tolist():
            self._rounds.leave(worker, 0.0)
        self._idle = set(np.flatnonzero(active).tolist())  # workers that compute nothing until the next step opens
        self._pace = {k: Pace() for k in self._idle}
        self._events: list[tuple[float, str, int, int]] = []  # heap of (time, kind, worker, step)
        self._now = 0.0
        self._began: list[int] = []  # workers that began the open step
        self._delays_s: Floats = np.empty(0)  # their delays in it

    def close(self, step: int) -> RoundOutcome:
        """See `Arrivals`."""
        self._began, self._delays_s = [], self._delays.draw(step)
        coming, self._idle = sorted(self._idle), set()
        for worker in coming:
            self._come(worker)
        while not (closed := self._rounds.close_due(self._now)):
            self._go_on(step)
        (closing,) = closed
        contributions = [Contribution(worker, made_for, 1) for worker, made_for, _ in closing.payloads]
        return RoundOutcome(sorted(self._began), contributions, closing.rates, self._now)

    def _go_on(self, step: int) -> None:
        """Go to the next event or to the deadline, whichever is first; at the same time the event is first."""
        deadline_s = self._rounds.next_deadline_s(self._now)
        if not self._events and math.isinf(deadline_s):
            raise ConfigError(f"delays: step {step} waits for a payload that never comes: lower the quorum")
        if not self._events or deadline_s < self._events[0][0]:
            self._now = deadline_s
            return
        self._now, kind, worker, event_step = heapq.heappop(self._events)
        if kind == _ARRIVAL:
            self._arrive(worker, event_step)
        elif event_step == step and worker in self._idle:
            self._begin(worker)

    def _come(self, worker: int) -> None:
        """Let a worker that has nothing to compute begin the open step, or wait for the next one."""
        step = self._rounds.newest
        began_at_s = self._rounds.began_at_s.get(step)
        patience_s = self._courses.wait_before_joining_s(
            step,
            None if began_at_s is None else self._now - began_at_s,
            self._pace[worker].usual_s,
        )
        if patience_s > 0.0:
            self._idle.add(worker)
            heapq.heappush(self._events, (self._now + patience_s, _JOIN, worker, step))
        else:
            self._begin(worker)

    def _begin(self, worker: int) -> None:
        step = self._rounds.newest
        self._rounds.begin(worker, step, self._now)
        self._idle.discard(worker)
        self._began.append(worker)
        delay_s = float(self._delays_s[worker])
        self._pace[worker].note(delay_s)
        if math.isfinite(delay_s):
            heapq.heappush(self._events, (self._now + delay_s, _ARRIVAL, worker, step))

    def _arrive(self, worker: int, made_for: int) -> None:
        if self._rounds.arrive(worker, made_for, 0, None, self._now) is Fate.IN_TIME:
            self._idle.add(worker)
        else:
            self._come(worker)
