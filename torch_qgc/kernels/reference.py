"""The definition of the codec, in plain torch: any device, clear rather than fast. The others equal it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from .encoded import Encoded
from .format import BLOCK, COLUMNS, LIVE, PASS_THROUGH, ROWS, step_levels

__all__ = ["decode_sum", "dither", "encode", "int32"]

_SLICE = 1024  # blocks worked on at a time: temporaries stay small
_FRACTION = 1 << 16  # the rounding's fixed point
_INFINITY = 0x7F800000
_MAGNITUDE = 0x7FFFFFFF


def encode(values: torch.Tensor, key: tuple[int, int], l2: bool, first_block: int, out: Encoded) -> None:
    """Round stochastically to b-bit codes and write scales, planes and statistics into `out`.

    With s the block's scale, L = 2^(b-1) - 1 and u uniform on [0, 1):  Q(v) = (s / L) floor(v L / s + u), in
    fixed point with 16 fraction bits [Song & Choi eq. (3)-(4), whose s is the L2 norm]. At b = 1:  Q(v) = s
    with probability (1 + v/s)/2, else -s.

    Args:
        values: [n] fp32, bf16 or fp16, contiguous.
        key: from derive_key.
        l2: take the block's L2 norm as its scale, not its largest magnitude.
        first_block: the slice's offset in the flat gradient, in blocks.
        out: receives the result; its statistics is a float64 [2] tensor.
    """
    assert out.statistics is not None
    out.statistics.zero_()
    for begin, blocks in _slices(values):
        v = blocks.float()
        scale, sendable = _scale(v, l2)
        v = torch.where(sendable, v, 0.0)
        x = _fixed_point(v, scale, sendable, out.bits)
        if out.bits == 1:
            x = x - (1 << 15)  # codes -1 and 0 stand for -s and +s
        random = dither(key, first_block + begin, len(v), v.device)
        codes = torch.where(sendable, (x + random.view_as(x)) >> 16, 0)
        out.scales[begin : begin + len(v)] = scale.view(-1)
        _pack(codes, out.planes[begin : begin + len(v)])
        padding = max(0, (begin + len(v)) * BLOCK - len(values))
        out.statistics[0] += _rounding_variance(x, scale, out.bits, padding)
        out.statistics[1] += torch.where(scale.isnan(), torch.nan, v.double().square()).sum()


def decode_sum(
    payloads: Sequence[Encoded],
    coefficients: Sequence[float],
    out: torch.Tensor,
    accumulate: bool,
) -> None:
    """Add  sum_k c_k Q_k  to `out`, in payload order.

    Each term is  float32(code) * (c * (scale / L)), one rounding per operation, so that every machine gets
    the same bits.

    Args:
        payloads: K encoded slices of n coordinates each.
        coefficients: [K], rounded to fp32.
        out: fp32 [n]; overwritten if not `accumulate`.
    """
    if not accumulate:
        out.zero_()
    for payload, c in zip(payloads, coefficients):
        factor = torch.tensor(c, dtype=torch.float32, device=out.device)
        if payload.bits == PASS_THROUGH:
            out += factor * payload.planes
            continue
        # a tensor: CUDA divides by a plain number by multiplying with its reciprocal
        levels = torch.tensor(float(step_levels(payload.bits)), device=out.device)
        step = (factor * (payload.scales / levels)).view(-1, 1, 1)
        for begin in range(0, payload.blocks, _SLICE):
            codes = _unpack(payload.planes[begin : begin + _SLICE])
            if payload.bits == 1:
                codes = 2 * codes + 1
            terms = (codes.float() * step[begin : begin + _SLICE]).view(-1)
            part = out[begin * BLOCK : (begin + _SLICE) * BLOCK]
            part += terms[: len(part)]


def dither(key: tuple[int, int], first_block: int, blocks: int, device: torch.device | None = None) -> torch.Tensor:
    """Return 16 random bits for each coordinate: int32 [blocks, 32, 16] in [0, 65536).

    One hash of a counter serves two coordinates: its low half row r, its high half row r + 16. A hash of two
    multiplications is not enough: coordinates at some distances came out correlated (docs/kernels.md).
    """
    half = BLOCK // 2
    base = int32(first_block * half + key[0])
    x = torch.arange(blocks * half, dtype=torch.int32, device=device) + base
    x = (x ^ _shift(x, 17)) * int32(0xED5AD4BB)
    x = (x ^ _shift(x, 11) ^ int32(key[1])) * int32(0xAC4C1B51)
    x = (x ^ _shift(x, 15)) * int32(0x31848BAB)
    x = (x ^ _shift(x, 14)).view(blocks, ROWS // 2, COLUMNS)
    return torch.cat([x & 0xFFFF, _shift(x, 16)], 1)


def _slices(values: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (first block, [blocks, 32, 16]), the last slice padded with zeros."""
    for begin in range(0, -(-len(values) // BLOCK), _SLICE):
        part = values[begin * BLOCK : (begin + _SLICE) * BLOCK]
        part = torch.nn.functional.pad(part, (0, -len(part) % BLOCK))
        yield begin, part.view(-1, ROWS, COLUMNS)


def _scale(v: torch.Tensor, l2: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each block's scale, and whether its codes are sent (else they are zero): both [blocks, 1, 1].

    The scale is NaN if the block holds an inf or NaN, and 0 if it holds nothing above 2^-90. Found on bit
    patterns and integers: there is no order of additions to agree on. The L2 norm uses 11 bits of each value
    and comes out up to 0.4 % low; never below the largest magnitude, it is still a valid scale.
    """
    largest = (v.view(torch.int32) & _MAGNITUDE).flatten(1).amax(1).view(-1, 1, 1)
    scale = largest.view(torch.float32)
    if l2:
        exponent = (largest >> 23).clamp(LIVE >> 23, 254)
        normalised = (v * ((264 - exponent) << 23).view(torch.float32)).nan_to_num(0.0, 0.0, 0.0).int()
        total = normalised.square().sum((1, 2), dtype=torch.int32).view(-1, 1, 1)
        # torch's own fp32 square root is not correctly rounded on CPU
        norm = total.float().double().sqrt().float() * ((exponent - 10) << 23).view(torch.float32)
        scale = torch.maximum(norm, scale)
    finite = (largest < _INFINITY) & scale.isfinite()
    scale = torch.where(finite, torch.where(largest >= LIVE, scale, 0.0), torch.nan)
    return scale, finite & (largest >= LIVE)


def _fixed_point(v: torch.Tensor, scale: torch.Tensor, sendable: torch.Tensor, bits: int) -> torch.Tensor:
    """Return int32(trunc(v full / scale)) with full = L 2^16 (2^15 at 1 bit), never above full."""
    full = torch.tensor(float(step_levels(bits) * _FRACTION if bits > 1 else _FRACTION // 2), device=v.device)
    inverse = full / scale
    one_ulp_less = (inverse.view(torch.int32) - 1).view(torch.float32)
    inverse = torch.where(scale * inverse > full, one_ulp_less, inverse)
    inverse = torch.where(sendable, inverse, 0.0)
    return (v * inverse).int()


def _rounding_variance(x: torch.Tensor, scale: torch.Tensor, bits: int, padding: int) -> torch.Tensor:
    """Return  sum (s/L)^2 f (1 - f), f the fraction of the fixed-point value; exact."""
    fraction = (x & (_FRACTION - 1)).double() / _FRACTION
    per_block = (fraction * (1 - fraction)).sum((1, 2))
    if bits == 1:
        per_block[-1] -= padding / 4  # a padded zero is a coin toss, but is never decoded
    step = scale.double().view(-1) * (2.0 if bits == 1 else 1 / step_levels(bits))
    return (step.square() * per_block).sum()


def _pack(codes: torch.Tensor, planes: torch.Tensor) -> None:
    """Write bit j of codes [blocks, 32, 16] to bit r of planes[:, j]."""
    row = torch.arange(ROWS, dtype=torch.int32, device=codes.device).view(1, ROWS, 1)
    for j in range(planes.shape[1]):
        planes[:, j] = (((codes >> j) & 1) << row).sum(1, dtype=torch.int32)


def _unpack(planes: torch.Tensor) -> torch.Tensor:
    """Read the codes [blocks, 32, 16] back from planes; the last plane is the sign, in two's complement."""
    bits = planes.shape[1]
    row = torch.arange(ROWS, dtype=torch.int32, device=planes.device).view(1, ROWS, 1)
    codes = -((planes[:, -1:] >> row) & 1) << (bits - 1)
    for j in range(bits - 1):
        codes |= ((planes[:, j : j + 1] >> row) & 1) << j
    return codes


def _shift(x: torch.Tensor, count: int) -> torch.Tensor:
    """Shift right logically: torch's shift of an int32 carries the sign."""
    return (x >> count) & (_MAGNITUDE >> (count - 1))


def int32(word: int) -> int:
    """Return the signed number with the low 32 bits of `word`."""
    return (word + (1 << 31)) % (1 << 32) - (1 << 31)
