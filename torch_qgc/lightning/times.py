"""How long each worker takes for a step, known to all without anybody waiting for anybody."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["StepTimes"]


class Store(Protocol):
    """torch.distributed's key-value store, as far as it is used here."""

    def set(self, key: str, value: str) -> None:
        """Write."""

    def check(self, keys: list[str]) -> bool:
        """Tell whether all keys have been written."""

    def get(self, key: str) -> bytes:
        """Read."""


class StepTimes:
    """Measure this worker's own time for a step, and read the others' from the process group's key-value store.

    Own time runs from the request for the step's first batch to the end of its update, without the waiting for its
    result. Steps that are replayed do not count.

    Args:
        store: of the process group: a write or a read asks rank 0's store, no other rank takes part.
        worker, workers: this worker's number, and how many there are.
        name: of the job among those that use the store.
        now: seconds.
    """

    def __init__(
        self, store: Store, worker: int, workers: int, *, name: str, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._store, self._worker, self._workers, self._name, self._now = store, worker, workers, name, now
        self._own_s: deque[float] = deque(maxlen=16)  # of the newest computed steps
        self._begun_at_s: float | None = None
        self._waited_s = 0.0

    def begin(self, waited_s: float) -> None:
        """Begin a step that this worker computes; `waited_s` is how long it has waited for results so far."""
        self._begun_at_s, self._waited_s = self._now(), waited_s

    def end(self, waited_s: float) -> None:
        """End the step, if one was begun here."""
        if self._begun_at_s is not None:
            self._own_s.append(self._now() - self._begun_at_s - (waited_s - self._waited_s))
            self._begun_at_s = None

    @property
    def own_s(self) -> float:
        """The median over this worker's newest steps; NaN before the first."""
        return statistics.median(self._own_s) if self._own_s else math.nan

    def exchange(self) -> NDArray[np.float64]:
        """Tell the others, and return what they have told last, [workers] seconds; NaN of those not heard of yet."""
        found = np.full(self._workers, math.nan)
        try:
            if self._own_s:
                self._store.set(self._key(self._worker), f"{self.own_s:.6f}")
            for worker in range(self._workers):
                if worker == self._worker:
                    found[worker] = self.own_s
                elif self._store.check([self._key(worker)]):
                    found[worker] = float(self._store.get(self._key(worker)))
        except (RuntimeError, ValueError):  # rank 0 and its store are gone; who is slow matters less than going on
            pass
        return found

    def _key(self, worker: int) -> str:
        return f"torch_qgc/{self._name}/step_s/{worker}"
