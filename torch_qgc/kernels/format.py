"""The payload: how many bytes it has, where its parts lie, and the keys of its random numbers.

A slice of n coordinates is cut into blocks of 512 = 32 rows x 16 columns, the last one padded with zeros. On
the wire: one fp32 scale per block, then block by block b planes of 16 words of 32 bits, little endian. Bit r
of word c of plane j is bit j of the code at (row r, column c), so that a CPU vector holds a row, a GPU thread
owns a column, and neither needs another one's data. Why it looks like this: docs/kernels.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from torch_qgc.errors import CodecError

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = [
    "BLOCK",
    "COLUMNS",
    "LIVE",
    "PASS_THROUGH",
    "ROWS",
    "Encoded",
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


@dataclass(frozen=True, eq=False, slots=True)
class Encoded:
    """One encoded slice: a single uint8 buffer, ready to be sent, and what is known about it.

    `statistics` is float64 [2]: the rounding variance and the squared norm of what was encoded; None on the
    receiving side, since they are not part of the payload.
    """

    buffer: torch.Tensor
    numel: int
    bits: int
    statistics: torch.Tensor | None = None

    @property
    def blocks(self) -> int:
        """Number of blocks of 512, 0 for the pass-through codec."""
        return 0 if self.bits == PASS_THROUGH else -(-self.numel // BLOCK)

    @property
    def scales(self) -> torch.Tensor:
        """View of the buffer: fp32 [blocks]; empty for the pass-through codec."""
        return self.buffer[: 4 * self.blocks].view(torch.float32)

    @property
    def planes(self) -> torch.Tensor:
        """View of the buffer: int32 [blocks, bits, 16]; fp32 [numel] for the pass-through codec."""
        if self.bits == PASS_THROUGH:
            return self.buffer.view(torch.float32)
        return self.buffer[4 * self.blocks :].view(torch.int32).view(self.blocks, self.bits, COLUMNS)

    @property
    def variance(self) -> float:
        """Sum of the exact conditional variances of the rounding, NaN if unknown or not finite."""
        return float("nan") if self.statistics is None else float(self.statistics[0])

    @property
    def squared_norm(self) -> float:
        """Sum of the squares of the values that were encoded, NaN if unknown or not finite."""
        return float("nan") if self.statistics is None else float(self.statistics[1])

    def to_buffer(self) -> memoryview:
        """Return the bytes to send, without a copy unless they lie on an accelerator."""
        return self.buffer.cpu().numpy().data

    @classmethod
    def from_buffer(cls, buffer: Buffer, numel: int, bits: int) -> Encoded:
        """Wrap received bytes without copying them; the buffer stays alive as long as the result.

        Raises:
            CodecError: the size is not `payload_bytes(numel, bits)`, or the bytes are not contiguous.
        """
        view = memoryview(buffer)
        expected = payload_bytes(numel, bits)
        if view.nbytes != expected or not view.c_contiguous:
            raise CodecError(
                f"payload of {numel} coordinates at {bits} bits: expected {expected} contiguous bytes, "
                f"got {view.nbytes}{'' if view.c_contiguous else ' with gaps'}: sender and receiver must "
                "agree on layout and bits"
            )
        return cls(_as_tensor(view), numel, bits)


class _Writable:
    """An array interface that declares memory writable and keeps its owner alive.

    torch has no read-only tensors and warns about them; nothing in this package writes into a payload.
    """

    def __init__(self, array: np.ndarray) -> None:
        self._owner = array
        self.__array_interface__ = {**array.__array_interface__, "data": (array.ctypes.data, False)}


def _as_tensor(view: memoryview) -> torch.Tensor:
    if view.nbytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    return torch.from_numpy(np.asarray(_Writable(np.frombuffer(view, np.uint8))))
