"""The codec as torch operators, so that it works under torch.compile and fake tensors; one implementation per
device.

torch.ops.torch_qgc.encode and .decode_sum trust their arguments: call them through kernels/__init__.py, which
checks.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Protocol, cast

import torch

from . import native, reference
from .encoded import Encoded
from .format import PASS_THROUGH, payload_bytes

__all__ = ["backend", "describe"]

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Backend(Protocol):
    """What reference.py, Native and gpu.py have in common; shapes and meaning as in reference.py."""

    def encode(self, values: torch.Tensor, key: tuple[int, int], l2: bool, first_block: int, out: Encoded) -> None: ...

    def decode_sum(
        self,
        payloads: Sequence[Encoded],
        coefficients: Sequence[float],
        out: torch.Tensor,
        accumulate: bool,
    ) -> None: ...


class Native:
    """The C++ library on torch tensors; `isa` forces an instruction set, for tests."""

    def __init__(self, isa: int | None = None) -> None:
        self._isa = isa

    def encode(self, values: torch.Tensor, key: tuple[int, int], l2: bool, first_block: int, out: Encoded) -> None:
        """See reference.encode."""
        assert out.statistics is not None
        native.encode(
            values.data_ptr(),
            _DTYPES[values.dtype],
            values.numel(),
            out.bits,
            key,
            l2,
            first_block,
            out.buffer.data_ptr(),
            out.statistics.data_ptr(),
            torch.get_num_threads(),
            self._isa,
        )

    def decode_sum(
        self,
        payloads: Sequence[Encoded],
        coefficients: Sequence[float],
        out: torch.Tensor,
        accumulate: bool,
    ) -> None:
        """See reference.decode_sum."""
        native.decode_sum(
            [payload.buffer.data_ptr() for payload in payloads],
            [payload.bits for payload in payloads],
            coefficients,
            out.numel(),
            out.data_ptr(),
            accumulate,
            torch.get_num_threads(),
            self._isa,
        )


_NATIVE = Native()


@functools.cache
def _triton() -> tuple[Backend | None, str]:
    """Import the CUDA kernels once, only where there is a CUDA device; else say why not."""
    if not torch.cuda.is_available():
        return None, "no CUDA device"
    try:
        import triton

        from . import gpu
    except ImportError as error:
        warnings.warn(
            f"torch_qgc runs its plain torch codec on CUDA, many times slower than Triton's: {error}; install triton",
            RuntimeWarning,
            stacklevel=2,
        )
        return None, f"plain torch: {error}; install triton"
    return cast(Backend, gpu), f"Triton {triton.__version__}"


def backend(device: torch.device) -> Backend:
    """Return the fastest implementation that runs on `device`."""
    if device.type == "cpu" and native.library() is not None:
        return _NATIVE
    if device.type == "cuda":
        return _triton()[0] or reference
    return reference


def describe() -> dict[str, str]:
    """Say for each kind of device which implementation runs there, and why not a faster one."""
    reason = native.missing()
    return {
        "cpu": f"C++, {native.instruction_set()}" if reason is None else f"plain torch: {reason}",
        "cuda": _triton()[1],
    }


def _encode(
    values: torch.Tensor, bits: int, k0: int, k1: int, l2: bool, first_block: int
) -> tuple[torch.Tensor, torch.Tensor]:
    buffer, statistics = _encode_fake(values, bits, k0, k1, l2, first_block)
    out = Encoded(buffer, values.numel(), bits, statistics)
    if bits == PASS_THROUGH:
        out.planes.copy_(values)
        norm = torch.linalg.vector_norm(values, dtype=torch.float64)
        statistics.copy_(torch.stack([torch.zeros_like(norm), norm.square()]))
    else:
        backend(values.device).encode(values, (k0, k1), l2, first_block, out)
    return buffer, statistics


def _encode_fake(
    values: torch.Tensor, bits: int, k0: int, k1: int, l2: bool, first_block: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        values.new_empty(payload_bytes(values.numel(), bits), dtype=torch.uint8),
        values.new_empty(2, dtype=torch.float64),
    )


def _decode_sum(
    payloads: list[torch.Tensor],
    bits: list[int],
    coefficients: list[float],
    out: torch.Tensor,
    accumulate: bool,
) -> None:
    encoded = [Encoded(buffer, out.numel(), b) for buffer, b in zip(payloads, bits)]
    backend(out.device).decode_sum(encoded, coefficients, out, accumulate)


torch.library.define(
    "torch_qgc::encode",
    "(Tensor values, int bits, int k0, int k1, bool l2, int first_block) -> (Tensor, Tensor)",
)
torch.library.define(
    "torch_qgc::decode_sum",
    "(Tensor[] payloads, int[] bits, float[] coefficients, Tensor(a!) out, bool accumulate) -> ()",
)
torch.library.impl("torch_qgc::encode", "default", _encode)
torch.library.impl("torch_qgc::decode_sum", "default", _decode_sum)
torch.library.register_fake("torch_qgc::encode", _encode_fake)
torch.library.register_fake("torch_qgc::decode_sum", lambda *_: None)
