"""An aggregator's socket: a ROUTER that only members of the job can speak to, within bounds."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import msgspec
import zmq

from torch_qgc.kernels import payload_bytes
from torch_qgc.planner import Plan
from torch_qgc.protocol.contract import JobSpec
from torch_qgc.protocol.gate import LOOK_EVERY_S, Gate
from torch_qgc.protocol.identity import Door
from torch_qgc.protocol.messages import MAX_HEADER_BYTES
from torch_qgc.protocol.transport import Peer, Sent

__all__ = ["HEARTBEAT_MS", "HEARTBEAT_TIMEOUT_MS", "MOST_FRAMES", "OVERHEAD_BYTES", "Bounds", "ZmqServer"]

Frame = Any  # anything with the buffer interface
HEARTBEAT_MS = 1_000
HEARTBEAT_TIMEOUT_MS = 10_000
MOST_FRAMES = 2  # of a message: a header, a payload
OVERHEAD_BYTES = 1_024  # of encryption, of a frame
QUEUE_BYTES = 64 << 20
LEAST_AT_ONCE = 256  # messages that are read at a time
TRACKED_BYTES = zmq.COPY_THRESHOLD  # smaller messages are copied, and bounded by their number


class Bounds(msgspec.Struct, frozen=True, kw_only=True):
    """What an aggregator's port takes.

    Args:
        message_bytes: a peer that announces a larger frame is disconnected before it is read; one whose message is
            longer in all, too.
        queue_bytes: payloads queued per peer; further ones are dropped, and fetched from the log when they are needed.
        received_messages, sent_messages: queued per peer. A peer whose messages are not read yet has to wait.
        connections: at once.
        handshake_s: within which a connection has to show a key.
    """

    message_bytes: int = 256 << 20
    queue_bytes: int = 4 * QUEUE_BYTES
    received_messages: int = 64
    sent_messages: int = 1_000
    connections: int = 4_096
    handshake_s: float = 10.0

    @classmethod
    def of(cls, spec: JobSpec, plan: Plan) -> Bounds:
        """Return the bounds that a job fits into."""
        numel = min(spec.chunk_numel, spec.numel)
        payload = max(payload_bytes(numel, bits) for bits in (16, 32))
        plans = 4 * len(plan.to_json()) + (64 << 10)  # later ones have the same workers, and longer numbers
        return cls(
            message_bytes=max(payload, plans, MAX_HEADER_BYTES),
            queue_bytes=min(max(2 * spec.step_bytes(0), QUEUE_BYTES), spec.log_bytes),
            connections=2 * spec.workers + 64,
        )


class ZmqServer:
    """The aggregator's transport over TCP. A vanished peer is noticed at the next send to it.

    Args:
        bind: "tcp://host:port"; port * picks a free one, see `endpoint`.
        door: by what it knows workers.
        bounds: what the port takes.
        io_threads: that move messages, and encrypt; a second one helps where one is busy all the time.
    """

    def __init__(self, bind: str, door: Door, *, bounds: Bounds = Bounds(), io_threads: int = 1) -> None:
        self._context = zmq.Context(io_threads=io_threads)
        self._socket = socket = self._context.socket(zmq.ROUTER)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        socket.setsockopt(zmq.MAXMSGSIZE, bounds.message_bytes + OVERHEAD_BYTES)
        socket.setsockopt(zmq.SNDHWM, bounds.sent_messages)
        socket.setsockopt(zmq.RCVHWM, bounds.received_messages)
        socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
        socket.setsockopt(zmq.HANDSHAKE_IVL, int(bounds.handshake_s * 1_000))
        socket.setsockopt(zmq.LINGER, 2_000)
        self._gate = Gate(
            socket,
            door,
            most_connections=bounds.connections,
            most_unread_bytes=2 * (bounds.message_bytes + OVERHEAD_BYTES),
        )
        try:
            socket.bind(bind)
        except zmq.ZMQError:
            self._context.destroy(linger=0)
            raise
        self.endpoint: str = socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._poller = zmq.Poller()
        for each in (socket, self._gate.requests):
            self._poller.register(each, zmq.POLLIN)
        self._watched: set[int] = set()
        self._queue_bytes = bounds.queue_bytes
        self._backlogs: dict[bytes, _Backlog] = {}
        self.malformed = 0  # messages with too many frames
        self.dropped = 0  # results that did not fit into a queue

    def watch(self, descriptor: int) -> None:
        """Make `poll` return when a file descriptor becomes readable."""
        self._watched.add(descriptor)
        self._poller.register(descriptor, zmq.POLLIN)

    def poll(self, timeout_s: float) -> list[tuple[Peer, list[Frame]]]:
        """Return the messages that are in, with who has sent them; wait for one at most timeout_s."""
        until_s = time.monotonic() + timeout_s
        while True:
            left_s = until_s - time.monotonic()
            ready = dict(self._poller.poll(max(0, int(min(left_s, LOOK_EVERY_S) * 1_000 + 0.999))))
            messages = self._receive() if self._socket in ready else []
            self._gate.look(time.monotonic())
            if messages or left_s <= 0 or not self._watched.isdisjoint(ready):
                return messages

    def _receive(self) -> list[tuple[Peer, list[Frame]]]:
        messages = []
        # A bounded number, so that the caller can look at its deadlines. ZeroMQ takes turns among connections, and each
        # gets one, so that the gate knows who has only begun a message.
        for _ in range(LEAST_AT_ONCE + self._gate.connections):
            try:
                connection = self._socket.recv(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                break
            frames: list[Frame] = []
            last = connection
            while last.more:
                last = self._socket.recv(copy=False)
                if len(frames) <= MOST_FRAMES:
                    frames.append(last.buffer)
            if len(frames) > MOST_FRAMES:
                self.malformed += 1
                continue
            self._gate.note(last.get(zmq.SRCFD))
            messages.append((Peer(int(last.get("User-Id")), connection.bytes), frames))
        return messages

    def send(self, peer: Peer, frames: Sequence[Frame]) -> Sent:
        """Queue a message for a peer; never blocks."""
        nbytes = memoryview(frames[-1]).nbytes
        large = nbytes >= TRACKED_BYTES
        if large and self.queued_bytes(peer) + nbytes > self._queue_bytes:
            self.dropped += 1
            return Sent.FULL
        try:
            tracker = self._socket.send_multipart([peer.connection, *frames], zmq.NOBLOCK, copy=False, track=large)
        except zmq.Again:
            return Sent.FULL
        except zmq.ZMQError as error:
            if error.errno == zmq.EHOSTUNREACH:
                return Sent.GONE
            raise
        if large and tracker is not None:
            if peer.connection not in self._backlogs:  # forget those of connections that have ended
                self._backlogs = {name: each for name, each in self._backlogs.items() if each.bytes}
            self._backlogs.setdefault(peer.connection, _Backlog()).add(nbytes, tracker)
        return Sent.OK

    def queued_bytes(self, peer: Peer) -> int:
        """Return the payload bytes that wait until a peer reads."""
        backlog = self._backlogs.get(peer.connection)
        return 0 if backlog is None else backlog.bytes

    def report(self) -> dict[str, int]:
        """Return counts of connections that were denied or cut, of malformed messages, of results not queued."""
        return {
            "denied": self._gate.denied,
            "cut": self._gate.cut,
            "malformed": self.malformed,
            "dropped": self.dropped,
        }

    def close(self) -> None:
        """Release the port; what is queued is still sent for a moment."""
        self._gate.close()
        self._context.destroy()


class _Backlog:
    """The large messages that are queued for one peer, until ZeroMQ has handed them to the network."""

    def __init__(self) -> None:
        self._queued: deque[tuple[int, zmq.MessageTracker]] = deque()
        self._bytes = 0

    @property
    def bytes(self) -> int:
        """Payload bytes that wait."""
        while self._queued and self._queued[0][1].done:
            self._bytes -= self._queued.popleft()[0]
        return self._bytes

    def add(self, nbytes: int, tracker: zmq.MessageTracker) -> None:
        """Note a message that was queued."""
        self._queued.append((nbytes, tracker))
        self._bytes += nbytes
