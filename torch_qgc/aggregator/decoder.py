"""From the payloads of one closed round to the bytes every worker applies."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from torch_qgc.aggregator.variates import ControlVariates
from torch_qgc.job.courses import Courses
from torch_qgc.job.rounds import Closing
from torch_qgc.kernels import derive_key
from torch_qgc.kernels.buffers import Payload, decode_sum, encode
from torch_qgc.planner.temperature import LEAST
from torch_qgc.protocol.contract import JobSpec
from torch_qgc.protocol.messages import ABSENT, Result, encode_message

__all__ = ["Decoded", "RoundDecoder"]

_MOST = ABSENT - 1

Floats32: TypeAlias = NDArray[np.float32]


class Decoded(NamedTuple):
    """A decoded round.

    Attributes:
        frames: of its Result: header and payload.
        coefficients: c of each payload.
        gradient: [n] fp32, before it was encoded for the way down.
    """

    frames: list[bytes | memoryview]
    coefficients: list[float]
    gradient: Floats32


class RoundDecoder:
    """Decode closed rounds, and encode the results for the way down; without torch, on so many threads."""

    def __init__(self, spec: JobSpec, courses: Courses, threads: int = 1) -> None:
        self._spec, self._courses, self._threads = spec, courses, threads
        self._variates: dict[int, ControlVariates] = {}  # by chunk

    def decode(self, closing: Closing[Payload], temperature: float) -> Decoded:
        """Decode a round.

            ghat = sum over payloads i of c_k(i) Q(h_i),   c_k = m_k / r_k or as the plan's decoder says

        m_k is the share of worker k in the step that the payload was made for.

        Args:
            temperature: of the step; see `torch_qgc.planner.temperature`.
        """
        spec, plan = self._spec, self._courses.at(closing.step).plan
        # The shares of the dead are spread over the living, and so is what "annealed" lets a payload weigh at most.
        temperature = max(temperature * min(float(plan.shares[closing.alive].sum()), 1.0), LEAST)
        weighed = {
            course.version: course.plan.coefficients(closing.counts, rates=closing.rates, temperature=temperature)
            for course in {made_for: self._courses.at(made_for) for _, made_for, _ in closing.payloads}.values()
        }
        coefficients = [
            float(weighed[self._courses.at(made_for).version][worker]) for worker, made_for, _ in closing.payloads
        ]
        offset, numel = spec.chunk_span(closing.chunk)
        out = np.empty(numel, dtype=np.float32)
        if spec.control_variates:
            out = self._with_variates(closing, coefficients, numel)
        else:
            payloads = [payload for _, _, payload in closing.payloads]
            decode_sum(payloads, coefficients, out, accumulate=False, threads=self._threads)
        # The aggregator draws as worker number K, so its dither is independent of every worker's.
        key = derive_key(spec.seed, closing.step, spec.workers)
        encoded = encode(out, spec.downlink_bits, key=key, norm=plan.norm, offset=offset, threads=self._threads)
        header = Result(
            closing.step,
            closing.chunk,
            spec.downlink_bits,
            plan.second_scale(closing.counts, rates=closing.rates, temperature=temperature),
            np.where(closing.alive, closing.counts.clip(max=_MOST), ABSENT).astype(np.uint8).tobytes(),
        )
        return Decoded([encode_message(header), memoryview(encoded.buffer)], coefficients, out)

    def _with_variates(self, closing: Closing[Payload], coefficients: list[float], numel: int) -> Floats32:
        """Decode a round whose late workers are stood in for by what they usually send."""
        if closing.chunk not in self._variates:
            self._variates[closing.chunk] = ControlVariates(self._spec.workers, numel)
        sent = []
        for (worker, _, payload), coefficient in zip(closing.payloads, coefficients):
            decoded = np.empty(numel, dtype=np.float32)
            decode_sum([payload], [1.0], decoded, accumulate=False, threads=self._threads)
            sent.append((worker, decoded, coefficient))
        shares = np.where(closing.alive, self._courses.at(closing.step).plan.shares, 0.0)
        living = max(float(shares.sum()), 1e-9)
        return self._variates[closing.chunk].decode(sent, shares / living, closing.rates / living)
