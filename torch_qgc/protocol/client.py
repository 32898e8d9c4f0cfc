"""A worker's sockets: a DEALER to each aggregator, which knows the job's key or is not listened to."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Sequence
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

from torch_qgc.protocol.identity import SHARE_A_KEY, Pass
from torch_qgc.protocol.server import HEARTBEAT_MS, HEARTBEAT_TIMEOUT_MS, OVERHEAD_BYTES

__all__ = ["ZmqClient"]

Frame = Any  # anything with the buffer interface
TRIES = 4  # at which it hangs up, before the key is thought to be wrong; the time between them grows to a second
RETRIES = 6  # of connections that nobody takes, some 3 s, before the aggregator is thought to be dead

_OTHERS = (zmq.EVENT_HANDSHAKE_SUCCEEDED, zmq.EVENT_CONNECTED, zmq.EVENT_CONNECT_RETRIED)
_FAILURES = (zmq.EVENT_HANDSHAKE_FAILED_AUTH, zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL, zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL)


class ZmqClient:
    """A worker's connections to all aggregators, used from one thread.

    Args:
        endpoints: "tcp://host:port" of every aggregator, in order.
        passes: what this worker shows to each of them.
        max_message_bytes: larger frames are not read.
    """

    def __init__(self, endpoints: Sequence[str], passes: Sequence[Pass], *, max_message_bytes: int = 256 << 20) -> None:
        self._endpoints, self._worker = list(endpoints), passes[0].worker
        self._context = zmq.Context()
        self._poller = zmq.Poller()
        self._sockets = []
        self._monitors = []
        self._failures: list[int | None] = [0] * len(endpoints)  # of handshakes; None: one has succeeded
        self._connected: list[int] = []
        self._retries = [0] * len(endpoints)  # since it was connected
        for endpoint, shown in zip(endpoints, passes):
            socket = self._context.socket(zmq.DEALER)
            socket.setsockopt(zmq.MAXMSGSIZE, max_message_bytes + OVERHEAD_BYTES)
            socket.setsockopt(zmq.SNDHWM, 0)  # what we send is bounded by the step we are in
            socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
            socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
            socket.setsockopt(zmq.LINGER, 2_000)
            socket.setsockopt(zmq.RECONNECT_IVL, 100)
            socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2_000)
            shown.put_on(socket)
            monitor = socket.get_monitor_socket(sum(_FAILURES) | sum(_OTHERS))
            monitor.setsockopt(zmq.RCVHWM, 0)  # a full queue would stop the thread that moves messages
            socket.connect(endpoint)
            for each in (socket, monitor):
                self._poller.register(each, zmq.POLLIN)
            self._sockets.append(socket)
            self._monitors.append(monitor)
        self._index = {socket: i for i, socket in enumerate(self._sockets)}

    def watch(self, descriptor: int) -> None:
        """Make `poll` return when a file descriptor becomes readable."""
        self._poller.register(descriptor, zmq.POLLIN)

    def poll(self, timeout_s: float) -> list[tuple[int, list[Frame]]]:
        """Return the messages that are in, as (aggregator, frames); wait for one at most timeout_s."""
        messages = []
        for socket, _ in self._poller.poll(int(timeout_s * 1_000 + 0.999)):
            index = self._index.get(socket)
            if index is None:  # a watched descriptor or a monitor
                continue
            for _ in range(64):
                try:
                    received = socket.recv_multipart(zmq.NOBLOCK, copy=False)
                except zmq.Again:
                    break
                messages.append((index, [frame.buffer for frame in received]))
        self._note_handshakes()
        return messages

    def connected(self) -> list[int]:
        """Return the aggregators to which a connection has come to stand, once for each that has."""
        connected, self._connected = self._connected, []
        return connected

    @property
    def shut_out(self) -> str | None:
        """Why an aggregator does not let this worker in, and will not; None as long as there is hope."""
        for endpoint, failures in zip(self._endpoints, self._failures):
            if failures is not None and failures >= TRIES:
                return (
                    f"worker {self._worker}: expected an aggregator of this job at {endpoint}, got one with another "
                    f"key, or another program: {SHARE_A_KEY}; and set `encrypt` alike"
                )
        return None

    @property
    def deserted(self) -> str | None:
        """Which aggregator was there, and is dead: nobody takes connections at its port any more. None if none is."""
        for endpoint, failures, retries in zip(self._endpoints, self._failures, self._retries):
            if failures is None and retries >= RETRIES:
                return (
                    f"worker {self._worker}: the aggregator at {endpoint} is dead: nobody takes connections there any "
                    "more (it is a child of rank 0 by default: has that been killed?)"
                )
        return None

    def _note_handshakes(self) -> None:
        for aggregator, monitor in enumerate(self._monitors):
            while monitor.poll(0):
                event = parse_monitor_message(monitor.recv_multipart())
                failures = self._failures[aggregator]
                if event["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                    self._failures[aggregator] = None
                    self._connected.append(aggregator)
                elif event["event"] in _OTHERS:
                    retried = event["event"] == zmq.EVENT_CONNECT_RETRIED
                    self._retries[aggregator] = self._retries[aggregator] + 1 if retried else 0
                elif failures is not None and event["event"] != zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
                    self._failures[aggregator] = TRIES  # it has said no, and ZeroMQ does not ask again
                elif failures is not None and event["value"] != errno.ETIMEDOUT:  # it may be stopped for a while
                    self._failures[aggregator] = failures + 1

    def send(self, aggregator: int, frames: Sequence[Frame]) -> None:
        """Queue a message for an aggregator; one that has shut this worker out gets none."""
        with contextlib.suppress(zmq.Again):  # the queue has no bound, but after a refusal there is none
            self._sockets[aggregator].send_multipart(list(frames), zmq.NOBLOCK, copy=False)

    def close(self) -> None:
        """Close the connections; what is queued is still sent for a moment."""
        for socket in self._sockets:
            socket.disable_monitor()
        self._context.destroy()
