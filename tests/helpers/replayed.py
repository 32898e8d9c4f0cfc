"""Put a job's recorded arrivals into fresh rounds: do the same ones close on the same payloads?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from torch_qgc.job.courses import Courses
from torch_qgc.job.events import Event
from torch_qgc.job.rounds import Closing, Rounds
from torch_qgc.planner import Plan
from torch_qgc.protocol.contract import ClosingRule


def read_events(path: Path) -> list[Event]:
    """Read what `Network(trace=...)` has written."""
    lines = path.read_bytes().splitlines(keepends=True)
    return [msgspec.json.decode(line, type=Event) for line in lines if line.endswith(b"\n")]  # the last one may be cut


class Replay:
    """Rounds that are told what was recorded of others: who joined, began, sent and was gone, and when.

    The clock is that of the record: rounds are looked at when something arrives, and where one is on record as closed
    in between (a deadline). What they decide must be what is on record, and nothing else.

    Args:
        plan, rule: of the job; chunks, first_step, log_steps: as at its aggregator.
    Attributes:
        closings: what has been decided, in order.
    """

    def __init__(
        self, plan: Plan, rule: ClosingRule, *, chunks: Sequence[int] = (0,), first_step: int = 0, log_steps: int
    ) -> None:
        self.rounds: Rounds[None] = Rounds(Courses(rule, plan, first_step), chunks=chunks, log_steps=log_steps)
        self.closings: list[Closing[None]] = []
        self._decided: list[Closing[None]] = []  # and not yet found on record
        self._in: dict[int, list[tuple[int, int]]] = {chunk: [] for chunk in chunks}

    def __call__(self, events: Iterable[Event]) -> list[Closing[None]]:
        """Replay events; return the closings.

        Raises:
            AssertionError: a decision differs from the one on record.
        """
        for event in events:
            if event.name == "close":
                self._compare(event)
            elif event.name in ("join", "begin", "take", "arrive", "left", "lost"):
                assert not self._decided, f"closed here, but not on record: {self._decided}"
                self._tell(event, event.time_s)
        assert not self._decided
        return self.closings

    def _tell(self, event: Event, now: float) -> None:
        rounds, worker, step, chunk = self.rounds, event.worker, event.step, event.chunk
        assert worker is not None
        if event.name == "join":
            assert step is not None
            rounds.join(worker, step, now)
            return
        if event.name == "arrive":
            assert step is not None
            assert chunk is not None
            fate = rounds.arrive(worker, step, chunk, None, now)
            assert fate.value == event.detail["fate"]
            if fate.value != "dropped":
                self._in[chunk].append((worker, step))
            self._decided = rounds.close_due(now, [chunk])
            return
        if event.name == "begin":
            assert step is not None
            rounds.begin(worker, step, now)
        elif event.name == "take":
            assert step is not None
            rounds.take(worker, step, now)
        else:
            rounds.leave(worker, now, event.name)
        self._decided = rounds.close_due(now)

    def _compare(self, event: Event) -> None:
        if not self._decided:
            self._decided = self.rounds.close_due(event.time_s)
        assert self._decided, f"on record as closed, but not here: {event}"
        closing = self._decided.pop(0)
        assert (closing.step, closing.chunk) == (event.step, event.chunk)
        assert [(worker, made_for) for worker, made_for, _ in closing.payloads] == sorted(self._in[closing.chunk])
        for name in ("counts", "rates", "alive"):
            assert getattr(closing, name).tolist() == _as_list(event.detail[name]), name
        self._in[closing.chunk] = []
        self.closings.append(closing)


def _as_list(values: Any) -> list[Any]:
    return list(values) if isinstance(values, list) else values.tolist()
