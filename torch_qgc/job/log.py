"""The log of closed rounds: what a late worker replays from."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch_qgc.errors import ProtocolError
from torch_qgc.kernels import payload_bytes
from torch_qgc.protocol.messages import JobSpec

__all__ = ["ResultLog", "result_bytes"]


def result_bytes(spec: JobSpec, chunks: Sequence[int]) -> int:
    """Return the payload bytes of one step's results over the given chunks."""
    return spec.tracks * sum(payload_bytes(spec.chunk_span(c)[1], spec.downlink_bits) for c in chunks)


class ResultLog:
    """The newest `capacity` steps of results, bounded in steps and in bytes.

    Raises:
        ProtocolError: log_bytes cannot hold four steps, too few for anybody to be late.
    """

    def __init__(self, spec: JobSpec, chunks: Sequence[int]) -> None:
        step_bytes = max(result_bytes(spec, chunks), 1)
        self.capacity = min(spec.log_steps, spec.log_bytes // step_bytes)  # steps
        if self.capacity < 4:
            raise ProtocolError(
                f"the log must hold at least 4 steps: one step's results are {step_bytes:,} bytes, log_bytes is "
                f"{spec.log_bytes:,} and log_steps {spec.log_steps}: raise them, or lower downlink_bits"
            )
        self._frames: OrderedDict[int, dict[int, list[Any]]] = OrderedDict()
        self.bytes = 0

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
