"""What a scheme does with gradients: mix those of partitions, encode what a worker sends, decode a round."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse

from torch_qgc.errors import PlanError
from torch_qgc.kernels import Encoded, decode_sum, derive_key, encode
from torch_qgc.planner import Plan
from torch_qgc.planner.checks import Floats, Ints, Mask
from torch_qgc.planner.variance import PASS_THROUGH_BITS
from torch_qgc.schemes import BlockPlan, ErrorFeedback, FeedbackMemory, PartPlan, Scheme
from torch_qgc.simulator.arrivals import Contribution

__all__ = ["Payload", "SchemeCodec", "plans_of"]

#: What a worker sends in a step: one encoded vector per slice.
Payload: TypeAlias = list[Encoded]


def plans_of(scheme: Scheme) -> tuple[Plan, ...]:
    """Return the plans of a scheme, one per slice or part of the gradient."""
    if isinstance(scheme, BlockPlan | PartPlan):
        return scheme.plans
    return (scheme.plan if isinstance(scheme, ErrorFeedback) else scheme,)


@dataclass(frozen=True, eq=False)
class _Slice:
    """A slice of the gradient that one code encodes.

    Attributes:
        code: the plan of the slice, or a plan for each of its parts.
        start, stop: the slice's coordinates in the gradient.
        offset: where the slice's payload begins in the vector that a worker mixes.
        by_column: [K, parts N] csc, the parts w_kn / sum_n |w_kn| of which worker k's mean gradient is made.
        scaled: the second track is the first times one number per round, as in every plan that a job trains with.
    """

    code: Plan | PartPlan
    start: int
    stop: int
    offset: int
    by_column: sparse.csc_array[np.float64]
    scaled: bool

    @property
    def plan(self) -> Plan:
        """The plan of the slice, or of its first part: parts have workers, partitions, norm and bits in common."""
        return self.code.plans[0] if isinstance(self.code, PartPlan) else self.code

    @property
    def parts(self) -> int:
        """How many parts the slice is cut into."""
        return len(self.code.plans) if isinstance(self.code, PartPlan) else 1

    @property
    def width(self) -> int:
        """Coordinates of a payload: those of the slice, or of a part. The last part is padded to the same width."""
        return -(-(self.stop - self.start) // self.parts)

    def coefficients(self, counts: Ints, rates: Floats | None, temperature: float) -> Floats:
        """Return [parts, K] coefficients of the round."""
        if isinstance(self.code, PartPlan):
            return self.code.coefficients(counts)
        return self.code.coefficients(counts, rates=rates, temperature=temperature)[None]

    def second_coefficients(self, counts: Ints, rates: Floats | None, temperature: float) -> Floats:
        """Return [1, K] coefficients of a second track that is not `scaled`."""
        second = self.plan.second_coefficients(counts, rates=rates, temperature=temperature)
        assert second is not None
        return second[None]

    def second_scale(self, counts: Ints, rates: Floats | None, temperature: float) -> float:
        """Return the number by which the first track is multiplied to give the second, if it is `scaled`."""
        if isinstance(self.code, PartPlan):
            return 1.0
        return self.code.second_scale(counts, rates=rates, temperature=temperature)

    def column(self, index: int) -> tuple[list[int], list[float]]:
        """Return the workers that hold a column, and the factor that it has in what each of them sends."""
        span = slice(self.by_column.indptr[index], self.by_column.indptr[index + 1])
        return self.by_column.indices[span].tolist(), self.by_column.data[span].tolist()


class SchemeCodec:
    """Encode and decode as a scheme says, with the kernels of training.

    The dither's key is (seed, step, worker), as in `qgc_hook`. The payloads of a plan are therefore bit for bit those
    of a real job.

    Memory beside the payloads: 4 bytes per coordinate and worker with error feedback, one decoded part with parts.

    Args:
        scheme: any of torch_qgc.schemes.
        numel: P, coordinates of the gradient.
        seed: the seed of the dither.
        downlink_bits: bits per coordinate of results; 32 leaves them as they are.
        plan_at: step -> the plan that holds for it, in a job that plans anew; its shares and weights are those of the
            scheme. None: the scheme holds for all steps.
    """

    def __init__(
        self,
        scheme: Scheme,
        numel: int,
        seed: int,
        downlink_bits: int = 32,
        plan_at: Callable[[int], Plan] | None = None,
    ) -> None:
        self.scheme, self._seed, self._downlink_bits, self._plan_at = scheme, seed, downlink_bits, plan_at
        self.slices = _slices(scheme, numel)
        last = self.slices[-1]
        self.mixed_numel = last.offset + last.width
        self.bits = last.plan.bits
        self._feedback: dict[int, FeedbackMemory] | None = None
        if isinstance(scheme, ErrorFeedback):
            self._feedback = {}

    @property
    def active(self) -> Mask:
        """[K] bool, the workers that send anything."""
        return np.asarray((self.bits > 0) & np.any([s.code.shares > 0 for s in self.slices], axis=0))

    @property
    def remembers(self) -> bool:
        """A worker's payload depends on its earlier ones, also on those that were late (error feedback)."""
        return self._feedback is not None

    def state_dict(self) -> dict[str, Any]:
        """Return what changes from step to step."""
        return {"feedback": self._feedback}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self._feedback = state["feedback"]

    # --- what a worker computes ---------------------------------------------------------------------------

    def last_partition(self) -> NDArray[np.int64]:
        """Return [K] the last partition that each worker holds, -1 for workers that hold none."""
        last = np.full(len(self.bits), -1)
        for s in self.slices:
            rows = s.by_column.tocoo()
            np.maximum.at(last, rows.coords[0], rows.coords[1] % s.plan.num_partitions)
        return last

    def mix(self, partition: int, gradient: torch.Tensor, target: Callable[[int], torch.Tensor | None]) -> None:
        """Add a partition's mean gradient to the vectors of the workers that hold the partition.

            h_k += w_kn / sum_n |w_kn| gbar_n,   for each part of the gradient and each slice

        Args:
            gradient: [P] fp32, the partition's mean gradient.
            target: returns a worker's h_k, fp32 [mixed_numel], or None if it is not needed.
        """
        for s in self.slices:
            for part in range(s.parts):
                start = s.start + part * s.width
                piece = gradient[start : min(start + s.width, s.stop)]
                workers, factors = s.column(part * s.plan.num_partitions + partition)
                for worker, factor in zip(workers, factors):
                    mixed = target(worker)
                    if mixed is not None:
                        mixed[s.offset : s.offset + len(piece)].add_(piece, alpha=factor)

    def encode(self, worker: int, step: int, mixed: torch.Tensor, *, delivered: bool) -> Payload:
        """Encode what a worker sends.

        Args:
            mixed: [mixed_numel] the worker's mean gradient h_k.
            delivered: the payload will be in time. Acknowledged error feedback keeps what was not.
        """
        if self._feedback is None:
            return self._quantize(worker, step, mixed)
        if worker not in self._feedback:
            assert isinstance(self.scheme, ErrorFeedback)
            memory = self._feedback[worker] = FeedbackMemory(self.scheme, worker, (self.mixed_numel,))
            memory.error = memory.error.astype(np.float32)  # half the memory, and the codec works in fp32 anyway
        memory = self._feedback[worker]
        corrected = memory.corrected(mixed.cpu().numpy())
        payload = self._quantize(worker, step, torch.from_numpy(corrected).to(mixed.device))
        sent = torch.empty_like(mixed)
        decode_sum(payload, [memory.gain], sent, accumulate=False)
        memory.sent(corrected, sent.cpu().numpy(), delivered)
        return payload

    def _quantize(self, worker: int, step: int, values: torch.Tensor) -> Payload:
        return [
            encode(
                values[s.offset : s.offset + s.width],
                int(s.plan.bits[worker]),
                key=derive_key(self._seed, step, worker, stream),
                norm=s.plan.norm,
            )
            for stream, s in enumerate(self._slices(step))
        ]

    def _slices(self, step: int) -> list[_Slice]:
        """Return the slices as they are coded in a step."""
        if self._plan_at is None:
            return self.slices
        return [replace(s, code=self._plan_at(step)) for s in self.slices]

    # --- what the aggregator computes -----------------------------------------------------------------------

    def decode(
        self,
        contributions: Sequence[Contribution],
        payloads: Mapping[tuple[int, int], Payload],
        rates: Floats | None,
        tracks: Sequence[torch.Tensor],
        *,
        step: int,
        temperature: float = 1.0,
    ) -> None:
        """Decode a round into one or two tracks, overwriting them.

            ghat = sum over contributions i of c_k(i) Q(h_k(i)),   with the coefficients of the scheme for this round

        as it comes out of the downlink. A payload keeps the share of the step that it was made for, as in
        `RoundDecoder`.

        Args:
            contributions: the contributions to the round, in decode order.
            payloads: (worker, step) -> what the worker sent. Workers that hold no data count as arrived without one.
            rates: [K] expected contributions per round; None stands for the plan's.
            tracks: one or two of [P] fp32, contiguous: the gradient, and what Adam squares.
            step: which round, for the dither of its result.
            temperature: the learning rate of the step over the highest one so far, in (0, 1].
        """
        for j, s in enumerate(self._slices(step)):
            present = [c for c in contributions if c.slices > j]
            sent = [(c, payloads[c[:2]][j]) for c in present if c[:2] in payloads]
            coded = {made_for: self._slices(made_for)[j] for made_for in {c.made_for for c, _ in sent}}
            received = np.bincount([c.worker for c in present], minlength=len(self.bits)), rates, temperature
            first, *second = (track[s.start : s.stop] for track in tracks)
            weights = {made_for: then.coefficients(*received) for made_for, then in coded.items()}
            self._decode_slice(s, sent, weights, first)
            self._send_down(first, step, stream=2 * j)
            for out in second:
                if s.scaled:
                    torch.mul(first, s.second_scale(*received), out=out)
                else:
                    weights = {made_for: then.second_coefficients(*received) for made_for, then in coded.items()}
                    self._decode_slice(s, sent, weights, out)
                    self._send_down(out, step, stream=2 * j + 1)

    def _decode_slice(
        self, s: _Slice, sent: list[tuple[Contribution, Encoded]], weights: Mapping[int, Floats], out: torch.Tensor
    ) -> None:
        """Decode the payloads of a slice into `out`, with [parts, K] coefficients for each step they were made for."""
        payloads = [payload for _, payload in sent]
        for row, part in enumerate(torch.split(out, s.width)):
            factors = [float(weights[c.made_for][row, c.worker]) * self._gain(c.worker) for c, _ in sent]
            # The last part may be shorter than its payloads, which are padded with zeros.
            whole = part if len(part) == s.width else torch.empty(s.width, device=out.device)
            decode_sum(payloads, factors, whole, accumulate=False)
            if whole is not part:
                part.copy_(whole[: len(part)])

    def _send_down(self, track: torch.Tensor, step: int, stream: int) -> None:
        """Round a slice of a track to the bits of results, as an aggregator does, which draws as worker number K."""
        if self._downlink_bits < PASS_THROUGH_BITS:
            key = derive_key(self._seed, step, len(self.bits), stream)
            encoded = encode(track, self._downlink_bits, key=key, norm=self.slices[0].plan.norm)
            decode_sum([encoded], [1.0], track, accumulate=False)

    def _gain(self, worker: int) -> float:
        return 1.0 if self._feedback is None else self._feedback[worker].gain


def _slices(scheme: Scheme, numel: int) -> list[_Slice]:
    codes: tuple[Plan | PartPlan, ...] = (scheme,) if isinstance(scheme, PartPlan) else plans_of(scheme)
    fractions = scheme.fractions if isinstance(scheme, BlockPlan) else (1.0,)
    cuts = [0, *np.round(np.cumsum(fractions)[:-1] * numel).astype(int).tolist(), numel]
    slices = []
    offset = 0
    for code, start, stop in zip(codes, cuts, cuts[1:]):
        mass = code.shares * code.weights.shape[1]  # sum_n |w_kn|
        scale = np.divide(1.0, mass, out=np.zeros_like(mass), where=mass > 0)
        parts: sparse.csr_array[np.float64] = sparse.csr_array(code.weights).multiply(scale[:, None])
        scaled = isinstance(code, PartPlan) or _is_scaled(code)
        slices.append(_Slice(code, start, stop, offset, sparse.csc_array(parts), scaled))
        offset += slices[-1].width
    return slices


def _is_scaled(plan: Plan) -> bool:
    """Tell whether the second track of a plan is the first times one number per round."""
    try:
        plan.second_scale(np.zeros(plan.num_workers))
    except PlanError:
        return False
    return True
