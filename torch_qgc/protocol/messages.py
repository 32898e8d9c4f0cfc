"""Typed messages between workers and aggregators: headers, limits, validation.

A message is a list of frames: one msgpack header, then the payload frames its type calls for. Payload layout
is the codec's (docs/kernels.md). Nothing here knows about sockets, and nothing received is trusted: integers
are range-checked by the schema, text is bounded, and sizes are compared before anything is allocated.
"""

from __future__ import annotations

from typing import Annotated, Literal, cast

import msgspec

from torch_qgc.errors import ProtocolError

__all__ = [
    "PROTOCOL_VERSION",
    "Begin",
    "Bye",
    "Failed",
    "Fault",
    "Fetch",
    "FromAggregator",
    "FromWorker",
    "Hash",
    "Hello",
    "Introduce",
    "JobSpec",
    "Ping",
    "Push",
    "Refusal",
    "Rejected",
    "Result",
    "Started",
    "Welcome",
    "decode_from_aggregator",
    "decode_from_worker",
    "encode_message",
]

PROTOCOL_VERSION = 1
MAX_HEADER_BYTES = 16 * 1024  # every header; plans travel in a frame of their own
MAX_PLAN_BYTES = 64 * 1024 * 1024

Index = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
Step = Annotated[int, msgspec.Meta(ge=0, lt=2**53)]
Count = Annotated[int, msgspec.Meta(ge=1, lt=2**53)]
Seconds = Annotated[float, msgspec.Meta(ge=0.0)]
Digest = Annotated[str, msgspec.Meta(max_length=128)]
Text = Annotated[str, msgspec.Meta(max_length=8192)]


class JobSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything all workers and all aggregators of one job must agree on."""

    workers: Annotated[int, msgspec.Meta(ge=1, le=65536)]
    numel: Count  # coordinates of the flat gradient
    chunk_numel: Count  # coordinates of a chunk (the last one may be shorter)
    layout_digest: Digest  # names, shapes and order of the parameters
    plan_digest: Digest
    first_step: Step  # where the job starts: 0, or where its checkpoint was taken
    seed: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
    aggregators: Annotated[int, msgspec.Meta(ge=1, le=65536)]  # chunk c belongs to aggregator c mod this
    tracks: Literal[1, 2]  # 2: results carry the second track as well
    downlink_bits: Annotated[int, msgspec.Meta(ge=2, le=32)]  # 32: results are plain fp32
    deadline_s: Seconds | None  # None: wait for all
    warmup_steps: Index  # that many first steps wait for all whatever the deadline
    quorum: Count  # a step is never closed on fewer arrivals
    late: Literal["fold", "drop"]
    max_staleness: Index  # how many steps old a folded payload may be
    verify_every: Index  # steps between parameter hashes; 0: never
    log_steps: Count  # results kept for late workers
    log_bytes: Count  # and their size, whichever is less
    join_timeout_s: Seconds  # how long the first step waits for workers that have not joined

    @property
    def chunks(self) -> int:
        """Number of chunks of the flat gradient."""
        return -(-self.numel // self.chunk_numel)

    def chunk_span(self, chunk: int) -> tuple[int, int]:
        """Return (offset, numel) of a chunk in the flat gradient."""
        offset = chunk * self.chunk_numel
        return offset, min(self.chunk_numel, self.numel - offset)


# --- worker to aggregator -------------------------------------------------------------------------------


class Hello(msgspec.Struct, tag="hello", frozen=True, kw_only=True):
    """Ask to join. Worker 0 adds the plan (JSON) as a second frame; it decides what job this is."""

    version: int
    worker: Index
    step: Step  # the first step whose result this worker lacks
    spec: JobSpec


class Begin(msgspec.Struct, tag="begin", frozen=True):
    """Announce a step's forward pass; the first one starts the step's clock."""

    step: Step


class Push(msgspec.Struct, tag="push", frozen=True):
    """Deliver a chunk. Second frame: the codec's payload."""

    step: Step
    chunk: Index
    bits: Annotated[int, msgspec.Meta(ge=1, le=32)]
    variance: float  # exact rounding variance of this payload
    squared_norm: float  # squared norm of what was encoded


