"""What a training process tells the aggregator that it has started: over a pipe, which also shows that it is there.

A command line and an environment can be read by others, so the job's secret is in neither.
"""

from __future__ import annotations

import os
import select
import struct
from typing import IO, TypeVar

import msgspec

from torch_qgc.protocol.contract import JobSpec

__all__ = ["Announced", "Parent", "tell"]

_LENGTH = struct.Struct(">Q")
T = TypeVar("T")


class Announced(msgspec.Struct, frozen=True):
    """What the job is.

    Args:
        spec: of the job.
        plan: as JSON.
    """

    spec: JobSpec
    plan: str


def tell(pipe: IO[bytes], message: object) -> None:
    """Write a message.

    Raises:
        OSError: nobody reads.
    """
    content = msgspec.msgpack.encode(message)
    pipe.write(_LENGTH.pack(len(content)) + content)
    pipe.flush()


class Parent:
    """The training process, as its child sees it.

    Args:
        descriptor: the reading end of the pipe.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.gone = False  # it has closed its end

    def hear(self, kind: type[T]) -> T | None:
        """Return its next message; None if it is gone."""
        head = self._read(_LENGTH.size)
        content = None if head is None else self._read(_LENGTH.unpack(head)[0])
        return None if content is None else msgspec.msgpack.decode(content, type=kind)

    def announced(self) -> Announced | None:
        """Return what the job is, if that has just been told. Waits for nothing; notes if the parent is gone."""
        readable = not self.gone and select.select([self.descriptor], [], [], 0)[0]
        return self.hear(Announced) if readable else None

    def _read(self, count: int) -> bytes | None:
        content = bytearray()
        while len(content) < count:
            part = os.read(self.descriptor, count - len(content))
            if not part:
                self.gone = True
                return None
            content += part
        return bytes(content)
