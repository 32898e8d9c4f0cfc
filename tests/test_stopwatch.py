"""What a worker's step took, by two clocks that need not agree."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_qgc.job.stopwatch import Stopwatch, Timed
from torch_qgc.protocol.messages import Begin, Push

seconds = st.floats(0.0, 100.0)


def push(step: int, spent_s: float, chunk: int = 0) -> Push:
    return Push(step, chunk, 4, 0.0, 0.0, spent_s=spent_s)


@given(seconds, seconds, seconds, seconds, st.floats(0.0, 1e6), st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_own_time_and_the_links_are_told_apart_whatever_the_clocks_show(
    outside_s: float, spent_s: float, latency_s: float, carries_s: float, offset_s: float, chunks: int
) -> None:
    """A link that delays everything alike takes nothing; what payloads take longer than BEGIN is the link's."""
    watch = Stopwatch(chunks)
    began_s = offset_s + latency_s
    watch.begin(3, Begin(7, samples=12, batch_size=16, outside_s=outside_s), began_s)
    for chunk in range(chunks - 1):
        part = (chunk + 1) / chunks
        assert watch.push(3, push(7, part * spent_s, chunk), began_s + part * (spent_s + carries_s)) is None
    timed = watch.push(3, push(7, spent_s, chunks - 1), began_s + spent_s + carries_s)
    assert timed is not None
    assert (timed.step, timed.samples, timed.batch_size) == (7, 12, 16)
    assert timed.own_s == pytest.approx(outside_s + spent_s)
    assert timed.link_s == pytest.approx(carries_s, abs=1e-8)  # of differences near 1e6 s


def test_no_link_is_quicker_than_none() -> None:
    """A BEGIN that was held up, behind payloads of the step before, say, makes the time on the link no less than 0."""
    watch = Stopwatch(1)
    watch.begin(0, Begin(1), 10.0)
    timed = watch.push(0, push(1, 3.0), 11.0)
    assert timed is not None
    assert (timed.own_s, timed.link_s) == (3.0, 0.0)


def test_workers_are_timed_apart() -> None:
    watch = Stopwatch(2)
    watch.begin(0, Begin(1), 0.0)
    watch.begin(1, Begin(1), 5.0)
    assert watch.push(0, push(1, 1.0), 1.0) is None
    assert watch.push(1, push(1, 1.0), 6.5) is None
    for worker, now, link_s in ((1, 7.5, 0.5), (0, 9.0, 7.0)):
        timed = watch.push(worker, push(1, 2.0, 1), now)
        assert timed is not None
        assert timed.link_s == link_s


def timed_steps(watch: Stopwatch, events: list[tuple[int, bool, bool]]) -> list[Timed]:
    """Let one worker begin a step (thin or not) and push it, or not; each a second after the other."""
    out = []
    for now, (step, thin, pushes) in enumerate(events):
        watch.begin(0, Begin(step, thin=thin), 2.0 * now)
        if pushes:
            timed = watch.push(0, push(step, 1.0), 2.0 * now + 1.0)
            out += [] if timed is None else [timed]
    return out


def test_steps_that_are_thin_or_were_never_delivered_say_nothing() -> None:
    events = [(0, False, True), (1, False, False), (2, True, False), (3, True, True), (4, False, True)]
    assert [timed.step for timed in timed_steps(Stopwatch(1), events)] == [0, 4]


def test_payloads_of_a_step_that_is_not_at_hand_say_nothing() -> None:
    """One that was said again on a new connection, or of a step before the one that has begun, or twice."""
    watch = Stopwatch(1)
    assert watch.push(0, push(0, 1.0), 1.0) is None  # never announced here
    watch.begin(0, Begin(4), 2.0)
    assert watch.push(0, push(3, 1.0), 3.0) is None
    assert watch.push(0, push(4, 1.0), 3.0) is not None
    assert watch.push(0, push(4, 1.0), 4.0) is None
