"""The virtual clock: which workers are in which round, and when a round closes. Payloads play no part here."""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from torch_qgc.errors import ConfigError
from torch_qgc.job.courses import Course, Courses
from torch_qgc.job.events import Trace, silent
from torch_qgc.job.pace import Pace
from torch_qgc.job.replanning import replan_if_due
from torch_qgc.job.rounds import Rounds
from torch_qgc.job.steering import Steering
from torch_qgc.job.stopwatch import Stopwatch
from torch_qgc.planner import Plan
from torch_qgc.planner.checks import Floats, Mask
from torch_qgc.protocol.contract import ClosingRule
from torch_qgc.protocol.messages import Begin, Push
from torch_qgc.simulator.delays import DelaySource
from torch_qgc.simulator.machines import Demand, Load, Times

__all__ = ["Arrivals", "Contribution", "IndependentRounds", "JobRounds", "RoundOutcome"]

# Events of workers; of two at the same time the first in the alphabet is first.
_ARRIVAL = "arrival"  # a payload is at the aggregator
_BEGIN = "begin"  # a BEGIN is
_DONE = "done"  # a worker has computed its gradient
_JOIN = "join"  # a worker has waited long enough for the open step to close
_RESULT = "result"  # a result is at a worker


class Contribution(NamedTuple):
    """A payload in a round: which worker sent it, for which step it was made, and how many of its slices arrived."""

    worker: int
    made_for: int
    slices: int


@dataclass(frozen=True)
class RoundOutcome:
    """A closed round.

    Attributes:
        began: workers that began to compute while the round was open, each as often as it did.
        wanted: workers that began this very step, or may still do so since its result has not reached them yet: their
            gradients at this step's parameters may be in this or a later round.
        contributions: payloads of the round in decode order: by worker, then by the step they were made for.
        rates: [K] expected contributions per round that decoding takes; None stands for the plan's 1 - p_k.
        closed_at_s: when the round closed, in seconds on the virtual clock.
    """

    began: list[int]
    wanted: list[int]
    contributions: list[Contribution]
    rates: Floats | None
    closed_at_s: float


class Arrivals(Protocol):
    """The virtual clock of one run. It can be pickled between two steps."""

    @property
    def courses(self) -> Courses | None:
        """What holds from which step on, in a running job; None: the scheme holds for all steps."""

    def close(self, step: int) -> RoundOutcome:
        """Let time pass until the step closes. Steps are asked for in order."""


class IndependentRounds:
    """The rounds of Song & Choi: every worker begins every step, and is in it if its delay is at most the deadline.

    A step ends when all active workers are in, or at the deadline, and the next one begins when all have the result.
    Late payloads are lost.

    Args:
        delays: the delays of the run.
        deadline_s: the deadline of a step; None waits for all active workers.
        active: [K] bool, the workers that have a share of the data. The others are not waited for.
        done: [M], rising: a worker has finished slice i of its payload after done[i] times its delay. Payloads in one
            piece have [1.0].
        load: batches and sizes.
    """

    courses = None

    def __init__(self, delays: DelaySource, deadline_s: float | None, active: Mask, done: Floats, load: Load) -> None:
        self._delays, self._deadline_s, self._done, self._load = delays, deadline_s, done, load
        self._active = np.flatnonzero(active)
        self._now = 0.0

    def close(self, step: int) -> RoundOutcome:
        """See `Arrivals`."""
        times = self._delays.draw(step, self._load)
        ready = (times.own_s + times.up_s)[:, None] * self._done  # [K, M]
        limit_s = math.inf if self._deadline_s is None else self._deadline_s
        duration = min(float(ready[self._active].max(initial=0.0)), limit_s)
        if not math.isfinite(duration):
            raise ConfigError(f"delays: step {step} waits for a payload that never comes: set a deadline")
        # Inactive workers count as arrived if they come before the deadline: some decode rules count arrivals.
        slices = np.sum(ready <= limit_s, axis=1)
        self._now += duration + float(times.down_s[self._active].max(initial=0.0))
        return RoundOutcome(
            began=self._active.tolist(),
            wanted=self._active.tolist(),
            contributions=[Contribution(int(k), step, int(slices[k])) for k in np.flatnonzero(slices)],
            rates=None if self._deadline_s is not None else np.ones(len(slices)),
            closed_at_s=self._now,
        )


