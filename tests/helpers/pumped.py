"""Several aggregators and any number of workers, whose messages travel in no time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from helpers.simulated import peer_of
from helpers.virtual import session_for
from torch_qgc.aggregator.aggregator import Aggregator
from torch_qgc.planner import Plan
from torch_qgc.protocol.contract import JobSpec
from torch_qgc.protocol.transport import Peer
from torch_qgc.worker.connection import Connection
from torch_qgc.worker.session import Session


class Pump:
    """Move messages until nobody has anything to say.

    Args:
        aggregators: of one job, in order.
    """

    def __init__(self, aggregators: Sequence[Aggregator]) -> None:
        self.aggregators = list(aggregators)
        self.time_s = 0.0
        self.sessions: dict[Peer, Session] = {}

    def connect(self, spec: JobSpec, plan: Plan, worker: int, **options: Any) -> Connection:
        """Connect a new worker to all aggregators."""
        endpoints = [f"memory-{index}" for index in range(len(self.aggregators))]
        session = self.sessions[peer_of(worker)] = session_for(spec, plan, worker, endpoints=endpoints, **options)
        for index in range(len(self.aggregators)):
            session.connected(index)
        return Connection(session, PumpedCarrier(self))

    def pump(self) -> None:
        """Let everything arrive that is on its way, and what is said in answer."""
        busy = True
        while busy:
            busy = False
            for peer, session in self.sessions.items():
                for aggregator, frames in session.drain():
                    busy = True
                    self.aggregators[aggregator].receive(peer, frames(), self.time_s)
            for index, serving in enumerate(self.aggregators):
                serving.tick(self.time_s)
                serving.plan(self.time_s)
                for peer, answer in serving.drain():
                    busy = True
                    if peer in self.sessions:  # else it is cut off
                        self.sessions[peer].receive(index, list(answer), self.time_s)


class PumpedCarrier:
    """See `torch_qgc.worker.connection.Carrier`: nothing takes time, so who waits in vain three times waits forever."""

    def __init__(self, pump: Pump) -> None:
        self._pump, self._in_vain = pump, 0

    def now(self) -> float:
        return self._pump.time_s

    def locked(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def wait_for(self, condition: Callable[[], object], timeout_s: float) -> bool:
        self._pump.pump()
        holds = bool(condition())
        self._in_vain = 0 if holds else self._in_vain + 1
        assert self._in_vain < 3, "would wait forever"
        return holds

    def flush(self) -> None:
        self._pump.pump()

    def close(self) -> None:
        self._pump.pump()