class Fetch(msgspec.Struct, tag="fetch", frozen=True):
    """Ask again for a result."""

    step: Step
    chunk: Index


class Hash(msgspec.Struct, tag="hash", frozen=True):
    """State the digest of the parameters before `step`."""

    step: Step
    digest: Digest


class Fault(msgspec.Struct, tag="fault", frozen=True):
    """Report an error inside the communication path: the job ends on every rank."""

    step: Step
    text: Text


class Bye(msgspec.Struct, tag="bye", frozen=True):
    """Leave in good order."""


# --- aggregator to worker -------------------------------------------------------------------------------


class Welcome(msgspec.Struct, tag="welcome", frozen=True):
    """Confirm that the worker is in; `oldest` is the oldest step whose results can still be had."""

    oldest: Step


class Refusal(msgspec.Struct, tag="refusal", frozen=True):
    """Say why a worker may not join. Final."""

    text: Text


class Introduce(msgspec.Struct, tag="introduce", frozen=True):
    """Ask an unknown peer to say Hello (again)."""


class Started(msgspec.Struct, tag="started", frozen=True):
    """Tell that a step's clock is running."""

    step: Step
    elapsed_s: Seconds  # how long already, at the time of sending


class Result(msgspec.Struct, tag="result", frozen=True):
    """Deliver a closed round. One payload frame per track, at `bits` bits (32: fp32)."""

    step: Step
    chunk: Index
    bits: Annotated[int, msgspec.Meta(ge=2, le=32)]
    contributions: Annotated[bytes, msgspec.Meta(max_length=65536)]  # [K] uint8: payloads of each worker in it


class Rejected(msgspec.Struct, tag="rejected", frozen=True):
    """Say why a message was dropped. The sender stays in the job."""

    text: Text


class Failed(msgspec.Struct, tag="failed", frozen=True):
    """End the job on every rank."""

    text: Text


class Ping(msgspec.Struct, tag="ping", frozen=True):
    """Show that the aggregator is there."""


FromWorker = Hello | Begin | Push | Fetch | Hash | Fault | Bye
FromAggregator = Welcome | Refusal | Introduce | Started | Result | Rejected | Failed | Ping

_encoder = msgspec.msgpack.Encoder()
_from_worker = msgspec.msgpack.Decoder(FromWorker)
_from_aggregator = msgspec.msgpack.Decoder(FromAggregator)


def encode_message(message: FromWorker | FromAggregator) -> bytes:
    """Encode a header frame."""
    return _encoder.encode(message)


def decode_from_worker(frame: bytes | memoryview) -> FromWorker:
    """Decode and validate a header that a worker sent.

    Raises:
        ProtocolError: not a header of this protocol; says what is wrong with it.
    """
    return cast(FromWorker, _decode(_from_worker, frame))


def decode_from_aggregator(frame: bytes | memoryview) -> FromAggregator:
    """Decode and validate a header that an aggregator sent.

    Raises:
        ProtocolError: not a header of this protocol; says what is wrong with it.
    """
    return cast(FromAggregator, _decode(_from_aggregator, frame))


def _decode(decoder: msgspec.msgpack.Decoder, frame: bytes | memoryview) -> object:  # type: ignore[type-arg]
    size = len(frame) if isinstance(frame, bytes) else frame.nbytes
    if size > MAX_HEADER_BYTES:
        raise ProtocolError(
            f"expected a header of at most {MAX_HEADER_BYTES} bytes, got {size}: "
            "is this another program, or another version of torch_qgc?"
        )
    try:
        return decoder.decode(frame)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(
            f"expected a torch_qgc header (protocol {PROTOCOL_VERSION}), got {size} bytes that are none ({error}): "
            "is this another program, or another version of torch_qgc?"
        ) from error
