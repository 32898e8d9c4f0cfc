"""The payload: how many bytes it has, where its parts lie, and the keys of its random numbers.

A slice of n coordinates is cut into blocks of 512 = 32 rows x 16 columns, the last one padded with zeros. On
the wire: one fp32 scale per block, then block by block b planes of 16 words of 32 bits, little endian. Bit r
of word c of plane j is bit j of the code at (row r, column c), so that a CPU vector holds a row, a GPU thread
owns a column, and neither needs another one's data. Why it looks like this: docs/kernels.md.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch_qgc.errors import CodecError

__all__ = [
    "BLOCK",
    "COLUMNS",
    "LIVE",
    "PASS_THROUGH",
    "ROWS",
    "check_bits",
    "check_coefficients",
    "check_encoding",
    "check_size",
    "derive_key",
    "payload_bytes",
    "step_levels",
]

ROWS, COLUMNS = 32, 16
BLOCK = ROWS * COLUMNS
PASS_THROUGH = 32  # bits: plain fp32, no scales
LIVE = (127 - 90) << 23  # bit pattern of 2^-90: a block whose largest magnitude is below is sent as zeros

_MASK64 = (1 << 64) - 1


def payload_bytes(numel: int, bits: int) -> int:
    """Return the exact size of a payload: ceil(n / 512) (4 + 64 b) bytes, or 4 n for the pass-through codec.

    Args:
        numel: coordinates of the slice, n >= 0.
        bits: b = 2..16, 1 (stochastic sign) or 32 (plain fp32).
    Raises:
        CodecError: bits outside of that.
    """
    if bits == PASS_THROUGH:
        return 4 * numel
    check_bits(bits)
    return -(-numel // BLOCK) * (4 + 4 * COLUMNS * bits)


def check_bits(bits: int) -> None:
    """Raise CodecError unless `bits` is 1..16 or 32."""
    if not (1 <= bits <= 16 or bits == PASS_THROUGH):
        raise CodecError(
            f"bits: expected 1 (stochastic sign), 2..16 or 32 (plain fp32), got {bits}: choose one of these"
        )


def check_encoding(bits: int, key: tuple[int, int], norm: str, offset: int) -> None:
    """Raise CodecError unless a slice can be encoded like this; see `torch_qgc.kernels.encode`."""
    if norm not in ("max", "l2"):
        raise CodecError(f"norm: expected 'max' or 'l2', got {norm!r}: choose one of these")
    if offset < 0 or offset % BLOCK:
        raise CodecError(f"offset: expected a multiple of {BLOCK}, got {offset}: cut slices at whole blocks")
    if len(key) != 2 or not all(0 <= word < 1 << 32 for word in key):
        raise CodecError(f"key: expected two words of 32 bits, got {key}: make it with derive_key")
    check_bits(bits)


def check_size(view: memoryview, numel: int, bits: int) -> None:
    """Raise CodecError unless these bytes can be the payload of `numel` coordinates at `bits` bits."""
    expected = payload_bytes(numel, bits)
    if view.nbytes != expected or not view.c_contiguous:
        raise CodecError(
            f"payload of {numel} coordinates at {bits} bits: expected {expected} contiguous bytes, "
            f"got {view.nbytes}{'' if view.c_contiguous else ' with gaps'}: sender and receiver must "
            "agree on layout and bits"
        )


def check_coefficients(coefficients: Sequence[float], payloads: Sequence[object]) -> None:
    """Raise CodecError unless there is one coefficient per payload."""
    if len(coefficients) != len(payloads):
        raise CodecError(
            f"coefficients: expected {len(payloads)}, one per payload, got {len(coefficients)}: drop or add some"
        )


def step_levels(bits: int) -> int:
    """Return L = 2^(b-1) - 1, the number of steps on each side of zero; 1 for the stochastic sign."""
    return max(1, (1 << (bits - 1)) - 1)


def derive_key(seed: int, step: int, worker: int, stream: int = 0) -> tuple[int, int]:
    """Derive the two 32-bit words that key the dither of one (seed, step, worker, stream).

    k = 0, then k = splitmix64(k xor word) for each word; (k0, k1) are its low and high half. Never make
    neighbouring keys by hand: (k0 + 1, k1) is the stream of (k0, k1) shifted by one.

    Args:
        seed, step, worker, stream: any integers, taken modulo 2^64.
    """
    state = 0
    for word in (seed, step, worker, stream):
        state = _splitmix64(state ^ (word & _MASK64))
    return state & 0xFFFFFFFF, state >> 32


def _splitmix64(x: int) -> int:
    """Return the output of Steele, Lea and Flood's generator at state x ("Fast splittable PRNGs", 2014)."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)
