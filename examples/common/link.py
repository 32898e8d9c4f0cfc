"""A slow link: a relay on this machine that lets through so many bytes per second each way."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

_PIECE = 1 << 14  # bytes that are let through at once


class Relay:
    """Stand between a client and a server, and pass on what they say as slowly as a link would.

    Args:
        endpoint: of the server, tcp://host:port.
        bytes_per_s: each way.
    Attributes:
        endpoint: where the client finds it.
    """

    def __init__(self, endpoint: str, bytes_per_s: float) -> None:
        host, port = endpoint.removeprefix("tcp://").rsplit(":", 1)
        self._server, self._bytes_per_s = (host, int(port)), bytes_per_s
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open = [self._listener]
        self.endpoint = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, name="relay", daemon=True).start()

    def close(self) -> None:
        """Cut the connections."""
        for each in self._open:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._server)
                self._open += [client, server]
                for source, target in ((client, server), (server, client)):
                    target.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    threading.Thread(target=self._carry, args=(source, target), name="relay", daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket) -> None:
        free_at_s = 0.0  # when the link has carried what it was given
        with contextlib.suppress(OSError):
            while piece := source.recv(_PIECE):
                free_at_s = max(free_at_s, time.monotonic()) + len(piece) / self._bytes_per_s
                time.sleep(max(free_at_s - time.monotonic(), 0.0))
                target.sendall(piece)
            target.shutdown(socket.SHUT_WR)
