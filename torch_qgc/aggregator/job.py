"""One job at its aggregator: messages of members drive the rounds, closed rounds are decoded, logged and sent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from torch_qgc.aggregator.agreement import Agreement
from torch_qgc.aggregator.decoder import RoundDecoder
from torch_qgc.aggregator.feed import Feed
from torch_qgc.aggregator.gathering import Gathering
from torch_qgc.aggregator.planning import Planning
from torch_qgc.errors import ProtocolError
from torch_qgc.job.courses import Course, Courses
from torch_qgc.job.events import Event, Trace, silent
from torch_qgc.job.log import ResultLog
from torch_qgc.job.progress import Progress
from torch_qgc.job.rounds import Closing, Fate, Rounds
from torch_qgc.kernels import payload_bytes
from torch_qgc.kernels.buffers import Payload
from torch_qgc.logs import logger
from torch_qgc.planner import Plan
from torch_qgc.planner.temperature import LEAST
from torch_qgc.protocol import messages
from torch_qgc.protocol.contract import JobSpec

__all__ = ["Job"]

Frame = Any  # bytes, memoryview or another buffer
EVERYBODY = None  # in the outbox: all workers that are in
LINGER_S = 120.0  # for which those that have not left may be silent when others have


class Job:
    """An aggregator's part of one job: the rounds of its chunks.

    What is to be sent collects in `outbox`, as (worker or EVERYBODY, frames), and results in `feed`.

    Args:
        spec, plan: the job, validated.
        index: which aggregator this is.
        now: seconds on the aggregator's clock at which the job was announced.
        threads: how many may decode.
        stats: counts of rounds, late, folded and dropped payloads, extensions, lost workers, bytes.
        trace: is told what happens.
    """

    def __init__(
        self,
        spec: JobSpec,
        plan: Plan,
        *,
        index: int,
        now: float,
        threads: int = 1,
        stats: Counter[str],
        trace: Trace = silent,
    ) -> None:
        self.spec, self.stats = spec, stats
        self.courses = Courses(spec.rule, plan, spec.first_step)
        self.failed: str | None = None
        self.outbox: list[tuple[int | None, list[Frame]]] = []
        self.log = ResultLog(spec.log_capacity(index))
        self.feed = Feed(self.log)
        self.rounds: Rounds[Payload] = Rounds(
            self.courses,
            chunks=spec.owned_by(index),
            log_steps=self.log.capacity,
            join_by_s=now + spec.join_timeout_s,
            trace=trace,
        )
        self._decides = index == 0  # about new plans
        self._temperatures: dict[int, float] = {}  # of the steps that are open
        self._planning = Planning(spec, plan, self.rounds, trace) if self._decides and spec.replan_every else None
        self._decoder = RoundDecoder(spec, self.courses, threads)
        self._agreement = Agreement()
        self._gathering = Gathering(spec)
        self._left_at: dict[int, int] = {}  # worker -> the step at which it has left in good order
        self._gone: dict[int, Literal["left", "lost"]] = {}  # workers that are not in
        self._has_been_late: set[int] = set()
        self._verify: messages.Verify | None = None  # the newest that was asked for
        self._progress = Progress(spec.stall_timeout_s)
        self._empty_since_s: float | None = None  # nobody is in
        self._abandoned = False
        self._trace = trace

    # --- members come and go ----------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        """A step has closed, so that a worker that comes now may have a checkpoint of this job."""
        return self.rounds.oldest > self.spec.first_step

    def oldest_for(self, worker: int, step: int) -> int:
        """Return the oldest step whose results can be had, for a worker that lacks those from `step` on.

        Raises:
            ProtocolError: they are no longer there, or there can be no results before it yet.
        """
        oldest, newest = max(self.log.oldest, self.spec.first_step), self.rounds.oldest
        if step < oldest:
            raise ProtocolError(
                f"worker {worker} needs the results from step {step} on, the log starts at {oldest}: "
                "load a checkpoint the other workers also start from, or raise log_steps / log_bytes"
            )
        if step > newest:
            raise ProtocolError(
                f"worker {worker} has results up to step {step - 1}, but step {newest} has not closed yet: is it a "
                "worker of another job?"
            )
        return oldest

    def join(self, hello: messages.Hello, heard: int | None, now: float) -> None:
        """Enter a worker, and tell it all that it may have missed.

        Args:
            hello: with the first step whose results it lacks.
            heard: messages of its session since the Hello before; None if the session is a new one.
        Raises:
            ProtocolError: see `oldest_for`.
        """
        worker, step = hello.worker, hello.step
        oldest = self.oldest_for(worker, step)
        if heard is None:
            self._gathering.forget(worker)
            self._agreement.forget(worker)
        self._welcome(hello, oldest, heard or 0)
        self._enter(worker, step, now)
        logger.info("worker %d joined at step %d", worker, step)
        for course in self.courses.changes if self._decides else ():
            self._announce(course, worker)
        for other, how in self._gone.items():
            self._send(worker, messages.Gone(other, how))
        for began, at_s in self.rounds.began_at_s.items():
            self._send(worker, messages.Started(began, now - at_s))
        for message in (*self._agreement.known(), self._verify):
            if message is not None:
                self._send(worker, message)
        self.feed.start(worker, step)
        self._settle_agreement(now)

    def _welcome(self, hello: messages.Hello, oldest: int, heard: int) -> None:
        first, newest = self.courses.first, self.courses.newest.version if self._decides else 0
        header = messages.Welcome(oldest, hello.attempt, heard, first.from_step, newest)
        known = hello.spec.plan_digest == self.spec.plan_digest
        plan = [] if known else [first.plan.to_json().encode()]
        self.outbox.append((hello.worker, [messages.encode_message(header), *plan]))

    def _enter(self, worker: int, step: int, now: float) -> None:
        self.rounds.join(worker, step, now)
        if self._gone.pop(worker, None) is not None:
            self._left_at.pop(worker, None)
            logger.info("worker %d is back", worker)
            self._send(EVERYBODY, messages.Gone(worker, "back"))

    def lost(self, worker: int, now: float) -> None:
        """Note that a worker's connection is gone: it is away, and lost if it does not come back soon."""
        self.feed.stop(worker)
        if worker in self._gone:
            return  # it has said goodbye, or was lost before
        self.rounds.away(worker, now)
        self._take_out_who_is_away(now)
        self.close_due(now)

    def _take_out_who_is_away(self, now: float) -> None:
        for worker in self.rounds.roster.away_for(self.spec.away_s if self.failed is None else 0.0, now):
            self._take_out(worker, now, "its process or its network is gone")

    def _take_out(self, worker: int, now: float, why: str) -> None:
        self.stats["lost_workers"] += 1
        self.rounds.leave(worker, now, "lost")
        self._gone[worker] = "lost"
        if self.failed is not None:
            return
        step = self.rounds.oldest
        logger.info("worker %d was lost in step %d: %s", worker, step, why)
        if self.spec.one_group and self.courses.warms_up(step):
            self.fail(
                f"worker {worker} was lost in step {step}: {why}. In the first {self.spec.rule.warmup_steps} steps all "
                "must take part (DDP rebuilds its buckets there): start the job again",
                now,
            )
        elif self.spec.rule.on_loss == "fail":
            self.fail(
                f"worker {worker} was lost in step {step}: {why} (on_loss='fail'; 'continue' lets the others go on)",
                now,
            )
        else:
            self._send(EVERYBODY, messages.Gone(worker, "lost"))
            self._agreement.forget(worker)
            self._settle_agreement(now)

    def fail(self, text: str, now: float) -> None:
        """End the job on every rank."""
        if self.failed is None:
            self.failed = messages.as_text(text)
            self._trace(Event(now, "fail", None, None, None, {"text": self.failed}))
            logger.info("the job has failed: %s", self.failed)
        self._send(EVERYBODY, messages.Failed(self.failed))

    # --- one message of a member ------------------------------------------------------------------------

    def receive(self, worker: int, message: messages.FromWorker, rest: Sequence[Frame], now: float) -> None:
        """Take one message. A worker that has said goodbye still hears what becomes of the job.

        Raises:
            ProtocolError, CodecError: it is dropped.
        """
        self._progress.note(worker)
        if self._gone.get(worker) == "lost":
            self._take_back(worker, now)
        match message:
            case messages.Begin():
                self._begin(worker, message, now)
                self.close_due(now)
            case messages.Push():
                self._push(worker, message, rest, now)
                self.close_due(now, [message.chunk])
            case messages.Fetch(step, chunk):
                self._fetch(worker, step, chunk)
            case messages.Hash(step, parts):
                if step > self.rounds.oldest:
                    raise ProtocolError(
                        f"worker {worker} states what it is before step {step}, but step {self.rounds.oldest} has not "
                        "closed yet"
                    )
                self._agreement.state(worker, step, parts)
                self._settle_agreement(now)
            case messages.Mark():
                self._agreement.mark(worker, message)
                self._settle_agreement(now)
            case messages.Gather() | messages.Take():
                if not self._decides:
                    raise ProtocolError(f"worker {worker} takes part in a gathering: it is aggregator 0 that gathers")
                answer = self._gathering.receive(worker, message, rest, self.rounds.roster.awaited)
                self.outbox += [(worker, frames) for frames in answer]
                self._settle_agreement(now)
            case messages.Replan():
                self._adopt(worker, message, rest, now)
            case messages.Bye(step):
                self._bye(worker, step, now)
                self.close_due(now)

    def _push(self, worker: int, push: messages.Push, rest: Sequence[Frame], now: float) -> None:
        where = f"worker {worker}, step {push.step}, chunk {push.chunk}"
        self.rounds.open_step(push.chunk)
        bits = self.courses.at(push.step).plan.bits[worker]
        if push.bits != bits:
            raise ProtocolError(f"{where}: expected {bits} bits as planned, got {push.bits}")
        numel = self.spec.chunk_span(push.chunk)[1]
        expected = payload_bytes(numel, push.bits)
        got = [memoryview(frame).nbytes for frame in rest]
        if got != [expected]:
            raise ProtocolError(
                f"{where}: expected one payload frame of {expected} bytes ({numel} coordinates at {push.bits} bits), "
                f"got {got}: is it truncated?"
            )
        fate = self.rounds.arrive(worker, push.step, push.chunk, Payload(rest[0], numel, push.bits), now)
        self.stats["bytes_received"] += expected
        if fate is Fate.REPEATED:
            self.stats["repeated"] += 1
            return
        if self._is_left(worker, push.step, now):
            return
        if self._planning is not None:
            self._planning.push(worker, push, now)
        if fate is not Fate.IN_TIME:
            self.stats["late"] += 1
            self.stats[fate.value] += 1

    def _fetch(self, worker: int, step: int, chunk: int) -> None:
        logged = self.log.get(step, chunk)
        if logged is not None:
            self.outbox.append((worker, logged))
        elif self.rounds.open_step(chunk) > step:
            raise ProtocolError(
                f"worker {worker} asks for step {step}, the log starts at {self.log.oldest}: "
                "raise log_steps / log_bytes"
            )

    # --- closing ----------------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Do what time brings: give up those who do not come, come back or move on, and close what is due."""
        for worker in self.rounds.roster.overdue(now):
            self._take_out(worker, now, f"it did not join within {self.spec.join_timeout_s:g} s")
        self._take_out_who_is_away(now)
        self._take_out_who_is_stuck(now)
        if self.rounds.roster.alive.any():
            self._empty_since_s = None
        elif self._empty_since_s is None:
            self._empty_since_s = now
        self._abandoned = self._empty_since_s is not None and now > self._empty_since_s + self.spec.join_timeout_s
        self.close_due(now)

    @property
    def finished(self) -> bool:
        """Nobody is in, or will come back: some have left in good order, it has failed, or all were lost long ago.

        Nor does it wait for ever for who does not leave although others have: they may be waiting for each other.
        """
        alive = self.rounds.roster.awaited
        if alive:
            return bool(self._left_at) and self._progress.quiet_s(alive) > LINGER_S
        return bool(self._left_at) or self.failed is not None or self._abandoned

    def close_due(self, now: float, chunks: Iterable[int] | None = None) -> None:
        """Decode, log and send the rounds that are due."""
        if self.failed is not None:
            return
        closings = self.rounds.close_due(now, chunks)
        for closing in closings:
            self._publish(closing, now)

    def plan_if_due(self, now: float) -> None:
        """Plan anew if it is time to: when results are on their way, so that workers compute meanwhile."""
        if self._planning is not None and self.failed is None:
            self._planning.plan_if_due(self.replan, now)

    def _take_out_who_is_stuck(self, now: float) -> None:
        """Name the workers that others have waited for for long, now and then, and give up those that do nothing."""
        step, workers = self.rounds.waited_for()
        if not self.rounds.is_made(step):  # nobody waits in it: all compute, or are between two steps, or at the end
            alive = self.rounds.roster.awaited
            workers = frozenset(self._agreement.awaited(step, alive) | self._gathering.awaited(alive))
        waited_s, stuck = self._progress.look(step, workers, now)
        if waited_s is not None:
            logger.warning("step %d waits for workers %s, for %.0f s by now", step, sorted(workers), waited_s)
        for worker in self.rounds.roster.joined.intersection(stuck):
            self._take_out(
                worker,
                now,
                f"the others have waited for it for {self.spec.stall_timeout_s:g} s, and its training thread has done "
                "nothing; Limits(stall_timeout_s=...) is how long it may",
            )

    def _take_back(self, worker: int, now: float) -> None:
        """Let a worker that was given up go on, if what it lacks is still there.

        Raises:
            ProtocolError: it is not, and the worker is told that it cannot go on.
        """
        step = self.rounds.roster.position(worker)
        try:
            self.oldest_for(worker, step)
        except ProtocolError as error:
            self._send(worker, messages.Refusal(messages.as_text(error)))
            raise
        self._enter(worker, step, now)

    def _publish(self, closing: Closing[Payload], now: float) -> None:
        decoded = self._decoder.decode(closing, self._temperatures.get(closing.step, LEAST))
        frames = decoded.frames
        if self._planning is not None:
            self._planning.close(closing, decoded, now)
        self.log.put(closing.step, closing.chunk, frames)
        self.feed.publish(closing.step, closing.chunk)
        self.stats["rounds"] += 1
        deadline_s = self.courses.deadline_s(closing.step)
        if deadline_s is not None and closing.extended_s > 0.5 * deadline_s:
            self.stats["extended"] += 1
            logger.info(
                "step %d, chunk %d was open %.2f s after its deadline: it waited for its quorum of %d, or for a worker "
                "that was about to fall off the log of %d steps",
                closing.step,
                closing.chunk,
                closing.extended_s,
                self.spec.rule.quorum,
                self.log.capacity,
            )

    # --- new plans --------------------------------------------------------------------------------------

    def replan(self, plan: Plan, deadline_s: float | None) -> Course:
        """Let a plan and a deadline hold from the first step on that no worker can have begun; of aggregator 0 alone.

        Raises:
            ConfigError: this job cannot train with the plan.
        """
        course = self.courses.following(plan, deadline_s, open_step=self.rounds.newest)
        course.check(self.spec)
        self.courses.add(course)
        self._announce(course, EVERYBODY)
        return course

    def _announce(self, course: Course, worker: int | None) -> None:
        self.outbox.append((worker, course.to_frames()))

    def _adopt(self, worker: int, replan: messages.Replan, rest: Sequence[Frame], now: float) -> None:
        """Take a plan that aggregator 0 has decided on and a worker passes on.

        Raises:
            ProtocolError: it can be none of aggregator 0's.
        """
        where = f"worker {worker} tells of plan {replan.version} from step {replan.from_step} on"
        if self._decides:
            raise ProtocolError(f"{where}: aggregator 0 makes the plans")
        course, newest = Course.from_frames(replan, rest, self.spec), self.courses.newest
        if course.version > newest.version:
            # Aggregator 0 is one step ahead at most, and whoever begins a step has told of its plan before.
            first = max(self.rounds.newest_begun, newest.from_step) + 1
            last = max(self.rounds.newest + 1, newest.from_step) + 1
            if course.version != newest.version + 1 or not first <= course.from_step <= last:
                raise ProtocolError(f"{where}: expected plan {newest.version + 1} from a step in {first} .. {last} on")
        try:
            self.courses.add(course)
        except ProtocolError as error:  # who is right cannot be told
            self.fail(f"worker {worker} tells of another plan than others: {error}", now)

    def _check_plan(self, worker: int, begin: messages.Begin, now: float) -> None:
        """End the job if a worker follows another plan than is decoded by: what it sends would be weighed wrongly."""
        course = self.courses.at(begin.step)
        if begin.plan != course.version:
            self.fail(
                f"worker {worker} begins step {begin.step} by plan {begin.plan}, expected plan {course.version}, which "
                f"holds from step {course.from_step} on: has another worker told of a plan that is none?",
                now,
            )

    # --- agreement --------------------------------------------------------------------------------------

    def _begin(self, worker: int, begin: messages.Begin, now: float) -> None:
        step = begin.step
        if self._is_left(worker, step, now):
            return
        if begin.thin:
            self.rounds.take(worker, step, now)
            if worker not in self._has_been_late:  # whatever its loop does otherwise shows now
                self._has_been_late.add(worker)
                self._verify = messages.Verify(self.rounds.newest + 2)
                self._send(EVERYBODY, self._verify)
        else:
            first = self.rounds.begin(worker, step, now)
            self._check_plan(worker, begin, now)
            if first:
                oldest = self.rounds.oldest
                self._temperatures = {s: theta for s, theta in self._temperatures.items() if s >= oldest}
                self._temperatures[step] = begin.temperature
                self._send(EVERYBODY, messages.Started(step, 0.0))
        if self._planning is not None:
            self._planning.begin(worker, begin, now)
        if self._agreement.begin(worker, step):
            self._settle_agreement(now)

    def _bye(self, worker: int, step: int, now: float) -> None:
        self.rounds.leave(worker, now)
        self._send(EVERYBODY, messages.Gone(worker, "left"))
        self._left_at[worker], self._gone[worker] = step, "left"
        # A step that others have only begun they may be about to give up, as a loop's last batches that are no whole
        # accumulation.
        if self.failed is None and self.rounds.is_made(step) and self.rounds.roster.alive.any():
            self.fail(_left_early(worker, step, None, self.rounds.newest_begun), now)
        self._settle_agreement(now)

    def _is_left(self, worker: int, step: int, now: float) -> bool:
        """End the job if a worker makes a step before which another one has left its loop; tell whether it does."""
        left = [k for k, left_at in self._left_at.items() if left_at <= step]
        if left:
            self.fail(_left_early(left[0], self._left_at[left[0]], worker, step), now)
        return bool(left)

    def _settle_agreement(self, now: float) -> None:
        """Compare what all that are alive have stated, and hand out what all of them have handed over."""
        if self.rounds.roster.here < self.rounds.roster.awaited:
            return  # what one that is away has said counts when it is back, and not if it is lost
        alive = self.rounds.roster.awaited
        self.outbox += [(EVERYBODY, frames) for frames in self._gathering.settle(alive)]
        verdict = self._agreement.settle(alive)
        for message in verdict.messages:
            self._send(EVERYBODY, message)
        if verdict.problem is not None:
            self.fail(verdict.problem, now)

    def _send(self, worker: int | None, message: messages.FromAggregator) -> None:
        self.outbox.append((worker, [messages.encode_message(message)]))

    def __repr__(self) -> str:
        late = self.stats["late"]
        end = f", failed: {self.failed!r:.300}" if self.failed is not None else ""
        return f"Job({self.rounds!r}, {self.stats['rounds']} rounds closed, {late} payloads late{end})"


def _left_early(worker: int, step: int, other: int | None, newest: int) -> str:
    who = "others have begun" if other is None else f"worker {other} begins"
    return (
        f"worker {worker} has left its loop at step {step}, but {who} step {newest}: every rank's loop must end at the "
        "same step. What ends it (early stopping, a limit on time or loss) must be decided by all ranks together, for "
        "example by rank 0 and broadcast every n-th step"
    )
