"""Results that a worker has received and not yet applied, in bounded memory, and which steps have begun or closed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torch_qgc.errors import ProtocolError
from torch_qgc.kernels import payload_bytes
from torch_qgc.protocol.contract import JobSpec
from torch_qgc.protocol.messages import ABSENT, Result

__all__ = ["ClosedRound", "Inbox"]


@dataclass(frozen=True)
class ClosedRound:
    """A result as received.

    Attributes:
        step, chunk: which round.
        bits: of the payload; 32: fp32.
        second_scale: what Adam squares is this times the gradient.
        counts: [K] int64 payloads of each worker in it.
        alive: [K] bool, who was in the job when it closed.
        payload: the decoded gradient, encoded for the way down.
    """

    step: int
    chunk: int
    bits: int
    second_scale: float
    counts: NDArray[np.int64]
    alive: NDArray[np.bool_]
    payload: Any

    @property
    def nbytes(self) -> int:
        """Payload bytes."""
        return memoryview(self.payload).nbytes


class Inbox:
    """Keep results until their step is taken; forget what does not fit, which is asked for again when it is needed.

    Results of the step at hand are always kept: their size is bounded by the model's.

    Args:
        spec: the job.
        step: the first step whose results are to be taken.
        bound_bytes: of results of later steps.
    """

    def __init__(self, spec: JobSpec, step: int, bound_bytes: int) -> None:
        self._spec, self._bound_bytes = spec, bound_bytes
        self.step = step  # the first step whose results have not been taken
        self.held_bytes = 0
        self._results: dict[int, dict[int, ClosedRound]] = {}
        self._newest = -1  # the newest step of which any result was received, kept or not
        self._started_s: dict[int, float] = {}
        self._forgotten: set[tuple[int, int]] = set()  # (step, chunk) of results that did not fit

    def put(self, header: Result, frames: list[Any]) -> bool:
        """Take a result; tell whether it is new and was kept.

        Raises:
            ProtocolError: it is not one of this job.
        """
        spec, contributions = self._spec, np.frombuffer(header.contributions, dtype=np.uint8)
        numel = spec.chunk_span(header.chunk)[1]
        sizes = [memoryview(frame).nbytes for frame in frames]
        expected = (spec.workers, spec.downlink_bits, [payload_bytes(max(numel, 0), spec.downlink_bits)])
        got = (len(contributions), header.bits, sizes)
        if got != expected or numel <= 0:
            raise ProtocolError(
                f"result of step {header.step}, chunk {header.chunk} of {spec.chunks}: expected (workers, bits, sizes) "
                f"{expected}, got {got}: the aggregator serves another job"
            )
        self._newest = max(self._newest, header.step)
        if header.step < self.step or header.chunk in self._results.get(header.step, ()):
            return False  # answered twice
        alive = contributions != ABSENT
        result = ClosedRound(
            header.step,
            header.chunk,
            header.bits,
            header.second_scale,
            np.where(alive, contributions, 0).astype(np.int64),
            alive,
            frames[0],
        )
        if header.step > self.step:
            if self.held_bytes + result.nbytes > self._bound_bytes:
                self._forgotten.add((header.step, header.chunk))
                return False
            self.held_bytes += result.nbytes
        self._results.setdefault(header.step, {})[header.chunk] = result
        return True

    def ready(self, taken: set[int]) -> list[ClosedRound]:
        """Return the results of the step at hand that are in, but for the chunks that were taken."""
        return [r for c, r in self._results.get(self.step, {}).items() if c not in taken]

    def missing(self) -> list[int]:
        """Return the chunks of the step at hand whose results are not in."""
        kept = self._results.get(self.step, {})
        return [chunk for chunk in range(self._spec.chunks) if chunk not in kept]

    def forgotten(self) -> list[int]:
        """Return the chunks of the step at hand whose results have come, and did not fit then."""
        return [chunk for chunk in self.missing() if (self.step, chunk) in self._forgotten]

    @property
    def newest(self) -> int:
        """The newest step of which any result has come."""
        return self._newest

    @property
    def passed(self) -> bool:
        """A later step has closed than the one at hand."""
        return self._newest > self.step

    def advance(self) -> None:
        """Forget the step at hand, and go on to the next."""
        self._results.pop(self.step, None)
        self.step += 1
        # What is at hand now no longer counts: its size is bounded by the model's.
        self.held_bytes -= sum(r.nbytes for r in self._results.get(self.step, {}).values())
        self._started_s = {s: t for s, t in self._started_s.items() if s >= self.step}
        self._forgotten = {(s, c) for s, c in self._forgotten if s >= self.step}

    def closed(self, step: int) -> bool:
        """Tell whether a step has closed: all its results are in, or one of a later step."""
        return step < self.step or step < self._newest or len(self._results.get(step, ())) == self._spec.chunks

    def start(self, step: int, at_s: float) -> None:
        """Note when a step's clock has started."""
        if step >= self.step:
            self._started_s.setdefault(step, at_s)

    def elapsed_s(self, step: int, now: float) -> float | None:
        """Return for how long a step's clock has been running, None if nobody has begun it."""
        started_s = self._started_s.get(step)
        return None if started_s is None else now - started_s

    def __repr__(self) -> str:
        return f"Inbox(step {self.step}, {len(self._results)} steps held, {self.held_bytes:,} bytes ahead)"
