"""Gatherings: whoever dies, leaves, comes back or means harm, all that are alive get the same, in bounded memory."""

from __future__ import annotations

import contextlib
from collections import deque
from typing import Any

import pytest
from helpers.simulated import make_spec, simple_plan
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_qgc.aggregator import gathering as module
from torch_qgc.aggregator.gathering import Gathering
from torch_qgc.errors import CollectiveFailed, ConfigError, ProtocolError
from torch_qgc.protocol import messages
from torch_qgc.protocol.contract import JobSpec
from torch_qgc.protocol.pieces import LEAST_PIECE_BYTES, Cut
from torch_qgc.protocol.server import Bounds
from torch_qgc.worker.gathering import Gathering as OfWorker

WORKERS, GATHERINGS = 4, 3
PIECE = LEAST_PIECE_BYTES


def spec_of(workers: int = WORKERS, **changes: Any) -> JobSpec:
    """A job in which a worker's content has at most 100,000 bytes: three pieces and a bit."""
    return make_spec(simple_plan(workers), **{"log_bytes": workers * 100_000, **changes})


def content_of(worker: int, number: int) -> bytes:
    return bytes([16 * worker + number]) * (1 + (worker + number) % 3 * PIECE + worker)


def held_bytes(gathering: Gathering) -> int:
    frames = [frame for content in gathering._open.values() for frame in content.frames.values()]
    frames += [frame for kept in gathering._kept.values() for pieces in kept.values() for frame in pieces]
    return sum(memoryview(frame).nbytes for frame in frames)


class Hall:
    """An aggregator's gathering and the workers', between which messages take no time. They are lost where told."""

    def __init__(self, spec: JobSpec) -> None:
        self.spec, self.there = spec, Gathering(spec)
        self.here = [OfWorker(spec) for _ in range(spec.workers)]
        self.alive = set(range(spec.workers))
        self.left: set[int] = set()
        self.to_say: list[deque[Any]] = [deque() for _ in self.here]
        self.got: list[dict[int, dict[int, bytes]]] = [{} for _ in self.here]
        self.alive_at: dict[int, set[int]] = {}  # number -> who was alive when it was complete

    def say(self, worker: int, *, lost: bool = False) -> None:
        """Let a worker say the next thing; the answer may get lost."""
        if worker not in self.alive:
            return
        here, to_say = self.here[worker], self.to_say[worker]
        if not here.said:
            to_say.extend(here.begin(content_of(worker, here.number)))
        header, *rest = to_say.popleft() if to_say else [messages.encode_message(here.take())]
        message: Any = messages.decode_from_worker(header)
        answers = self.there.receive(worker, message, rest, self.alive)
        for answer in [] if lost else answers:
            self._hear(worker, answer)
        self.settle(deaf=worker if lost else None)

    def settle(self, deaf: int | None = None) -> None:
        before = self.there.number
        told = self.there.settle(self.alive)
        if self.there.number > before:
            self.alive_at[before] = set(self.alive)
        for worker in self.alive - {deaf}:
            for frames in told:
                self._hear(worker, frames)
        assert held_bytes(self.there) <= 2 * self.spec.log_bytes

    def _hear(self, worker: int, frames: list[Any]) -> None:
        here = self.here[worker]
        here.hear(messages.decode_from_aggregator(frames[0]), frames[1:])  # type: ignore[arg-type]
        if here.complete:
            number = here.number
            self.got[worker][number] = here.end()
            self.to_say[worker].clear()

    def lose(self, worker: int) -> None:
        if worker in self.alive:
            self.alive.remove(worker)
            self.there.forget(worker)
            self.settle()

    def come_back(self, worker: int) -> None:
        if worker not in self.alive | self.left:
            self.alive.add(worker)
            self.to_say[worker] = deque(self.here[worker].said)

    def leave(self, worker: int) -> None:
        if worker in self.alive and not self.here[worker].said:  # nobody leaves in the middle of a call
            self.alive.remove(worker)
            self.left.add(worker)
            self.settle()


