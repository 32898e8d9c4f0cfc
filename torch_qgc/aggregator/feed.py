"""Results on their way to the workers: what does not fit into a worker's queue is owed, and sent when there is room."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from torch_qgc.job.log import ResultLog

__all__ = ["Feed"]


class Feed:
    """Send every member each result once per connection, in the order in which rounds closed.

    Args:
        log: holds the results. One that it has forgotten is not sent: nobody who still needs it is in the job.
    """

    def __init__(self, log: ResultLog) -> None:
        self._log = log
        self._owed: dict[int, deque[tuple[int, int]]] = {}  # worker -> (step, chunk) of results, in order
        self._full: set[int] = set()  # workers whose queue was full at the last try

    def start(self, worker: int, step: int) -> None:
        """Begin with the results of `step`: the worker is in, over a new connection."""
        self._owed[worker] = deque(key for key in self._log if key[0] >= step)
        self._full.discard(worker)

    def stop(self, worker: int) -> None:
        """Send a worker nothing more."""
        self._owed.pop(worker, None)

    def publish(self, step: int, chunk: int) -> None:
        """Add a result for all members."""
        for owed in self._owed.values():
            owed.append((step, chunk))

    def take(self) -> list[tuple[int, list[Any]]]:
        """Return what is to be sent now, as (worker, frames); of a worker whose queue was full, one for a try."""
        taken = []
        for worker, owed in self._owed.items():
            for _ in range(min(len(owed), 1) if worker in self._full else len(owed)):
                frames = self._log.get(*owed.popleft())
                if frames is not None:
                    taken.append((worker, frames))
        self._full.clear()
        return taken

    def unsent(self, worker: int, results: Sequence[tuple[int, int]]) -> None:
        """Take back what did not fit into a worker's queue, as (step, chunk), in order."""
        if worker in self._owed:
            self._owed[worker].extendleft(reversed(results))
            self._full.add(worker)

    @property
    def owes(self) -> bool:
        """Somebody's queue was full."""
        return bool(self._full)
