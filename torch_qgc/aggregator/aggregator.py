"""The aggregator: messages in, messages out.

No sockets and no clock in here: `receive` and `tick` are given the time, and what is to be sent is drained.
`process.py` connects this to a transport; tests connect it to a virtual clock.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch_qgc.aggregator.job import EVERYBODY, Job
from torch_qgc.aggregator.lobby import Lobby, check_job, read_job
from torch_qgc.errors import CodecError, ConfigError, PlanError, ProtocolError
from torch_qgc.job.events import Event, Trace, silent
from torch_qgc.logs import logger
from torch_qgc.planner import Plan
from torch_qgc.protocol import messages
from torch_qgc.protocol.contract import JobSpec
from torch_qgc.protocol.transport import Peer

__all__ = ["Aggregator"]

Frame = Any  # bytes, memoryview or another buffer
RETRY_S = 0.02  # after which a full queue is tried again
FAILED_S = 60.0  # for which whoever speaks or comes is told that the job has failed


class Aggregator:
    """One authority over the chunks c with c mod `count` == `index`, for one job.

    Args:
        index, count: which aggregator of how many this is.
        threads: how many may decode.
        told: what the job is comes by `announce` alone, from whoever has started this; else from worker 0's Hello.
        ping_interval_s: how often live workers are pinged (a failed ping is how a death is noticed).
        trace: is told what happens.
    """

    def __init__(
        self,
        index: int = 0,
        count: int = 1,
        *,
        threads: int = 1,
        told: bool = False,
        ping_interval_s: float = 0.5,
        trace: Trace = silent,
    ) -> None:
        self.index, self.count = index, count
        self.stats: Counter[str] = Counter()
        self.job: Job | None = None  # until it is known what it is
        self._told = told
        self._lobby = Lobby()
        self._outbox: list[tuple[Peer, list[Frame]]] = []
        self._failed_before: str | None = None  # the job began
        self._failed_at_s: float | None = None
        self._over = False
        self._threads, self._ping_interval_s, self._trace = threads, ping_interval_s, trace
        self._next_ping_at_s = 0.0

    # --- what goes in -----------------------------------------------------------------------------------

    def receive(self, peer: Peer, frames: Sequence[Frame], now: float) -> None:
        """Take one message. Whatever is wrong with it is answered and counted, never raised."""
        try:
            if not frames:
                raise ProtocolError("expected a header frame, got an empty message")
            message = messages.decode_from_worker(memoryview(frames[0]))
            worker = self._lobby.worker_of(peer)
            if isinstance(message, messages.Fault) and self._may_end(peer, message.session):
                self.fail(f"worker {peer.worker} failed at step {message.step}: {message.text}", now)
                if worker is None:
                    self._send(peer, messages.Failed(messages.as_text(self.failed)))
            elif self.failed is not None and not isinstance(message, messages.Bye):
                self._send(peer, messages.Failed(self.failed))
            elif isinstance(message, messages.Hello):
                self._hello(peer, message, frames[1:], now)
            elif worker is not None and self.job is not None:
                self._lobby.hear(worker)
                self.job.receive(worker, message, frames[1:], now)
                self._collect()
            elif not self._lobby.is_waiting(peer):
                self._send(peer, messages.Introduce())
        except (ProtocolError, PlanError, CodecError, ConfigError) as error:
            self.stats["bad_messages"] += 1
            self._trace(Event(now, "reject", None, None, self._lobby.worker_of(peer), {"text": str(error)}))
            logger.warning("a message was dropped: %s", error)
            self._send(peer, messages.Rejected(messages.as_text(error)))

    def _may_end(self, peer: Peer, session: str) -> bool:
        """Tell whether a fault is one of this job's workers', which may have it before it has said Hello."""
        known = self.job is None or peer.worker < self.job.spec.workers
        return known and self._lobby.speaks_for(peer, session)

    def lost(self, peer: Peer, now: float) -> None:
        """Note that a peer's connection is gone."""
        worker = self._lobby.remove(peer)
        if worker is not None and self.job is not None:
            self.job.lost(worker, now)
            self._collect()
            self._let_in_who_waits(now)

    def unsent(self, peer: Peer, messages_unsent: Sequence[Sequence[Frame]], now: float) -> None:
        """Take back messages that did not fit into a peer's queue, in order.

        Results are sent when there is room, and what was gathered is asked for again. If anything else does not fit,
        the peer has not read for long: its connection is given up, and all that it lacks is told on the next one.
        """
        worker, results = self._lobby.worker_of(peer), []
        for frames in messages_unsent:
            header = messages.decode_from_aggregator(frames[0])
            if isinstance(header, messages.Result):
                results.append((header.step, header.chunk))
            elif not isinstance(header, messages.Ping | messages.Met | messages.Gathered | messages.Awaited):
                self.lost(peer, now)
                return
        if worker is not None and self.job is not None:
            self.job.feed.unsent(worker, results)

    def tick(self, now: float) -> None:
        """Close what is due, and ping."""
        if self.failed is not None:
            self._failed_at_s = now if self._failed_at_s is None else self._failed_at_s
            self._over = now > self._failed_at_s + FAILED_S
        if self.job is None:
            return
        if self.failed is None:
            self.job.tick(now)
            self._collect()
            for peer, why in self._lobby.take_refused(now):
                self._refuse(peer, why)
        if now >= self._next_ping_at_s:
            self._next_ping_at_s = now + self._ping_interval_s
            for peer in self._lobby.peers():
                self._send(peer, messages.Ping(self._lobby.heard(peer.worker)))

    def plan(self, now: float) -> None:
        """Plan anew if it is time to; to be called when what was drained is sent, because it may take a while."""
        if self.job is not None:
            self.job.plan_if_due(now)
            self._collect()

    def wakeup_in(self, now: float) -> float:
        """Return the seconds until the next tick that could matter; messages may matter earlier."""
        if self.job is None or self.failed is not None:
            return self._ping_interval_s
        room_s = now + RETRY_S if self.job.feed.owes else math.inf
        return min(max(self._next_ping_at_s, now), self.job.rounds.next_deadline_s(now), room_s) - now

    @property
    def failed(self) -> str | None:
        """Why the job has ended on every rank, or cannot begin; None if it goes on."""
        return self._failed_before if self.job is None else self.job.failed

    @property
    def finished(self) -> bool:
        """All workers of the job have left, or are lost for good; or it has failed, and all had time to hear that."""
        return self._over or (self.job is not None and self.job.finished)

    def fail(self, text: str, now: float) -> None:
        """End the job on every rank, also one that has not begun."""
        if self.job is not None:
            self.job.fail(text, now)
            self._collect()
        elif self._failed_before is None:
            self._failed_before = messages.as_text(text)
            logger.info("the job has failed before it began: %s", text)
            for peer, _ in self._lobby.take_waiting():
                self._send(peer, messages.Failed(self._failed_before))

    # --- joining ----------------------------------------------------------------------------------------

    def announce(self, spec: JobSpec, plan: Plan, now: float) -> None:
        """Begin the job; workers that wait are let in.

        Raises:
            ConfigError: it cannot be; names the remedy.
        """
        if self.failed is not None:
            return  # and whoever says Hello is told why
        check_job(spec, plan, aggregators=self.count)
        self._begin(spec, plan, now)
        self._let_in_who_waits(now)

    def _begin(self, spec: JobSpec, plan: Plan, now: float) -> None:
        self.job = Job(
            spec, plan, index=self.index, now=now, threads=self._threads, stats=self.stats, trace=self._trace
        )

    def _let_in_who_waits(self, now: float) -> None:
        for peer, hello in self._lobby.take_waiting():
            self._hello(peer, hello, (), now)

    def _hello(self, peer: Peer, hello: messages.Hello, rest: Sequence[Frame], now: float) -> None:
        if hello.worker != peer.worker:
            raise ProtocolError(
                f"expected a Hello of worker {peer.worker}, whose key it is, got one of worker {hello.worker}: give "
                "every rank its own number"
            )
        if self.job is None and (self._told or hello.worker != 0):
            self._lobby.keep_waiting(peer, hello, now)
            return
        try:
            if hello.version != messages.PROTOCOL_VERSION:
                raise ProtocolError(
                    f"worker {hello.worker} speaks protocol {hello.version}, this aggregator "
                    f"{messages.PROTOCOL_VERSION}: install the same version of torch_qgc on every machine"
                )
            if self.job is None:
                self._begin(*read_job(hello, rest, aggregators=self.count), now)
            assert self.job is not None
            self._lobby.check(hello, self.job.spec, running=self.job.running)
            self.job.oldest_for(hello.worker, hello.step)
        except (ProtocolError, PlanError, ConfigError) as error:
            self._refuse(peer, messages.as_text(error))
            return
        if self._lobby.is_taken(hello):
            self._lobby.keep_waiting(peer, hello, now)
            return
        self.job.join(hello, self._lobby.admit(peer, hello), now)
        self._collect()
        self._let_in_who_waits(now)

    def _refuse(self, peer: Peer, why: str) -> None:
        """Turn a worker away, for good."""
        self.stats["refused"] += 1
        logger.warning("a worker was refused: %s", why)
        self._send(peer, messages.Refusal(why))

    # --- what goes out ----------------------------------------------------------------------------------

    def _collect(self) -> None:
        """Address what the job wants to send."""
        assert self.job is not None
        outbox, self.job.outbox = self.job.outbox, []
        for worker, frames in outbox:
            peer = None if worker is EVERYBODY else self._lobby.peer_of(worker)
            peers = self._lobby.peers() if worker is EVERYBODY else [] if peer is None else [peer]
            self._outbox += [(each, frames) for each in peers]

    def _send(self, peer: Peer, message: messages.FromAggregator) -> None:
        self._outbox.append((peer, [messages.encode_message(message)]))

    def drain(self) -> list[tuple[Peer, list[Frame]]]:
        """Return what is to be sent, in order, and forget it."""
        outbox, self._outbox = self._outbox, []
        for worker, frames in self.job.feed.take() if self.job is not None else ():
            peer = self._lobby.peer_of(worker)
            if peer is not None:
                outbox.append((peer, frames))
        return outbox

    def report(self) -> dict[str, int]:
        """Return counts of rounds, late, folded and dropped payloads, extensions, bad messages, bytes."""
        return dict(self.stats)

    def __repr__(self) -> str:
        if self.job is None:
            phase = "waits to hear what the job is"
        else:
            phase = "failed" if self.failed is not None else "finished" if self.finished else "serves"
        return f"Aggregator({self.index} of {self.count}, {phase}, {self._lobby!r}, {self.job!r})"
