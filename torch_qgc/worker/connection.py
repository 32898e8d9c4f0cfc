"""What the training thread does with its session: say, and wait. Whatever moves messages and time stands behind it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from torch_qgc.errors import CollectiveFailed, JobFailed
from torch_qgc.logs import logger
from torch_qgc.protocol import messages
from torch_qgc.protocol.contract import JobSpec
from torch_qgc.worker.inbox import ClosedRound
from torch_qgc.worker.session import Session

__all__ = ["Carrier", "Connection"]

REFETCH_S, MOST_REFETCH_S = 10.0, 60.0  # results that do not come are asked for, ever less often
GOODBYE_S = 5.0  # for which a goodbye may take to be heard

SAY_EVERY_S = 10.0  # after so long it is said whom a gathering waits for


class Carrier(Protocol):
    """Whatever carries a session's messages: a background thread over sockets, or a virtual network in tests."""

    def now(self) -> float:
        """Return the time in seconds."""

    def locked(self) -> contextlib.AbstractContextManager[Any]:
        """Keep the session from changing."""

    def wait_for(self, condition: Callable[[], object], timeout_s: float) -> bool:
        """Let messages come, with the lock held by the caller, until a condition holds or time is up."""

    def flush(self) -> None:
        """Send what the session has to say."""

    def close(self) -> None:
        """Send what is left, and release everything; twice does no harm."""


