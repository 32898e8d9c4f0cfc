"""What workers may hand to each other comes back as it was; everything else is refused; bytes of others run nothing."""

from __future__ import annotations

import contextlib
import enum
import math
import pickle
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torch_qgc.errors import ConfigError, ProtocolError
from torch_qgc.worker.content import pack, unpack

plain = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False)
plain |= st.text(st.characters(exclude_categories=["Cs"])) | st.binary()
keys = st.text(st.characters(exclude_categories=["Cs"])) | st.integers(-(2**63), 2**63 - 1)
values = st.recursive(plain, lambda inner: st.lists(inner) | st.dictionaries(keys, inner), max_leaves=20)


@given(values)
def test_plain_values_come_back_as_they_were(value: Any) -> None:
    back = unpack(pack(value), "here")
    assert back == value
    assert repr(back) == repr(value)  # True is not 1, and -0.0 not 0.0


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.int64, torch.uint8]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bool])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0, 2), (2, 3, 4)])
def test_tensors_come_back_bit_for_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = (100 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype)
    back = unpack(pack({"t": [tensor]}), "here")["t"][0]
    assert back.dtype is dtype
    assert back.shape == shape
    assert torch.equal(back, tensor)
    back += back  # it is one's own


def test_views_conjugates_and_what_requires_a_gradient_come_as_their_values() -> None:
    tensor = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    for view in (tensor.T, tensor[::2, 1::3], tensor.expand(2, 4, 6), tensor.requires_grad_()):
        assert torch.equal(unpack(pack(view), "here"), view.detach())
    turned = torch.view_as_complex(torch.randn(3, 2, generator=torch.Generator().manual_seed(0))).conj()
    assert torch.equal(unpack(pack(turned), "here"), turned)
    special = torch.tensor([math.nan, math.inf, -0.0])
    assert torch.equal(unpack(pack(special), "here").view(torch.int32), special.view(torch.int32))


@pytest.mark.parametrize("dtype", ["<f4", ">f8", "<i2", "|u1", "|b1", "<c16"])
def test_arrays_come_back_bit_for_bit_and_scalars_as_pythons_own(dtype: str) -> None:
    array = np.arange(12).reshape(3, 4).astype(dtype)[:, ::2]
    back = unpack(pack(array), "here")
    assert back.dtype == array.dtype
    np.testing.assert_array_equal(back, array)
    if array.dtype.kind != "c":
        assert type(unpack(pack(array[0, 0]), "here")) is type(array[0, 0].item())


class Colour(enum.IntEnum):
    RED = 1


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ({1, 2}, "type set"),
        ([1, {"a": object()}], r"type object at \[1\]\['a'\]"),
        (Colour.RED, "type Colour"),
        (bytearray(b"x"), "type bytearray"),
        ({(1, 2): 3}, r"key \(1, 2\) of type tuple"),
        ({True: 3}, "key True of type bool"),
        (torch.ones(2).to_sparse(), "tensor of torch.float32, torch.sparse_coo"),
        (torch.ones(2, device="meta"), "on meta"),
        (np.array(["a"]), "array of <U1"),
        (np.array([object()]), "array of object"),
        (np.datetime64("2020-01-01"), "type date"),
        (2**64, "more|64"),
        ("\ud800", "surrogates"),
    ],
)
def test_anything_else_is_refused_by_name_and_place_with_what_is_accepted(value: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        pack(value)
    assert "None, bool, int (64 bits), float, str and bytes; tensors" in str(caught.value)


def test_what_holds_itself_is_refused() -> None:
    value: list[Any] = []
    value.append(value)
    with pytest.raises(ConfigError, match="at most 64 deep"):
        pack(value)


# --- bytes of others --------------------------------------------------------------------------------------


class Bomb:
    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit",)


@given(st.binary(max_size=300) | values.map(pack), st.integers(0, 299), st.integers(0, 255))
def test_any_bytes_are_a_value_or_a_protocol_error(content: bytes, at: int, byte: int) -> None:
    changed = bytearray(content)
    if at < len(changed):
        changed[at] = byte
    with contextlib.suppress(ProtocolError):
        unpack(bytes(changed), "worker 1")


def ext(code: int, *fields: Any) -> bytes:
    return msgspec.msgpack.encode(msgspec.msgpack.Ext(code, msgspec.msgpack.encode(fields)))


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(Bomb()),
        ext(1, "float32", [2], b"\0" * 7),
        ext(1, "float32", [2**40, 2**40], b""),
        ext(1, "float32", [-1, -8], b"\0" * 32),
        ext(1, "float32", [0, -1], b""),
        ext(1, "qint8", [1], b"\0"),
        ext(1, "__class__", [1], b"\0"),
        ext(2, "|O", [1], b"\0" * 8),
        ext(2, "<f4,(", [1], b"\0" * 4),
        ext(2, "<f4", [2**62, 4], b""),
        ext(2, "<f4", [1] * 100, b"\0" * 4),
        ext(1, "float32", "x"),
        ext(3, "float32", [1], b"\0" * 4),
        b"\x91" * 100_000,
        b"\xdd\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"",
    ],
)
def test_bytes_that_mean_harm_are_a_protocol_error_that_names_their_sender(content: bytes) -> None:
    with pytest.raises(ProtocolError, match="worker 1: expected content that was packed"):
        unpack(content, "worker 1")
