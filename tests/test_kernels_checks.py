"""What the codec refuses, before anything is touched; and the payload as bytes."""

from __future__ import annotations

import pytest
import torch

from torch_qgc.errors import CodecError
from torch_qgc.kernels import Encoded, decode_sum, encode, payload_bytes

KEY = (1, 2)


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        (
            torch.zeros(4, dtype=torch.float64),
            {},
            "values: expected float32, bfloat16 or float16, got torch.float64",
        ),
        (torch.zeros(4, dtype=torch.int32), {}, "values: expected float32"),
        (torch.zeros(4), {"bits": 0}, "bits: expected"),
        (torch.zeros(4), {"bits": 17}, "bits: expected 1 .* got 17"),
        (torch.zeros(4), {"bits": -1}, "bits: expected"),
        (torch.zeros(4), {"norm": "l1"}, "norm: expected 'max' or 'l2', got 'l1'"),
        (torch.zeros(4), {"offset": 100}, "offset: expected a multiple of 512, got 100"),
        (torch.zeros(4), {"offset": -512}, "offset: expected a multiple of 512"),
        (torch.zeros(4), {"key": (1, 2**32)}, "key: expected two words of 32 bits"),
    ],
)
def test_encode_names_what_it_expected(values: torch.Tensor, options: dict[str, object], message: str) -> None:
    arguments = {"bits": 4, "key": KEY, **options}
    with pytest.raises(CodecError, match=message):
        encode(values, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("out", "coefficients", "message"),
    [
        (torch.ones(600, dtype=torch.float64), [1.0], "out: expected contiguous float32"),
        (torch.ones(1200)[::2], [1.0], "out: expected contiguous float32 of one dimension, got .* strides"),
        (torch.ones(2, 300), [1.0], "out: expected contiguous float32 of one dimension"),
        (torch.ones(600), [1.0, 2.0], "coefficients: expected 1, one per payload, got 2"),
        (torch.ones(601), [1.0], "payload 0: expected 601 coordinates .* got 600"),
    ],
)
def test_decode_names_what_it_expected_and_touches_nothing(
    out: torch.Tensor, coefficients: list[float], message: str
) -> None:
    before = out.clone()
    with pytest.raises(CodecError, match=message):
        decode_sum([encode(torch.ones(600), 4, key=KEY)], coefficients, out)
    assert torch.equal(out, before)


@pytest.mark.parametrize("change", [-1, 1, -64, 1000])
def test_a_payload_of_the_wrong_size_is_refused(change: int) -> None:
    expected = payload_bytes(600, 4)
    with pytest.raises(CodecError, match=f"expected {expected} contiguous bytes, got {expected + change}"):
        Encoded.from_buffer(bytes(expected + change), 600, 4)
    handmade = Encoded(torch.zeros(expected + change, dtype=torch.uint8), 600, 4)
    with pytest.raises(CodecError, match=f"payload 0: expected {expected} contiguous bytes"):
        decode_sum([handmade], [1.0], torch.zeros(600))


@pytest.mark.parametrize("bits", [1, 4, 16, 32])
@pytest.mark.parametrize("numel", [0, 1, 700])
def test_bytes_survive_the_wire_without_a_copy(numel: int, bits: int) -> None:
    sent = encode(torch.randn(numel, generator=torch.Generator().manual_seed(0)), bits, key=KEY)
    wire = bytearray(sent.to_buffer())
    received = Encoded.from_buffer(wire, numel, bits)
    assert torch.equal(received.scales, sent.scales)
    assert torch.equal(received.planes, sent.planes)
    for form in (bytes(wire), memoryview(wire).toreadonly(), memoryview(b"x" + wire)[1:]):
        out, expected = torch.zeros(numel), torch.zeros(numel)
        decode_sum([Encoded.from_buffer(form, numel, bits)], [1.0], out)
        decode_sum([sent], [1.0], expected)
        assert torch.equal(out, expected)
    if numel:
        wire[0] ^= 0xFF
        assert received.buffer[0] == wire[0]


@pytest.mark.filterwarnings("error")
def test_read_only_bytes_raise_no_warning_and_outlive_their_name() -> None:
    values = torch.arange(600.0)
    received = Encoded.from_buffer(bytes(encode(values, 32, key=KEY).to_buffer()), 600, 32)
    filler = [bytes(2400) for _ in range(100)]
    assert torch.equal(received.planes, values)
    assert len(filler) == 100


def test_a_strided_view_of_bytes_is_refused() -> None:
    with pytest.raises(CodecError, match="with gaps"):
        Encoded.from_buffer(memoryview(bytes(2 * payload_bytes(600, 4)))[::2], 600, 4)


def test_values_of_any_shape_and_stride_are_taken_in_logical_order() -> None:
    values = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    flat = encode(values.t().reshape(-1).contiguous(), 4, key=KEY)
    assert torch.equal(encode(values.t(), 4, key=KEY).buffer, flat.buffer)


def test_gradients_that_require_grad_are_encoded_without_a_graph() -> None:
    encoded = encode(torch.ones(600, requires_grad=True), 4, key=KEY)
    assert not encoded.buffer.requires_grad
    assert not encoded.statistics.requires_grad  # type: ignore[union-attr]