class Connection:
    """One worker's connection to its job.

    Args:
        session: its side of the protocol.
        carrier: makes a session's messages travel.
    """

    def __init__(self, session: Session, carrier: Carrier) -> None:
        self._session, self._carrier = session, carrier
        self._began_at_s = 0.0  # the newest step

    @property
    def spec(self) -> JobSpec:
        """The job."""
        return self._session.spec

    @property
    def session(self) -> Session:
        """What was said and heard; for reading."""
        return self._session

    def now(self) -> float:
        """Return the time in seconds on the carrier's clock."""
        return self._carrier.now()

    def join(self, timeout_s: float) -> None:
        """Wait until every aggregator has let this worker in.

        Raises:
            Refused: an aggregator does not accept it; the message names the remedy.
            JobFailed: no answer in time.
        """
        session = self._session
        with self._carrier.locked():
            self._carrier.flush()
            self._carrier.wait_for(lambda: session.error or session.is_in, timeout_s)
            self._check()
            if not session.is_in:
                silent = [e for a, e in enumerate(session.endpoints) if a not in session.welcomed]
                missing = silent or session.endpoints[:1]  # which has not told all plans
                raise JobFailed(
                    f"worker {session.worker}: no answer from the aggregator at {', '.join(missing)} within "
                    f"{timeout_s:.0f} s: is it running and reachable, and has worker 0 joined?"
                )

    def begin(self, step: int, *, thin: bool = False, **facts: Any) -> None:
        """Announce the step's forward pass to every aggregator; `facts` are those of `messages.Begin`."""
        with self._carrier.locked():
            self._began_at_s = self._carrier.now()
            plan = self._session.courses.at(step).version
            self._session.begin(messages.Begin(step, thin, plan=plan, **facts))
            self._carrier.flush()

    def push(self, step: int, chunk: int, bits: int, payload: Callable[[], tuple[Any, float, float]]) -> None:
        """Send a chunk.

        Args:
            payload: returns (buffer, rounding variance, squared norm); called when it is sent, so that it may wait for
                a device to finish.
        """
        with self._carrier.locked():
            self._session.push(step, chunk, bits, payload, self._carrier.now() - self._began_at_s)
            self._carrier.flush()

    def send_hash(self, step: int, parts: dict[str, str]) -> None:
        """State what this replica is before `step`, by name; aggregator 0 compares."""
        self._say(messages.Hash(step, parts), 0)

    def verify_asked(self, step: int) -> bool:
        """Tell whether aggregator 0 wants replicas to be compared before this step."""
        with self._carrier.locked():
            return step in self._session.verify_steps

    def say_goodbye(self, step: int, timeout_s: float) -> None:
        """Wait until all have left, and what was stated last was compared, at most timeout_s.

        Raises:
            JobFailed: replicas differ, or others make steps that this one does not.
        """
        session = self._session
        with self._carrier.locked():
            self._check()
            session.leave()
            self._carrier.flush()
            self._carrier.wait_for(lambda: session.error or session.agreed_step >= step, timeout_s)
            self._check()

    def mark(self, number: int, step: int, owed: int) -> None:
        """Tell where this worker's loop has ended."""
        self._say(messages.Mark(number, step, owed), 0)

    def loop_makes(self, number: int, step: int, timeout_s: float) -> bool:
        """Wait until it is known whether others make a step in a loop, at most timeout_s; False if it stays unknown.

        Raises:
            JobFailed, Refused: the job has ended.
        """
        ends = self._session.loop_ends  # changes while this waits

        def goes_on() -> bool:
            return number in ends and ends[number].step > step

        self._wait_for(lambda: goes_on() or (number in ends and ends[number].ended), timeout_s)
        return goes_on()

    def loop_ended_before(self, number: int, step: int, timeout_s: float) -> bool:
        """Wait until others have begun a step, or their loop has ended before it; tell whether that has.

        If neither has happened after timeout_s, the answer is no.

        Raises:
            JobFailed, Refused: the job has ended.
        """
        session = self._session

        def ended() -> bool:
            end = session.loop_ends.get(number)
            return end is not None and end.ended and end.step <= step

        self._wait_for(lambda: ended() or session.begun_step >= step, timeout_s)
        return ended()

    def gather(self, content: bytes, timeout_s: float) -> dict[int, bytes]:
        """Hand content to all workers; return that of each in the job, once all that are alive have called this, too.

        Raises:
            ConfigError: the content is too large.
            CollectiveFailed: somebody has not called it in time. The call still counts, as each worker's n-th call
                belongs to the others' n-th.
            JobFailed, Refused: the job has ended.
        """
        session, until_s = self._session, self._carrier.now() + timeout_s
        with self._carrier.locked():
            if session.gathering.said:  # the call before has run out of time
                self._meet(until_s, timeout_s)
            session.gather(content)
            return self._meet(until_s, timeout_s)

    def _meet(self, until_s: float, timeout_s: float) -> dict[int, bytes]:
        """Take all of the gathering at hand."""
        session, gathering, carrier = self._session, self._session.gathering, self._carrier
        said_at_s = carrier.now()
        while True:
            heard = self._hear_of_gathering(min(REFETCH_S, until_s - carrier.now()))
            if gathering.complete:
                return gathering.end()
            if carrier.now() >= until_s:
                raise CollectiveFailed(
                    f"worker {session.worker}: workers {gathering.awaited or 'unknown'} have not made call "
                    f"{gathering.number + 1} of those that all make together within {timeout_s:g} s: every rank must "
                    "make it (a loop body does not run for replayed steps), or the timeout is too short for a late one"
                )
            if carrier.now() - said_at_s >= SAY_EVERY_S and gathering.awaited:
                said_at_s = carrier.now()
                logger.warning("worker %d waits for workers %s in a collective", session.worker, gathering.awaited)
            if gathering.asks or not heard:
                session.say(gathering.take(), 0)

    def _hear_of_gathering(self, timeout_s: float) -> bool:
        """Wait for news of the gathering at hand, and tell whether there are any."""
        session, gathering, before = self._session, self._session.gathering, self._session.gathering.news
        self._carrier.flush()
        self._carrier.wait_for(lambda: session.error or gathering.asks or gathering.news > before, max(timeout_s, 0.0))
        if not gathering.complete:  # else whatever came after it is for the next call to say
            self._check()
        return gathering.news > before

    def send_fault(self, step: int, text: str, timeout_s: float = 5.0) -> bool:
        """Make the job end on every rank: wait until every aggregator has heard it; tell whether all have.

        It waits because the process may end right after it, and with it whatever was to be sent.
        """
        session = self._session
        with self._carrier.locked():
            session.fault(step, text)
            self._carrier.flush()
            return self._carrier.wait_for(lambda: len(session.failed_at) == len(session.endpoints), timeout_s)

    def closed(self, step: int) -> bool:
        """Tell whether a step has closed: all its results are in, or one of a later step.

        Raises:
            JobFailed, Refused: the job has ended.
        """
        with self._carrier.locked():
            self._check()
            return self._session.inbox.closed(step)

    def results(self) -> Iterator[ClosedRound]:
        """Yield the results of the step at hand, each as soon as it is in, until all are; then go on to the next step.

        Raises:
            JobFailed, Refused: the job has ended.
        """
        session, inbox = self._session, self._session.inbox
        taken: set[int] = set()
        self._fetch(inbox.forgotten())
        asked_s, patience_s = self.now(), REFETCH_S
        while len(taken) < session.spec.chunks:
            with self._carrier.locked():
                self._check()
                left_s = asked_s + patience_s - self.now()
                self._carrier.wait_for(lambda: session.error or inbox.ready(taken), max(left_s, 0.0))
                ready = inbox.ready(taken)
                if not ready and self.now() >= asked_s + patience_s:
                    self._fetch(inbox.missing())
                    asked_s, patience_s = self.now(), min(2 * patience_s, MOST_REFETCH_S)
            for result in ready:
                taken.add(result.chunk)
                yield result
        with self._carrier.locked():
            inbox.advance()

    def _fetch(self, chunks: list[int]) -> None:
        if chunks:
            with self._carrier.locked():
                self._session.fetch(chunks)
                self._carrier.flush()

    def wait_closed(self, step: int, timeout_s: float) -> bool:
        """Wait until a step has closed without this worker, at most timeout_s; tell whether it has."""
        return self._wait_for(lambda: self._session.inbox.closed(step), timeout_s)

    def elapsed_s(self, step: int) -> float | None:
        """Return for how long the step's clock has been running, None if nobody has begun it."""
        with self._carrier.locked():
            return self._session.inbox.elapsed_s(step, self._carrier.now())

    def close(self) -> None:
        """Say goodbye, and wait a moment until it is heard."""
        session, everybody = self._session, len(self._session.endpoints)
        with self._carrier.locked():
            session.leave()
            self._carrier.flush()
            if session.expects_goodbye:
                self._carrier.wait_for(lambda: session.error or len(session.left_at) == everybody, GOODBYE_S)
        self._carrier.close()

    def _say(self, message: messages.FromWorker, aggregator: int | None = None) -> None:
        with self._carrier.locked():
            self._session.say(message, aggregator)
            self._carrier.flush()

    def _wait_for(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        """Wait until a condition holds or time is up, and tell whether it does; raise if the job has ended."""
        with self._carrier.locked():
            self._carrier.wait_for(lambda: self._session.error or condition(), timeout_s)
            self._check()
            return condition()

    def _check(self) -> None:
        error = self._session.error
        if error is not None:
            # A fresh exception each time: the training thread may raise it in more than one place.
            raise type(error)(*error.args)

    def __repr__(self) -> str:
        return f"Connection({self._session!r})"
