"""A worker's side of a gathering: its own content out, everybody's in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch_qgc.errors import CollectiveFailed, ProtocolError
from torch_qgc.protocol.contract import JobSpec
from torch_qgc.protocol.messages import Awaited, Gather, Gathered, Met, Take, encode_message
from torch_qgc.protocol.pieces import Cut

__all__ = ["Gathering"]

Frame = Any


class Gathering:
    """The gatherings that a worker takes part in, one after the other.

    Args:
        spec: the job.
    Attributes:
        number: of those that are over here; a worker that comes back sets it to that of its checkpoint.
        news: counts what was heard of the one that is open.
        awaited: workers whose content is not there yet, as far as was heard.
    """

    def __init__(self, spec: JobSpec) -> None:
        self.number = 0
        self.news = 0
        self.awaited: list[int] = []
        self._cut = Cut.of(spec)
        self._begin([])

    def _begin(self, said: list[list[Frame]]) -> None:
        self.awaited = []
        self._said = said  # this worker's content
        self._pieces: list[int] | None = None  # of each worker's content, once the gathering is complete
        self._heard: dict[tuple[int, int], Frame] = {}
        self._missing: list[tuple[int, int]] = []  # the last one is the next to come
        self._asks = False

    def begin(self, content: bytes) -> list[list[Frame]]:
        """Take part in the next gathering; return what to say.

        Raises:
            ConfigError: the content is too large.
        """
        pieces = self._cut.cut(content)
        self._begin([[encode_message(Gather(self.number, i, len(pieces))), piece] for i, piece in enumerate(pieces)])
        return self._said

    @property
    def said(self) -> list[list[Frame]]:
        """What this worker has said in the gathering that it is in; nothing between two of them."""
        return self._said

    def hear(self, message: Met | Gathered | Awaited, rest: Sequence[Frame]) -> None:
        """Take one message.

        Raises:
            ProtocolError: it is none of this job.
        """
        if not self._said or message.number != self.number:
            return  # answered twice
        self.news += 1
        match message:
            case Awaited(_, workers):
                self.awaited = workers
            case Met(_, pieces) if self._pieces is None:
                self._pieces = pieces
                self._missing = [(k, p) for k, count in enumerate(pieces) for p in range(count)][::-1]
                self._asks = not pieces
            case Gathered(number, worker, piece, more) if self._pieces is not None:
                if worker >= len(self._pieces):
                    raise ProtocolError(
                        f"gathering {number}: expected one of {len(self._pieces)} workers, got {worker}"
                    )
                where = f"gathering {number}, worker {worker}"
                self._cut.check(where, piece, self._pieces[worker], rest)
                self._heard.setdefault((worker, piece), rest[0])
                while self._missing and self._missing[-1] in self._heard:
                    self._missing.pop()
                self._asks = not more

    @property
    def complete(self) -> bool:
        """Everything is here, or will never be: `end` says which."""
        return self._pieces is not None and not self._missing

    @property
    def asks(self) -> bool:
        """Nothing more comes before this worker has said something."""
        return self._asks or self.complete

    def take(self) -> Take:
        """Ask for what is missing."""
        self._asks = False
        return Take(self.number, *(self._missing[-1] if self._missing else (0, 0)))

    def end(self) -> dict[int, bytes]:
        """Return the content of each worker that is in the complete gathering, by its number, and go on to the next.

        Raises:
            CollectiveFailed: it is no longer there.
        """
        assert self.complete
        assert self._pieces is not None
        pieces, heard, number = self._pieces, self._heard, self.number
        self.number += 1
        self._begin([])
        if not pieces:
            raise CollectiveFailed(
                f"call {number + 1} of those that all workers make together was made while this one was lost, and what "
                "was gathered is no longer kept: start it again from the newest checkpoint, or raise "
                "Limits(log_bytes=...)"
            )
        return {k: b"".join(heard[k, p] for p in range(count)) for k, count in enumerate(pieces) if count}
