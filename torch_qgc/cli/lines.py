"""What a worker prints, cut into lines that say whose they are."""

from __future__ import annotations

__all__ = ["Lines"]

_LONGEST = 1 << 16  # bytes without an end after which there is a line


class Lines:
    """Put a prefix in front of every line of a stream.

    Of a line that was written over by carriage returns, as progress bars do, the last state is kept.

    Args:
        prefix: of each line.
    """

    def __init__(self, prefix: bytes) -> None:
        self._prefix, self._rest = prefix, b""

    def feed(self, data: bytes) -> bytes:
        """Take what was read, and return the lines that are complete."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) >= _LONGEST:
            lines, self._rest = [*lines, self._rest], b""
        return b"".join(map(self._shown, lines))

    def end(self) -> bytes:
        """Return what is left, as a line."""
        rest, self._rest = self._rest, b""
        return self._shown(rest) if rest else b""

    def _shown(self, line: bytes) -> bytes:
        return self._prefix + line.rstrip(b"\r").rpartition(b"\r")[2] + b"\n"
