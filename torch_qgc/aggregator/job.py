"""The aggregator: drives rounds from received messages, decodes them, answers, keeps the log.

No sockets and no clock in here: `receive` and `tick` are given the time, and what is to be sent collects in
`outbox`. `serve.py` connects this to a transport; tests connect it to a virtual clock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from torch_qgc.aggregator.decoder import Arrival, RoundDecoder
from torch_qgc.errors import CodecError, PlanError, ProtocolError
from torch_qgc.job.log import ResultLog
from torch_qgc.job.rates import ArrivalRates
from torch_qgc.job.roster import Roster
from torch_qgc.job.rounds import ClosingRule, Round
from torch_qgc.kernels import payload_bytes
from torch_qgc.kernels.buffers import Payload
from torch_qgc.planner import Plan
from torch_qgc.protocol import messages

__all__ = ["Aggregator"]

Frame = Any  # bytes, memoryview or another buffer


class Aggregator:
    """One authority over the chunks c with c mod `count` == `index`, for one job.

    Args:
        index, count: which aggregator of how many this is.
        threads: how many may decode.
        ping_interval_s: how often live workers are pinged (a failed ping is how a death is noticed).
    """

    def __init__(self, index: int = 0, count: int = 1, *, threads: int = 1, ping_interval_s: float = 0.5) -> None:
        self.index, self.count = index, count
        self.outbox: list[tuple[bytes, list[Frame]]] = []
        self.failed: str | None = None
        self.stats: Counter[str] = Counter()
        self._threads, self._ping_interval_s = threads, ping_interval_s
        self._next_ping_at = 0.0
        self._waiting_hellos: dict[bytes, messages.Hello] = {}
        self._roster: Roster | None = None  # set with all below once worker 0 has said what the job is
        self._began_at: dict[int, float] = {}
        self._hashes: dict[int, dict[int, str]] = {}

    # --- what goes in -----------------------------------------------------------------------------------

    def receive(self, peer: bytes, frames: Sequence[Frame], now: float) -> None:
        """Take one message. Whatever is wrong with it is answered and counted, never raised."""
        try:
            if not frames:
                raise ProtocolError("expected a header frame, got an empty message")
            message = messages.decode_from_worker(memoryview(frames[0]))
            if self.failed is not None and not isinstance(message, messages.Bye):
                self._send(peer, messages.Failed(self.failed))
            elif isinstance(message, messages.Hello):
                self._hello(peer, message, frames[1:], now)
            else:
                worker = self._roster.worker_of(peer) if self._roster is not None else None
                if worker is None:
                    if peer not in self._waiting_hellos:
                        self._send(peer, messages.Introduce())
                    return
                self._dispatch(worker, message, frames[1:], now)
        except (ProtocolError, PlanError, CodecError) as error:
            self.stats["bad_messages"] += 1
            self._send(peer, messages.Rejected(str(error)[:8000]))

    def lost(self, peer: bytes) -> None:
        """Note that a peer's connection is gone: an immediate erasure."""
        self._waiting_hellos.pop(peer, None)
        if self._roster is not None and self._roster.mark_lost(peer):
            self.stats["lost_workers"] += 1

    def tick(self, now: float) -> None:
        """Close what is due, and ping."""
        if self._roster is None or self.failed is not None:
            return
        self._close_due(self._chunks, now)
        if now >= self._next_ping_at:
            self._next_ping_at = now + self._ping_interval_s
            for peer in self._roster.peers():
                self._send(peer, messages.Ping())

    def wakeup_in(self, now: float) -> float:
        """Return the seconds until the next tick that could matter; messages may matter earlier."""
        times = [max(self._next_ping_at, now)]
        if self._roster is None:
            times = [now + self._ping_interval_s]
        elif self._rule.deadline_s is not None:
            # A deadline that has passed waits for its quorum, which only a message can complete.
            times += [t for t in (began + self._rule.deadline_s for began in self._began_at.values()) if t > now]
        return min(times) - now

    @property
    def finished(self) -> bool:
        """All workers of the job have left or died."""
        return self._roster is not None and self._roster.finished

    # --- joining ----------------------------------------------------------------------------------------

    def _hello(self, peer: bytes, hello: messages.Hello, rest: Sequence[Frame], now: float) -> None:
        try:
            if hello.version != messages.PROTOCOL_VERSION:
                raise ProtocolError(
                    f"worker {hello.worker} speaks protocol {hello.version}, this aggregator "
                    f"{messages.PROTOCOL_VERSION}: install the same version of torch_qgc on every machine"
                )
            if self._roster is None:
                if hello.worker != 0:
                    if len(self._waiting_hellos) < 65536:
                        self._waiting_hellos[peer] = hello
                    return
                self._start_job(hello.spec, rest, now)
            assert self._roster is not None
            self._roster.check(hello, self.spec)
            oldest = self._log.oldest
            if hello.step < oldest:
                raise ProtocolError(
                    f"worker {hello.worker} needs the results from step {hello.step} on, the log starts at {oldest}: "
                    "load a checkpoint the other workers also start from, or raise log_steps / log_bytes"
                )
            self._roster.admit(peer, hello, now)
        except (ProtocolError, PlanError) as error:
            self.stats["refused"] += 1
            self._send(peer, messages.Refusal(str(error)[:8000]))
            return
        self._send(peer, messages.Welcome(self._log.oldest))
        waiting, self._waiting_hellos = self._waiting_hellos, {}
        for other_peer, other in waiting.items():
            self._hello(other_peer, other, (), now)

    def _start_job(self, spec: messages.JobSpec, rest: Sequence[Frame], now: float) -> None:
        if len(rest) != 1 or memoryview(rest[0]).nbytes > messages.MAX_PLAN_BYTES:
            raise ProtocolError(f"worker 0's Hello: expected one plan frame of at most {messages.MAX_PLAN_BYTES} bytes")
        try:
            plan = Plan.from_json(bytes(memoryview(rest[0])).decode())
        except (UnicodeDecodeError, ValueError, KeyError, TypeError) as error:
            raise ProtocolError(f"worker 0's Hello: its plan cannot be read ({error})") from error
        if plan.num_workers != spec.workers or plan.digest() != spec.plan_digest:
            raise ProtocolError(
                f"worker 0's Hello: expected a plan for {spec.workers} workers with digest {spec.plan_digest}, got one "
                f"for {plan.num_workers} with digest {plan.digest()}: pass the same plan to every rank"
            )
        if spec.aggregators != self.count:
            raise ProtocolError(
                f"the job has {spec.aggregators} aggregators, this one was started as one of {self.count}: "
                f"start it with --count {spec.aggregators}"
            )
        self.spec, self.plan = spec, plan
        self._rule = ClosingRule(
            deadline_s=spec.deadline_s,
            warmup_steps=spec.first_step + spec.warmup_steps,
            quorum=spec.quorum,
            late=spec.late,
            max_staleness=spec.max_staleness,
        )
        self._chunks = list(range(self.index, spec.chunks, self.count))
        self._log = ResultLog(spec, self._chunks)
        self._decoder = RoundDecoder(spec, plan, self._threads)
        self._rates = ArrivalRates(1.0 - plan.straggle_probs, spec.chunks)
        self._rounds = {c: Round[Arrival](spec.first_step, c, self._rule) for c in self._chunks}
        self._last_push = np.full((spec.workers, spec.chunks), -1, dtype=np.int64)
        self._roster = Roster(spec, now)

    # --- one message of a member ------------------------------------------------------------------------

    def _dispatch(self, worker: int, message: messages.FromWorker, rest: Sequence[Frame], now: float) -> None:
        assert self._roster is not None
        match message:
            case messages.Begin(step):
                self._begin(worker, step, now)
                self._close_due(self._chunks, now)
            case messages.Push():
                self._push(worker, message, rest)
                self._close_due([message.chunk], now)
            case messages.Fetch(step, chunk):
                logged = self._log.get(step, chunk)
                if logged is not None:
                    self._send_frames(self._roster.peer_of(worker), logged)
                elif self._open_step(chunk) > step:
                    raise ProtocolError(
                        f"worker {worker} asks for step {step}, the log starts at {self._log.oldest}: "
                        "raise log_steps / log_bytes"
                    )
            case messages.Hash(step, digest):
                self._compare(worker, step, digest)
            case messages.Fault(step, text):
                self.fail(f"worker {worker} failed at step {step}: {text}")
            case messages.Bye():
                self._roster.leave(worker)
                self._close_due(self._chunks, now)

    def _begin(self, worker: int, step: int, now: float) -> None:
        assert self._roster is not None
        newest = max(r.step for r in self._rounds.values())
        if step > newest:
            raise ProtocolError(f"worker {worker} begins step {step}, but step {newest} has not closed yet")
        self._roster.advance(worker, step)
        if step not in self._began_at and step >= min(r.step for r in self._rounds.values()):
            self._began_at[step] = now
            for peer in self._roster.peers():
                self._send(peer, messages.Started(step, 0.0))

    def _push(self, worker: int, push: messages.Push, rest: Sequence[Frame]) -> None:
        where = f"worker {worker}, step {push.step}, chunk {push.chunk}"
        open_step = self._open_step(push.chunk)
        if push.step > open_step:
            raise ProtocolError(f"{where}: a payload for a step that cannot have begun; step {open_step} is open")
        if push.step <= self._last_push[worker, push.chunk]:
            raise ProtocolError(f"{where}: a second payload for a chunk that was already delivered")
        if push.bits != self.plan.bits[worker]:
            raise ProtocolError(f"{where}: expected {self.plan.bits[worker]} bits as planned, got {push.bits}")
        numel = self.spec.chunk_span(push.chunk)[1]
        expected = payload_bytes(numel, push.bits)
        got = [memoryview(frame).nbytes for frame in rest]
        if got != [expected]:
            raise ProtocolError(
                f"{where}: expected one payload frame of {expected} bytes ({numel} coordinates at {push.bits} bits), "
                f"got {got}: is it truncated?"
            )
        self._last_push[worker, push.chunk] = push.step
        self.stats["bytes_received"] += expected
        staleness = open_step - push.step
        if staleness > 0:
            self.stats["late"] += 1
            if self._rule.late == "drop" or staleness > self._rule.max_staleness:
                self.stats["dropped"] += 1
                return
            self.stats["folded"] += 1
        arrival = Arrival(worker, push.step, Payload(rest[0], numel, push.bits))
        self._rounds[push.chunk].add(worker, push.step, arrival)

    def _open_step(self, chunk: int) -> int:
        if chunk not in self._rounds:
            raise ProtocolError(
                f"expected a chunk of aggregator {self.index} of {self.count} below {self.spec.chunks}, got {chunk}"
            )
        return self._rounds[chunk].step

    # --- closing ----------------------------------------------------------------------------------------

    def _close_due(self, chunks: Sequence[int], now: float) -> None:
        assert self._roster is not None
        awaited = self._roster.awaited(now)
        for chunk in chunks:
            current = self._rounds[chunk]
            began_at = self._began_at.get(current.step)
            leashed = self._roster.behind(current.step - self._log.capacity + 2)
            if current.is_due(now, began_at, awaited, leashed):
                self._close(current, now)

    def _close(self, current: Round[Arrival], now: float) -> None:
        assert self._roster is not None
        step, chunk = current.step, current.chunk
        began_at = self._began_at.get(step)
        waits = self._rule.waits_for_all(step)
        if not waits and began_at is not None and self._rule.deadline_s is not None:
            # A round that was still open a while after its deadline waited for its quorum or for a leashed worker.
            self.stats["extended"] += now > began_at + 1.5 * self._rule.deadline_s
        arrivals = [current.payloads[key] for key in sorted(current.payloads)]
        alive = self._roster.alive
        rates = np.ones(self.spec.workers) if waits else self._rates.rates(chunk)
        counts, payloads = self._decoder.close(step, chunk, arrivals, rates, alive)
        if not waits:
            self._rates.update(chunk, counts, alive)
        header = messages.Result(step, chunk, self.spec.downlink_bits, counts.astype(np.uint8).tobytes())
        frames = [messages.encode_message(header), *payloads]
        self._log.put(step, chunk, frames)
        for peer in self._roster.peers():
            self._send_frames(peer, frames)
        self.stats["rounds"] += 1
        self._rounds[chunk] = Round(step + 1, chunk, self._rule)
        oldest = min(r.step for r in self._rounds.values())
        for past in [s for s in self._began_at if s < oldest]:
            del self._began_at[past]

    # --- agreement --------------------------------------------------------------------------------------

    def _compare(self, worker: int, step: int, digest: str) -> None:
        assert self._roster is not None
        digests = self._hashes.setdefault(step, {})
        digests[worker] = digest
        if not set(np.flatnonzero(self._roster.alive).tolist()) <= set(digests):
            if len(self._hashes) > 1024:
                del self._hashes[min(self._hashes)]
            return
        del self._hashes[step]
        if len(set(digests.values())) > 1:
            groups: dict[str, list[int]] = {}
            for k, d in sorted(digests.items()):
                groups.setdefault(d, []).append(k)
            named = "; ".join(f"workers {ks}: {d[:12]}" for d, ks in sorted(groups.items(), key=lambda g: -len(g[1])))
            self.fail(
                f"replicas differ before step {step} ({named}). Everything between backward and the next step must run "
                "in state.update on every rank: state.bind(optimizer, scheduler=..., max_grad_norm=...)"
            )

    def fail(self, text: str) -> None:
        """End the job on every rank."""
        self.failed = text
        for peer in self._roster.peers() if self._roster is not None else ():
            self._send(peer, messages.Failed(text[:8000]))

    # --- what goes out ----------------------------------------------------------------------------------

    def _send(self, peer: bytes, message: messages.FromAggregator) -> None:
        self._send_frames(peer, [messages.encode_message(message)])

    def _send_frames(self, peer: bytes, frames: list[Frame]) -> None:
        self.outbox.append((peer, frames))

    def drain(self) -> list[tuple[bytes, list[Frame]]]:
        """Return what is to be sent, in order, and forget it."""
        outbox, self.outbox = self.outbox, []
        return outbox

    def report(self) -> dict[str, int]:
        """Return counts of rounds, late, folded and dropped payloads, extensions, bad messages, bytes."""
        return dict(self.stats)
