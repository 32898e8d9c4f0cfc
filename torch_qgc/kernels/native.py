"""The C++ codec behind ctypes: addresses in, bytes out, no torch. Calls release the GIL.

When the library was not built, `library()` is None and the reference runs instead; one warning says so.
"""

from __future__ import annotations

import ctypes
import functools
import warnings
from collections.abc import Sequence
from pathlib import Path

__all__ = ["INSTRUCTION_SETS", "decode_sum", "encode", "instruction_set", "library", "missing"]

INSTRUCTION_SETS = ("baseline", "x86-64-v3", "x86-64-v4")
_PATH = Path(__file__).with_name("_codec.so")
_ABI = 2  # of codec.cpp; a library built from other sources must not be called

_int, _i64, _u32, _u64, _ptr = ctypes.c_int, ctypes.c_int64, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_void_p


@functools.cache
def library() -> ctypes.CDLL | None:
    """Load the library once; None, and one warning that says what it costs, if that cannot be done."""
    reason = missing()
    if reason is not None:
        warnings.warn(
            f"torch_qgc runs its plain torch codec on CPU, about 40 times slower than the C++ one: {reason}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    codec = ctypes.CDLL(str(_PATH))
    codec.qgc_encode.argtypes = [_ptr, _int, _i64, _int, _int, _u32, _u32, _u64, _ptr, _ptr, _int, _int]
    codec.qgc_encode.restype = None
    codec.qgc_decode_sum.argtypes = [_int, _ptr, _ptr, _ptr, _i64, _ptr, _int, _int, _int]
    codec.qgc_decode_sum.restype = None
    return codec


def missing() -> str | None:
    """Say why the C++ codec cannot run here; None if it can."""
    if not _PATH.exists():
        return "it was not built; install a C++17 compiler, then `pip install --force-reinstall torch_qgc`"
    try:
        abi = ctypes.CDLL(str(_PATH)).qgc_abi()
    except (OSError, AttributeError) as error:
        return f"{_PATH.name} does not load ({error}); reinstall torch_qgc on this machine"
    return None if abi == _ABI else f"{_PATH.name} has interface {abi}, expected {_ABI}; reinstall torch_qgc"


@functools.cache
def _best() -> int:
    codec = library()
    return 0 if codec is None else int(codec.qgc_best_isa())


def instruction_set() -> str:
    """Return the name of the instruction set that the library picked."""
    return INSTRUCTION_SETS[_best()]


def encode(
    values: int,
    dtype: int,
    numel: int,
    bits: int,
    key: tuple[int, int],
    l2: bool,
    first_block: int,
    payload: int,
    statistics: int,
    threads: int,
    isa: int | None = None,
) -> None:
    """Encode `numel` numbers at address `values` into `payload_bytes(numel, bits)` bytes at address
    `payload`.

    Args:
        dtype: 0 fp32, 1 bf16, 2 fp16.
        statistics: address of two float64: rounding variance and squared norm.
        isa: index into INSTRUCTION_SETS, at most the machine's best, which is the default.
    """
    codec = library()
    assert codec is not None
    isa = _best() if isa is None else isa
    codec.qgc_encode(values, dtype, numel, bits, l2, *key, first_block, payload, statistics, threads, isa)


def decode_sum(
    payloads: Sequence[int],
    bits: Sequence[int],
    coefficients: Sequence[float],
    numel: int,
    out: int,
    accumulate: bool,
    threads: int,
    isa: int | None = None,
) -> None:
    """Add the payloads at these addresses, weighted, to `numel` fp32 numbers at address `out`."""
    codec = library()
    assert codec is not None
    count = len(payloads)
    codec.qgc_decode_sum(
        count,
        (_ptr * count)(*payloads),
        (_int * count)(*bits),
        (ctypes.c_float * count)(*coefficients),
        numel,
        out,
        accumulate,
        threads,
        _best() if isa is None else isa,
    )
