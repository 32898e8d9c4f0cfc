"""Who takes part in the job, and how far each worker has come."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

__all__ = ["Roster"]


class Roster:
    """The workers of one job. A worker is expected until the join timeout, then present, then gone.

    Args:
        workers: K.
        first_step: of the job.
        join_by_s: when those that have not joined are no longer expected; infinite: never.
    """

    def __init__(self, workers: int, first_step: int = 0, join_by_s: float = math.inf) -> None:
        self._join_by_s = join_by_s
        self.alive: NDArray[np.bool_] = np.ones(workers, dtype=np.bool_)  # the expected count as alive
        self._joined = np.zeros(workers, dtype=np.bool_)
        self._position = np.full(workers, first_step, dtype=np.int64)  # first step whose result the worker may lack
        self._away_since_s: dict[int, float] = {}  # of workers whose connection is gone

    def join(self, worker: int, step: int) -> None:
        """Enter a worker, for the first time or back from the dead, whose first missing result is that of `step`."""
        self.alive[worker] = self._joined[worker] = True
        self._position[worker] = step
        self._away_since_s.pop(worker, None)

    def remove(self, worker: int) -> None:
        """Take out a worker that has left or died."""
        self.alive[worker] = False
        self._away_since_s.pop(worker, None)

    def away(self, worker: int, now: float) -> None:
        """Note that a worker's connection is gone: it may come back."""
        self._away_since_s[worker] = now

    def away_for(self, seconds: float, now: float) -> list[int]:
        """Return the workers that have been away for as long."""
        return [worker for worker, since_s in sorted(self._away_since_s.items()) if now >= since_s + seconds]

    def advance(self, worker: int, step: int) -> None:
        """Note that a worker has applied all steps below `step`."""
        self._position[worker] = max(self._position[worker], step)

    def position(self, worker: int) -> int:
        """Return the first step whose result a worker may lack."""
        return int(self._position[worker])

    @property
    def awaited(self) -> frozenset[int]:
        """The workers that may still send: alive, and joined or expected to; those that are away may come back."""
        return frozenset(np.flatnonzero(self.alive).tolist())

    @property
    def here(self) -> frozenset[int]:
        """Those of them that are not away."""
        return self.awaited - self._away_since_s.keys()

    @property
    def joined(self) -> frozenset[int]:
        """The workers that have been in the job."""
        return frozenset(np.flatnonzero(self._joined).tolist())

    def overdue(self, now: float) -> list[int]:
        """Return the workers that are still expected, but have not joined in time."""
        if now <= self._join_by_s:
            return []
        overdue: list[int] = np.flatnonzero(self.alive & ~self._joined).tolist()
        return overdue

    def behind(self, step: int) -> frozenset[int]:
        """Return the live workers that may still lack a result below `step`."""
        return frozenset(np.flatnonzero(self.alive & (self._position < step)).tolist())
