"""From the payloads of one closed round to the bytes every worker applies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from torch_qgc.kernels import derive_key
from torch_qgc.kernels.buffers import Payload, decode_sum, encode
from torch_qgc.planner import Plan
from torch_qgc.protocol.messages import JobSpec

__all__ = ["Arrival", "RoundDecoder"]


@dataclass(frozen=True)
class Arrival:
    """A payload that is in: whose, made for which step, and what."""

    worker: int
    made_for: int
    payload: Payload


class RoundDecoder:
    """Decode both tracks in one pass, and encode the result for the way down; without torch, on so many threads."""

    def __init__(self, spec: JobSpec, plan: Plan, threads: int = 1) -> None:
        self._spec, self._plan, self._threads = spec, plan, threads

    def close(
        self,
        step: int,
        chunk: int,
        arrivals: Sequence[Arrival],
        rates: NDArray[np.float64],
        alive: NDArray[np.bool_],
    ) -> tuple[NDArray[np.int64], list[memoryview]]:
        """Decode a round.

            ghat = sum over payloads i of c_k(i) Q(h_i),   c_k = m_k / r_k        (docs/runtime.md)

        Args:
            arrivals: the round's payloads in decode order (by worker, then by the step they were made for).
            rates: [K] expected contributions per round r_k.
            alive: [K]; the shares of dead workers are spread over the living, since nobody answers for them.
        Returns:
            [K] int64 contributions of each worker, and one payload frame per track.
        """
        counts = np.bincount([a.worker for a in arrivals], minlength=self._spec.workers)
        rates = rates * max(float(self._plan.shares[alive].sum()), 1e-9)
        first = self._plan.coefficients(counts, rates=rates)
        offset, numel = self._spec.chunk_span(chunk)
        out = np.empty(numel, dtype=np.float32)
        tracks = [out]
        per_payload = [float(first[a.worker]) for a in arrivals]
        second_out = per_payload_second = None
        if self._spec.tracks == 2:
            second = self._plan.second_coefficients(counts, rates=rates)
            assert second is not None  # the spec asks for two tracks only if the plan has them
            per_payload_second = [float(second[a.worker]) for a in arrivals]
            second_out = np.empty(numel, dtype=np.float32)
            tracks.append(second_out)
        decode_sum(
            [a.payload for a in arrivals],
            per_payload,
            out,
            second_coefficients=per_payload_second,
            second_out=second_out,
            accumulate=False,
            threads=self._threads,
        )
        frames = []
        for track, values in enumerate(tracks):
            # The aggregator draws as worker number K, so its dither is independent of every worker's.
            key = derive_key(self._spec.seed, step, self._spec.workers, track)
            bits, norm = self._spec.downlink_bits, self._plan.norm
            encoded = encode(values, bits, key=key, norm=norm, offset=offset, threads=self._threads)
            frames.append(memoryview(encoded.buffer))
        return counts, frames
