"""The codec on raw buffers, without torch: what an aggregator runs. Every argument is checked here.

Where the C++ library is missing the reference does the work, and brings torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from torch_qgc.errors import CodecError

from . import native
from .format import BLOCK, PASS_THROUGH, check_coefficients, check_encoding, check_size, payload_bytes

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["Payload", "decode_sum", "encode"]

Floats32 = NDArray[np.float32]


class Payload(NamedTuple):
    """The bytes of an encoded slice, of how many coordinates, at how many bits."""

    buffer: Buffer
    numel: int
    bits: int


def encode(
    values: Floats32,
    bits: int,
    *,
    key: tuple[int, int],
    norm: Literal["max", "l2"] = "max",
    offset: int = 0,
    threads: int = 1,
) -> Payload:
    """Round values stochastically to `bits` bits per coordinate: `torch_qgc.kernels.encode` without torch.

    Args:
        values: [n] float32, contiguous.
        bits, key, norm, offset: as there.
        threads: how many may work.
    Raises:
        CodecError: arguments outside of that.
    """
    check_encoding(bits, key, norm, offset)
    _check_array("values", values, values.size)
    if bits == PASS_THROUGH:
        return Payload(values.tobytes(), values.size, bits)
    if native.library() is None:
        import torch

        from . import tensors

        encoded = tensors.encode(torch.from_numpy(values), bits, key=key, norm=norm, offset=offset)
        return Payload(encoded.to_buffer(), values.size, bits)
    payload, statistics = np.empty(payload_bytes(values.size, bits), dtype=np.uint8), np.empty(2)
    native.encode(
        values.ctypes.data,
        0,
        values.size,
        bits,
        key,
        norm == "l2",
        offset // BLOCK,
        payload.ctypes.data,
        statistics.ctypes.data,
        threads,
    )
    return Payload(payload.data, values.size, bits)


def decode_sum(
    payloads: Sequence[Payload],
    coefficients: Sequence[float],
    out: Floats32,
    *,
    accumulate: bool = True,
    threads: int = 1,
) -> None:
    """Add  sum_k c_k Q_k  to `out`: `torch_qgc.kernels.decode_sum` without torch.

    Args:
        payloads: K payloads of n coordinates, of any mix of bits; any contiguous buffers.
        coefficients: [K], rounded to float32.
        out: [n] float32, contiguous.
        accumulate: add to what `out` holds; else overwrite it.
        threads: how many may work.
    Raises:
        CodecError: sizes, lengths or dtypes that do not fit; nothing has been written then.
    """
    _check_array("out", out, out.size)
    check_coefficients(coefficients, payloads)
    for k, payload in enumerate(payloads):
        if payload.numel != out.size:
            raise CodecError(
                f"payload {k}: expected {out.size} coordinates as in out, got {payload.numel}: decode slice by slice"
            )
        check_size(memoryview(payload.buffer), payload.numel, payload.bits)
    if native.library() is None:
        import torch

        from . import tensors
        from .encoded import Encoded

        encoded = [Encoded.from_buffer(*payload) for payload in payloads]
        tensors.decode_sum(encoded, coefficients, torch.from_numpy(out), accumulate=accumulate)
        return
    # Arrays keep the memory in place until the sums are made.
    held = [np.frombuffer(memoryview(payload.buffer), dtype=np.uint8) for payload in payloads]
    native.decode_sum(
        [array.ctypes.data for array in held],
        [payload.bits for payload in payloads],
        coefficients,
        out.size,
        out.ctypes.data,
        accumulate,
        threads,
    )


def _check_array(name: str, array: Floats32, numel: int) -> None:
    if array.dtype != np.float32 or array.shape != (numel,) or not array.flags.c_contiguous:
        raise CodecError(
            f"{name}: expected contiguous float32 of shape [{numel}], got {array.dtype} of shape "
            f"{list(array.shape)}{'' if array.flags.c_contiguous else ' with gaps'}: make a fresh array and copy"
        )
