"""Who is in, when a round closes, what is folded, and what arrivals weigh: the one implementation of a job's rules.

No clock and no sockets in here. The aggregator drives it with messages and its own clock, the simulator with a virtual
one, tests with recorded arrivals.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from torch_qgc.errors import ProtocolError
from torch_qgc.job.courses import Courses
from torch_qgc.job.events import Event, Trace, silent
from torch_qgc.job.pace import Pace
from torch_qgc.job.rates import ArrivalRates
from torch_qgc.job.roster import Roster

__all__ = ["Closing", "Fate", "Rounds"]

T = TypeVar("T")


class Fate(enum.Enum):
    """What becomes of a payload that has arrived."""

    IN_TIME = "in time"
    FOLDED = "folded"  # late: enters the open round
    DROPPED = "dropped"  # too late
    REPEATED = "repeated"  # it was delivered before


@dataclass(frozen=True)
class Closing(Generic[T]):
    """A round that has closed, and everything its decoding needs.

    Attributes:
        step, chunk: which round.
        payloads: (worker, the step it was made for, payload), in decode order: by worker, then by step.
        counts: [K] int64 payloads of each worker.
        rates: [K] contributions per round r_k that the coefficients m_k / r_k take. The shares of the dead are spread
            over the living: the r_k are multiplied by the living's part of all shares.
        alive: [K] bool, who was in the job, or had sent what is in the round before it was lost.
        waited_for_all: everybody alive is in it; its r_k are 1 and it says nothing about rates.
        extended_s: seconds that it was open after its deadline, for its quorum or for a worker about to fall off the
            log.
    """

    step: int
    chunk: int
    payloads: list[tuple[int, int, T]]
    counts: NDArray[np.int64]
    rates: NDArray[np.float64]
    alive: NDArray[np.bool_]
    waited_for_all: bool
    extended_s: float


@dataclass
class _Round(Generic[T]):
    """One chunk of one step while it is open."""

    step: int
    payloads: dict[tuple[int, int], T] = field(default_factory=dict)  # (worker, the step it was made for)
    present: set[int] = field(default_factory=set)  # workers whose payload for this very step is in
    before: frozenset[int] | None = None  # those that were in the step before; None: there was none


@dataclass
class _Begun:
    """The newest step that a worker computes or has computed."""

    step: int
    at_s: float
    delivered: int = 0  # chunks of it that have come


class Rounds(Generic[T]):
    """The open rounds of some chunks of one job; there is one per chunk. `T` is whatever is kept of a payload.

    Args:
        courses: the plan, when rounds close, and how both change.
        chunks: which chunks.
        log_steps: results that are kept. A worker that is about to lack one that is not kept is waited for.
        join_by_s: when workers that have not joined are no longer waited for.
        trace: is told what happens.
    """

    def __init__(
        self,
        courses: Courses,
        *,
        chunks: Sequence[int] = (0,),
        log_steps: int,
        join_by_s: float = math.inf,
        trace: Trace = silent,
    ) -> None:
        plan, first_step = courses.at(courses.first_step).plan, courses.first_step
        workers = plan.num_workers
        self.courses, self.rule, self.chunks = courses, courses.rule, list(chunks)
        self.roster = Roster(workers, first_step, join_by_s)
        self.rates = ArrivalRates(1.0 - plan.straggle_probs, chunks=len(self.chunks))
        self._log_steps, self._trace = log_steps, trace
        self._open: dict[int, _Round[T]] = {chunk: _Round(first_step) for chunk in self.chunks}
        self._column = {chunk: i for i, chunk in enumerate(self.chunks)}
        self._last = np.full((workers, len(self.chunks)), -1, dtype=np.int64)  # newest step that each delivered
        self.began_at_s: dict[int, float] = {}  # of the steps that are open
        self._begun: dict[int, _Begun] = {}  # by worker
        self._pace = [Pace() for _ in range(workers)]  # from BEGIN to the last payload here

    # --- where the job is -------------------------------------------------------------------------------

    @property
    def oldest(self) -> int:
        """The oldest step that is open for some chunk."""
        return min(r.step for r in self._open.values())

    @property
    def newest(self) -> int:
        """The newest step that is open for some chunk."""
        return max(r.step for r in self._open.values())

    @property
    def newest_begun(self) -> int:
        """The newest step that a worker has begun; the one before the job's first if none has."""
        return max([*self.began_at_s, self.newest - 1])

    def is_made(self, step: int) -> bool:
        """Tell whether somebody has sent a payload for a step, which may have closed since."""
        return self.newest > step or any(r.present for r in self._open.values() if r.step == step)

    def open_step(self, chunk: int) -> int:
        """Return the step that is open for a chunk.

        Raises:
            ProtocolError: the chunk is not one of these.
        """
        if chunk not in self._open:
            raise ProtocolError(f"expected one of the {len(self.chunks)} chunks that are aggregated here, got {chunk}")
        return self._open[chunk].step

    def waits_for_all(self, step: int) -> bool:
        """Tell whether a step closes only when every live worker is in."""
        return self.courses.waits_for_all(step)

    def present(self, chunk: int) -> AbstractSet[int]:
        """Return the workers whose payload for the open step of a chunk is in."""
        return self._open[chunk].present

    # --- what happens -----------------------------------------------------------------------------------

    def join(self, worker: int, step: int, now: float) -> None:
        """Enter a worker whose first missing result is that of `step`."""
        self.roster.join(worker, step)
        self._trace(Event(now, "join", step, None, worker, {}))

    def leave(self, worker: int, now: float, how: str = "left") -> None:
        """Take out a worker that has left or was lost; rounds that waited for it alone are due."""
        self.roster.remove(worker)
        self._trace(Event(now, how, None, None, worker, {}))

    def away(self, worker: int, now: float) -> None:
        """Note that a worker's connection is gone. Steps that wait for all go on waiting for it; others do not."""
        self.roster.away(worker, now)
        self._trace(Event(now, "away", None, None, worker, {}))

    def begin(self, worker: int, step: int, now: float) -> bool:
        """Note that a worker computes a step; tell whether it is the first to, which starts the step's clock.

        Raises:
            ProtocolError: the step before has not closed for every chunk.
        """
        if step > self.oldest:
            raise ProtocolError(f"worker {worker} begins step {step}, but step {self.oldest} has not closed yet")
        self.roster.advance(worker, step)
        self._begun[worker] = _Begun(step, now)
        self._trace(Event(now, "begin", step, None, worker, {}))
        if step < self.oldest or step in self.began_at_s:
            return False
        self.began_at_s[step] = now
        return True

    def take(self, worker: int, step: int, now: float) -> None:
        """Note that a worker takes the result of a step that has closed without it.

        Raises:
            ProtocolError: the step has not closed for every chunk.
        """
        if step >= self.oldest:
            raise ProtocolError(
                f"worker {worker} takes the result of step {step}, but step {self.oldest} has not closed yet"
            )
        self.roster.advance(worker, step)
        self._trace(Event(now, "take", step, None, worker, {}))

    def arrive(self, worker: int, made_for: int, chunk: int, payload: T, now: float) -> Fate:
        """Take a payload.

        Raises:
            ProtocolError: not one of these chunks, or a step that cannot have begun.
        """
        open_step = self.open_step(chunk)
        current, column = self._open[chunk], self._column[chunk]
        if made_for > open_step:
            raise ProtocolError(
                f"worker {worker}, step {made_for}, chunk {chunk}: a payload for a step that cannot have begun; step "
                f"{open_step} is open"
            )
        if made_for <= self._last[worker, column]:
            return Fate.REPEATED
        self._last[worker, column] = made_for
        self._note_pace(worker, made_for, now)
        staleness = open_step - made_for
        if staleness == 0:
            fate = Fate.IN_TIME
            current.present.add(worker)
        elif self.waits_for_all(made_for):
            fate = Fate.DROPPED  # the worker counted as lost when that step closed: the others have stood in for it
        elif self.rule.late == "fold" and staleness <= self.rule.max_staleness:
            fate = Fate.FOLDED
        else:
            fate = Fate.DROPPED
        if fate is not Fate.DROPPED:
            current.payloads[worker, made_for] = payload
        self._trace(Event(now, "arrive", made_for, chunk, worker, {"fate": fate.value}))
        return fate

    # --- closing ----------------------------------------------------------------------------------------

    def close_due(self, now: float, chunks: Iterable[int] | None = None) -> list[Closing[T]]:
        """Close the rounds that are due now, of all chunks or of those that something has happened to."""
        awaited, here = self.roster.awaited, self.roster.here
        chunks = self.chunks if chunks is None else chunks
        due = [c for c in chunks if self._is_due(self._open[c], now, awaited, here)]
        return [self._close(chunk, now) for chunk in due]

    def waited_for(self) -> tuple[int, frozenset[int]]:
        """Return the oldest open step, and the workers that it is open for: alive, and not in it."""
        present = [r.present for r in self._open.values() if r.step == self.oldest]
        awaited = self.roster.awaited if self.waits_for_all(self.oldest) else self.roster.here
        return self.oldest, awaited - frozenset.intersection(*map(frozenset, present))

    def next_deadline_s(self, now: float) -> float:
        """Return when the next deadline is; infinite if there is none ahead.

        A deadline that has passed waits for its quorum, which only an arrival can complete.
        """
        deadlines_s = [(began, self.courses.deadline_s(step)) for step, began in self.began_at_s.items()]
        ahead = [began + deadline_s for began, deadline_s in deadlines_s if deadline_s is not None]
        return min((at for at in ahead if at > now), default=math.inf)

    def _is_due(self, current: _Round[T], now: float, awaited: AbstractSet[int], here: AbstractSet[int]) -> bool:
        present = current.present
        began_at_s, deadline_s = self.began_at_s.get(current.step), self.courses.deadline_s(current.step)
        alive = awaited if deadline_s is None else here
        if alive and alive <= present:
            return True
        if began_at_s is None or deadline_s is None:
            return False
        if len(present) < min(self.rule.quorum, max(len(alive), 1)):
            return False
        if not self.roster.behind(current.step - self._log_steps + 2) <= present:  # they would fall off the log
            return False
        by_s = began_at_s + deadline_s
        if now >= by_s:
            return True
        return self.rule.awaits == "begun" and not any(
            self._can_make(current, worker, by_s) for worker in alive - present
        )

    def _can_make(self, current: _Round[T], worker: int, by_s: float) -> bool:
        """Tell whether the payload of a worker that is not in yet may come by then, as far as can be told."""
        begun = self._begun.get(worker)
        if begun is None or begun.step < current.step:
            about_to_begin = current.before is None or worker in current.before  # else busy with an older step
            return about_to_begin or self._grows_too_old(current, worker, begun)
        usual_s = self._pace[worker].usual_s
        return usual_s is None or begun.at_s + usual_s <= by_s

    def _grows_too_old(self, current: _Round[T], worker: int, begun: _Begun | None) -> bool:
        """Tell whether what a worker computes would be dropped if this round closed without it."""
        return (
            begun is not None
            and begun.delivered < len(self.chunks)
            and self.rule.late == "fold"
            and current.step - begun.step == self.rule.max_staleness
        )

    def _note_pace(self, worker: int, made_for: int, now: float) -> None:
        begun = self._begun.get(worker)
        if begun is not None and begun.step == made_for:
            begun.delivered += 1
            if begun.delivered == len(self.chunks):
                self._pace[worker].note(now - begun.at_s)

    def _close(self, chunk: int, now: float) -> Closing[T]:
        current, column = self._open[chunk], self._column[chunk]
        course, deadline_s = self.courses.at(current.step), self.courses.deadline_s(current.step)
        waits, shares = deadline_s is None, course.plan.shares
        if self.courses.changes_at(current.step):
            self.rates.expect(column, *self.courses.rates_at(current.step))
        payloads = [(worker, made_for, kept) for (worker, made_for), kept in sorted(current.payloads.items(), key=_key)]
        counts = np.bincount([worker for worker, _, _ in payloads], minlength=len(shares)).astype(np.int64)
        alive = self.roster.alive | (counts > 0)  # who is in it answers for its own share, whatever became of it since
        rates = np.ones(len(alive)) if waits else self.rates.rates(column)
        rates = rates * max(float(shares[alive].sum()), 1e-9)
        extended_s = 0.0
        if deadline_s is not None:
            self.rates.update(column, counts, alive)
            if current.step in self.began_at_s:
                extended_s = max(now - self.began_at_s[current.step] - deadline_s, 0.0)
        self._open[chunk] = _Round(current.step + 1, before=frozenset(current.present))
        for past in [step for step in self.began_at_s if step < self.oldest]:
            del self.began_at_s[past]
        detail = {"counts": counts, "rates": rates, "alive": alive, "extended_s": extended_s}
        self._trace(Event(now, "close", current.step, chunk, None, detail))
        return Closing(current.step, chunk, payloads, counts, rates, alive, waits, extended_s)

    def __repr__(self) -> str:
        steps = f"step {self.oldest}" if self.oldest == self.newest else f"steps {self.oldest} to {self.newest}"
        return (
            f"Rounds({steps} open, {len(self.chunks)} chunks, {int(self.roster.alive.sum())} of "
            f"{len(self.roster.alive)} workers alive)"
        )


def _key(entry: tuple[tuple[int, int], object]) -> tuple[int, int]:
    return entry[0]
