"""The inbox: bounded, whatever comes in whatever order, and nothing of what is at hand is lost."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.simulated import make_spec, simple_plan
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_qgc.errors import ProtocolError
from torch_qgc.kernels import payload_bytes
from torch_qgc.protocol.contract import JobSpec
from torch_qgc.protocol.messages import ABSENT, Result
from torch_qgc.worker.inbox import Inbox

STEPS = 6


def spec_of(chunks: int, downlink_bits: int) -> JobSpec:
    return make_spec(simple_plan(3), numel=512 * chunks - 100, chunk_numel=512, downlink_bits=downlink_bits)


def result(spec: JobSpec, step: int, chunk: int) -> tuple[Result, list[bytes]]:
    """A result that can be told from all others."""
    size = payload_bytes(spec.chunk_span(chunk)[1], spec.downlink_bits)
    contributions = bytes([1, ABSENT, step % 3])
    return Result(step, chunk, spec.downlink_bits, 0.5, contributions), [bytes([step * 16 + chunk]) * size]


@given(
    chunks=st.integers(1, 3),
    downlink_bits=st.sampled_from([4, 32]),
    bound_bytes=st.integers(0, 12_000),
    moves=st.lists(st.tuples(st.integers(-1, STEPS - 1), st.integers(0, 2)), max_size=60),
)
@settings(max_examples=200, deadline=None)
def test_it_stays_within_its_bound_and_gives_every_result_once_and_in_order(
    chunks: int, downlink_bits: int, bound_bytes: int, moves: list[tuple[int, int]]
) -> None:
    """Moves: a result of a step and chunk comes, or (-1) the worker takes what is at hand, if that is complete.

    What did not fit is asked for again, as `missing` says, and with that every step is taken, with its own bytes.
    """
    spec = spec_of(chunks, downlink_bits)
    inbox = Inbox(spec, 0, bound_bytes)
    at_hand: set[int] = set()  # chunks of the step at hand that must be there
    taken = 0

    def put(step: int, chunk: int) -> None:
        kept = inbox.put(*result(spec, step, chunk))
        if step == inbox.step:
            assert kept == (chunk not in at_hand)
            at_hand.add(chunk)
        assert step >= inbox.step or not kept

    def take() -> None:
        nonlocal taken
        rounds = {r.chunk: r for r in inbox.ready(set())}
        assert len(rounds) == chunks
        for chunk, got in rounds.items():
            header, frames = result(spec, taken, chunk)
            assert got.payload == frames[0]
            assert got.alive.tolist() == [True, False, True]
            assert got.counts.tolist() == [1, 0, header.contributions[2]]
        inbox.advance()
        taken += 1
        at_hand.clear()
        at_hand.update({r.chunk for r in inbox.ready(set())})

    for step, chunk in moves:
        if step >= 0:
            put(step, chunk % chunks)
        elif not inbox.missing():
            take()
        ahead = [r for s, kept in inbox._results.items() if s > inbox.step for r in kept.values()]
        assert sum(r.nbytes for r in ahead) == inbox.held_bytes <= bound_bytes
        assert {r.chunk for r in inbox.ready(set())} == at_hand
        assert all(s >= inbox.step for s in inbox._results)
    while taken < STEPS:
        for chunk in inbox.missing():
            put(inbox.step, chunk)
        take()
    assert inbox.held_bytes == 0
    assert not inbox._results


@pytest.mark.parametrize(
    ("changes", "frames"),
    [
        ({}, []),
        ({}, [bytes(7)]),
        ({}, [bytes(2048), b""]),
        ({"chunk": 9}, [bytes(2048)]),
        ({"bits": 4}, [bytes(payload_bytes(512, 4))]),
        ({"contributions": b"\1"}, [bytes(2048)]),
    ],
)
def test_a_result_of_another_job_is_refused_before_it_is_kept(changes: dict[str, object], frames: list[bytes]) -> None:
    spec = spec_of(2, 32)
    fields = {"step": 0, "chunk": 0, "bits": 32, "second_scale": 1.0, "contributions": bytes(3), **changes}
    inbox = Inbox(spec, 0, 1 << 20)
    with pytest.raises(ProtocolError, match="another job"):
        inbox.put(Result(**fields), frames)  # type: ignore[arg-type]
    assert inbox.missing() == [0, 1]


def test_a_step_is_known_to_have_closed_by_a_later_one_that_did_not_fit() -> None:
    spec = spec_of(2, 32)
    inbox = Inbox(spec, 3, 0)
    assert not inbox.closed(3)
    assert not inbox.put(*result(spec, 4, 0))
    assert inbox.closed(3)
    assert inbox.passed
    assert not inbox.closed(4)
    for chunk in range(2):
        assert inbox.put(*result(spec, 3, chunk))
    inbox.advance()
    assert inbox.missing() == [0, 1]
    assert not inbox.passed


def test_a_steps_clock_is_that_of_its_first_word() -> None:
    inbox = Inbox(spec_of(1, 32), 2, 0)
    assert inbox.elapsed_s(2, 10.0) is None
    inbox.start(1, 5.0)  # past
    inbox.start(2, 6.0)
    inbox.start(2, 9.0)  # another aggregator's, later
    assert inbox.elapsed_s(2, 10.0) == pytest.approx(4.0)
    assert inbox.elapsed_s(1, 10.0) is None
    assert "step 2" in repr(inbox)
    assert np.size(inbox.missing()) == 1
