"""One worker's side of the protocol: what it says, has heard, and what is wrong. No sockets, clock or threads."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from torch_qgc.errors import ConfigError, JobFailed, PlanError, QGCError, Refused
from torch_qgc.job.courses import Course, Courses
from torch_qgc.job.events import Event, Trace, silent
from torch_qgc.logs import logger
from torch_qgc.protocol import messages
from torch_qgc.protocol.contract import JobSpec
from torch_qgc.worker.gathering import Gathering
from torch_qgc.worker.inbox import Inbox
from torch_qgc.worker.spoken import Message, Spoken

__all__ = ["Outgoing", "Session"]

Frame = Any
#: An aggregator, and the message for it.
Outgoing = tuple[int, Message]


class Session:
    """One life of one worker in a job, at all of the job's aggregators.

    Args:
        endpoints: of aggregator 0, 1, ...; chunk c belongs to aggregator c mod their number.
        spec: the job.
        worker: this worker's number, 0 .. K-1.
        courses: the plan that the job begins with, which worker 0 tells the aggregators, and what becomes of it.
        first_step: the first step this worker has no result of.
        inbox_bytes: results of future steps kept at most.
        silence_s: an aggregator from which nothing was heard for that long is gone.
        trace: is told what happens.
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        spec: JobSpec,
        worker: int,
        courses: Courses,
        *,
        first_step: int = 0,
        inbox_bytes: int = 512 << 20,
        silence_s: float = 30.0,
        trace: Trace = silent,
    ) -> None:
        self.spec, self.worker, self.endpoints = spec, worker, list(endpoints)
        self.inbox = Inbox(spec, first_step, inbox_bytes)
        self.gathering = Gathering(spec)
        self.error: QGCError | None = None
        self.welcomed: set[int] = set()  # aggregators that have let this worker in
        self.failed_at: set[int] = set()  # aggregators that have said that the job has failed
        self.left_at: set[int] = set()  # aggregators that have heard this worker's goodbye
        self.gone: dict[int, str] = {}  # workers that are not in now, and how they went
        self.verify_steps: set[int] = set()  # before which replicas are to be compared
        self.agreed_step = -1  # the newest before which all were found equal
        self.loop_ends: dict[int, messages.Marked] = {}  # what is known of the ends of loops, by number
        self.begun_step = -1  # the newest that anybody has begun, as aggregator 0 says, which knows of loops' ends, too
        self.rejections: list[str] = []
        self.bytes_sent = self.bytes_received = 0
        self._spoken = [Spoken() for _ in endpoints]
        self._unheld: list[Outgoing] = []  # hellos, and what needs none
        self._fault: Message | None = None
        self._left = False
        self._newest_plan = 0  # as the welcomes have said
        self._name = secrets.token_hex(16)
        self._connected: set[int] = set()
        self.courses = courses
        self._silence_s, self._trace = silence_s, trace
        self._silent_s = [0.0] * len(self.endpoints)
        self._last_tick_s: float | None = None
        for aggregator in range(len(self.endpoints)):
            self._hello(aggregator)

    # --- what this worker says ----------------------------------------------------------------------------

    def say(self, message: messages.FromWorker, aggregator: int | None = None) -> None:
        """Queue a message for one aggregator, or for all."""
        self._say(
            [messages.encode_message(message)], range(len(self.endpoints)) if aggregator is None else [aggregator]
        )

    def begin(self, begin: messages.Begin) -> None:
        """Queue the announcement of a step."""
        for spoken in self._spoken:
            spoken.step_begins(begin.step)
        self._say([messages.encode_message(begin)], range(len(self.endpoints)), begin.step)

    def fault(self, step: int, text: str) -> None:
        """Queue the report of an error, which needs no Hello; on a new connection it is said again."""
        header = messages.encode_message(messages.Fault(step, messages.as_text(text), self._name))
        self._fault = fault = lambda: [header]
        self._unheld += [(aggregator, fault) for aggregator in range(len(self.endpoints))]

    def push(
        self, step: int, chunk: int, bits: int, payload: Callable[[], tuple[Frame, float, float]], spent_s: float = 0.0
    ) -> None:
        """Queue a chunk; `payload` returns (buffer, rounding variance, squared norm) when it is sent."""

        def frames() -> list[Frame]:
            buffer, variance, squared_norm = payload()
            return [messages.encode_message(messages.Push(step, chunk, bits, variance, squared_norm, spent_s)), buffer]

        self._spoken[chunk % len(self.endpoints)].say(frames, step)

    def gather(self, content: bytes) -> None:
        """Queue content for all workers; all of theirs comes when every live one has done so."""
        for frames in self.gathering.begin(content):
            self._say(frames, [0])

    def leave(self) -> None:
        """Queue a goodbye, once."""
        if not self._left:
            self._left = True
            self.say(messages.Bye(self.inbox.step))

    def fetch(self, chunks: Iterable[int]) -> None:
        """Ask again for results of the step at hand."""
        step, count = self.inbox.step, len(self.endpoints)
        for chunk in chunks:
            self._say([messages.encode_message(messages.Fetch(step, chunk))], [chunk % count], step)

    @property
    def expects_goodbye(self) -> bool:
        """It is in the job at every aggregator, and that goes on: whoever just goes away is taken for lost."""
        return len(self.welcomed) == len(self.endpoints) and self.error is None and self._fault is None

    @property
    def unheard(self) -> int:
        """Messages that were said, and may have to be said again."""
        return sum(len(spoken) for spoken in self._spoken)

    def drain(self) -> list[Outgoing]:
        """Return what is to be sent now, in order."""
        unheld, self._unheld = self._unheld, []
        return unheld + [(a, message) for a, spoken in enumerate(self._spoken) for message in spoken.drain()]

    def _say(self, frames: list[Frame], aggregators: Iterable[int], step: int | None = None) -> None:
        for aggregator in aggregators:
            self._spoken[aggregator].say(lambda: frames, step)

    def _hello(self, aggregator: int) -> None:
        """Introduce this worker on a new connection, or say again what has ended its part in the job."""
        attempt = self._spoken[aggregator].hello()
        if self._fault is not None:
            self._unheld.append((aggregator, self._fault))
            return
        hello = messages.Hello(
            version=messages.PROTOCOL_VERSION,
            worker=self.worker,
            step=self.inbox.step,
            spec=self.spec,
            session=self._name,
            attempt=attempt,
            since=self._spoken[aggregator].since,
        )
        plan = self.courses.first.plan
        frames = [messages.encode_message(hello), *([plan.to_json().encode()] if self.worker == 0 else [])]
        self._unheld.append((aggregator, lambda: frames))

    def connected(self, aggregator: int) -> None:
        """Note that a connection stands. Any but the first begins with a Hello: what was on its way may be lost."""
        if aggregator in self._connected and self.error is None:
            self._hello(aggregator)
        self._connected.add(aggregator)

    # --- what it hears ------------------------------------------------------------------------------------

    def receive(self, aggregator: int, frames: list[Frame], now: float) -> None:
        """Take one message.

        Raises:
            ProtocolError: it is none of this job.
        """
        self._silent_s[aggregator] = 0.0
        self.bytes_received += sum(memoryview(frame).nbytes for frame in frames)
        match message := messages.decode_from_aggregator(frames[0]):
            case messages.Result(step, chunk):
                kept = self.inbox.put(message, frames[1:])
                self._note_begun(aggregator, step)
                self._trace(Event(now, "result", step, chunk, self.worker, {"kept": kept}))
            case messages.Started(step, elapsed_s):
                self._note_begun(aggregator, step)
                self.inbox.start(step, now - elapsed_s)
            case messages.Welcome(_, attempt, heard, _, plan):
                self._come_back(message, frames[1:])  # also if it is passed over: what follows it is not
                if self._spoken[aggregator].answered(attempt, heard):
                    self.welcomed.add(aggregator)
                    self._newest_plan = max(self._newest_plan, plan)
                    self._trace(Event(now, "joined", self.inbox.step, None, self.worker, {"aggregator": aggregator}))
            case messages.Introduce():
                if self._spoken[aggregator].let_in:  # else it is being answered
                    self._hello(aggregator)
            case messages.Refusal(text):
                self.end(Refused(text))
            case messages.Failed(text):
                self.failed_at.add(aggregator)
                self.end(JobFailed(text))
            case messages.Gone(worker, how):
                self._note_gone(aggregator, worker, how, now)
            case messages.Verify(step):
                self.verify_steps = {s for s in self.verify_steps if s >= self.inbox.step} | {step}
            case messages.Replan():
                course = Course.from_frames(message, frames[1:], self.spec)
                if self.courses.add(course):
                    self._trace(Event(now, "replan", course.from_step, None, self.worker, {"version": course.version}))
                    self._pass_on(course, range(1, len(self.endpoints)))
            case messages.Agreed(step):
                self.agreed_step = max(self.agreed_step, step)
            case messages.Marked(number):
                self.loop_ends[number] = message
                self.loop_ends.pop(number - 4, None)
            case messages.Met() | messages.Gathered() | messages.Awaited():
                self.gathering.hear(message, frames[1:])
            case messages.Rejected(text):
                self.rejections = [*self.rejections[-99:], text]
                logger.warning("worker %d: an aggregator has dropped a message: %s", self.worker, text)
                if aggregator not in self.welcomed:
                    self.end(Refused(text))
            case messages.Ping(heard):
                self._spoken[aggregator].heard(heard)

    def _come_back(self, welcome: messages.Welcome, rest: list[Frame]) -> None:
        """Take over what a running job has begun with, where a later checkpoint than its first one says otherwise.

        Raises:
            ProtocolError, PlanError: what follows the header is no plan.
        """
        plan = messages.plan_frame(rest, "the job's first plan") if rest else self.courses.first.plan
        spec = msgspec.structs.replace(self.spec, first_step=welcome.first_step, plan_digest=plan.digest())
        if spec == self.spec:
            return
        if self.welcomed:
            self.end(JobFailed(f"worker {self.worker}: the aggregators do not agree on what the job has begun with"))
            return
        try:
            spec.validate(plan)
            self.courses.come_back(plan, spec.first_step)
        except (ConfigError, PlanError) as error:
            self.end(Refused(f"worker {self.worker} cannot come back to the job: {error}"))
            return
        self.spec = spec

    @property
    def is_in(self) -> bool:
        """Every aggregator has let this worker in, and it knows the plans that were made before that."""
        return len(self.welcomed) == len(self.endpoints) and self.courses.newest.version >= self._newest_plan

    def _pass_on(self, course: Course, aggregators: Iterable[int]) -> None:
        """Tell other aggregators of a plan that aggregator 0 has made."""
        self._say(course.to_frames(), aggregators)

    def tick(self, now: float) -> None:
        """Notice aggregators that are silent.

        Only time in which this is called counts as silence: a suspended process must not blame its peer.
        """
        passed_s = 0.0 if self._last_tick_s is None else min(now - self._last_tick_s, 1.0)
        self._last_tick_s = now
        for aggregator, endpoint in enumerate(self.endpoints):
            self._silent_s[aggregator] += passed_s
            if self._silent_s[aggregator] > self._silence_s:
                self.end(
                    JobFailed(
                        f"worker {self.worker}: nothing heard from the aggregator at {endpoint} for "
                        f"{self._silent_s[aggregator]:.0f} s: its process (a child of rank 0 by default) or the "
                        "network is gone"
                    )
                )

    def end(self, error: QGCError) -> None:
        """Note that this worker cannot go on; the first reason stays."""
        self.error = self.error or error

    def _note_begun(self, aggregator: int, step: int) -> None:
        """Note that somebody has begun a step; from another aggregator it may come before a loop's end is known."""
        if aggregator == 0:
            self.begun_step = max(self.begun_step, step)

    def _note_gone(self, aggregator: int, worker: int, how: str, now: float) -> None:
        if worker == self.worker:
            if how == "left":
                self.left_at.add(aggregator)
            return
        if self.gone.get(worker, "back") == how:
            return  # another aggregator has said so, or this one on another connection
        self._trace(Event(now, "gone", self.inbox.step, None, worker, {"how": how}))
        if how == "back":
            del self.gone[worker]
            logger.warning("worker %d is back", worker)
            return
        self.gone[worker] = how
        if how == "lost":
            logger.warning(
                "worker %d was lost: its process or its network is gone. The others go on, its share of the data "
                "spread over them (QGCState(on_loss='fail') ends the job instead)",
                worker,
            )

    def __repr__(self) -> str:
        if self.error is not None:
            phase = f"ended: {str(self.error)!r:.300}"
        else:
            phase = "in the job" if self.is_in else "joining"
        let_in = f"let in by {len(self.welcomed)} of {len(self.endpoints)} aggregators"
        return f"Session(worker {self.worker}, {phase}, {let_in}, {self.inbox!r})"
