"""The log of closed rounds: what a late worker replays from."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

__all__ = ["ResultLog"]


class ResultLog:
    """The newest `capacity` steps of results.

    Args:
        capacity: steps; `JobSpec.log_capacity` says how many fit into the job's bounds.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._frames: OrderedDict[int, dict[int, list[Any]]] = OrderedDict()
        self.bytes = 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Go through (step, chunk) of what is here, by step."""
        return ((step, chunk) for step, chunks in self._frames.items() for chunk in chunks)

    def put(self, step: int, chunk: int, frames: list[Any]) -> None:
        """Keep a result's frames; forget the steps that no longer fit."""
        self._frames.setdefault(step, {})[chunk] = frames
        self.bytes += sum(memoryview(frame).nbytes for frame in frames)
        while len(self._frames) > self.capacity:
            _, forgotten = self._frames.popitem(last=False)
            self.bytes -= sum(memoryview(frame).nbytes for frames in forgotten.values() for frame in frames)

    def get(self, step: int, chunk: int) -> list[Any] | None:
        """Return a result's frames, or None if it is not (or no longer) there."""
        return self._frames.get(step, {}).get(chunk)

    @property
    def oldest(self) -> int:
        """The oldest step from which on all results are still here (0 before any was forgotten)."""
        return next(iter(self._frames), 0)
