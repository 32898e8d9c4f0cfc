"""The stretches of a step, for torch.profiler and for whoever traces the job."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from torch.profiler import record_function

from torch_qgc.job.events import Event, Trace, silent

__all__ = ["Spans"]


class Spans:
    """Name what a worker does: `with spans("encode", step=3, chunk=1): ...` or `spans.mark("begin", step=3)`.

    Args:
        worker: this worker's number.
        trace: is told of everything; a stretch when it ends, with its `duration_s`.
        now: seconds on the clock of the trace.
    """

    def __init__(self, worker: int, trace: Trace = silent, now: Callable[[], float] = time.monotonic) -> None:
        self._worker, self._trace, self._now = worker, trace, now

    @contextlib.contextmanager
    def __call__(
        self, name: str, *, step: int | None = None, chunk: int | None = None, **detail: Any
    ) -> Iterator[None]:
        """Enter a stretch: a range `qgc.<name>` of the profiler, an event when it is left."""
        began_s = self._now()
        with record_function(f"qgc.{name}"):
            yield
        ended_s = self._now()
        self._trace(Event(ended_s, name, step, chunk, self._worker, {"duration_s": ended_s - began_s, **detail}))

    def mark(self, name: str, *, step: int | None = None, chunk: int | None = None, **detail: Any) -> None:
        """Tell of a moment."""
        self._trace(Event(self._now(), name, step, chunk, self._worker, detail))
