"""The `torch_qgc` logger, and a filter that keeps a message which repeats from filling the log."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

__all__ = ["Sparing", "logger"]


class Sparing(logging.Filter):
    """Let a message through once in a while, and say then how often it was left out in between.

    Messages are the same if their unformatted text is: "worker %d was lost" is one message for all workers and one
    of a burst of 1,000 is shown.

    Args:
        every_s: seconds between two records of one message.
        burst: records of one message that pass before the first is left out.
        now: seconds that only go forward.
    """

    def __init__(self, every_s: float = 10.0, burst: int = 8, now: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._every_s, self._burst, self._now = every_s, burst, now
        self._seen: dict[str, tuple[float, int, int]] = {}  # message -> start of its period, records in it, left out

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether the record is shown."""
        now, key = self._now(), str(record.msg)
        since, shown, left_out = self._seen.get(key, (now, 0, 0))
        if now - since >= self._every_s:
            if left_out:
                record.msg = f"{record.msg} (and {left_out} more like it in {now - since:.0f} s)"
            since, shown, left_out = now, 0, 0
        passes = shown < self._burst
        self._seen[key] = (since, shown + passes, left_out + (not passes))
        return passes


logger = logging.getLogger("torch_qgc")
if not any(isinstance(f, Sparing) for f in logger.filters):
    logger.addFilter(Sparing())
