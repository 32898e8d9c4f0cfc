"""How long a worker usually takes for a step, from its newest ones."""

from __future__ import annotations

import statistics
from collections import deque

__all__ = ["Pace"]


class Pace:
    """The median of a worker's newest step times; a mean would be fooled by a single pause.

    Args:
        memory: steps.
    """

    def __init__(self, memory: int = 16) -> None:
        self._times_s: deque[float] = deque(maxlen=memory)

    def note(self, seconds: float) -> None:
        """Enter the time from a step's BEGIN to its last payload."""
        self._times_s.append(seconds)

    @property
    def usual_s(self) -> float | None:
        """Seconds that a step usually takes; None before the first."""
        return statistics.median(self._times_s) if self._times_s else None
