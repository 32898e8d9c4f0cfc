"""Aggregators in threads of this process, and workers that reach them over real sockets."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from helpers.keys import SECRET, door, passes
from helpers.ranks import PATIENCE_S
from helpers.simulated import make_spec, simple_plan
from torch_qgc.aggregator.aggregator import Aggregator
from torch_qgc.aggregator.process import serve
from torch_qgc.job.courses import Courses
from torch_qgc.planner import Plan
from torch_qgc.protocol.identity import Secret
from torch_qgc.protocol.server import Bounds, ZmqServer
from torch_qgc.protocol.transport import MonotonicClock
from torch_qgc.worker.connection import Connection
from torch_qgc.worker.session import Session
from torch_qgc.worker.sockets import SocketCarrier

BOUNDS = Bounds(message_bytes=64 << 20)


class Served:
    """S aggregators in threads of this process."""

    def __init__(
        self, count: int = 1, *, encrypt: bool = True, bounds: Bounds = BOUNDS, ping_interval_s: float = 0.05
    ) -> None:
        self.servers = [
            ZmqServer("tcp://127.0.0.1:*", door(index, encrypt=encrypt), bounds=bounds) for index in range(count)
        ]
        self.aggregators = [Aggregator(index, count, ping_interval_s=ping_interval_s) for index in range(count)]
        self.endpoints = [server.endpoint for server in self.servers]
        self._stop = False
        self._threads = [threading.Thread(target=self._run, args=pair) for pair in zip(self.aggregators, self.servers)]
        for thread in self._threads:
            thread.start()

    def _run(self, aggregator: Aggregator, server: ZmqServer) -> None:
        serve(aggregator, server, MonotonicClock(), stop=lambda: self._stop)

    def close(self) -> None:
        self._stop = True
        for thread in self._threads:
            thread.join()
        for server in self.servers:
            server.close()


def connect(
    endpoints: list[str],
    spec: Any,
    worker: int,
    plan: Plan,
    *,
    secret: Secret = SECRET,
    encrypt: bool = True,
    **options: Any,
) -> Connection:
    session = Session(endpoints, spec, worker, Courses(spec.rule, plan, spec.first_step), **options)
    shown = passes(worker, len(endpoints), secret=secret, encrypt=encrypt)
    return Connection(session, SocketCarrier(session, shown))


@contextlib.contextmanager
def job(
    workers: int = 2,
    count: int = 1,
    inbox_bytes: int = 1 << 30,
    encrypt: bool = True,
    bounds: Bounds = BOUNDS,
    **spec: Any,
) -> Iterator[tuple[Served, list[Connection], Plan]]:
    plan = simple_plan(workers, bits_per_coordinate=spec.pop("bits_per_coordinate", 4))
    served = Served(count, encrypt=encrypt, bounds=bounds)
    made = make_spec(plan, aggregators=count, **spec)
    options: dict[str, Any] = {"encrypt": encrypt, "inbox_bytes": inbox_bytes}
    members = [connect(served.endpoints, made, k, plan, **options) for k in range(workers)]
    try:
        for member in members:
            member.join(PATIENCE_S)
        yield served, members, plan
    finally:
        for member in members:
            member.close()
        served.close()
