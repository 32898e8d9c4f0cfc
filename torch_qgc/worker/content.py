"""What users may hand to other workers, as bytes. Reading it runs no code of the sender's: that rules out pickle."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
import torch

from torch_qgc.errors import ConfigError, ProtocolError

__all__ = ["pack", "unpack"]

_ACCEPTED = (
    "None, bool, int (64 bits), float, str and bytes; tensors and numpy arrays of numbers; lists, tuples and dicts "
    "(with keys of str or int) of these"
)
_MOST_DEPTH = 64
_PLAIN = (type(None), bool, int, float, str, bytes)
_TENSOR, _ARRAY = 1, 2  # msgpack's codes for types of our own
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}
_NUMPY_DTYPES = {"|b1", "|i1", "|u1"} | {
    order + kind for order in "<>" for kind in ("i2", "i4", "i8", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16")
}


class _Values(msgspec.Struct, array_like=True, frozen=True):
    """The numbers of a tensor or an array, contiguous."""

    dtype: str
    shape: list[int]
    data: bytes


def pack(value: Any) -> bytes:
    """Encode a value in msgpack; tuples are read back as lists, tensors on the CPU, numpy's scalars as Python's.

    Raises:
        ConfigError: it holds something else than what is accepted, which the error lists; says where.
    """
    plain = _plain(value, "", 0)
    try:
        return msgspec.msgpack.encode(plain)
    except (OverflowError, ValueError) as error:  # an integer of more bits; half a surrogate
        raise ConfigError(f"expected {_ACCEPTED}, got what msgpack cannot hold: {error}") from error


def unpack(content: bytes, where: str) -> Any:
    """Decode what `pack` has made, or somebody else: nothing in it is trusted.

    Raises:
        ProtocolError: it is none; `where` says of whom.
    """
    try:
        return msgspec.msgpack.decode(content, ext_hook=_read)
    except (msgspec.DecodeError, ValueError, TypeError, OverflowError, RecursionError, MemoryError) as error:
        raise ProtocolError(
            f"{where}: expected content that was packed by the same version of torch_qgc, got {len(content):,} bytes "
            f"that were not ({error})"
        ) from error


def _plain(value: Any, path: str, depth: int) -> Any:
    """Return the value with tensors and arrays as bytes; names what cannot be."""
    if type(value) in _PLAIN:
        return value
    if depth > _MOST_DEPTH:
        raise ConfigError(f"expected containers at most {_MOST_DEPTH} deep, got more at {path[:200]}")
    if isinstance(value, np.generic):
        return _plain(value.item(), path, depth + 1)
    if isinstance(value, torch.Tensor):
        return _of_tensor(value, path)
    if isinstance(value, np.ndarray):
        if value.dtype.str not in _NUMPY_DTYPES:
            raise _refused(f"an array of {value.dtype}", path)
        return _ext(_ARRAY, value.dtype.str, value.shape, value.tobytes())
    if isinstance(value, list | tuple):
        return [v if type(v) in _PLAIN else _plain(v, f"{path}[{i}]", depth + 1) for i, v in enumerate(value)]
    if isinstance(value, dict):
        for key in value:
            if type(key) not in (str, int):
                raise _refused(f"the key {key!r} of type {type(key).__name__}", path)
        return {k: v if type(v) in _PLAIN else _plain(v, f"{path}[{k!r}]", depth + 1) for k, v in value.items()}
    raise _refused(f"a value of type {type(value).__name__}", path)


def _refused(what: str, path: str) -> ConfigError:
    return ConfigError(f"expected {_ACCEPTED}, got {what}{f' at {path[:200]}' if path else ''}: convert it first")


def _of_tensor(tensor: torch.Tensor, path: str) -> msgspec.msgpack.Ext:
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in _DTYPES or tensor.layout is not torch.strided or tensor.is_meta:
        raise _refused(f"a tensor of {tensor.dtype}, {tensor.layout}, on {tensor.device}", path)
    values = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return _ext(_TENSOR, name, values.shape, values.reshape(-1).view(torch.uint8).numpy().tobytes())


def _ext(code: int, dtype: str, shape: tuple[int, ...], data: bytes) -> msgspec.msgpack.Ext:
    return msgspec.msgpack.Ext(code, msgspec.msgpack.encode(_Values(dtype, list(shape), data)))


def _read(code: int, data: memoryview) -> Any:
    """Read a tensor or an array: the bytes that are there, in a shape that they fill."""
    values = msgspec.msgpack.decode(data, type=_Values)
    if code == _TENSOR:
        dtype = _DTYPES.get(values.dtype)
        if dtype is None:
            raise ValueError(f"a tensor of {values.dtype!r:.40}")
        _check_size(values, dtype.itemsize)
        flat = torch.frombuffer(bytearray(values.data), dtype=dtype) if values.data else torch.empty(0, dtype=dtype)
        return flat.reshape(values.shape)
    if code == _ARRAY:
        if values.dtype not in _NUMPY_DTYPES:
            raise ValueError(f"an array of {values.dtype!r:.40}")
        _check_size(values, np.dtype(values.dtype).itemsize)
        return np.frombuffer(bytearray(values.data), dtype=values.dtype).reshape(values.shape)
    raise ValueError(f"a type of code {code}")


def _check_size(values: _Values, itemsize: int) -> None:
    if any(n < 0 for n in values.shape) or math.prod(values.shape) * itemsize != len(values.data):
        raise ValueError(f"{len(values.data)} bytes for a shape of {values.shape!r:.80}")
