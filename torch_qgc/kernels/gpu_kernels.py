# mypy: ignore-errors
# ruff: noqa: RUF005
"""Triton kernels: the same bit transpose as in codec.cpp. (Triton's dialect has no types and no unpacking.)

A lane owns columns of a few blocks and holds all 32 rows of them in registers: 32 loads are in flight before
anything is computed, and no lane needs another one's data but for the block's scale. Reductions that decide about
payloads are of integers. Launch with fused multiply-add switched off, as gpu.py does.
"""

import triton
import triton.language as tl

__all__ = ["decode_kernel", "encode_kernel"]


@triton.jit
def _hash(x, k1):
    x = (x ^ (x >> 17)) * 0xED5AD4BB
    x = (x ^ (x >> 11) ^ k1) * 0xAC4C1B51
    x = (x ^ (x >> 15)) * 0x31848BAB
    return x ^ (x >> 14)


@triton.jit
def _exchange(words, F: tl.constexpr, STEP: tl.constexpr, MASK: tl.constexpr):
    """Do one round of the transpose: swap bits STEP apart between words STEP apart."""
    out = ()
    for k in tl.static_range(F):
        if k & STEP == 0:
            swap = ((words[k] >> STEP) ^ words[k + STEP]) & MASK
            out = out + (words[k] ^ (swap << STEP),)
        else:
            swap = ((words[k - STEP] >> STEP) ^ words[k]) & MASK
            out = out + (words[k] ^ swap,)
    return out


@triton.jit
def _transpose(words, F: tl.constexpr):
    """Swap bit j of word k with bit k of word j, in every field of F bits."""
    if F > 8:
        words = _exchange(words, F, 8, 0x00FF00FF)
    if F > 4:
        words = _exchange(words, F, 4, 0x0F0F0F0F)
    if F > 1:
        words = _exchange(words, F, 2, 0x33333333)
        words = _exchange(words, F, 1, 0x55555555)
    return words


@triton.jit
def _place(fixed, FIELD: tl.constexpr, F: tl.constexpr):
    """Take the low F bits of the integer part of a fixed-point number to a field."""
    if F * FIELD < 16:
        fixed = fixed >> (16 - F * FIELD)
    else:
        fixed = fixed << (F * FIELD - 16)
    return fixed & (((1 << F) - 1) << (F * FIELD))


