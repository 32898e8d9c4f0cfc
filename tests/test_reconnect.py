"""Connections that are lost and come back: a session goes on as if nothing had happened."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers.match import Match, Member
from helpers.pumped import Pump
from helpers.simulated import make_spec, peer_of, push_all, simple_plan, take
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_qgc.aggregator.aggregator import Aggregator
from torch_qgc.aggregator.lobby import TAKEN_S
from torch_qgc.errors import JobFailed, Refused
from torch_qgc.protocol import messages
from torch_qgc.protocol.transport import Peer
from torch_qgc.worker.connection import Connection

PLAN = simple_plan(2)


class Line(Pump):
    """Two workers of a job without deadline, and the connection of worker 1, which may be cut."""

    def __init__(self, **spec: Any) -> None:
        super().__init__([Aggregator()])
        made = make_spec(PLAN, deadline_s=None, **spec)
        self.workers: list[Connection] = [self.connect(made, PLAN, k) for k in range(2)]
        for worker in self.workers:
            worker.join(1.0)
        self.session = self.workers[1].session
        self.peer: Peer | None = peer_of(1)

    @property
    def aggregator(self) -> Aggregator:
        return self.aggregators[0]

    def cut(self) -> None:
        """Cut worker 1's connection, with all that is on its way."""
        assert self.peer is not None
        del self.sessions[self.peer]

    def mend(self, *, noticed: bool = True) -> None:
        """Connect it again; the aggregator may not have noticed yet that the other connection is gone."""
        assert self.peer is not None
        old, self.peer = self.peer, self.peer._replace(connection=self.peer.connection + b"'")
        if noticed:
            self.aggregator.lost(old, self.time_s)
        self.session.drain()  # whatever was said meanwhile is on the old connection
        self.sessions[self.peer] = self.session
        self.session.connected(0)
        self.pump()
        if not noticed:
            self.aggregator.lost(old, self.time_s)
            self.pump()

    def step(self, step: int, workers: Any = (0, 1)) -> None:
        for k in workers:
            self.workers[k].begin(step)
            push_all(self.workers[k], PLAN, step, torch.ones(512))


@pytest.mark.parametrize("noticed", [True, False])
@pytest.mark.parametrize("arrived", [0, 1, 2])  # of the two messages
def test_what_was_lost_with_its_connection_is_heard_once(noticed: bool, arrived: int) -> None:
    """Without a deadline the round would wait for it for ever; what was heard is not said again."""
    line = Line(away_s=5.0)
    said = [lambda: line.workers[1].begin(0), lambda: push_all(line.workers[1], PLAN, 0, torch.ones(512))]
    for say in said[:arrived]:
        say()
    received = line.aggregator.stats["bytes_received"]
    line.cut()
    for say in said[arrived:]:
        say()
    line.mend(noticed=noticed)
    line.step(0, [0])
    (result,) = line.workers[0].results()
    assert result.counts.tolist() == [1, 1]
    take(line.workers[1])
    assert line.session.rejections == []
    assert line.aggregator.stats["repeated"] == line.aggregator.stats["bad_messages"] == 0
    assert line.aggregator.stats["lost_workers"] == 0
    each = line.aggregator.stats["bytes_received"] // 2
    assert received in (0, each)


def test_results_that_were_missed_come_unasked_with_the_next_connection() -> None:
    line = Line()
    line.step(0)
    take(line.workers[0])
    line.cut()
    line.aggregator.lost(peer_of(1), line.time_s)
    for step in (1, 2):
        line.step(step, [0])
        take(line.workers[0])
    line.mend(noticed=False)
    assert line.session.inbox.newest == 2
    for _ in range(3):
        assert take(line.workers[1]).shape == (512,)
    assert line.session.unheard == 0


