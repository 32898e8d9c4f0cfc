"""What happens in a job, for whoever wants to watch: tests, benchmarks, profilers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

__all__ = ["Event", "Trace", "silent"]


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened.

    Attributes:
        time_s: when, on the clock of the end that saw it (time.monotonic() in real jobs).
        name: what. Aggregators: "join", "begin", "take", "arrive", "close", "away", "lost", "left", "replan", "reject",
            "fail".
            Workers: "joined", "begin", "gather", "encode", "push", "result", "wait", "put", "replay", "hash", "gone",
            "replan", "fault".
        step, chunk, worker: which, where that makes sense, else None.
        detail: more, by name, as docs/runtime.md lists it.
    """

    time_s: float
    name: str
    step: int | None
    chunk: int | None
    worker: int | None
    detail: dict[str, Any]


Trace: TypeAlias = Callable[[Event], None]


def silent(event: Event) -> None:
    """Watch nothing."""
