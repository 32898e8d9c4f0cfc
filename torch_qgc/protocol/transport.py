"""What moves messages to and from an aggregator, and an in-memory network under a virtual clock that does."""

from __future__ import annotations

import enum
import heapq
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

__all__ = ["Clock", "MemoryNetwork", "MonotonicClock", "Peer", "Sent", "Transport"]

Frame = Any  # anything with the buffer interface


class Peer(NamedTuple):
    """A connection, and the worker whose key has made it: nobody else can speak through it.

    Attributes:
        worker: its number; taken from the key, not from what is said.
        connection: the name of the connection.
    """

    worker: int
    connection: bytes


class Sent(enum.Enum):
    """What became of a message that was to be sent."""

    OK = "ok"
    FULL = "full"  # the peer's queue is full
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

    def poll(self, timeout_s: float) -> list[tuple[Peer, list[Frame]]]:
        """Return the messages that are in, as (peer, frames); wait for one at most timeout_s."""

    def send(self, peer: Peer, frames: Sequence[Frame]) -> Sent:
        """Queue a message for a peer; never blocks."""

    def close(self) -> None:
        """Release sockets; what is queued is still sent for a moment."""


class MemoryNetwork:
    """An aggregator's transport and clock without sockets or waiting: time jumps from event to event.

    `at` schedules a call, such as a simulated worker's next action; `deliver` schedules a message to the
    aggregator; what the aggregator sends is handed to `on_send(peer, frames)` at the time it is sent.
    """

    def __init__(self, on_send: Callable[[Peer, Sequence[Frame]], None] = lambda peer, frames: None) -> None:
        self._now = 0.0
        self._order = itertools.count()  # ties in time keep the order in which they were scheduled
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._inbox: list[tuple[Peer, list[Frame]]] = []
        self._gone: set[Peer] = set()
        self.on_send = on_send

    def now(self) -> float:
        """Return the virtual time in seconds."""
        return self._now

    def at(self, time_s: float, call: Callable[[], None]) -> None:
        """Run `call` at a virtual time (not before now)."""
        heapq.heappush(self._events, (max(time_s, self._now), next(self._order), call))

    def deliver(self, time_s: float, peer: Peer, frames: Sequence[Frame]) -> None:
        """Let a message reach the aggregator at a virtual time."""
        self.at(time_s, lambda: self._inbox.append((peer, list(frames))))

    def disconnect(self, peer: Peer) -> None:
        """Cut a peer off: sends to it report GONE."""
        self._gone.add(peer)

    @property
    def idle(self) -> bool:
        """Nothing is scheduled any more."""
        return not self._events

    def poll(self, timeout_s: float) -> list[tuple[Peer, list[Frame]]]:
        """Jump to the next event, or by timeout_s, and return what has come in."""
        until = self._now + max(timeout_s, 0.0)
        while self._events and self._events[0][0] <= until and not self._inbox:
            self._now, _, call = heapq.heappop(self._events)
            call()
        if not self._inbox:
            self._now = until
        inbox, self._inbox = self._inbox, []
        return inbox

    def send(self, peer: Peer, frames: Sequence[Frame]) -> Sent:
        """Hand a message to `on_send`."""
        if peer in self._gone:
            return Sent.GONE
        self.on_send(peer, frames)
        return Sent.OK

    def close(self) -> None:
        """Nothing to release."""
