"""A way between a worker and its aggregator that can be cut, closed and clogged."""

from __future__ import annotations

import contextlib
import selectors
import socket
import struct
import threading
from collections.abc import Callable
from urllib.parse import urlsplit

_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: what is on its way is lost, and both ends hear of it at once


class Proxy:
    """Forward TCP connections, from a thread of its own.

    Args:
        target: the endpoint behind; asked for when the first connection comes.
    Attributes:
        clogged: nothing that comes from the target is read.
        silent: nothing is read on either side, and no connection is taken: as behind a network that is gone.
    """

    def __init__(self, target: Callable[[], str]) -> None:
        self._target = target
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._pairs: list[tuple[socket.socket, socket.socket]] = []  # (the worker's side, the target's)
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._closing = self.clogged = self.silent = False
        self.connections = 0  # that have come

    def through(self, endpoint: str) -> str:
        """Return the address at which an endpoint is reached through this."""
        return "tcp://{}:{}".format(*self._listening.getsockname())

    def start(self) -> None:
        """Begin to forward; after processes were forked, so that they are forked from a single thread."""
        self._thread.start()

    def cut(self) -> None:
        """Reset all connections; new ones are taken."""
        with self._lock:
            for pair in self._pairs:
                _reset(pair)
            self._pairs.clear()

    def close(self) -> None:
        """Stop, and cut what there is."""
        self._closing = True
        if self._thread.is_alive():
            self._thread.join()
        self.cut()
        self._listening.close()

    def _run(self) -> None:
        while not self._closing:
            with self._lock:
                ends = {} if self.silent else {end: pair for pair in self._pairs for end in self._open_ends(pair)}
            with selectors.DefaultSelector() as selector:
                for end in [*ends, *([] if self.silent else [self._listening])]:
                    with contextlib.suppress(ValueError, KeyError):  # it was cut meanwhile
                        selector.register(end, selectors.EVENT_READ)
                ready = [key.fileobj for key, _ in selector.select(0.005)]
            for end in ready:
                if end is self._listening:
                    self._take()
                else:
                    self._forward(end, ends[end])  # type: ignore[index, arg-type]

    def _open_ends(self, pair: tuple[socket.socket, socket.socket]) -> tuple[socket.socket, ...]:
        return pair[:1] if self.clogged else pair

    def _take(self) -> None:
        worker, _ = self._listening.accept()
        parts = urlsplit(self._target())
        try:
            target = socket.create_connection((parts.hostname, parts.port))
        except OSError:
            _reset((worker,))
            return
        with self._lock:
            self.connections += 1
            self._pairs.append((worker, target))

    def _forward(self, end: socket.socket, pair: tuple[socket.socket, socket.socket]) -> None:
        other = pair[1] if end is pair[0] else pair[0]
        with contextlib.suppress(OSError):  # it was cut
            content = end.recv(1 << 18)
            if content:
                other.sendall(content)
                return
        with self._lock:
            if pair in self._pairs:
                self._pairs.remove(pair)
                for each in pair:  # what was sent before the end still arrives
                    each.close()


def _reset(ends: tuple[socket.socket, ...]) -> None:
    for end in ends:
        with contextlib.suppress(OSError):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        end.close()
