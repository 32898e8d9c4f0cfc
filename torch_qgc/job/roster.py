"""Who belongs to the job: members, their connections, and how far each has come."""

from __future__ import annotations

import msgspec
import numpy as np
from numpy.typing import NDArray

from torch_qgc.errors import ProtocolError
from torch_qgc.protocol.messages import Hello, JobSpec

__all__ = ["Roster"]


class Roster:
    """Members of one job. A worker is expected (until the join timeout), then alive, then left or lost.

    Args:
        spec: the job.
        now: seconds on the aggregator's clock at which the job was announced.
    """

    def __init__(self, spec: JobSpec, now: float) -> None:
        self._join_by = now + spec.join_timeout_s
        self._peer_of: dict[int, bytes] = {}
        self._worker_of: dict[bytes, int] = {}
        self.alive: NDArray[np.bool_] = np.ones(spec.workers, dtype=np.bool_)  # the expected count as alive
        self._joined = np.zeros(spec.workers, dtype=np.bool_)
        self._position = np.zeros(spec.workers, dtype=np.int64)  # first step whose result the worker may lack

    def check(self, hello: Hello, spec: JobSpec) -> None:
        """Refuse a worker that does not fit the job.

        Raises:
            ProtocolError: names the field that differs, or who already has the worker's number.
        """
        mine, theirs = msgspec.to_builtins(spec), msgspec.to_builtins(hello.spec)
        remedies = {
            "workers": "start every rank with the same world size",
            "layout_digest": "build the same model on every rank (names, shapes, order, requires_grad)",
            "plan_digest": "pass the same plan to every rank",
        }
        for name, expected in mine.items():
            if theirs[name] != expected:
                remedy = remedies.get(name, "pass the same arguments to QGCState on every rank")
                raise ProtocolError(
                    f"worker {hello.worker}: expected {name}={expected!r} as worker 0, got {theirs[name]!r}: {remedy}"
                )
        if hello.worker >= spec.workers:
            raise ProtocolError(f"expected a worker number below {spec.workers}, got {hello.worker}")
        if hello.worker in self._peer_of:
            raise ProtocolError(
                f"worker {hello.worker} is already in this job from another connection: give every rank its own "
                "number; if it was restarted, try again when the old connection has timed out"
            )

    def admit(self, peer: bytes, hello: Hello, now: float) -> None:
        """Enter a worker (for the first time, or back from the dead)."""
        previous = self._worker_of.get(peer)
        if previous is not None:
            raise ProtocolError(f"this connection already speaks for worker {previous}: use one connection per worker")
        self._peer_of[hello.worker] = peer
        self._worker_of[peer] = hello.worker
        self.alive[hello.worker] = self._joined[hello.worker] = True
        self._position[hello.worker] = hello.step

    def worker_of(self, peer: bytes) -> int | None:
        """Return the worker behind a connection."""
        return self._worker_of.get(peer)

    def peer_of(self, worker: int) -> bytes:
        """Return the connection of a worker that is in."""
        return self._peer_of[worker]

    def peers(self) -> list[bytes]:
        """Return the connections of all that are in."""
        return list(self._worker_of)

    def leave(self, worker: int) -> None:
        """Take out a worker that left in good order."""
        self.alive[worker] = False
        self._worker_of.pop(self._peer_of.pop(worker), None)

    def mark_lost(self, peer: bytes) -> bool:
        """Take out a worker whose connection is gone; tell whether it was one."""
        worker = self._worker_of.get(peer)
        if worker is None:
            return False
        self.leave(worker)
        return True

    def advance(self, worker: int, step: int) -> None:
        """Note that a worker has applied all steps below `step`."""
        self._position[worker] = max(self._position[worker], step)

    def awaited(self, now: float) -> set[int]:
        """Return the workers that may still send: alive, and joined or still expected to."""
        if now > self._join_by:
            self.alive &= self._joined
        return set(np.flatnonzero(self.alive).tolist())

    def behind(self, step: int) -> set[int]:
        """Return the live workers that may still lack a result below `step`."""
        return set(np.flatnonzero(self.alive & (self._position < step)).tolist())

    @property
    def finished(self) -> bool:
        """Everybody who was expected has joined and gone (or never came)."""
        return not self.alive.any()
