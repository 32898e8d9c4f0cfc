"""Typed messages between workers and aggregators: headers, limits, validation.

A message is a list of frames: one msgpack header, then the payload frames its type calls for. Payload layout
is the codec's (docs/kernels.md). Nothing here knows about sockets, and nothing received is trusted: integers
are range-checked by the schema, text is bounded, and sizes are compared before anything is allocated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, cast

import msgspec

from torch_qgc.errors import ProtocolError
from torch_qgc.planner import Plan
from torch_qgc.planner.temperature import LEAST
from torch_qgc.protocol.contract import MOST_SECONDS, MOST_WORKERS, Digest, Index, JobSpec, Seconds, Step
from torch_qgc.protocol.pieces import MOST_PIECES, Piece, Pieces

__all__ = [
    "ABSENT",
    "MOST_NAMED",
    "PROTOCOL_VERSION",
    "Agreed",
    "Awaited",
    "Begin",
    "Bye",
    "Failed",
    "Fault",
    "Fetch",
    "FromAggregator",
    "FromWorker",
    "Gather",
    "Gathered",
    "Gone",
    "Hash",
    "Hello",
    "Introduce",
    "Mark",
    "Marked",
    "Met",
    "Ping",
    "Push",
    "Refusal",
    "Rejected",
    "Replan",
    "Result",
    "Started",
    "Take",
    "Verify",
    "Welcome",
    "as_text",
    "decode_from_aggregator",
    "decode_from_worker",
    "encode_message",
    "plan_frame",
]

PROTOCOL_VERSION = 4
MAX_HEADER_BYTES = 40 * 1024  # every header, with a text of 8192 characters in it; plans travel in their own frame
MAX_PLAN_BYTES = 64 * 1024 * 1024

MAX_TEXT = 8192  # characters, of up to four bytes
Text = Annotated[str, msgspec.Meta(max_length=MAX_TEXT)]
MOST_NAMED = 100  # workers that an Awaited lists
ABSENT = 255  # in a result's contributions: this worker was not in the job when the round closed


# --- worker to aggregator -------------------------------------------------------------------------------


class Hello(msgspec.Struct, tag="hello", frozen=True, kw_only=True):
    """Ask to join. Worker 0 adds the plan (JSON) as a second frame; it decides what job this is."""

    version: int
    worker: Index
    step: Step  # the first step whose result this worker lacks
    spec: JobSpec
    session: Digest = ""  # of one life of the worker: it owns the number, over whatever connection
    attempt: Index = 0  # Hellos of this session here so far
    since: Index = 0  # the last of them whose answer has come; 0: none


class Begin(msgspec.Struct, tag="begin", frozen=True):
    """Announce a step's forward pass; the first one starts the step's clock.

    A thin step has closed without this worker, which goes through it only to take its result: nothing is sent for it.
    """

    step: Step
    thin: bool = False
    samples: Index = 0  # of its batch
    batch_size: Index = 0  # the mean over workers; 0: the user's own loader, whose batches are not ours to cut
    moves: bool = False  # any worker could have drawn it
    outside_s: Seconds = 0.0  # since the result of the step before: update, data, whatever the loop does
    # The learning rate over its peak so far, the same on all ranks; next to 0 as long as it has never changed.
    temperature: Annotated[float, msgspec.Meta(gt=0.0, le=1.0)] = LEAST
    plan: Index = 0  # version of the plan that the worker follows in it


class Push(msgspec.Struct, tag="push", frozen=True):
    """Deliver a chunk. Second frame: the codec's payload."""

    step: Step
    chunk: Index
    bits: Annotated[int, msgspec.Meta(ge=1, le=32)]
    variance: float  # exact rounding variance of this payload
    squared_norm: float  # squared norm of what was encoded
    spent_s: Seconds = 0.0  # since BEGIN, by the worker's clock


class Fetch(msgspec.Struct, tag="fetch", frozen=True):
    """Ask again for a result."""

    step: Step
    chunk: Index


class Hash(msgspec.Struct, tag="hash", frozen=True):
    """State what must be equal on all replicas before `step`, by name: digests, or short values as text."""

    step: Step
    parts: Annotated[dict[Digest, Annotated[str, msgspec.Meta(max_length=256)]], msgspec.Meta(max_length=64)]


class Mark(msgspec.Struct, tag="mark", frozen=True):
    """Tell at which step this worker has come to the end of its loop over a loader."""

    number: Index  # of loops so far
    step: Step
    owed: Index  # batches of the loop that made no step on this worker alone, as far as it knows


class Gather(msgspec.Struct, tag="gather", frozen=True):
    """Hand a piece of content to all workers. Second frame: the piece (`torch_qgc.protocol.pieces`).

    Aggregator 0 waits until the content of every live worker is there, and hands all of it to all.
    """

    number: Index  # of gatherings so far: all workers make the same ones in the same order
    piece: Piece
    pieces: Pieces


class Take(msgspec.Struct, tag="take", frozen=True):
    """Ask for what was gathered: for the pieces from one on, in the order of workers and pieces.

    Answered by as many as travel at once; from the first piece of worker 0 on, by Met before these. Of a gathering that
    is not complete yet, Awaited says so.
    """

    number: Index
    worker: Index
    piece: Piece


class Fault(msgspec.Struct, tag="fault", frozen=True):
    """Report an error on this worker: the job ends on every rank. Answered by Failed, to the sender as well.

    The one message that is heard without a Hello: an error may come before the job is joined.
    """

    step: Step
    text: Text
    session: Digest = ""


