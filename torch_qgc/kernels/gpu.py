"""The codec on CUDA: launches of the Triton kernels in gpu_kernels.py. Equals reference.py bit for bit."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import triton

from . import reference
from .encoded import Encoded
from .format import BLOCK, PASS_THROUGH
from .gpu_kernels import decode_kernel, encode_kernel

__all__ = ["LAUNCH", "TILE", "decode_sum", "encode", "field_bits"]

# A fused multiply-add rounds once where the definition rounds twice.
LAUNCH = {"num_warps": 4, "enable_fp_fusion": False}
TILE = 16  # blocks per program: two columns per thread; with four, encoding and decoding 1 bit would spill registers


def field_bits(bits: int) -> int:
    """Return the width of the field a code takes in a 32-bit word while planes are made: 1, 4, 8 or 16."""
    return next(width for width in (1, 4, 8, 16) if bits <= width)


def encode(values: torch.Tensor, key: tuple[int, int], l2: bool, first_block: int, out: Encoded) -> None:
    """See reference.encode."""
    assert out.statistics is not None
    whole, rest = divmod(values.numel(), BLOCK)
    per_block = torch.empty(out.blocks, 2, dtype=torch.float64, device=values.device)
    parts = [(values, 0, whole)]
    if rest:
        padded = torch.nn.functional.pad(values[whole * BLOCK :], (0, BLOCK - rest))
        parts.append((padded, whole, 1))
    for part, begin, blocks in parts:
        if blocks == 0:
            continue
        encode_kernel[(triton.cdiv(blocks, TILE),)](
            part,
            out.scales[begin:],
            out.planes[begin:],
            per_block[begin:],
            blocks,
            reference.int32((first_block + begin) * BLOCK // 2 + key[0]),
            reference.int32(key[1]),
            BITS=out.bits,
            F=field_bits(out.bits),
            L2=l2,
            TILE=TILE,
            **LAUNCH,
        )
    if rest and out.bits == 1:  # coins tossed for the padding, which nobody decodes
        per_block[-1, 0] -= (BLOCK - rest) * out.scales[-1].double().square()
    torch.sum(per_block, 0, out=out.statistics)


def decode_sum(
    payloads: Sequence[Encoded],
    coefficients: Sequence[float],
    out: torch.Tensor,
    accumulate: bool,
) -> None:
    """See reference.decode_sum. Runs of payloads whose codes have fields of one width share a launch."""
    if not accumulate:
        out.zero_()
    for width, run in itertools.groupby(zip(payloads, coefficients), lambda term: _field(term[0])):
        members, factors = zip(*run)
        if width == PASS_THROUGH:
            reference.decode_sum(members, factors, out, True)
        else:
            _decode_run(members, factors, out, width)


def _field(payload: Encoded) -> int:
    return PASS_THROUGH if payload.bits == PASS_THROUGH else field_bits(payload.bits)


def _decode_run(payloads: Sequence[Encoded], coefficients: Sequence[float], out: torch.Tensor, width: int) -> None:
    whole, rest = divmod(out.numel(), BLOCK)
    bits = torch.tensor([p.bits for p in payloads], dtype=torch.int32, device=out.device)
    factors = torch.tensor(coefficients, dtype=torch.float32, device=out.device)

    def launch(sums: torch.Tensor, begin: int, blocks: int) -> None:
        places = [
            [p.buffer.data_ptr() + 4 * begin, p.buffer.data_ptr() + 4 * (p.blocks + 16 * p.bits * begin)]
            for p in payloads
        ]
        decode_kernel[(triton.cdiv(blocks, TILE),)](
            torch.tensor(places, dtype=torch.int64, device=out.device),
            bits,
            factors,
            sums,
            len(payloads),
            blocks,
            F=width,
            ALIGNED=all(planes % 16 == 0 for _, planes in places),
            TILE=TILE,
            **LAUNCH,
        )

    if whole:
        launch(out, 0, whole)
    if rest:
        tail = out[whole * BLOCK :]
        padded = torch.nn.functional.pad(tail, (0, BLOCK - rest))
        launch(padded, whole, 1)
        tail.copy_(padded[:rest])
