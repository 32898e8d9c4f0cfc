"""Connections that are lost and come back: nothing is lost with them, and no round stands still."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.pumped import Pump
from helpers.simulated import make_spec, peer_of, push_all, simple_plan, take

from torch_qgc.aggregator.aggregator import Aggregator
from torch_qgc.errors import JobFailed, Refused
from torch_qgc.protocol import messages
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

    @property
    def aggregator(self) -> Aggregator:
        return self.aggregators[0]

    def cut(self, *, noticed: bool) -> None:
        """Cut worker 1's connection, with all that is on its way; it has another one then."""
        session = self.sessions.pop(peer_of(1))
        session.drain()
        if noticed:
            self.aggregator.lost(peer_of(1), self.time_s)
        self.sessions[peer_of(1, b"again")] = session


def test_two_messages_on_a_new_connection_are_asked_for_one_introduction_and_answered_with_two() -> None:
    """The second Hello must not be taken for somebody else's: the worker would be refused, and end."""
    line = Line()
    line.cut(noticed=True)
    line.workers[1].session.say(messages.Begin(0))
    line.workers[1].session.say(messages.Fetch(0, 0))
    line.pump()
    assert line.workers[1].session.error is None
    for worker in line.workers:
        worker.begin(0)
        push_all(worker, PLAN, 0, torch.ones(512))
    assert torch.equal(take(line.workers[0]), take(line.workers[1]))


@pytest.mark.parametrize("noticed", [True, False])
def test_a_payload_that_was_lost_with_its_connection_is_sent_again(noticed: bool) -> None:
    """Without a deadline the round would wait for it for ever."""
    line = Line()
    session = line.workers[1].session
    del line.sessions[peer_of(1)]  # nothing gets through
    line.workers[1].begin(0)
    push_all(line.workers[1], PLAN, 0, torch.ones(512))
    line.sessions[peer_of(1)] = session
    line.cut(noticed=noticed)
    session.connected(0)  # it is not said before that something was lost
    session.connected(0)
    line.pump()
    if not noticed:
        line.aggregator.lost(peer_of(1), line.time_s)  # now it is
    line.workers[0].begin(0)
    push_all(line.workers[0], PLAN, 0, torch.ones(512))
    (result,) = line.workers[0].results()
    assert result.counts.tolist() == [1, 1]
    assert take(line.workers[1]).shape == (512,)
    assert line.aggregator.stats["lost_workers"] == noticed


def test_what_was_lost_is_said_again_only_while_its_step_is_at_hand() -> None:
    line = Line()
    for worker in line.workers:
        worker.begin(0)
        push_all(worker, PLAN, 0, torch.ones(512))
    for worker in line.workers:
        take(worker)
    before = line.aggregator.stats["bytes_received"]
    line.cut(noticed=True)
    line.workers[1].begin(1)
    assert line.workers[1].session.rejections == []
    assert line.aggregator.stats["bytes_received"] == before
    for worker in line.workers[::-1]:
        worker.begin(1)
        push_all(worker, PLAN, 1, torch.ones(512))
    assert next(iter(line.workers[0].results())).counts.tolist() == [1, 1]


def test_a_worker_that_was_never_in_is_refused_at_once() -> None:
    line = Line()
    line.sessions[peer_of(1, b"thief")] = line.connect(line.workers[0].spec, PLAN, 1).session
    line.sessions[peer_of(1)] = line.workers[1].session
    line.pump()
    assert isinstance(line.sessions[peer_of(1, b"thief")].error, Refused)
    assert line.workers[1].session.error is None


def test_a_fault_that_was_lost_with_its_connection_is_said_again() -> None:
    line = Line()
    line.cut(noticed=True)
    assert line.workers[1].send_fault(0, "broken on purpose")
    assert line.aggregator.failed is not None
    with pytest.raises(JobFailed, match="broken on purpose"):
        line.workers[0].closed(0)
