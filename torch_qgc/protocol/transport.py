"""Sockets: ZeroMQ on both ends, and an in-memory network under a virtual clock for tests and simulation."""

from __future__ import annotations

import enum
import heapq
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import zmq

__all__ = ["Clock", "MemoryNetwork", "MonotonicClock", "Sent", "Transport", "ZmqClient", "ZmqServer"]

Frame = Any  # anything with the buffer interface
HEARTBEAT_MS = 1_000
HEARTBEAT_TIMEOUT_MS = 10_000


class Sent(enum.Enum):
    """What became of a message that was to be sent."""

    OK = "ok"
    FULL = "full"  # the peer's queue is full: dropped, the peer will ask again
    GONE = "gone"  # there is no such connection any more


class Clock(Protocol):
    """Seconds that only go forward."""

    def now(self) -> float:
        """Return the present time in seconds."""


class MonotonicClock:
    """time.monotonic()."""

    def now(self) -> float:
        """Return the present time in seconds."""
        return time.monotonic()


class Transport(Protocol):
    """The aggregator's end of the network."""

    def poll(self, timeout_s: float) -> list[tuple[bytes, list[Frame]]]:
        """Return the messages that are in, as (peer, frames); wait for one at most timeout_s."""

    def send(self, peer: bytes, frames: Sequence[Frame]) -> Sent:
        """Queue a message for a peer; never blocks."""

    def close(self) -> None:
        """Release sockets; what is queued is still sent for a moment."""


class ZmqServer:
    """A ROUTER socket. A vanished peer is noticed at the next send to it.

    Args:
        bind: "tcp://host:port"; port * picks a free one, see `endpoint`.
        max_message_bytes: a peer that announces a larger frame is disconnected before it is read.
        queue_messages: messages queued per peer before they are dropped.
    """

    def __init__(self, bind: str, *, max_message_bytes: int = 256 << 20, queue_messages: int = 1_000) -> None:
        self._context = zmq.Context()
        self._socket = socket = self._context.socket(zmq.ROUTER)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        socket.setsockopt(zmq.MAXMSGSIZE, max_message_bytes)
        socket.setsockopt(zmq.SNDHWM, queue_messages)
        socket.setsockopt(zmq.RCVHWM, queue_messages)
        socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
        socket.setsockopt(zmq.LINGER, 2_000)
        try:
            socket.bind(bind)
        except zmq.ZMQError:
            self._context.destroy(linger=0)
            raise
        self.endpoint: str = socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def poll(self, timeout_s: float) -> list[tuple[bytes, list[Frame]]]:
        """Return the messages that are in, as (peer, frames); wait for one at most timeout_s."""
        if not self._socket.poll(max(0, int(timeout_s * 1_000 + 0.999))):
            return []
        messages = []
        for _ in range(256):  # then let the caller look at its deadlines
            try:
                peer, *frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                break
            messages.append((peer.bytes, [frame.buffer for frame in frames]))
        return messages

    def send(self, peer: bytes, frames: Sequence[Frame]) -> Sent:
        """Queue a message for a peer; never blocks."""
        try:
            self._socket.send_multipart([peer, *frames], zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return Sent.FULL
        except zmq.ZMQError as error:
            if error.errno == zmq.EHOSTUNREACH:
                return Sent.GONE
            raise
        return Sent.OK

    def close(self) -> None:
        """Release the port; what is queued is still sent for a moment."""
        self._context.destroy()


class ZmqClient:
    """A worker's connections to all aggregators, used from one thread; other threads only `wake` it.

    Args:
        endpoints: "tcp://host:port" of every aggregator.
        max_message_bytes: larger frames are not read.
    """

    def __init__(self, endpoints: Sequence[str], *, max_message_bytes: int = 256 << 20) -> None:
        self._context = zmq.Context()
        self._poller = zmq.Poller()
        self._sockets = []
        for endpoint in endpoints:
            socket = self._context.socket(zmq.DEALER)
            socket.setsockopt(zmq.MAXMSGSIZE, max_message_bytes)
            socket.setsockopt(zmq.SNDHWM, 0)  # what we send is bounded by the step we are in
            socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
            socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
            socket.setsockopt(zmq.LINGER, 2_000)
            socket.setsockopt(zmq.RECONNECT_IVL, 100)
            socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2_000)
            socket.connect(endpoint)
            self._poller.register(socket, zmq.POLLIN)
            self._sockets.append(socket)
        self._index = {socket: i for i, socket in enumerate(self._sockets)}

    def watch(self, fd: int) -> None:
        """Make `poll` return when the file descriptor becomes readable."""
        self._poller.register(fd, zmq.POLLIN)

    def poll(self, timeout_s: float) -> list[tuple[int, list[Frame]]]:
        """Return the messages that are in, as (aggregator, frames); wait for one at most timeout_s."""
        messages = []
        for socket, _ in self._poller.poll(int(timeout_s * 1_000 + 0.999)):
            index = self._index.get(socket)
            if index is None:  # the watched descriptor
                continue
            for _ in range(64):
                try:
                    frames = socket.recv_multipart(zmq.NOBLOCK, copy=False)
                except zmq.Again:
                    break
                messages.append((index, [frame.buffer for frame in frames]))
        return messages

    def send(self, aggregator: int, frames: Sequence[Frame]) -> None:
        """Queue a message for an aggregator."""
        self._sockets[aggregator].send_multipart(list(frames), copy=False)

    def close(self) -> None:
        """Close the connections; what is queued is still sent for a moment."""
        self._context.destroy()


class MemoryNetwork:
    """An aggregator's transport and clock without sockets or waiting: time jumps from event to event.

    `at` schedules a call, such as a simulated worker's next action; `deliver` schedules a message to the
    aggregator; what the aggregator sends is handed to `on_send(peer, frames)` at the time it is sent.
    """

    def __init__(self, on_send: Callable[[bytes, Sequence[Frame]], None] = lambda peer, frames: None) -> None:
        self._now = 0.0
        self._order = itertools.count()  # ties in time keep the order in which they were scheduled
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._inbox: list[tuple[bytes, list[Frame]]] = []
        self._gone: set[bytes] = set()
        self.on_send = on_send

    def now(self) -> float:
        """Return the virtual time in seconds."""
        return self._now

    def at(self, time_s: float, call: Callable[[], None]) -> None:
        """Run `call` at a virtual time (not before now)."""
        heapq.heappush(self._events, (max(time_s, self._now), next(self._order), call))

    def deliver(self, time_s: float, peer: bytes, frames: Sequence[Frame]) -> None:
        """Let a message reach the aggregator at a virtual time."""
        self.at(time_s, lambda: self._inbox.append((peer, list(frames))))

    def disconnect(self, peer: bytes) -> None:
        """Cut a peer off: sends to it report GONE."""
        self._gone.add(peer)

    @property
    def idle(self) -> bool:
        """Nothing is scheduled any more."""
        return not self._events

    def poll(self, timeout_s: float) -> list[tuple[bytes, list[Frame]]]:
        """Jump to the next event, or by timeout_s, and return what has come in."""
        until = self._now + max(timeout_s, 0.0)
        while self._events and self._events[0][0] <= until and not self._inbox:
            self._now, _, call = heapq.heappop(self._events)
            call()
        if not self._inbox:
            self._now = until
        inbox, self._inbox = self._inbox, []
        return inbox

    def send(self, peer: bytes, frames: Sequence[Frame]) -> Sent:
        """Hand a message to `on_send`."""
        if peer in self._gone:
            return Sent.GONE
        self.on_send(peer, frames)
        return Sent.OK

    def close(self) -> None:
        """Nothing to release."""
