"""The aggregator: messages in, messages out.

No sockets and no clock in here: `receive` and `tick` are given the time, and what is to be sent is drained.
`process.py` connects this to a transport; tests connect it to a virtual clock.
"""

from __future__ import annotations

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
            if self.failed is not None and not isinstance(message, messages.Bye):
                self._send(peer, messages.Failed(self.failed))
            elif isinstance(message, messages.Hello):
                self._hello(peer, message, frames[1:], now)
            elif worker is not None and self.job is not None:
                self.job.receive(worker, message, frames[1:], now)
                self._collect()
            elif not self._lobby.is_waiting(peer):
                self._send(peer, messages.Introduce())
        except (ProtocolError, PlanError, CodecError, ConfigError) as error:
            self.stats["bad_messages"] += 1
            self._trace(Event(now, "reject", None, None, self._lobby.worker_of(peer), {"text": str(error)}))
            logger.warning("a message was dropped: %s", error)
            self._send(peer, messages.Rejected(messages.as_text(error)))

    def lost(self, peer: Peer, now: float) -> None:
        """Note that a peer's connection is gone."""
        worker = self._lobby.remove(peer)
        if worker is not None and self.job is not None:
            self.job.lost(worker, now)
            self._collect()

    def tick(self, now: float) -> None:
        """Close what is due, and ping."""
        if self.job is None or self.failed is not None:
            return
        self.job.close_due(now)
        self.job.say_who_is_waited_for(now)
        self._collect()
        if now >= self._next_ping_at_s:
            self._next_ping_at_s = now + self._ping_interval_s
            for peer in self._lobby.peers():
                self._send(peer, messages.Ping())

    def plan(self, now: float) -> None:
        """Plan anew if it is time to; to be called when what was drained is sent, because it may take a while."""
        if self.job is not None:
            self.job.plan_if_due(now)
            self._collect()

    def wakeup_in(self, now: float) -> float:
        """Return the seconds until the next tick that could matter; messages may matter earlier."""
        if self.job is None or self.failed is not None:
            return self._ping_interval_s
        return min(max(self._next_ping_at_s, now), self.job.rounds.next_deadline_s(now)) - now

    @property
    def failed(self) -> str | None:
        """Why the job has ended on every rank; None if it has not."""
        return None if self.job is None else self.job.failed

    @property
    def finished(self) -> bool:
        """All workers of the job have left or died."""
        return self.job is not None and self.job.rounds.roster.finished

    def fail(self, text: str, now: float) -> None:
        """End the job, if there is one, on every rank."""
        if self.job is not None:
            self.job.fail(text, now)
            self._collect()

    # --- joining ----------------------------------------------------------------------------------------

    def announce(self, spec: JobSpec, plan: Plan, now: float) -> None:
        """Begin the job; workers that wait are let in.

        Raises:
            ConfigError: it cannot be; names the remedy.
        """
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
            self._lobby.keep_waiting(peer, hello)
            return
        if self._lobby.worker_of(peer) == hello.worker:
            return  # it was asked twice, for two messages that it had sent before it was in
        try:
            if hello.version != messages.PROTOCOL_VERSION:
                raise ProtocolError(
                    f"worker {hello.worker} speaks protocol {hello.version}, this aggregator "
                    f"{messages.PROTOCOL_VERSION}: install the same version of torch_qgc on every machine"
                )
            if self.job is None:
                self._begin(*read_job(hello, rest, aggregators=self.count), now)
            assert self.job is not None
            self._lobby.admit(peer, hello, self.job.spec)
            try:
                self.job.join(hello.worker, hello.step, now)
            except ProtocolError:
                self._lobby.remove(peer)
                raise
        except (ProtocolError, PlanError, ConfigError) as error:
            self.stats["refused"] += 1
            logger.warning("a worker was refused: %s", error)
            self._send(peer, messages.Refusal(messages.as_text(error)))
            return
        self._collect()
        self._let_in_who_waits(now)

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
