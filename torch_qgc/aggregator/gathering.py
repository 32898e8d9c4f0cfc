"""What the workers of a job hand to each other outside of its steps: kept until all that are alive have taken it."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

from torch_qgc.errors import ProtocolError
from torch_qgc.protocol.contract import JobSpec
from torch_qgc.protocol.messages import MOST_NAMED, Awaited, FromAggregator, Gather, Gathered, Met, Take, encode_message
from torch_qgc.protocol.pieces import Cut

__all__ = ["AT_ONCE", "AT_ONCE_BYTES", "Gathering"]

Frame = Any  # bytes, memoryview or another buffer
AT_ONCE_BYTES, AT_ONCE = 8 << 20, 256  # sent before more is asked for: what does not fit into a queue is dropped
MOST_KEPT = 64  # gatherings that are complete


@dataclass
class _Content:
    """What has come of one worker's content."""

    pieces: int
    frames: dict[int, Frame] = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        return len(self.frames) == self.pieces


class Gathering:
    """The gatherings of a job, of which one is open at a time.

    A worker begins the next one when it has taken all of this one, so while it is open no worker that has been in the
    job ever since needs any but the one before. Older ones are kept as far as `log_bytes` reach, for a worker that was
    lost for a while: what it missed is complete without it, and it gets what all others got. So no more than twice
    `log_bytes` are held.

    Args:
        spec: the job.
    """

    def __init__(self, spec: JobSpec) -> None:
        self.number = 0  # of the one that is open; all before it are complete
        self._spec, self._cut = spec, Cut.of(spec)
        self._open: dict[int, _Content] = {}  # by worker
        self._kept: dict[int, dict[int, list[Frame]]] = {}  # number -> worker -> its pieces

    def receive(
        self, worker: int, message: Gather | Take, rest: Sequence[Frame], alive: AbstractSet[int]
    ) -> list[list[Frame]]:
        """Take one message; return what it is answered.

        Raises:
            ProtocolError: it is dropped.
        """
        if message.number > self.number:
            raise ProtocolError(
                f"worker {worker} takes part in gathering {message.number}, but {self.number} is not complete yet: "
                "every rank must make the same calls in the same order"
            )
        if isinstance(message, Take):
            return self._answer(message, alive)
        where = f"worker {worker}, gathering {message.number}"
        self._cut.check(where, message.piece, message.pieces, rest)
        if message.number < self.number:  # said again, or by a worker that comes back: it gets what all others got
            whole = message.piece == message.pieces - 1
            return self._answer(Take(message.number, 0, 0), alive) if whole else []
        content = self._open.setdefault(worker, _Content(message.pieces))
        if content.pieces != message.pieces:
            raise ProtocolError(f"{where}: expected {content.pieces} pieces as before, got {message.pieces}")
        content.frames.setdefault(message.piece, rest[0])
        return []

    def forget(self, worker: int) -> None:
        """Drop what a worker that was lost has handed over: another life of it has come."""
        self._open.pop(worker, None)

    def awaited(self, alive: AbstractSet[int]) -> AbstractSet[int]:
        """Return the live workers that the open gathering lacks, none if nobody has begun it."""
        return (
            frozenset(k for k in alive if k not in self._open or not self._open[k].whole) if self._open else frozenset()
        )

    def settle(self, alive: AbstractSet[int]) -> list[list[Frame]]:
        """Complete the gathering if the content of all that are alive is there; return what to tell everybody."""
        if not alive or not self._open or self.awaited(alive):
            return []
        contents = {k: [self._open[k].frames[p] for p in range(self._open[k].pieces)] for k in sorted(alive)}
        number, self.number, self._open = self.number, self.number + 1, {}
        self._kept[number] = contents
        while len(self._kept) > MOST_KEPT or (len(self._kept) > 1 and self._kept_bytes() > self._spec.log_bytes):
            del self._kept[min(self._kept)]
        return self._from(number, 0, 0)

    def _answer(self, take: Take, alive: AbstractSet[int]) -> list[list[Frame]]:
        if take.number == self.number:
            return [_header(Awaited(take.number, sorted(self.awaited(alive))[:MOST_NAMED]))]
        if take.number not in self._kept:
            return [_header(Met(take.number, []))]
        return self._from(take.number, take.worker, take.piece)

    def _from(self, number: int, worker: int, piece: int) -> list[list[Frame]]:
        """Return the messages from a piece on, as many as travel at once."""
        contents, room = self._kept[number], AT_ONCE_BYTES
        at_once: list[tuple[int, int]] = []
        for k, frames in contents.items():
            for p, frame in enumerate(frames):
                if (k, p) >= (worker, piece) and room > 0 and len(at_once) < AT_ONCE:
                    at_once.append((k, p))
                    room -= memoryview(frame).nbytes
        said = [[*_header(Gathered(number, k, p, more=(k, p) != at_once[-1])), contents[k][p]] for k, p in at_once]
        if (worker, piece) == (0, 0):
            met = Met(number, [len(contents.get(k, ())) for k in range(self._spec.workers)])
            said.insert(0, _header(met))
        return said

    def _kept_bytes(self) -> int:
        return sum(_nbytes(contents) for contents in self._kept.values())

    def __repr__(self) -> str:
        return f"Gathering({self.number} complete, {len(self._open)} workers in the next, {self._kept_bytes():,} bytes)"


def _header(message: FromAggregator) -> list[Frame]:
    return [encode_message(message)]


def _nbytes(contents: dict[int, list[Frame]]) -> int:
    return sum(memoryview(frame).nbytes for frames in contents.values() for frame in frames)
