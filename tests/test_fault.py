"""An error on one worker, or its end without a word, is heard by all the others."""

from __future__ import annotations

import logging
import math
import os
import signal
from collections.abc import Sequence

import pytest
import torch
from helpers.keys import passes
from helpers.ranks import aggregators
from helpers.simulated import Job, make_spec, peer_of, push_all, simple_plan, take
from helpers.virtual import World, session_for

from torch_qgc.aggregator.aggregator import Aggregator
from torch_qgc.aggregator.process import serve
from torch_qgc.errors import JobFailed
from torch_qgc.job.courses import Courses
from torch_qgc.logs import logger
from torch_qgc.protocol import messages
from torch_qgc.protocol.contract import JobSpec
from torch_qgc.protocol.transport import MemoryNetwork, Peer, Sent
from torch_qgc.worker.connection import Connection
from torch_qgc.worker.session import Session
from torch_qgc.worker.sockets import SocketCarrier

PLAN = simple_plan(2)
JOIN_S = 100.0  # a busy machine is no reason to fail


def connect(endpoints: Sequence[str], spec: JobSpec, worker: int) -> Connection:
    plan = simple_plan(spec.workers)
    session = Session(endpoints, spec, worker, Courses(spec.rule, plan, spec.first_step))
    return Connection(session, SocketCarrier(session, passes(worker, len(endpoints))))


def fork_and_fail(endpoints: Sequence[str], spec: JobSpec) -> int:
    """Join as worker 1 in a process that reports an error and is gone at once, as a forked child is after it."""
    pid = os.fork()
    if pid == 0:
        status = 2
        try:
            worker = connect(endpoints, spec, 1)
            worker.join(JOIN_S)
            status = 0 if worker.send_fault(4, "broken on purpose", timeout_s=JOIN_S) else 1
        finally:
            os._exit(status)
    return pid


def spec_for(count: int) -> JobSpec:
    return make_spec(PLAN, numel=512 * count, aggregators=count, deadline_s=None)


def assert_heard(endpoints: Sequence[str], pid: int) -> None:
    """Be worker 0, and hear of it; the other process has ended knowing that everybody had."""
    worker = connect(endpoints, spec_for(len(endpoints)), 0)

    def join_and_wait() -> None:
        worker.join(JOIN_S)
        list(worker.results())

    with pytest.raises(JobFailed, match="worker 1 failed at step 4: broken on purpose"):
        join_and_wait()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    worker.close()


def test_a_fault_is_heard_every_time_although_the_process_ends_right_after_it() -> None:
    with aggregators(20) as endpoints:
        pids = [fork_and_fail([endpoint], spec_for(1)) for endpoint in endpoints]
        for endpoint, pid in zip(endpoints, pids):
            assert_heard([endpoint], pid)


def test_a_fault_is_acknowledged_by_every_aggregator() -> None:
    with aggregators(3, of=3) as endpoints:
        pid = fork_and_fail(endpoints, spec_for(3))
        assert_heard(endpoints, pid)


def test_reporting_a_fault_ends_when_the_aggregator_is_gone() -> None:
    with aggregators() as endpoints:
        worker = connect(endpoints, make_spec(simple_plan(1), deadline_s=None), 0)
        worker.join(JOIN_S)
    assert worker.send_fault(0, "nobody listens", timeout_s=0.2) is False
    worker.close()


def test_a_fault_says_how_many_have_heard_it() -> None:
    """One of two aggregators is gone: the job ends on all workers, but the call cannot promise it."""
    spec = make_spec(simple_plan(1), numel=1024, aggregators=2, deadline_s=None)
    with aggregators(1, of=2) as first:
        with aggregators(2, of=2) as both:
            worker = connect([first[0], both[1]], spec, 0)
            worker.join(JOIN_S)
        assert worker.send_fault(0, "half heard", timeout_s=2.0) is False
        assert worker.session.failed_at == {0}
        worker.close()


# --- vanished without a word ------------------------------------------------------------------------------


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """All warnings, also those that the rate limit would leave out."""
    monkeypatch.setattr(logger, "filters", [])
    caplog.set_level(logging.WARNING, "torch_qgc")
    return caplog


def losses(warned: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in warned.records if "was lost" in record.getMessage()]