def test_what_others_did_meanwhile_is_told_with_the_next_connection() -> None:
    """What was agreed, where loops have ended, which step is open and since when, who has left."""
    line = Line()
    line.step(0)
    for worker in line.workers:
        take(worker)
    line.workers[1].send_hash(1, {"parameters": "same"})
    line.workers[1].mark(0, 1, 0)
    line.cut()
    line.workers[0].send_hash(1, {"parameters": "same"})
    line.workers[0].mark(0, 1, 0)
    line.workers[0].begin(1)
    line.mend()
    assert line.session.agreed_step == 1
    assert line.session.loop_ends[0] == messages.Marked(0, 1, ended=True)
    assert line.session.begun_step == 1
    line = Line()
    line.cut()
    line.workers[0].session.leave()
    line.pump()
    line.mend()
    assert line.session.gone == {0: "left"}


def test_a_worker_that_comes_back_in_time_was_never_lost() -> None:
    line = Line(away_s=5.0)
    line.step(0, [0])
    line.cut()
    line.aggregator.lost(peer_of(1), line.time_s)
    line.time_s += 4.9
    line.pump()
    assert line.workers[0].session.gone == {}
    assert not line.workers[0].closed(0)  # the step waits for all
    line.mend()
    line.step(0, [1])
    assert torch.equal(take(line.workers[0]), take(line.workers[1]))


def test_a_worker_that_comes_back_late_was_lost_and_all_hear_that_it_is_back() -> None:
    line = Line(away_s=5.0)
    line.step(0, [0])
    line.cut()
    line.aggregator.lost(peer_of(1), line.time_s)
    line.time_s += 5.0
    line.pump()
    assert line.workers[0].session.gone == {1: "lost"}
    take(line.workers[0])
    line.mend()
    assert line.workers[0].session.gone == {}
    take(line.workers[1])
    line.step(1)
    assert next(iter(line.workers[0].results())).counts.tolist() == [1, 1]


def test_all_lost_at_once_is_not_the_end_of_the_job() -> None:
    """An aggregator that was suspended finds all connections gone when it wakes up."""
    line = Line(join_timeout_s=60.0)
    line.cut()
    for k in range(2):
        line.aggregator.lost(peer_of(k), line.time_s)
    line.pump()
    assert not line.aggregator.finished
    line.mend(noticed=False)
    line.workers[0].session.connected(0)
    line.pump()
    line.step(0)
    assert torch.equal(take(line.workers[0]), take(line.workers[1]))


def test_an_aggregator_that_all_have_lost_for_good_ends() -> None:
    line = Line(join_timeout_s=60.0)
    for k in range(2):
        line.aggregator.lost(peer_of(k), line.time_s)
    for seconds, finished in ((0.0, False), (59.0, False), (61.0, True)):
        line.aggregator.tick(seconds)
        assert line.aggregator.finished is finished


def test_a_process_that_is_none_of_the_session_is_refused_when_the_worker_stays() -> None:
    line = Line()
    line.connect(line.workers[0].spec, PLAN, 1)
    line.sessions[peer_of(1, b"thief")] = thief = line.sessions[peer_of(1)]
    line.sessions[peer_of(1)] = line.session
    line.pump()
    assert thief.error is None  # the first one's end may not have been noticed yet
    line.time_s += TAKEN_S + 1.0
    line.pump()
    assert isinstance(thief.error, Refused)
    assert line.session.error is None
    assert line.aggregator.failed is None


def test_an_answer_to_an_earlier_hello_lets_nothing_out() -> None:
    """What is said after it would overtake what the last Hello's answer will ask for again."""
    line = Line()
    line.cut()
    line.session.connected(0)
    line.session.connected(0)  # the connection broke again before the answer came
    line.workers[1].begin(0)
    second = messages.encode_message(messages.Welcome(0, attempt=2))
    third = messages.encode_message(messages.Welcome(0, attempt=3))
    line.session.drain()
    line.session.receive(0, [second], 0.0)
    assert line.session.drain() == []
    line.session.receive(0, [third], 0.0)
    assert len(line.session.drain()) == 1


