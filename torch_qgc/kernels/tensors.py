"""The codec on torch tensors, with every argument checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from torch_qgc.errors import CodecError

from . import ops
from .encoded import Encoded
from .format import BLOCK, check_coefficients, check_encoding, payload_bytes

__all__ = ["decode_sum", "encode", "report"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def encode(
    values: torch.Tensor,
    bits: int,
    *,
    key: tuple[int, int],
    norm: Literal["max", "l2"] = "max",
    offset: int = 0,
) -> Encoded:
    """Round values stochastically to `bits` bits per coordinate, unbiased given the values.

    Args:
        values: fp32, bf16 or fp16 of any shape, taken as flat [n]; copied first if not contiguous.
        bits: 2..16; 1 for the stochastic sign; 32 for plain fp32.
        key: from `derive_key`: a different one for each step and worker.
        norm: a block's scale: its largest magnitude, or its L2 norm as in Song & Choi (noisier at equal
            bits).
        offset: where the slice begins in the flat gradient, a multiple of 512, so that draws do not depend on
            how the gradient is cut.
    Returns:
        The payload in one buffer on the values' device. A block that holds an inf or NaN decodes to NaN.
    Raises:
        CodecError: dtype, bits, norm, key or offset outside of that.
    """
    if values.dtype not in _DTYPES:
        raise CodecError(f"values: expected float32, bfloat16 or float16, got {values.dtype}: use .float()")
    check_encoding(bits, key, norm, offset)
    flat = values.detach().reshape(-1)
    buffer, statistics = torch.ops.torch_qgc.encode(flat, bits, *key, norm == "l2", offset // BLOCK)
    return Encoded(buffer, flat.numel(), bits, statistics)


def decode_sum(
    payloads: Sequence[Encoded],
    coefficients: Sequence[float],
    out: torch.Tensor,
    *,
    accumulate: bool = True,
) -> None:
    """Add  sum_k c_k Q_k  to `out`.

    Each term is  float32(code) * (c * (scale / L)), one rounding per operation, added in payload order: every
    machine gets the same bits.

    Args:
        payloads: K encoded slices of n coordinates, of any mix of bits.
        coefficients: [K], rounded to fp32.
        out: fp32 [n], contiguous.
        accumulate: add to what `out` holds; else overwrite it.
    Raises:
        CodecError: lengths, dtype, strides or devices that do not fit; nothing has been written then.
    """
    _check_out(out)
    check_coefficients(coefficients, payloads)
    _check_payloads(payloads, out)
    torch.ops.torch_qgc.decode_sum(
        [payload.buffer for payload in payloads],
        [payload.bits for payload in payloads],
        coefficients,
        out,
        accumulate,
    )


def report() -> dict[str, str]:
    """Say for each kind of device which kernels run there, and why not faster ones."""
    return ops.describe()


def _check_out(out: torch.Tensor) -> None:
    if out.dtype != torch.float32 or out.dim() != 1 or not out.is_contiguous():
        raise CodecError(
            f"out: expected contiguous float32 of one dimension, got {out.dtype} {list(out.shape)} with "
            f"strides {list(out.stride())}: decode into a fresh tensor and copy"
        )


def _check_payloads(payloads: Sequence[Encoded], out: torch.Tensor) -> None:
    for k, payload in enumerate(payloads):
        expected, got = payload_bytes(payload.numel, payload.bits), payload.buffer.numel()
        if payload.numel != out.numel() or payload.buffer.device != out.device:
            raise CodecError(
                f"payload {k}: expected {out.numel()} coordinates on {out.device} as in out, got "
                f"{payload.numel} on {payload.buffer.device}: decode slice by slice, on one device"
            )
        if got != expected or payload.buffer.dtype != torch.uint8 or not payload.buffer.is_contiguous():
            raise CodecError(
                f"payload {k}: expected {expected} contiguous bytes for {payload.numel} coordinates at "
                f"{payload.bits} bits, got {got} of {payload.buffer.dtype}: build it with Encoded.from_buffer"
            )
