"""The worker's end and the aggregator's process over real sockets."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import zmq
from helpers.ranks import PATIENCE_S
from helpers.simulated import make_spec, push_all, simple_plan, take

from torch_qgc.aggregator.aggregator import Aggregator
from torch_qgc.aggregator.process import AggregatorProcess, check_bind, serve
from torch_qgc.errors import ConfigError, JobFailed, Refused
from torch_qgc.job.courses import Courses
from torch_qgc.planner import Plan
from torch_qgc.protocol import messages
from torch_qgc.protocol.transport import MonotonicClock, ZmqServer
from torch_qgc.worker.connection import Connection
from torch_qgc.worker.session import Session
from torch_qgc.worker.sockets import SocketCarrier


class Served:
    """S aggregators in threads of this process."""

    def __init__(self, count: int = 1, *, max_message_bytes: int = 64 << 20, ping_interval_s: float = 0.05) -> None:
        self.servers = [ZmqServer("tcp://127.0.0.1:*", max_message_bytes=max_message_bytes) for _ in range(count)]
        self.aggregators = [Aggregator(index, count, ping_interval_s=ping_interval_s) for index in range(count)]
        self.endpoints = [server.endpoint for server in self.servers]
        self._stop = False
        self._threads = [threading.Thread(target=self._run, args=pair) for pair in zip(self.aggregators, self.servers)]
        for thread in self._threads:
            thread.start()

    def _run(self, aggregator: Aggregator, server: ZmqServer) -> None:
        serve(aggregator, server, MonotonicClock(), stop=lambda: self._stop)

    def close(self) -> None:
        self._stop = True
        for thread in self._threads:
            thread.join()
        for server in self.servers:
            server.close()


def connect(endpoints: list[str], spec: Any, worker: int, plan: Plan, **options: Any) -> Connection:
    session = Session(endpoints, spec, worker, Courses(spec.rule, plan, spec.first_step), **options)
    return Connection(session, SocketCarrier(session))


@contextlib.contextmanager
def job(
    workers: int = 2, count: int = 1, inbox_bytes: int = 1 << 30, **spec: Any
) -> Iterator[tuple[Served, list[Connection], Plan]]:
    plan = simple_plan(workers, bits_per_coordinate=spec.pop("bits_per_coordinate", 4))
    served = Served(count)
    made = make_spec(plan, aggregators=count, **spec)
    members = [connect(served.endpoints, made, k, plan, inbox_bytes=inbox_bytes) for k in range(workers)]
    try:
        for member in members:
            member.join(PATIENCE_S)
        yield served, members, plan
    finally:
        for member in members:
            member.close()
        served.close()


@pytest.mark.parametrize(("count", "downlink_bits"), [(1, 32), (3, 8)])
def test_every_worker_gets_the_same_bytes_from_any_number_of_aggregators(count: int, downlink_bits: int) -> None:
    g = torch.randn(3, 512 * 5 + 17, generator=torch.Generator().manual_seed(0))
    spec = dict(numel=g.shape[1], chunk_numel=512, downlink_bits=downlink_bits, deadline_s=None)
    with job(3, count, **spec) as (_, workers, plan):
        for step in range(3):
            for worker in workers:
                worker.begin(step)
                push_all(worker, plan, step, g[worker.session.worker])
            taken = [take(worker) for worker in workers]
            assert all(torch.equal(t, taken[0]) for t in taken)
            # 4 bits per worker, and on the way down: close to the mean, not equal to it
            assert 0 < (taken[0] - g.mean(0)).norm() < 0.5 * g.mean(0).norm()


def test_a_late_worker_finds_missed_results_in_its_inbox_or_asks_again() -> None:
    """With an inbox of two steps, the results of the others were dropped on arrival and are fetched from the log."""
    g = torch.randn(2, 1024, generator=torch.Generator().manual_seed(1))
    with job(2, inbox_bytes=2 * 4096, numel=1024, deadline_s=0.02, late="drop") as (_, workers, plan):
        fast, slow = workers
        expected = []
        slow.begin(0)
        for step in range(6):
            fast.begin(step)
            push_all(fast, plan, step, g[0])
            expected.append(take(fast))
        assert slow.wait_closed(4, PATIENCE_S)
        assert slow.session.inbox.held_bytes == 2 * 4096  # of steps 1 and 2; later ones were dropped
        for step in range(6):
            assert torch.equal(take(slow), expected[step])
        assert not slow.closed(6)


def test_only_counts_of_the_worker_that_was_in_are_reported() -> None:
    with job(2, deadline_s=0.02) as (_, workers, plan):
        workers[0].begin(0)
        push_all(workers[0], plan, 0, torch.ones(512))
        (result,) = list(workers[1].results())
        assert result.counts.tolist() == [1, 0]


def test_a_worker_whose_connection_is_closed_is_no_longer_waited_for() -> None:
    with job(2, deadline_s=None) as (served, workers, plan):
        workers[0].begin(0)
        push_all(workers[0], plan, 0, torch.ones(512))
        workers[1]._carrier.close()  # without a goodbye, as a killed process
        (result,) = list(workers[0].results())
        assert result.counts.tolist() == [1, 0]
        assert served.aggregators[0].stats["lost_workers"] == 1


def test_a_refused_worker_says_why() -> None:
    with job(2) as (served, _, plan):
        stranger = connect(served.endpoints, make_spec(plan, layout_digest="another"), 1, plan)
        with pytest.raises(Refused, match="same model"):
            stranger.join(PATIENCE_S)
        stranger.close()


def test_a_silent_aggregator_is_noticed() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        nobody.listen()
        plan = simple_plan(2)
        endpoint = f"tcp://127.0.0.1:{nobody.getsockname()[1]}"
        worker = connect([endpoint], make_spec(plan), 0, plan, silence_s=0.5)
        with pytest.raises(JobFailed, match="nothing heard from the aggregator"):
            worker.join(PATIENCE_S)
        worker.close()


# --- bad input on the port --------------------------------------------------------------------------------


def raw_dealer(endpoint: str) -> tuple[zmq.Context[Any], zmq.Socket[Any]]:
    context: zmq.Context[Any] = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.setsockopt(zmq.LINGER, 0)
    dealer.connect(endpoint)
    return context, dealer


def test_garbage_on_the_port_does_not_disturb_the_job() -> None:
    with job(2, deadline_s=None) as (served, workers, plan):
        host, port = served.endpoints[0].removeprefix("tcp://").split(":")
        for garbage in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 5000, b"\x00"):
            with socket.create_connection((host, int(port))) as tcp, contextlib.suppress(OSError):
                tcp.sendall(garbage)
        context, dealer = raw_dealer(served.endpoints[0])
        for message in (
            [b"\xc1garbage"],
            [b"", b"", b""],
            [b"x" * 100_000],
            [messages.encode_message(messages.Begin(0))],
        ):
            dealer.send_multipart(message)
        answers = []
        while len(answers) < 4:
            assert dealer.poll(int(1000 * PATIENCE_S))
            answers.append(messages.decode_from_aggregator(dealer.recv_multipart()[0]))
        assert [type(a).__name__ for a in answers] == ["Rejected", "Rejected", "Rejected", "Introduce"]
        assert all("another program" in a.text for a in answers[:3] if isinstance(a, messages.Rejected))
        context.destroy(linger=0)
        for worker in workers:
            worker.begin(0)
            push_all(worker, plan, 0, torch.ones(512))
        assert torch.allclose(take(workers[0]), torch.ones(512))


def test_an_oversized_message_is_cut_off_before_it_is_read() -> None:
    plan = simple_plan(2)
    served = Served(max_message_bytes=1 << 20)
    spec = make_spec(plan, deadline_s=None)
    workers = [connect(served.endpoints, spec, k, plan) for k in range(2)]
    for worker in workers:
        worker.join(PATIENCE_S)
    context, dealer = raw_dealer(served.endpoints[0])
    for _ in range(20):
        dealer.send(bytes(8 << 20))
    for worker in workers:
        worker.begin(0)
        push_all(worker, plan, 0, torch.ones(512))
    take(workers[0])
    context.destroy(linger=0)
    assert served.aggregators[0].stats["bad_messages"] == 0  # none of it reached the aggregator
    for worker in workers:
        worker.close()
    served.close()


# --- the process ------------------------------------------------------------------------------------------


def test_the_aggregator_process_ends_with_the_job_and_frees_its_port() -> None:
    process = AggregatorProcess("127.0.0.31")  # where no other program picks its ports
    plan = simple_plan(1)
    worker = connect([process.endpoint], make_spec(plan, deadline_s=None), 0, plan)
    worker.join(PATIENCE_S)
    worker.begin(0)
    push_all(worker, plan, 0, torch.ones(512))
    assert torch.allclose(take(worker), torch.ones(512))
    worker.close()
    process.stop(PATIENCE_S)
    assert process.poll() == 0
    port = int(process.endpoint.rsplit(":", 1)[1])
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.31", port))


def test_the_aggregator_process_stops_and_tells_when_its_parent_lets_go() -> None:
    process = AggregatorProcess("127.0.0.31")  # where no other program picks its ports
    plan = simple_plan(1)
    worker = connect([process.endpoint], make_spec(plan), 0, plan)
    worker.join(PATIENCE_S)
    process._process.stdin.close()  # as the end of rank 0 would
    with pytest.raises(JobFailed, match="rank 0"):
        list(worker.results())
    worker.close()
    assert process._process.wait() == 1
    process.stop()


@pytest.mark.parametrize("bind", ["tcp://0.0.0.0:*", "tcp://192.0.2.7:5555", "ipc:///socket", "5555"])
def test_only_loopback_is_bound_without_a_word(bind: str) -> None:
    with pytest.raises(ConfigError, match="bind"):
        check_bind(bind, insecure=False)


def test_results_account_for_their_bytes() -> None:
    with job(2, deadline_s=None, bits_per_coordinate=2, numel=1 << 16, chunk_numel=1 << 14) as (_, workers, plan):
        for worker in workers:
            worker.begin(0)
            push_all(worker, plan, 0, torch.ones(1 << 16))
        for worker in workers:
            take(worker)
        assert all(w.session.inbox.held_bytes == 0 for w in workers)
        payload = (1 << 16) * 2 / 8 + 4 * 128  # 2 bits per coordinate and a scale per block
        assert workers[0].session.bytes_received > 4 << 16
        # A push's header, a Hello, a Begin and a Bye; a worker does not answer pings.
        assert payload <= workers[1].session.bytes_sent <= 1.1 * payload
