"""The payload as a tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from .format import BLOCK, COLUMNS, PASS_THROUGH, check_size

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["Encoded"]


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
        check_size(view, numel, bits)
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
