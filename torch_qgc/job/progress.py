"""Who keeps the others waiting, and for how long: a process may be alive, and its training thread stuck."""

from __future__ import annotations

import math
from collections.abc import Set as AbstractSet

__all__ = ["Progress"]

SAY_EVERY_S = 10.0  # after so long it is said who is waited for


class Progress:
    """Watch the workers that the oldest open step waits for.

    Only time in which somebody looks counts: an aggregator that was suspended blames nobody.

    Args:
        timeout_s: for which a worker may keep the others waiting without a message of its training thread.
    """

    def __init__(self, timeout_s: float = math.inf) -> None:
        self._timeout_s = timeout_s
        self._looked_at_s: float | None = None
        self._watched_s = 0.0  # in all
        self._step = -1
        self._step_since_s = self._said_at_s = 0.0  # in watched time, as all that follows
        self._moved_at_s: dict[int, float] = {}  # worker -> its newest message

    def note(self, worker: int) -> None:
        """Note a message of a worker's training thread."""
        self._moved_at_s[worker] = self._watched_s

    def quiet_s(self, workers: AbstractSet[int]) -> float:
        """Return for how long none of some workers has sent anything."""
        return self._watched_s - max((self._moved_at_s.get(worker, 0.0) for worker in workers), default=0.0)

    def look(self, step: int, workers: AbstractSet[int], now: float) -> tuple[float | None, list[int]]:
        """Look who is waited for.

        Args:
            step: the oldest that is open.
            workers: whom the others wait for in it, or before it.
        Returns:
            For how many seconds they have waited, now and then when that is long, else None; and who is stuck.
        """
        passed_s = 0.0 if self._looked_at_s is None else min(now - self._looked_at_s, 1.0)
        self._looked_at_s = now
        self._watched_s += passed_s
        if step != self._step or not workers:
            self._step, self._step_since_s, self._said_at_s = step, self._watched_s, self._watched_s
            return None, []
        waited_s = self._watched_s - self._step_since_s
        stuck = [
            worker
            for worker in sorted(workers)
            if self._watched_s - max(self._moved_at_s.get(worker, 0.0), self._step_since_s) >= self._timeout_s
        ]
        if self._watched_s - self._said_at_s < SAY_EVERY_S:
            return None, stuck
        self._said_at_s = self._watched_s
        return waited_s, stuck