@pytest.mark.parametrize("deadline_s", [None, 1.0])
def test_every_other_worker_warns_once_of_a_lost_one_whose_share_is_spread(
    deadline_s: float | None, warned: pytest.LogCaptureFixture
) -> None:
    plan = simple_plan(3, bits_per_coordinate=32)
    g = torch.randn(3, 512, generator=torch.Generator().manual_seed(0))
    spec = make_spec(plan, deadline_s=deadline_s)
    job = Job(plan, spec, g, lambda k, step: math.inf if k == 2 and step == 3 else 0.5)
    job.net.at(2.2, lambda: job.net.disconnect(peer_of(2)))
    job.run(8, stop=lambda: min(job.steps[:2]) >= 8)
    if deadline_s is None:  # else who has missed a step weighs more in others
        torch.testing.assert_close(job.decoded[2], g.mean(0), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(job.decoded[7], g[:2].mean(0), rtol=1e-6, atol=1e-6)
    said = losses(warned)
    assert len(said) == 2
    assert all(text.startswith("worker 2 was lost") and "on_loss='fail'" in text for text in said)
    assert [c.session.gone for c in job.connections] == [{2: "lost"}, {2: "lost"}, {}]


@pytest.mark.parametrize("deadline_s", [None, 1.0])
def test_a_loss_ends_the_job_by_name_if_it_is_to(deadline_s: float | None) -> None:
    plan = simple_plan(3)
    spec = make_spec(plan, deadline_s=deadline_s, on_loss="fail")
    world, told = World(), []

    def work(worker: int) -> None:
        connection = world.connect(peer_of(worker), session_for(spec, plan, worker))
        connection.join(math.inf)
        connection.begin(0)
        world.sleep(0.5)
        if worker == 2:
            world.net.disconnect(peer_of(2))
            return
        with pytest.raises(JobFailed, match=r"worker 2 was lost in step 0.*on_loss='fail'") as caught:
            for _ in connection.results():
                pass
        told.append(str(caught.value))

    for worker in range(3):
        world.start(lambda worker=worker: work(worker))
    world.run()
    assert len(told) == 2
    assert world.aggregator.failed == told[0]


def test_a_worker_that_leaves_in_good_order_is_no_loss(warned: pytest.LogCaptureFixture) -> None:
    plan = simple_plan(2)
    world = World()

    def work(worker: int) -> None:
        connection = world.connect(peer_of(worker), session_for(make_spec(plan, on_loss="fail"), plan, worker))
        connection.join(math.inf)
        connection.begin(0)
        push_all(connection, plan, 0, torch.ones(512))
        take(connection)
        if worker == 0:
            world.sleep(1.0)
            assert connection.session.gone == {1: "left"}
        connection.close()

    for worker in range(2):
        world.start(lambda worker=worker: work(worker))
    world.run()
    assert world.aggregator.failed is None
    assert losses(warned) == []


class HangingUp(MemoryNetwork):
    """A network on which worker 1's goodbye comes with the end of its connection, which is noticed first."""

    def __init__(self, goodbye: list[bytes]) -> None:
        super().__init__()
        self._goodbye = goodbye

    def send(self, peer: Peer, frames: Sequence[object]) -> Sent:
        if peer == peer_of(1) and self.now() >= 5.0:
            self.deliver(self.now(), peer, self._goodbye)
            return Sent.GONE
        return Sent.OK


def test_a_goodbye_that_is_read_after_the_connection_has_ended_is_one() -> None:
    """With on_loss="fail" the job would end because a worker had come to its end."""
    network = HangingUp([messages.encode_message(messages.Bye(0))])
    aggregator = Aggregator()
    for worker in range(2):
        for _, frames in session_for(make_spec(PLAN, on_loss="fail"), PLAN, worker).drain():
            network.deliver(0.0, peer_of(worker), frames())
    serve(aggregator, network, network, stop=lambda: network.now() > 10.0)
    assert aggregator.failed is None
    assert aggregator.stats["lost_workers"] == 0
    assert aggregator.job is not None
    assert aggregator.job.rounds.roster.awaited == {0}


def test_a_killed_process_is_noticed_and_the_others_are_warned(warned: pytest.LogCaptureFixture) -> None:
    with aggregators() as endpoints:
        joined, say_joined = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                connect(endpoints, spec_for(1), 1).join(JOIN_S)
                os.write(say_joined, b"!")
                signal.pause()
            finally:
                os._exit(1)
        worker = connect(endpoints, spec_for(1), 0)
        worker.join(JOIN_S)
        worker.begin(0)
        push_all(worker, PLAN, 0, torch.ones(512))
        assert os.read(joined, 1) == b"!"
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        (result,) = worker.results()
        assert result.counts.tolist() == [1, 0]
        assert worker.session.gone == {1: "lost"}
        assert len(losses(warned)) == 1
        worker.close()


@pytest.mark.parametrize("begun", [True, False])
def test_an_aggregator_ends_a_while_after_its_job_has_failed_whoever_does_not_leave(begun: bool) -> None:
    aggregator = Aggregator(told=not begun)
    for worker in range(2):
        for _, frames in session_for(make_spec(PLAN), PLAN, worker).drain():
            aggregator.receive(peer_of(worker), frames(), 0.0)
    aggregator.fail("broken on purpose", 0.0)
    for seconds, finished in ((0.0, False), (59.0, False), (61.0, True)):
        aggregator.tick(seconds)
        assert aggregator.finished is finished
