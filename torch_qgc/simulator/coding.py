"""A scheme at work on gradients: mix partitions, encode what a worker sends, decode a round."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse

from torch_qgc.errors import PlanError
from torch_qgc.kernels import Encoded, decode_sum, derive_key, encode, payload_bytes
from torch_qgc.planner import Plan
from torch_qgc.planner.checks import Floats, Mask
from torch_qgc.schemes import BlockPlan, ErrorFeedback, FeedbackMemory, PartPlan, Scheme
from torch_qgc.simulator.arrivals import Contribution

__all__ = ["Payload", "SchemeCodec", "plans_of"]

#: What a worker sends in a step: one encoding per slice.
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
        code: a plan for whole payloads, or for parts of the slice.
        start, stop: its coordinates in the gradient.
        offset: where its payload begins in what a worker mixes.
        by_column: [K, parts N] csc, what worker k's mean gradient is made of: w_kn / sum_n |w_kn|.
    """

    code: Plan | PartPlan
    start: int
    stop: int
    offset: int
    by_column: sparse.csc_array[Any]

    @property
    def plan(self) -> Plan:
        """The plan of the slice; of parts, which agree on workers, partitions, norm and bits, the first."""
        return self.code.plans[0] if isinstance(self.code, PartPlan) else self.code

    @property
    def parts(self) -> int:
        """How many parts it is cut into."""
        return len(self.code.plans) if isinstance(self.code, PartPlan) else 1

    @property
    def width(self) -> int:
        """Coordinates of a payload: all of the slice, or those of a part, the last of which may be padded."""
        return -(-(self.stop - self.start) // self.parts)

    def coefficients(self, counts: NDArray[Any], rates: Floats | None, tracks: int) -> list[Floats]:
        """Return [parts, K] coefficients for each track, of one that the code does not have those of the first."""
        if isinstance(self.code, PartPlan):
            return [self.code.coefficients(counts)] * tracks
        first = self.code.coefficients(counts, rates=rates)
        second = self.code.second_coefficients(counts, rates=rates) if tracks == 2 else None
        return [np.atleast_2d(c) for c in (first, first if second is None else second)[:tracks]]

    def second_scale(self, counts: NDArray[Any], rates: Floats | None) -> float | None:
        """Return by what the first track is multiplied to give the second, as in training; None if it has its own."""
        if isinstance(self.code, PartPlan):
            return 1.0
        try:
            return self.code.second_scale(counts, rates=rates)
        except PlanError:
            return None

    def column(self, index: int) -> tuple[list[int], list[float]]:
        """Return the workers that hold a column, and its part in what they send."""
        span = slice(self.by_column.indptr[index], self.by_column.indptr[index + 1])
        return self.by_column.indices[span].tolist(), self.by_column.data[span].tolist()


class SchemeCodec:
    """Encode and decode as a scheme says, with the kernels of training.

    The dither's key is (seed, step, worker), as in `qgc_hook`: a plan's payloads are bit for bit those of a real job.

    Memory beside payloads: with error feedback 4 bytes per coordinate and worker; with parts one decoded part.

    Args:
        scheme: any of torch_qgc.schemes.
        numel: P, coordinates of the gradient.
        seed: of the dither.
    """

    def __init__(self, scheme: Scheme, numel: int, seed: int) -> None:
        self.scheme, self._seed = scheme, seed
        self.slices = _slices(scheme, numel)
        last = self.slices[-1]
        self.mixed_numel = last.offset + last.width
        self.bits = last.plan.bits
        self._feedback: dict[int, FeedbackMemory] | None = None
        if isinstance(scheme, ErrorFeedback):
            self._feedback = {}

    @property
    def active(self) -> Mask:
        """[K] workers that send anything."""
        return np.asarray((self.bits > 0) & np.any([s.code.shares > 0 for s in self.slices], axis=0))

    @property
    def remembers(self) -> bool:
        """What a worker sends depends on what it sent before, in time or not (error feedback)."""
        return self._feedback is not None

    def payload_bits(self, worker: int) -> int:
        """Return the bits on the wire of one payload of a worker."""
        return 8 * sum(payload_bytes(s.width, int(self.bits[worker])) for s in self.slices)

    def state_dict(self) -> dict[str, Any]:
        """Return what changes from step to step."""
        return {"feedback": self._feedback}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self._feedback = state["feedback"]

    # --- what a worker computes ---------------------------------------------------------------------------

    def last_partition(self) -> NDArray[np.int64]:
        """[K] the last partition that each worker holds, -1 if none."""
        last = np.full(len(self.bits), -1)
        for s in self.slices:
            rows = s.by_column.tocoo()
            np.maximum.at(last, rows.coords[0], rows.coords[1] % s.plan.num_partitions)
        return last

    def mix(self, partition: int, gradient: torch.Tensor, target: Callable[[int], torch.Tensor | None]) -> None:
        """Add a partition's mean gradient to what its holders send.

            h_k += w_kn / sum_n |w_kn| gbar_n,   for each part of the gradient and each slice

        Args:
            gradient: [P] fp32.
            target: worker -> its h_k, fp32 [mixed_numel]; None: nobody needs it.
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
            mixed: [mixed_numel] its mean gradient h_k.
            delivered: whether it will be in time; error feedback may want to know.
        """
        if self._feedback is None:
            return self._quantize(worker, step, mixed)
        if worker not in self._feedback:
            assert isinstance(self.scheme, ErrorFeedback)
            memory = self._feedback[worker] = FeedbackMemory(self.scheme, worker, (self.mixed_numel,))
            memory.error = memory.error.astype(np.float32)  # the codec's precision, at half the memory
        memory = self._feedback[worker]
        corrected = memory.corrected(mixed.cpu().numpy())
        payload = self._quantize(worker, step, torch.from_numpy(corrected).to(mixed.device))
        sent = torch.empty_like(mixed)
        decode_sum(payload, [memory.gain], sent, accumulate=False)
        memory.sent(corrected, sent.cpu().numpy(), delivered)
        return payload

    def _quantize(self, worker: int, step: int, values: torch.Tensor) -> Payload:
        bits = int(self.bits[worker])
        return [
            encode(
                values[s.offset : s.offset + s.width],
                bits,
                key=derive_key(self._seed, step, worker, stream),
                norm=s.plan.norm,
            )
            for stream, s in enumerate(self.slices)
        ]

    # --- what the aggregator computes -----------------------------------------------------------------------

    def decode(
        self,
        contributions: Sequence[Contribution],
        payloads: Mapping[tuple[int, int], Payload],
        rates: Floats | None,
        tracks: Sequence[torch.Tensor],
    ) -> None:
        """Decode a round into one or two tracks, overwriting them.

            ghat = sum over contributions i of c_k(i) Q(h_k(i)),   coefficients as `Plan` gives them for who is in

        Args:
            contributions: in decode order.
            payloads: (worker, step) -> what it sent; workers without a payload are in, but have nothing to say.
            rates: [K] expected contributions per round; None: the plan's.
            tracks: one or two of [P] fp32, contiguous.
        """
        for j, s in enumerate(self.slices):
            present = [c for c in contributions if c.slices > j]
            counts = np.bincount([c.worker for c in present], minlength=len(self.bits))
            scale = s.second_scale(counts, rates) if len(tracks) == 2 else None
            sets = s.coefficients(counts, rates, len(tracks) if scale is None else 1)
            sent = [(c.worker, payloads[c[:2]][j]) for c in present if c[:2] in payloads]
            for part in range(s.parts):
                start = s.start + part * s.width
                self._decode_part(
                    [payload for _, payload in sent],
                    [[float(row[part, k]) * self._gain(k) for k, _ in sent] for row in sets],
                    s.width,
                    [track[start : min(start + s.width, s.stop)] for track, _ in zip(tracks, sets)],
                )
            if scale is not None:
                torch.mul(tracks[0][s.start : s.stop], scale, out=tracks[1][s.start : s.stop])

    def _decode_part(
        self, payloads: list[Encoded], coefficients: list[list[float]], width: int, outs: list[torch.Tensor]
    ) -> None:
        # The last part may be shorter than payloads are: those are padded with zeros.
        targets = [out if len(out) == width else torch.empty(width, device=out.device) for out in outs]
        two = len(targets) == 2
        decode_sum(
            payloads,
            coefficients[0],
            targets[0],
            second_coefficients=coefficients[1] if two else None,
            second_out=targets[1] if two else None,
            accumulate=False,
        )
        for out, target in zip(outs, targets):
            if target is not out:
                out.copy_(target[: len(out)])

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
        rows: Any = sparse.diags_array(scale) @ sparse.csr_array(code.weights)
        slices.append(_Slice(code, start, stop, offset, sparse.csc_array(rows)))
        offset += slices[-1].width
    return slices