@triton.jit
def _scale(rows, L2: tl.constexpr):
    """Return each block's scale and whether its codes are sent: [blocks, 1]."""
    largest = tl.zeros_like(rows[0]).to(tl.int32)
    for r in tl.static_range(32):
        largest = tl.maximum(largest, rows[r].to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    largest = tl.max(largest, 1)[:, None]
    scale = largest.to(tl.float32, bitcast=True)
    if L2:
        exponent = tl.minimum(tl.maximum(largest >> 23, 37), 254)
        factor = ((264 - exponent) << 23).to(tl.float32, bitcast=True)
        total = tl.zeros_like(rows[0]).to(tl.int32)
        for r in tl.static_range(32):
            t = (rows[r] * factor).to(tl.int32)
            total += t * t
        norm = tl.sqrt_rn(tl.sum(total, 1)[:, None].to(tl.float32))
        scale = tl.maximum(scale, norm * ((exponent - 10) << 23).to(tl.float32, bitcast=True))
    finite = (largest < 0x7F800000) & (scale.to(tl.int32, bitcast=True) < 0x7F800000)
    scale = tl.where(finite, tl.where(largest >= 37 << 23, scale, 0.0), float("nan"))
    return scale, finite & (largest >= 37 << 23)


@triton.jit
def _round(value, inverse, random, SIGN: tl.constexpr):
    """Return the dithered fixed-point number, and what rounding this value costs (in 2^-32 steps squared)."""
    fixed = (value * inverse).to(tl.int32)
    if SIGN:
        fixed -= 1 << 15
    fraction = (fixed & 0xFFFF).to(tl.float32)
    return fixed.to(tl.uint32, bitcast=True) + random, fraction * (65536.0 - fraction)


@triton.jit(do_not_specialize=["blocks", "base", "k1"])
def encode_kernel(
    values,
    scales,
    planes,
    statistics,
    blocks,
    base,
    k1,
    BITS: tl.constexpr,
    F: tl.constexpr,
    L2: tl.constexpr,
    TILE: tl.constexpr,
):
    """Encode TILE whole blocks per program; statistics is [blocks, 2] float64: variance and squared norm."""
    block = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)[:, None]
    column = tl.arange(0, 16)[None, :]
    inside = block < blocks
    rows = ()
    for r in tl.static_range(32):
        value = tl.load(values + block * 512 + r * 16 + column, mask=inside, other=0.0)
        rows = rows + (value.to(tl.float32),)
    scale, sent = _scale(rows, L2)
    levels: tl.constexpr = (1 << (BITS - 1)) - 1 if BITS > 1 else 1
    full: tl.constexpr = levels * 65536.0 if BITS > 1 else 32768.0
    inverse = tl.div_rn(tl.zeros_like(scale) + full, tl.where(sent, scale, 1.0))
    lower = (inverse.to(tl.int32, bitcast=True) - 1).to(tl.float32, bitcast=True)
    inverse = tl.where(scale * inverse > full, lower, inverse)

    lane = (block * 256 + column).to(tl.uint32) + base.to(tl.uint32)
    key = k1.to(tl.uint32)
    cost = tl.zeros_like(rows[0])
    words = ()
    for k in tl.static_range(F):
        word = tl.zeros_like(lane)
        for f in tl.static_range(16 // F):
            random = _hash(lane + (F * f + k) * 16, key)
            low, low_cost = _round(rows[F * f + k], inverse, random & 0xFFFF, BITS == 1)
            high, high_cost = _round(rows[F * f + k + 16], inverse, random >> 16, BITS == 1)
            word |= _place(low, f, F) | _place(high, f + 16 // F, F)
            cost += low_cost + high_cost
        words = words + (tl.where(sent, word, 0),)
    words = _transpose(words, F)
    for j in tl.static_range(BITS):
        at = (block * BITS + j) * 16 + column
        tl.store(planes + at, words[j].to(tl.int32, bitcast=True), mask=inside)

    square = tl.zeros_like(rows[0])
    for r in tl.static_range(32):
        scaled = rows[r] * inverse
        square += scaled * scaled
    step = scale.to(tl.float64) * (2.0 if BITS == 1 else 1.0 / levels)
    unit = tl.where(sent, 1.0 / inverse.to(tl.float64), scale.to(tl.float64))
    variance = tl.sum(tl.where(sent, cost, 0.0), 1)[:, None].to(tl.float64) * step * step * (1.0 / 4294967296.0)
    norm = tl.sum(tl.where(sent, square, 0.0), 1)[:, None].to(tl.float64) * unit * unit
    tl.store(scales + block, scale, mask=inside)
    tl.store(statistics + 2 * block, variance, mask=inside)
    tl.store(statistics + 2 * block + 1, norm, mask=inside)


@triton.jit
def _code(words, ROW: tl.constexpr, F: tl.constexpr):
    """Read one row's codes as fp32; the sign codec's 0 and -1 become 1 and -1."""
    field: tl.constexpr = ROW // F
    code = (words[ROW % F] << (32 - F - F * field)).to(tl.int32, bitcast=True) >> (32 - F)
    if F == 1:
        code = code | 1
    return code.to(tl.float32)


@triton.jit(do_not_specialize=["payloads", "blocks"])
def decode_kernel(
    addresses,
    bits,
    coefficients,
    out,
    payloads,
    blocks,
    F: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
):
    """Add `payloads` payloads to TILE whole blocks per program, in order, without leaving the registers.

    addresses: int64 [K, 2] of scales and planes; bits: int32 [K]; coefficients: fp32 [K].
    """
    block = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)[:, None]
    column = tl.arange(0, 16)[None, :]
    inside = block < blocks
    sums = ()
    for r in tl.static_range(32):
        at = block * 512 + r * 16 + column
        sums = sums + (tl.load(out + at, mask=inside, other=0.0),)
    for p in range(payloads):
        b = tl.load(bits + p)
        scales = tl.load(addresses + 2 * p).to(tl.pointer_type(tl.float32))
        planes = tl.load(addresses + 2 * p + 1).to(tl.pointer_type(tl.uint32))
        if ALIGNED:
            planes = tl.multiple_of(planes, 16)
        words = ()
        for j in tl.static_range(F):
            at = (block * b + tl.minimum(b - 1, j)) * 16 + column  # the last plane again extends the sign
            words = words + (tl.load(planes + at, mask=inside, other=0),)
        words = _transpose(words, F)
        levels = tl.maximum((1 << (b - 1)) - 1, 1).to(tl.float32)
        scale = tl.load(scales + block, mask=inside, other=0.0)
        step = tl.load(coefficients + p) * tl.div_rn(scale, tl.zeros_like(scale) + levels)
        added = ()
        for r in tl.static_range(32):
            added = added + (sums[r] + _code(words, r, F) * step,)
        sums = added
    for r in tl.static_range(32):
        at = block * 512 + r * 16 + column
        tl.store(out + at, sums[r], mask=inside)
