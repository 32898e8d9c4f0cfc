"""What a worker's step took, on its own and on the link, from the messages that it sends anyway."""

from __future__ import annotations

from typing import NamedTuple

from torch_qgc.protocol.messages import Begin, Push

__all__ = ["Stopwatch", "Timed"]


class Timed(NamedTuple):
    """A step of a worker that was computed and delivered.

    Attributes:
        step: which.
        samples: of its batch.
        batch_size: the mean over workers; 0: batches are not ours to cut.
        moves: any worker could have drawn its batch.
        own_s: seconds from the result of the step before to this step's last payload, by the worker's clock.
        link_s: by how much longer its payloads were on the way than the announcement of the step.
        down_s: for which the result of the step before was on the way to it, and the announcement back; None: it was
            still busy when that step closed, and has not waited for its result.
    """

    step: int
    samples: int
    batch_size: int
    moves: bool
    own_s: float
    link_s: float
    down_s: float | None


class _Running(NamedTuple):
    begin: Begin
    at_s: float
    down_s: float | None
    delivered: int = 0


class _Delivered(NamedTuple):
    step: int
    sent_s: float
    at_s: float


# An announcement that comes so soon after a payload, as a part of the time which that was on its way, came behind it.
_BEHIND = 0.05
_KEPT = 64  # steps


class Stopwatch:
    """Time workers' steps without a common clock: two of one's own are compared, and two of the aggregator's.

    A late worker begins its next step while its payload is still on the way, and the announcement queues behind that.
    Then the step is taken to have begun when the worker had sent the payload and had the result of the step before.

    Args:
        chunks: how many payloads of a step come here.
    """

    def __init__(self, chunks: int) -> None:
        self._chunks = chunks
        self._running: dict[int, _Running] = {}  # by worker, as the next two
        self._delivered: dict[int, _Delivered] = {}
        self._down_s: dict[int, float] = {}
        self._closed_at_s: dict[int, float] = {}  # by step

    def begin(self, worker: int, begin: Begin, now: float) -> None:
        """Note that a worker begins a step."""
        self._running.pop(worker, None)
        if begin.thin:
            return
        at_s, down_s, last = now, None, self._delivered.get(worker)
        closed_s = None if last is None else self._closed_at_s.get(last.step)
        if last is not None and closed_s is not None:
            if last.at_s <= closed_s and last.step == begin.step - 1:  # it has waited for the result
                down_s = self._down_s[worker] = max(now - closed_s - begin.outside_s, 0.0)
            elif now - last.at_s <= _BEHIND * (last.at_s - last.sent_s):
                had_s = max(last.sent_s, closed_s + self._down_s.get(worker, 0.0))
                at_s = min(now, had_s + begin.outside_s)
        self._running[worker] = _Running(begin, at_s, down_s)

    def close(self, step: int, now: float) -> None:
        """Note that a step has closed for all chunks that come here."""
        self._closed_at_s.setdefault(step, now)
        self._closed_at_s.pop(step - _KEPT, None)

    def push(self, worker: int, push: Push, now: float) -> Timed | None:
        """Note a payload; return what the step took if this was its last one here."""
        running = self._running.get(worker)
        if running is None or running.begin.step != push.step:
            return None
        running = running._replace(delivered=running.delivered + 1)
        if running.delivered < self._chunks:
            self._running[worker] = running
            return None
        del self._running[worker]
        sent_s, last = running.at_s + push.spent_s, self._delivered.get(worker)
        link_s = max(now - (sent_s if last is None else max(sent_s, last.at_s)), 0.0)
        self._delivered[worker] = _Delivered(push.step, sent_s, now)
        begin = running.begin
        own_s = begin.outside_s + push.spent_s
        return Timed(push.step, begin.samples, begin.batch_size, begin.moves, own_s, link_s, running.down_s)