class JobRounds:
    """The rounds of a running job: a late worker misses the steps that close meanwhile, and rates are measured.

    `torch_qgc.job.rounds.Rounds` decides who is in and when a round closes, as it does in training. This class supplies
    the events: when a worker begins a step, and when its payload arrives. A worker computes, hands its payload to its
    link, replays in no time the steps whose results it has meanwhile, and then joins the first step whose result it
    lacks or waits for the next one, as `ClosingRule` says. A link carries one message after the other, so a worker's
    BEGIN may come after a payload that is still under way, and a worker that a result has not reached yet may begin a
    step that has closed already.
    With `steering` the job plans anew as a running one does, from what its messages would say of time and size. Of the
    workers' quantization it knows what is typical, not what payloads have lost, so that the clock does not depend on
    what is computed. Deaths, restarts, and chunks that arrive one by one are not simulated.

    Args:
        delays: the delays of the run; a worker that begins step t takes its times of draw t.
        rule: when rounds close, and what becomes of late payloads.
        active: [K] bool, the workers that take part in the job.
        plan: what the job begins with: shares, 1 - p_k as the prior of the measured rates, batches and bits.
        demand: what a step by a plan asks of the machines.
        log_steps: steps that the job's log holds; a worker that lacks nearly as many is waited for.
        steering: decides about new plans; None: the plan stays as it is.
        trace: is told what happens, as in a real job.
    Attributes:
        courses: what holds from which step on.
    """

    def __init__(
        self,
        delays: DelaySource,
        rule: ClosingRule,
        active: Mask,
        plan: Plan,
        *,
        demand: Demand,
        log_steps: int,
        steering: Steering | None = None,
        trace: Trace = silent,
    ) -> None:
        self._delays, self.courses, self._demand = delays, Courses(rule, plan), demand
        self._rounds: Rounds[None] = Rounds(self.courses, log_steps=log_steps, trace=trace)
        for worker in np.flatnonzero(~active).tolist():
            self._rounds.leave(worker, 0.0)
        self._steering, self._stopwatch = steering, Stopwatch(1)
        self._loads: dict[int, Load] = {}  # by the version of the course
        members: list[int] = np.flatnonzero(active).tolist()
        self._idle = set(members)  # workers that compute nothing until they get a result
        self._lacks = dict.fromkeys(members, 0)  # the first step whose result each worker lacks
        self._up_free_s, self._down_free_s = dict.fromkeys(members, 0.0), dict.fromkeys(members, 0.0)
        self._pace = {k: Pace() for k in members}
        self._events: list[tuple[float, str, int, int]] = []  # heap of (time, kind, worker, step)
        self._spent_s: dict[
            tuple[int, int], float
        ] = {}  # (worker, step) of payloads that are to come: seconds of its own
        self._now = 0.0
        self._began: list[tuple[int, int]] = []  # (worker, step), while the round was open
        self._times: Times  # of the open step

    def close(self, step: int) -> RoundOutcome:
        """See `Arrivals`."""
        self._began, self._times = [], self._draw(step)
        for worker in sorted(self._idle):
            if self._lacks[worker] == step:
                self._come(worker)
        while not (closed := self._rounds.close_due(self._now)):
            self._go_on(step)
        (closing,) = closed
        self._stopwatch.close(step, self._now)
        if self._steering is not None:
            replan_if_due(self._steering, self._rounds, self._replan)
        wanted = {worker for worker, begun in self._began if begun == step} | self._send_result(step)
        return RoundOutcome(
            began=sorted(worker for worker, _ in self._began),
            wanted=sorted(wanted),
            contributions=[Contribution(worker, made_for, 1) for worker, made_for, _ in closing.payloads],
            rates=closing.rates,
            closed_at_s=self._now,
        )

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
        elif kind == _BEGIN:
            self._announce(worker, event_step)
        elif kind == _DONE:
            self._idle.add(worker)
            if self._lacks[worker] > event_step:  # the result is here already: late
                self._come(worker)
        elif kind == _RESULT:
            self._lacks[worker] = event_step + 1
            if worker in self._idle:
                self._come(worker)
        elif event_step == self._lacks[worker] and worker in self._idle:
            self._begin(worker)

    def _come(self, worker: int) -> None:
        """Let an idle worker begin the first step whose result it lacks, or wait for that result."""
        step = self._lacks[worker]
        began_at_s = self._rounds.began_at_s.get(step)
        patience_s = self.courses.wait_before_joining_s(
            step,
            None if began_at_s is None else self._now - began_at_s,
            self._pace[worker].usual_s,
        )
        if patience_s > 0.0:
            heapq.heappush(self._events, (self._now + patience_s, _JOIN, worker, step))
        else:
            self._begin(worker)

    def _begin(self, worker: int) -> None:
        step = self._lacks[worker]
        self._idle.discard(worker)
        self._began.append((worker, step))
        times = self._times if step == self._rounds.newest else self._draw(step)
        free_s = self._up_free_s[worker]
        done_s = self._now + float(times.own_s[worker])
        arrival_s = self._up_free_s[worker] = max(done_s, free_s) + float(times.up_s[worker])
        self._pace[worker].note(arrival_s - self._now)
        if free_s > self._now:
            heapq.heappush(self._events, (free_s, _BEGIN, worker, step))
        else:
            self._announce(worker, step)
        if math.isfinite(arrival_s):
            self._spent_s[worker, step] = done_s - self._now
            heapq.heappush(self._events, (done_s, _DONE, worker, step))
            heapq.heappush(self._events, (arrival_s, _ARRIVAL, worker, step))

    def _announce(self, worker: int, step: int) -> None:
        """Let a worker's BEGIN come."""
        self._rounds.begin(worker, step, self._now)
        mean = self._demand.batch_size or 0
        samples = round(float(self._load(step).batches[worker]) * mean)
        begin = Begin(step, samples=samples, batch_size=mean, moves=self._demand.moves)
        self._stopwatch.begin(worker, begin, self._now)

    def _arrive(self, worker: int, step: int) -> None:
        """Let a worker's payload come."""
        self._rounds.arrive(worker, step, 0, None, self._now)
        bits = int(self.courses.at(step).plan.bits[worker])
        push = Push(step, 0, bits, variance=0.0, squared_norm=0.0, spent_s=self._spent_s.pop((worker, step)))
        timed = self._stopwatch.push(worker, push, self._now)
        if self._steering is not None and timed is not None:
            self._steering.note(worker, timed, bits)

    def _replan(self, plan: Plan, deadline_s: float | None) -> Course:
        plan.check_trainable()
        course = self.courses.following(plan, deadline_s, open_step=self._rounds.newest)
        self.courses.add(course)
        return course

    def _draw(self, step: int) -> Times:
        return self._delays.draw(step, self._load(step))

    def _load(self, step: int) -> Load:
        course = self.courses.at(step)
        if course.version not in self._loads:
            self._loads[course.version] = self._demand.load(course.plan)
        return self._loads[course.version]

    def _send_result(self, step: int) -> set[int]:
        """Send a result to all workers; return those that it has not reached at once."""
        under_way = set()
        for worker in self._lacks:
            free_s = max(self._now, self._down_free_s[worker])
            here_s = self._down_free_s[worker] = free_s + float(self._times.down_s[worker])
            if here_s > self._now:
                heapq.heappush(self._events, (here_s, _RESULT, worker, step))
                under_way.add(worker)
            else:
                self._lacks[worker] = step + 1
        return under_way