class Bye(msgspec.Struct, tag="bye", frozen=True):
    """Leave in good order, having applied all steps below `step`."""

    step: Step


class Replan(msgspec.Struct, tag="replan", frozen=True):
    """Tell what holds from a step on. Second frame: the plan (JSON).

    Aggregator 0 decides it, and tells every worker before the result of the step before; workers tell the other
    aggregators before they begin the step.
    """

    version: Annotated[int, msgspec.Meta(ge=1, lt=2**31)]
    from_step: Step
    deadline_s: Annotated[float, msgspec.Meta(gt=0.0, le=MOST_SECONDS)] | None


# --- aggregator to worker -------------------------------------------------------------------------------


class Welcome(msgspec.Struct, tag="welcome", frozen=True):
    """Confirm that the worker is in. What it lacks follows unasked: plans, who is gone, results.

    Second frame: the plan that the job began with (JSON), if it is not the one of the worker's spec.
    """

    oldest: Step  # whose results can still be had
    attempt: Index = 0  # the Hello that this answers
    heard: Step = 0  # messages since the Hello that `since` names: what was sent after them is to be sent again
    first_step: Step = 0  # of the job; another than the worker's own, if it has come back with a later checkpoint
    plan: Index = 0  # version of the newest plan of those that follow, which aggregator 0 tells


class Refusal(msgspec.Struct, tag="refusal", frozen=True):
    """Say why a worker may not join. Final."""

    text: Text


class Introduce(msgspec.Struct, tag="introduce", frozen=True):
    """Ask who speaks: nothing is heard on a connection before its Hello."""


class Started(msgspec.Struct, tag="started", frozen=True):
    """Tell that a step's clock is running."""

    step: Step
    elapsed_s: Seconds  # how long already, at the time of sending


class Result(msgspec.Struct, tag="result", frozen=True):
    """Deliver a closed round. Second frame: the decoded gradient, at `bits` bits (32: fp32)."""

    step: Step
    chunk: Index
    bits: Annotated[int, msgspec.Meta(ge=2, le=32)]
    second_scale: float  # what Adam squares is this times the gradient; 1 without a second track
    contributions: Annotated[
        bytes, msgspec.Meta(max_length=MOST_WORKERS)
    ]  # [K] uint8: payloads of each worker, or ABSENT


class Gone(msgspec.Struct, tag="gone", frozen=True):
    """Tell all that a worker is no longer in the job, because it left in good order or was lost; or that it is back."""

    worker: Index
    how: Literal["left", "lost", "back"]


class Verify(msgspec.Struct, tag="verify", frozen=True):
    """Ask for a Hash before this step."""

    step: Step


class Agreed(msgspec.Struct, tag="agreed", frozen=True):
    """Tell that all replicas were equal before this step."""

    step: Step


class Marked(msgspec.Struct, tag="marked", frozen=True):
    """Tell what is known of the end of a loop: it ends at `step`, or it makes all steps before that, and maybe more."""

    number: Index
    step: Step
    ended: bool


class Met(msgspec.Struct, tag="met", frozen=True):
    """Tell that a gathering is complete, and who is in it: all that were alive then, the same for everybody."""

    number: Index
    # [K] of each worker's content; 0: it was not in the job. Empty: what was gathered is no longer there.
    pieces: Annotated[list[Annotated[int, msgspec.Meta(ge=0, le=MOST_PIECES)]], msgspec.Meta(max_length=MOST_WORKERS)]


class Gathered(msgspec.Struct, tag="gathered", frozen=True):
    """Deliver a piece of a worker's content. Second frame: the piece."""

    number: Index
    worker: Index
    piece: Piece
    more: bool  # the next piece follows; else it is to be asked for


class Awaited(msgspec.Struct, tag="awaited", frozen=True):
    """Name live workers whose content a gathering lacks; a hundred of them, if there are more."""

    number: Index
    workers: Annotated[list[Index], msgspec.Meta(max_length=MOST_NAMED)]


class Rejected(msgspec.Struct, tag="rejected", frozen=True):
    """Say why a message was dropped. A member stays in the job; one that is not in yet does not get in."""

    text: Text


class Failed(msgspec.Struct, tag="failed", frozen=True):
    """End the job on every rank."""

    text: Text


class Ping(msgspec.Struct, tag="ping", frozen=True):
    """Show that the aggregator is there."""

    heard: Step = 0  # messages since the last Hello


FromWorker = Hello | Begin | Push | Fetch | Hash | Mark | Gather | Take | Fault | Bye | Replan
FromAggregator = (
    Welcome
    | Refusal
    | Introduce
    | Started
    | Result
    | Gone
    | Verify
    | Agreed
    | Marked
    | Met
    | Gathered
    | Awaited
    | Rejected
    | Failed
    | Ping
    | Replan
)


def plan_frame(rest: Sequence[Any], where: str) -> Plan:
    """Return the plan in the one frame after a header.

    Raises:
        ProtocolError, PlanError: it is none; `where` says of what it was to be one.
    """
    if len(rest) != 1 or memoryview(rest[0]).nbytes > MAX_PLAN_BYTES:
        raise ProtocolError(f"{where}: expected one plan frame of at most {MAX_PLAN_BYTES} bytes")
    try:
        return Plan.from_json(bytes(memoryview(rest[0])).decode())
    except UnicodeDecodeError as error:
        raise ProtocolError(f"{where}: its plan cannot be read ({error})") from error


def as_text(words: object) -> str:
    """Return what a message can hold of an error or of other words: cut off, and without what UTF-8 cannot say."""
    return str(words)[:MAX_TEXT].encode("utf-8", "replace").decode()


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
