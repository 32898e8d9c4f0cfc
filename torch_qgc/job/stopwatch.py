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
    delivered: int


class Stopwatch:
    """Time workers' steps without a common clock: two of one's own are compared, and two of the aggregator's.

    Args:
        chunks: how many payloads of a step come here.
    """

    def __init__(self, chunks: int) -> None:
        self._chunks = chunks
        self._running: dict[int, _Running] = {}  # by worker
        self._delivered: dict[int, int] = {}  # worker -> the newest step that it has delivered in full
        self._closed: tuple[int, float, frozenset[int]] = (-1, 0.0, frozenset())  # step, when, who waited for it

    def begin(self, worker: int, begin: Begin, now: float) -> None:
        """Note that a worker begins a step."""
        if begin.thin:
            self._running.pop(worker, None)
        else:
            step, closed_at_s, waited = self._closed
            down_s = None
            if begin.step == step + 1 and worker in waited:
                down_s = max(now - closed_at_s - begin.outside_s, 0.0)
            self._running[worker] = _Running(begin, now, down_s, 0)

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
        self._delivered[worker] = push.step
        link_s = max(now - running.at_s - push.spent_s, 0.0)
        own_s = running.begin.outside_s + push.spent_s
        begin = running.begin
        return Timed(push.step, begin.samples, begin.batch_size, begin.moves, own_s, link_s, running.down_s)

    def close(self, step: int, now: float) -> None:
        """Note that the results of all steps up to this one are sent, to all at once."""
        if step <= self._closed[0]:
            return
        waited = frozenset(worker for worker, delivered in self._delivered.items() if delivered == step)
        self._closed = step, now, waited