def test_what_was_heard_is_known_although_the_answer_to_a_hello_was_lost() -> None:
    line = Line()
    line.step(0, [1])
    line.session.receive(0, [messages.encode_message(messages.Ping(0))], 0.0)  # an old one: nothing is known
    for connection in (b"second", b"third"):  # a Hello on each; the answer to the first one is lost
        (hello,) = [frames() for _, frames in say_hello(line)]
        line.aggregator.receive(peer_of(1, connection), hello, line.time_s)
    ((_, answer),) = [
        (peer, frames)
        for peer, frames in line.aggregator.drain()
        if peer == peer_of(1, b"third") and isinstance(messages.decode_from_aggregator(frames[0]), messages.Welcome)
    ]
    assert messages.decode_from_aggregator(answer[0]) == messages.Welcome(0, attempt=3, heard=2)


def say_hello(line: Line) -> Any:
    line.session.connected(0)
    return line.session.drain()


def test_a_fault_that_was_lost_with_its_connection_is_said_again() -> None:
    line = Line()
    line.cut()
    line.session.fault(0, "broken on purpose")
    line.mend()
    assert line.session.failed_at == {0}
    with pytest.raises(JobFailed, match="worker 1 failed at step 0: broken on purpose"):
        line.workers[0].closed(0)


def test_a_fault_before_the_job_is_told_to_all_who_come() -> None:
    line = Pump([Aggregator(told=True)])
    spec = make_spec(PLAN)
    early = line.connect(spec, PLAN, 0)
    line.pump()  # waits to hear what the job is
    broken = line.connect(spec, PLAN, 1)
    assert broken.send_fault(0, "no data")
    line.aggregators[0].announce(spec, PLAN, 0.0)
    for connection in (early, line.connect(spec, PLAN, 0)):
        with pytest.raises(JobFailed, match="worker 1 failed at step 0: no data"):
            connection.join(1.0)


# --- any weather ------------------------------------------------------------------------------------------


@given(
    st.integers(1, 2),
    st.lists(st.tuples(st.floats(0.0, 8.0), st.integers(0, 2), st.floats(0.0, 3.0)), max_size=6),
    st.data(),
)
@settings(max_examples=25)
def test_a_job_that_waits_for_all_ends_as_if_no_connection_had_ever_broken(
    aggregators: int, cuts: list[tuple[float, int, float]], data: Any
) -> None:
    """Whatever is lost with connections, and however long workers take: every sum is that of an undisturbed run."""
    plan, steps = simple_plan(3), 8
    spec = make_spec(
        plan, numel=2048, chunk_numel=512, aggregators=aggregators, deadline_s=None, away_s=30.0, warmup_steps=2
    )
    seed = data.draw(st.integers(0, 2**31))

    def play(breaks: list[tuple[float, int, float]], latency_s: float) -> list[list[dict[int, bytes]]]:
        rng = np.random.default_rng(seed)
        match = Match(plan, spec, latency_s=lambda: float(rng.uniform(0.0, latency_s)))
        for time_s, worker, after_s in breaks:
            aggregator = worker % aggregators
            connection = match.members[worker].connection
            match.world.net.at(time_s, lambda c=connection, a=aggregator, s=after_s: match.world.cut(c, a, after_s=s))

        def work(member: Member) -> None:
            for _ in range(steps):
                match.compute(member, float(rng.uniform(0.0, 1.5)))
            member.connection.close()

        for member in match.members:
            match.script(member, work)
        match.run()
        match.check()
        assert all(member.connection.session.rejections == [] for member in match.members)
        for each in match.world.aggregators:
            assert each.stats["lost_workers"] == each.stats["repeated"] == each.stats["bad_messages"] == 0
        return [member.applied for member in match.members]

    assert play(cuts, 0.3) == play([], 0.0)