who = st.integers(0, WORKERS - 1)
events = st.tuples(st.sampled_from(["say"] * 12 + ["deaf"] * 3 + ["lose", "back", "back", "leave"]), who)


def test_all_that_are_alive_get_the_same_in_any_order_of_what_comes_and_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everybody's own content is in it, whole, of all that were alive when it was complete and of nobody else."""
    monkeypatch.setattr(module, "AT_ONCE_BYTES", 2 * PIECE)

    @given(st.lists(events, max_size=120))
    @settings(max_examples=150, deadline=None)
    def happen(happens: list[tuple[str, int]]) -> None:
        hall = Hall(spec_of())
        for what, worker in happens:
            match what:
                case "say" | "deaf":
                    hall.say(worker, lost=what == "deaf")
                case "lose":
                    hall.lose(worker)
                case "back":
                    hall.come_back(worker)
                case "leave":
                    hall.leave(worker)
        for worker in range(WORKERS):
            hall.come_back(worker)
        for _ in range(200):  # nobody stands still
            for worker in sorted(hall.alive):
                if hall.here[worker].number < GATHERINGS:
                    hall.say(worker)
                else:
                    hall.leave(worker)
        assert hall.left == set(range(WORKERS))
        for got in hall.got:
            for number, contents in got.items():
                assert contents == {k: content_of(k, number) for k in sorted(hall.alive_at[number])}
                assert list(contents) == sorted(contents)

    happen()


def test_while_nobody_is_lost_one_gathering_before_the_open_one_is_all_that_is_needed() -> None:
    """Nobody begins the next before it has all of this one, so that is complete when all have begun the next."""
    hall = Hall(spec_of(log_bytes=WORKERS * 66_000))  # no room for two
    for _ in range(60):
        for worker in range(WORKERS):
            hall.say(worker)
            assert len(hall.there._kept) <= 2
            assert all(here.number >= hall.there.number - 1 for here in hall.here)
    assert min(here.number for here in hall.here) > 5


def test_a_worker_that_was_lost_for_too_long_is_told_so() -> None:
    hall = Hall(spec_of(2))
    hall.say(1)
    hall.lose(1)
    while hall.there.number <= module.MOST_KEPT + 1:
        hall.say(0)
    hall.come_back(1)
    for _ in hall.here[1].said[1:]:
        hall.say(1)
    with pytest.raises(CollectiveFailed, match=r"call 1 .* no longer kept: start it again from the newest checkpoint"):
        hall.say(1)


def test_another_life_of_a_worker_gets_what_all_others_got_and_takes_part_in_the_gathering_that_is_open() -> None:
    hall = Hall(spec_of(2))
    while hall.there.number < 1:
        hall.say(0)
        hall.say(1)
    hall.say(1)  # a part of what the old life had to say
    hall.lose(1)
    hall.here[1] = OfWorker(hall.spec)
    del hall.got[1][0]
    hall.come_back(1)
    while 1 not in hall.got[1]:
        hall.say(0)
        hall.say(1)
    assert hall.got[0] == hall.got[1] == {n: {k: content_of(k, n) for k in range(2)} for n in range(2)}


def test_who_is_missing_is_named_a_hundred_of_them_at_most() -> None:
    gathering, alive = Gathering(spec_of(300)), set(range(300))
    gathering.receive(7, messages.Gather(0, 0, 1), [b"x"], alive)
    ((header,),) = gathering.receive(7, messages.Take(0, 0, 0), [], alive)
    said = messages.decode_from_aggregator(header)
    assert said == messages.Awaited(0, [k for k in range(101) if k != 7])


