"""Headers: what is written is read back, and nothing else is taken."""

import contextlib

import msgspec
import pytest
from helpers.simulated import make_spec, simple_plan
from hypothesis import given
from hypothesis import strategies as st

from torch_qgc.errors import ProtocolError
from torch_qgc.protocol import messages

SPEC = make_spec(simple_plan(3))
MESSAGES = [
    messages.Hello(version=1, worker=2, step=5, spec=SPEC),
    messages.Begin(3),
    messages.Push(3, 1, 4, 0.5, float("inf")),
    messages.Fetch(2**40, 0),
    messages.Hash(50, {"parameters": "ab", "lr": "0.1"}),
    messages.Begin(3, thin=True),
    messages.Mark(2, 50, 1),
    messages.Gather(3, 1, 2),
    messages.Take(3, 2, 1),
    messages.Fault(1, "why"),
    messages.Bye(50),
]
ANSWERS = [
    messages.Welcome(0),
    messages.Refusal("no"),
    messages.Introduce(),
    messages.Started(1, 0.5),
    messages.Result(1, 2, 32, 0.5, b"\0\1"),
    messages.Gone(3, "lost"),
    messages.Verify(4),
    messages.Agreed(4),
    messages.Marked(1, 50, True),
    messages.Met(3, [2, 0, 65_535]),
    messages.Gathered(3, 2, 1, True),
    messages.Awaited(3, [1]),
    messages.Rejected("no"),
    messages.Failed("why"),
    messages.Ping(),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_a_workers_message_survives(message: messages.FromWorker) -> None:
    assert messages.decode_from_worker(messages.encode_message(message)) == message


@pytest.mark.parametrize("message", ANSWERS, ids=lambda m: type(m).__name__)
def test_an_aggregators_message_survives(message: messages.FromAggregator) -> None:
    assert messages.decode_from_aggregator(messages.encode_message(message)) == message


@given(data=st.binary(max_size=2000))
def test_garbage_is_a_protocol_error_and_nothing_else(data: bytes) -> None:
    for decode in (messages.decode_from_worker, messages.decode_from_aggregator):
        with contextlib.suppress(ProtocolError):
            decode(data)


@given(
    which=st.integers(0, len(MESSAGES) - 1), at=st.integers(0, 400), byte=st.integers(0, 255), cut=st.integers(0, 400)
)
def test_a_damaged_header_is_read_or_refused(which: int, at: int, byte: int, cut: int) -> None:
    data = bytearray(messages.encode_message(MESSAGES[which]))
    data[at % len(data)] = byte
    with_cut = bytes(data[: len(data) - cut % len(data)])
    with contextlib.suppress(ProtocolError):
        messages.decode_from_worker(with_cut)


@pytest.mark.parametrize(
    "fields",
    [
        {"type": "begin", "step": -1},
        {"type": "begin", "step": 2**60},
        {"type": "begin", "step": "3"},
        {"type": "begin"},
        {"type": "push", "step": 0, "chunk": 0, "bits": 33, "variance": 0.0, "squared_norm": 0.0},
        {"type": "push", "step": 0, "chunk": 2**31, "bits": 4, "variance": 0.0, "squared_norm": 0.0},
        {"type": "hash", "step": 0, "digest": "x" * 1000},
        {"type": "result", "step": 0},
        {"type": "hello", "version": 1, "worker": 0, "step": 0, "spec": {"workers": 10**9}},
    ],
)
def test_values_out_of_range_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ProtocolError, match="expected a torch_qgc header"):
        messages.decode_from_worker(msgspec.msgpack.encode(fields))


def test_a_header_that_is_too_long_is_not_even_parsed() -> None:
    with pytest.raises(ProtocolError, match="at most"):
        messages.decode_from_worker(b"\x90" * (messages.MAX_HEADER_BYTES + 1))


@given(numel=st.integers(1, 10_000), chunk=st.integers(1, 9))
def test_chunks_tile_the_gradient(numel: int, chunk: int) -> None:
    spec = make_spec(simple_plan(2), numel=numel, chunk_numel=512 * chunk)
    spans = [spec.chunk_span(c) for c in range(spec.chunks)]
    assert spans[0][0] == 0
    assert all(offset + n == following for (offset, n), (following, _) in zip(spans, spans[1:]))
    assert sum(n for _, n in spans) == numel
