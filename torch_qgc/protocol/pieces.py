"""How content that workers hand to each other is cut into messages: what both ends follow, and check."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import msgspec

from torch_qgc.errors import ConfigError, ProtocolError
from torch_qgc.kernels import payload_bytes
from torch_qgc.protocol.contract import JobSpec

__all__ = ["LEAST_PIECE_BYTES", "MOST_PIECES", "Cut", "Piece", "Pieces"]

MOST_PIECES = 2**16 - 1  # a message lists the number of each worker's pieces
LEAST_PIECE_BYTES = 32 * 1024  # less than the largest header, which any port takes, however small a job's chunks are

Piece = Annotated[int, msgspec.Meta(ge=0, lt=MOST_PIECES)]
Pieces = Annotated[int, msgspec.Meta(ge=1, le=MOST_PIECES)]


class Cut(NamedTuple):
    """The sizes of a job's pieces. All of one content have `piece_bytes`, but for the last, which may be smaller.

    Attributes:
        piece_bytes: what a chunk's payload may have, so that the port takes it.
        most_bytes: of one worker's content: its part of `log_bytes`, so that nobody takes up the others' room.
    """

    piece_bytes: int
    most_bytes: int

    @classmethod
    def of(cls, spec: JobSpec) -> Cut:
        """Return the sizes that a job allows."""
        piece_bytes = max(payload_bytes(min(spec.chunk_numel, spec.numel), 32), LEAST_PIECE_BYTES)
        return cls(piece_bytes, min(spec.log_bytes // spec.workers, MOST_PIECES * piece_bytes))

    def cut(self, content: bytes) -> list[memoryview]:
        """Cut content that is not empty.

        Raises:
            ConfigError: it is too large.
        """
        if len(content) > self.most_bytes:
            raise ConfigError(
                f"expected at most {self.most_bytes:,} bytes from one worker (log_bytes / workers, and {MOST_PIECES:,} "
                f"pieces of {self.piece_bytes:,} bytes), got {len(content):,}: hand over less, or raise "
                "Limits(log_bytes=...)"
            )
        view = memoryview(content)
        return [view[at : at + self.piece_bytes] for at in range(0, len(content), self.piece_bytes)]

    def check(self, where: str, piece: int, pieces: int, frames: Sequence[Any]) -> None:
        """Check what has come as one piece of so many.

        Raises:
            ProtocolError: it is none; `where` says of what.
        """
        got = [memoryview(frame).nbytes for frame in frames]
        whole = self.piece_bytes if piece < pieces - 1 else min(self.piece_bytes, self._last(pieces))
        least = whole if piece < pieces - 1 else 1
        if piece >= pieces or len(got) != 1 or not least <= got[0] <= whole:
            raise ProtocolError(
                f"{where}: expected one frame of {least:,} to {whole:,} bytes, a piece below {pieces}, and at most "
                f"{self.most_bytes:,} bytes in all, got piece {piece} with {got}"
            )

    def _last(self, pieces: int) -> int:
        """Return how many bytes the last of so many pieces may have."""
        return self.most_bytes - (pieces - 1) * self.piece_bytes