def test_content_of_many_workers_comes_in_as_many_messages_as_a_queue_takes() -> None:
    gathering, here, alive = Gathering(spec_of(600)), OfWorker(spec_of(600)), set(range(600))
    here.begin(b"own")
    for worker in alive:
        gathering.receive(worker, messages.Gather(0, 0, 1), [b"%d" % worker], alive)
    told, turns = gathering.settle(alive), 0
    while not here.complete:
        assert len(told) <= 1 + module.AT_ONCE
        for frames in told:
            here.hear(messages.decode_from_aggregator(frames[0]), frames[1:])  # type: ignore[arg-type]
        told, turns = gathering.receive(3, here.take(), [], alive), turns + 1
    assert here.end() == {k: b"%d" % k for k in range(600)}
    assert turns == 3


edges = st.sampled_from([0, 1, 2, 3, 65_534, 2**31 - 1])
sizes = st.sampled_from([0, 1, PIECE - 1, PIECE, PIECE + 1, 1696, 1697, 200_000])  # three pieces and 1,696: all it may
hostile = st.one_of(
    st.builds(messages.Gather, edges, edges.filter(lambda n: n < 65_535), st.sampled_from([1, 3, 4, 5, 65_535])),
    st.builds(messages.Take, edges, edges, edges.filter(lambda n: n < 65_535)),
)


@given(st.lists(st.tuples(hostile, st.lists(sizes, max_size=2)), max_size=40))
@settings(max_examples=150, deadline=None)
def test_a_member_that_means_harm_takes_no_more_room_than_its_own_and_changes_nobody_elses(said: list[Any]) -> None:
    gathering, alive = Gathering(spec_of(2)), {0, 1}
    room = bytearray(200_000)
    for message, lengths in said:
        with contextlib.suppress(ProtocolError):
            gathering.receive(1, message, [memoryview(room)[:n] for n in lengths], alive)
        gathering.settle(alive)
        assert held_bytes(gathering) <= 100_000
    assert gathering.number == 0
    gathering.receive(0, messages.Gather(0, 0, 1), [b"honest"], alive)
    gathering.settle({0})  # it was lost
    here = OfWorker(spec_of(2))
    here.begin(b"honest")
    for frames in gathering.receive(0, here.take(), [], {0}):
        here.hear(messages.decode_from_aggregator(frames[0]), frames[1:])  # type: ignore[arg-type]
    assert here.end() == {0: b"honest"}


def test_nobody_takes_part_in_a_gathering_that_cannot_have_begun() -> None:
    with pytest.raises(ProtocolError, match="gathering 1, but 0 is not complete yet: every rank must make the same"):
        Gathering(spec_of()).receive(2, messages.Gather(1, 0, 1), [b"x"], {0, 1, 2, 3})


# --- sizes ------------------------------------------------------------------------------------------------


@given(
    numel=st.integers(1, 1 << 27),
    chunks=st.integers(1, 9),
    workers=st.sampled_from([1, 2, 8, 8192]),
    log_bytes=st.integers(1, 1 << 40),
)
def test_pieces_fit_through_the_port_and_into_the_log(numel: int, chunks: int, workers: int, log_bytes: int) -> None:
    plan = simple_plan(2)
    spec = make_spec(plan, numel=numel, chunk_numel=512 * max(numel // chunks // 512, 1), log_bytes=log_bytes)
    cut = Cut.of(spec)
    assert cut.piece_bytes <= Bounds.of(spec, plan).message_bytes
    assert spec.workers * cut.most_bytes <= log_bytes


@pytest.mark.parametrize("size", [1, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE, 100_000])
def test_content_is_cut_into_pieces_that_pass_the_check_and_are_the_content(size: int) -> None:
    cut, content = Cut.of(spec_of()), bytes(range(256)) * (size // 256 + 1)
    pieces = cut.cut(content[:size])
    for i, piece in enumerate(pieces):
        cut.check("a test", i, len(pieces), [piece])
    assert b"".join(pieces) == content[:size]


def test_content_that_is_too_large_is_refused_with_the_bound_and_the_remedy() -> None:
    with pytest.raises(ConfigError, match=r"at most 100,000 bytes .*got 100,001.*Limits\(log_bytes"):
        Cut.of(spec_of()).cut(bytes(100_001))
