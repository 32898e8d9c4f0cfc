"""A session over ZeroMQ: a background thread that alone touches the sockets, and encodes on the way out."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from torch_qgc.errors import JobFailed, Refused
from torch_qgc.protocol.client import ZmqClient
from torch_qgc.protocol.identity import Pass
from torch_qgc.worker.session import Session

__all__ = ["SocketCarrier"]


class SocketCarrier:
    """Carry a session's messages over TCP; see `torch_qgc.worker.connection.Carrier`.

    Args:
        session: this worker's.
        passes: what it shows to each aggregator.
    """

    def __init__(self, session: Session, passes: Sequence[Pass]) -> None:
        self._session, self._passes = session, passes
        self._news = threading.Condition()  # also the session's lock
        self._wake_out, self._wake_in = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._closing = False
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._run, name="torch_qgc worker", daemon=True)
        self._thread.start()

    def now(self) -> float:
        """Return time.monotonic()."""
        return time.monotonic()

    def locked(self) -> contextlib.AbstractContextManager[Any]:
        """Keep the session from changing."""
        return self._news

    def wait_for(self, condition: Callable[[], object], timeout_s: float) -> bool:
        """Wait, with the lock held by the caller, until a condition holds or time is up."""
        return bool(self._news.wait_for(condition, timeout_s))

    def flush(self) -> None:
        """Wake the background thread, which sends."""
        with contextlib.suppress(BlockingIOError, OSError):  # full: the thread is already being woken
            self._wake_in.send(b"\0")

    def close(self) -> None:
        """Send what is left, and stop the thread."""
        if os.getpid() != self._pid or self._closing:
            return
        self._closing = True
        self.flush()
        self._thread.join(10.0)
        if not self._thread.is_alive():
            self._wake_in.close()
            self._wake_out.close()

    # --- the background thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        client = ZmqClient(self._session.endpoints, self._passes)
        try:
            client.watch(self._wake_out.fileno())
            self._loop(client)
        except Exception as error:
            with self._news:
                self._session.end(
                    JobFailed(f"worker {self._session.worker}: the connection's thread failed: {error!r}")
                )
                self._news.notify_all()
        finally:
            client.close()

    def _loop(self, client: ZmqClient) -> None:
        while True:
            closing = self._closing  # read first: what was queued before it was set is still sent
            self._send(client)
            if closing:
                return
            received = client.poll(0.25)
            with contextlib.suppress(BlockingIOError):
                while self._wake_out.recv(4096):
                    pass
            with self._news:
                now = self.now()
                for aggregator, frames in received:
                    self._session.receive(aggregator, frames, now)
                for aggregator in client.connected():
                    self._session.connected(aggregator)
                self._session.tick(now)
                if client.shut_out is not None:
                    self._session.end(Refused(client.shut_out))
                if client.deserted is not None:
                    self._session.end(JobFailed(client.deserted))
                if received or self._session.error is not None:
                    self._news.notify_all()

    def _send(self, client: ZmqClient) -> None:
        with self._news:
            outgoing = self._session.drain()
        for aggregator, frames in outgoing:
            message = frames()
            self._session.bytes_sent += sum(memoryview(frame).nbytes for frame in message)
            client.send(aggregator, message)
