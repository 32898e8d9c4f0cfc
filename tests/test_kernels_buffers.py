"""The codec on raw buffers: the torch face is its oracle, and bad input is refused before anything is written."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from torch_qgc import kernels
from torch_qgc.errors import CodecError
from torch_qgc.kernels import BLOCK, Encoded, native
from torch_qgc.kernels.buffers import Payload, decode_sum, encode

KEY = (3, 4)
SIZES = (0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 5000)


def values_of(numel: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(seed).standard_normal(numel).astype(np.float32)


@pytest.mark.parametrize("library", ["C++", "reference"])
@pytest.mark.parametrize("bits", [1, 2, 4, 9, 32])
@pytest.mark.parametrize("numel", SIZES)
def test_buffers_equal_tensors(numel: int, bits: int, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if library == "reference":
        monkeypatch.setattr(native, "library", lambda: None)
    values = values_of(numel)
    payload = encode(values, bits, key=KEY, norm="l2", offset=3 * BLOCK)
    expected = kernels.encode(torch.from_numpy(values), bits, key=KEY, norm="l2", offset=3 * BLOCK)
    assert bytes(payload.buffer) == bytes(expected.to_buffer())


@pytest.mark.parametrize("library", ["C++", "reference"])
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("numel", SIZES)
def test_sums_equal_those_of_tensors(
    numel: int, accumulate: bool, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if library == "reference":
        monkeypatch.setattr(native, "library", lambda: None)
    bits, coefficients = [4, 32, 2, 9], [0.5, 0.1, -1.0, 2.0]
    payloads = [encode(values_of(numel, k), b, key=(k, 9)) for k, b in enumerate(bits)]
    # at an odd address, as a received frame may be
    payloads = [p._replace(buffer=memoryview(b"x" + bytes(p.buffer))[1:]) for p in payloads]
    out = values_of(numel, 7)
    expected = torch.from_numpy(out.copy())
    kernels.decode_sum([Encoded.from_buffer(*p) for p in payloads], coefficients, expected, accumulate=accumulate)
    decode_sum(payloads, coefficients, out, accumulate=accumulate)
    np.testing.assert_array_equal(out.view(np.int32), expected.numpy().view(np.int32))


def good(**changes: Any) -> dict[str, Any]:
    payload = encode(values_of(1000), 4, key=KEY)
    arguments = {"payloads": [payload], "coefficients": [1.0], "out": np.full(1000, 7.0, dtype=np.float32)}
    return arguments | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"coefficients": [1.0, 2.0]}, "coefficients: expected 1, one per payload, got 2"),
        ({"out": np.zeros(1000)}, "float32 of shape \\[1000\\], got float64"),
        ({"out": np.zeros(2000, dtype=np.float32)[::2]}, "with gaps"),
        ({"out": np.zeros(999, dtype=np.float32)}, "expected 999 coordinates as in out, got 1000"),
        ({"payloads": [Payload(b"short", 1000, 4)]}, "expected 520 contiguous bytes, got 5"),
        ({"payloads": [Payload(bytes(520), 1000, 17)]}, "bits: expected"),
    ],
)
def test_bad_arguments_are_refused_and_nothing_is_written(changes: dict[str, Any], message: str) -> None:
    arguments = good(**changes)
    before = arguments["out"].copy()
    with pytest.raises(CodecError, match=message):
        decode_sum(**arguments)
    np.testing.assert_array_equal(arguments["out"], before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": np.zeros(4)}, "float32"),
        ({"bits": 17}, "bits: expected"),
        ({"norm": "l1"}, "norm: expected"),
        ({"offset": 5}, "multiple of 512"),
        ({"key": (1, -1)}, "two words"),
    ],
)
def test_bad_slices_are_refused(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"values": values_of(10), "bits": 4, "key": KEY} | changes
    with pytest.raises(CodecError, match=message):
        encode(arguments.pop("values"), arguments.pop("bits"), **arguments)
