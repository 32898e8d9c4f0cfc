"""Which connections an aggregator's port takes, and how much they may take before their messages can be read."""

from __future__ import annotations

import contextlib
import resource
import socket as sockets
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import zmq
from zmq.utils.monitor import parse_monitor_message

from torch_qgc.logs import logger
from torch_qgc.protocol.identity import Door

__all__ = ["LOOK_EVERY_S", "SPARE_DESCRIPTORS", "Gate", "received_bytes"]

LOOK_EVERY_S = 0.1
KERNEL_BYTES = 8 << 20  # may wait in a connection's own buffer
SPARE_DESCRIPTORS = 64  # for everything else that the process has open
_ZAP_DOMAIN = b"torch_qgc"
_AT_ONCE = 64  # requests that are answered before members get a turn
_TCP_INFO = struct.Struct("@128xQ")  # of Linux: the last of these fields is tcpi_bytes_received


@dataclass
class _Connection:
    known: bool = False  # a member's message has come through it
    base_bytes: int = 0  # received when the last message was read


class Gate:
    """Let members' connections in, and cut those that take too much.

    ZeroMQ asks here whether a connection may be made [ZAP, ZeroMQ RFC 27]; until the answer it reads no message of it,
    and it cuts those that are denied. The answer names the worker: its number is the User-Id of all that comes through
    the connection.

    ZeroMQ bounds a frame, and hands a message over when it is complete. It bounds neither the frames of a message nor
    the connections. So the gate counts connections, by the events of the socket's monitor; one too many costs the
    oldest that has sent nothing yet, which is no member at work. And it compares what a connection has received with
    what it had received when a message of it was last read: the difference is a message that is not complete, of
    however many frames. Linux counts these bytes (tcp_info); elsewhere this bound does not hold.

    Args:
        socket: that listens, before it is bound.
        door: by what workers are known.
        most_connections: at once; fewer if the process may not open so many files.
        most_unread_bytes: of a message that is not complete.
    Attributes:
        requests: the socket on which ZeroMQ asks.
        denied, cut: connections so far.
    """

    def __init__(self, socket: zmq.Socket[bytes], door: Door, *, most_connections: int, most_unread_bytes: int) -> None:
        self._door = door
        self.requests: zmq.Socket[bytes] = socket.context.socket(zmq.REP)
        self.requests.bind("inproc://zeromq.zap.01")
        socket.setsockopt(zmq.ZAP_DOMAIN, _ZAP_DOMAIN)
        door.put_on(socket)
        allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self.most_connections = max(min(most_connections, allowed - SPARE_DESCRIPTORS), 1)
        self.denied = self.cut = 0
        self._most_unread_bytes = most_unread_bytes + KERNEL_BYTES
        self._open: dict[int, _Connection] = {}  # by file descriptor, in the order in which they came
        self._delivered: set[int] = set()  # descriptors of which messages were read since the last look
        self._watched, self._looked_at_s = socket, 0.0
        self._monitor = socket.get_monitor_socket(zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)
        self._monitor.setsockopt(zmq.RCVHWM, 0)  # a full queue would stop the thread that moves messages

    @property
    def connections(self) -> int:
        """Connections at present."""
        return len(self._open)

    def note(self, descriptor: int) -> None:
        """Note that a member's message was read."""
        self._delivered.add(descriptor)

    def look(self, now: float) -> None:
        """Let in who may come in, and cut what is too much; bytes are counted ten times a second.

        It is to be called after one message at least of each connection was read that has a complete one.
        """
        self._answer()
        self._count()
        if now - self._looked_at_s < LOOK_EVERY_S:
            return
        self._looked_at_s = now
        for descriptor, connection in list(self._open.items()):
            received = received_bytes(descriptor)
            if descriptor in self._delivered:
                connection.known, connection.base_bytes = True, received
            elif received - connection.base_bytes > self._most_unread_bytes:
                self._cut(descriptor, "it has sent %d bytes that make no message", received - connection.base_bytes)
        self._delivered.clear()

    def close(self) -> None:
        """Stop watching."""
        self._watched.disable_monitor()

    def _answer(self) -> None:
        for _ in range(_AT_ONCE):
            try:
                version, request, _, _, _, mechanism, *credentials = self.requests.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            worker = self._door.worker_of(mechanism, credentials)
            self.denied += worker is None
            verdict = [b"400", b"", b""] if worker is None else [b"200", b"", b"%d" % worker]
            self.requests.send_multipart([version, request, *verdict, b""])

    def _count(self) -> None:
        while self._monitor.poll(0):
            event = parse_monitor_message(self._monitor.recv_multipart())
            descriptor = event["value"]
            self._open.pop(descriptor, None)
            if event["event"] == zmq.EVENT_DISCONNECTED:
                self._delivered.discard(descriptor)
                continue
            self._open[descriptor] = _Connection()
            if len(self._open) > self.most_connections:
                self._cut(self._least_wanted(), "there are more than %d", self.most_connections)

    def _least_wanted(self) -> int:
        """Return the oldest that has sent nothing, or else the newest."""
        quiet = (d for d, each in self._open.items() if not each.known and d not in self._delivered)
        return next(quiet, next(reversed(self._open)))

    def _cut(self, descriptor: int, why: str, *numbers: int) -> None:
        self.cut += 1
        logger.warning("a connection was cut: " + why, *numbers)
        del self._open[descriptor]
        with contextlib.suppress(OSError), _borrowed(descriptor) as connection:  # unless it has ended by itself
            connection.shutdown(sockets.SHUT_RDWR)

    def __repr__(self) -> str:
        return f"Gate({len(self._open)} of at most {self.most_connections} connections, {self.cut} cut)"


@contextlib.contextmanager
def _borrowed(descriptor: int) -> Iterator[sockets.socket]:
    """Use ZeroMQ's own connection. Should it have ended, and its number be another's, at worst that one comes back."""
    connection = sockets.socket(sockets.AF_INET, sockets.SOCK_STREAM, 0, fileno=descriptor)
    try:
        yield connection
    finally:
        connection.detach()


def received_bytes(descriptor: int) -> int:
    """Return what a connection has received so far, as Linux counts it; 0 where nobody does."""
    with contextlib.suppress(OSError, struct.error, AttributeError), _borrowed(descriptor) as connection:
        info = connection.getsockopt(sockets.IPPROTO_TCP, sockets.TCP_INFO, _TCP_INFO.size)
        return int(_TCP_INFO.unpack(info)[0])
    return 0
