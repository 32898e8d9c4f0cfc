"""An open port: who comes in, what strangers learn and do, and how much members and strangers can take."""

from __future__ import annotations

import contextlib
import random
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import zmq
from helpers.keys import SECRET, door, passes
from helpers.ranks import PATIENCE_S
from helpers.served import BOUNDS, Served, connect, job
from helpers.simulated import make_spec, push_all, simple_plan, take
from zmq.utils.monitor import parse_monitor_message

from torch_qgc.aggregator import lobby
from torch_qgc.errors import Refused
from torch_qgc.protocol import messages
from torch_qgc.protocol import server as server_module
from torch_qgc.protocol.gate import SPARE_DESCRIPTORS, received_bytes
from torch_qgc.protocol.identity import Secret
from torch_qgc.protocol.messages import encode_message
from torch_qgc.protocol.server import MOST_FRAMES, Bounds, ZmqServer
from torch_qgc.protocol.transport import Peer, Sent
from torch_qgc.worker.connection import Connection

OTHER_JOB = Secret(bytes(32))
BOTH = pytest.mark.parametrize("encrypt", [True, False], ids=["encrypted", "plain"])
BEGIN = encode_message(messages.Begin(0))


def until(condition: Callable[[], object]) -> None:
    """Wait for what must happen."""
    give_up = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < give_up, "it did not happen"
        time.sleep(0.005)


class Raw:
    """A DEALER that anybody could write, and the events of its connection."""

    def __init__(self, endpoint: str, prepare: Callable[[Any], object] = lambda dealer: None) -> None:
        self.context: zmq.Context[Any] = zmq.Context()
        self.dealer = self.context.socket(zmq.DEALER)
        self.dealer.setsockopt(zmq.LINGER, 0)
        self.dealer.setsockopt(zmq.SNDHWM, 0)
        self.dealer.setsockopt(zmq.RCVHWM, 1)
        prepare(self.dealer)
        self._monitor = self.dealer.get_monitor_socket()
        self._events: list[int] = []
        self.dealer.connect(endpoint)

    def send(self, frames: list[Any]) -> None:
        """Queue a message, if there is still a connection."""
        with contextlib.suppress(zmq.Again):
            self.dealer.send_multipart(frames, zmq.NOBLOCK, copy=False)

    def saw(self, *events: int) -> bool:
        while self._monitor.poll(0):
            self._events.append(parse_monitor_message(self._monitor.recv_multipart())["event"])
        return any(event in self._events for event in events)

    @property
    def was_denied(self) -> bool:
        failed = (zmq.EVENT_HANDSHAKE_FAILED_AUTH, zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL)
        return self.saw(*failed, zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL)

    def close(self) -> None:
        self.dealer.disable_monitor()
        self.context.destroy(linger=0)


@contextlib.contextmanager
def raw(endpoint: str, prepare: Callable[[Any], object] = lambda dealer: None) -> Iterator[Raw]:
    made = Raw(endpoint, prepare)
    try:
        yield made
    finally:
        made.close()


def as_member(worker: int, encrypt: bool = True, secret: Secret = SECRET) -> Callable[[Any], None]:
    return passes(worker, secret=secret, encrypt=encrypt)[0].put_on


def assert_goes_on(workers: list[Connection], plan: Any, step: int = 0) -> None:
    for worker in workers:
        worker.begin(step)
        push_all(worker, plan, step, torch.ones(workers[0].spec.numel))
    for worker in workers:
        assert torch.allclose(take(worker), torch.ones(workers[0].spec.numel))


# --- strangers --------------------------------------------------------------------------------------------


def own_key(dealer: Any, server: bytes) -> None:
    dealer.curve_publickey, dealer.curve_secretkey = zmq.curve_keypair()
    dealer.curve_serverkey = server


def plain(dealer: Any, password: bytes) -> None:
    dealer.plain_username, dealer.plain_password = b"worker", password


def password_of(worker: int, aggregator: int) -> bytes:
    return SECRET.pass_of(worker, aggregator, encrypt=False).secret


STRANGERS = {
    "no key": lambda dealer: None,
    "own keys": lambda dealer: own_key(dealer, zmq.curve_keypair()[0]),
    "own key, the aggregator's public key": lambda dealer: own_key(dealer, passes(0)[0].aggregator),
    "a worker's key of another job": as_member(1, secret=OTHER_JOB),
    "the key of a worker that the job does not have": as_member(16),
    "a password": lambda dealer: plain(dealer, b"password"),
    "a password of another job": as_member(1, encrypt=False, secret=OTHER_JOB),
    "a password for another aggregator": lambda dealer: plain(dealer, password_of(1, 1)),
}


@BOTH
def test_strangers_get_nothing_in_and_nothing_out(encrypt: bool) -> None:
    with job(2, encrypt=encrypt, deadline_s=None) as (served, workers, plan):
        heard: list[Any] = []
        receive = served.aggregators[0].receive
        served.aggregators[0].receive = lambda *args: (heard.append(args), receive(*args))  # type: ignore[method-assign]
        hello = encode_message(
            messages.Hello(version=messages.PROTOCOL_VERSION, worker=1, step=0, spec=workers[0].spec)
        )
        for name, prepare in STRANGERS.items():
            with raw(served.endpoints[0], prepare) as stranger:
                for frames in ([hello], [BEGIN], [b"\xc1garbage"], [b"", b"", b""], [bytes(100_000)]):
                    stranger.send(frames)
                until(lambda: stranger.was_denied)
                assert not stranger.saw(zmq.EVENT_HANDSHAKE_SUCCEEDED), name
                assert not stranger.dealer.poll(0), name
        assert heard == []
        assert served.aggregators[0].stats["bad_messages"] == 0
        assert_goes_on(workers, plan)
        assert served.servers[0].report()["denied"] > 0


def test_other_programs_on_the_port_do_not_disturb_the_job() -> None:
    with job(2, deadline_s=None) as (served, workers, plan):
        for garbage in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 5000, b"\x00"):
            with tcp(served) as connection, contextlib.suppress(OSError):
                connection.sendall(garbage)
        assert_goes_on(workers, plan)


@contextlib.contextmanager
def tcp(served: Served) -> Iterator[socket.socket]:
    host, port = served.endpoints[0].removeprefix("tcp://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        yield connection


class Relay:
    """A wire tap: everything that a worker sends to an aggregator, as bytes."""

    def __init__(self, endpoint: str) -> None:
        host, port = endpoint.removeprefix("tcp://").split(":")
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._there = (host, int(port))
        self.recorded = bytearray()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        here, _ = self._listener.accept()
        there = socket.create_connection(self._there)
        threading.Thread(target=self._move, args=(there, here, bytearray()), daemon=True).start()
        self._move(here, there, self.recorded)

    def _move(self, source: socket.socket, sink: socket.socket, record: bytearray) -> None:
        with contextlib.suppress(OSError):
            while part := source.recv(65536):
                record += part
                sink.sendall(part)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()


def test_who_repeats_a_recorded_connection_or_changes_it_gets_nothing_in() -> None:
    """All that a wire tap has recorded of a worker, with bits flipped, as it was, and cut."""
    plan = simple_plan(2)
    served = Served()
    spec = make_spec(plan, deadline_s=None)
    relay = Relay(served.endpoints[0])
    workers = [connect([served.endpoints[0] if k else relay.endpoint], spec, k, plan) for k in range(2)]
    for worker in workers:
        worker.join(PATIENCE_S)
    assert_goes_on(workers, plan)
    heard: list[Any] = []
    receive = served.aggregators[0].receive

    def listen(peer: Any, *args: Any) -> None:
        heard.append(peer.connection)
        receive(peer, *args)

    served.aggregators[0].receive = listen  # type: ignore[method-assign]
    recorded, draw = bytes(relay.recorded), random.Random(0)
    assert len(recorded) > 500
    for turn in range(200):
        said = bytearray(recorded if turn < 100 else recorded[: draw.randrange(1, len(recorded))])
        for _ in range(draw.randrange(4)):
            said[draw.randrange(len(said))] ^= 1 << draw.randrange(8)
        with tcp(served) as connection, contextlib.suppress(OSError):
            connection.sendall(said)
    assert_goes_on(workers, plan, 1)
    assert len(set(heard)) == 2  # the workers' own
    for worker in workers:
        worker.close()
    relay.close()
    served.close()


# --- keys that do not fit -----------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("other", [True, False], ids=["encrypts", "does not"])
def test_a_worker_with_a_wrong_key_is_told_what_to_do(encrypt: bool, other: bool) -> None:
    """At once; before, a worker that got no answer waited for its join timeout of 300 s."""
    with job(1, encrypt=encrypt, deadline_s=None) as (served, workers, plan):
        lost = connect(served.endpoints, workers[0].spec, 0, plan, secret=OTHER_JOB, encrypt=other)
        with pytest.raises(Refused, match=r"another key.*qgc keygen FILE.*Network\(key_file=FILE\).*encrypt"):
            lost.join(PATIENCE_S)
        lost.close()
        assert_goes_on(workers, plan)


@BOTH
def test_both_ends_must_encrypt_or_neither(encrypt: bool) -> None:
    with job(1, encrypt=encrypt, deadline_s=None) as (served, workers, plan):
        lost = connect(served.endpoints, workers[0].spec, 0, plan, encrypt=not encrypt)
        with pytest.raises(Refused, match="encrypt"):
            lost.join(PATIENCE_S)
        lost.close()
        assert_goes_on(workers, plan)


@BOTH
def test_of_two_workers_with_one_number_the_second_is_told_and_the_first_goes_on(
    encrypt: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lobby, "TAKEN_S", 0.5)  # after which it is certain that the first one goes on
    with job(2, encrypt=encrypt, deadline_s=None) as (served, workers, plan):
        second = connect(served.endpoints, workers[0].spec, 1, plan, encrypt=encrypt)
        with pytest.raises(Refused, match="give every rank its own number"):
            second.join(PATIENCE_S)
        second.close()
        assert_goes_on(workers, plan)


def test_a_worker_of_an_old_version_is_told_and_the_job_goes_on() -> None:
    with job(1, deadline_s=None) as (served, workers, plan), raw(served.endpoints[0], as_member(1)) as old:
        old.send([encode_message(messages.Hello(version=1, worker=1, step=0, spec=workers[0].spec))])
        answer = messages.decode_from_aggregator(old.dealer.recv_multipart()[0])
        assert isinstance(answer, messages.Refusal)
        assert "install the same version of torch_qgc on every machine" in answer.text
        assert_goes_on(workers, plan)


@BOTH
def test_a_member_cannot_speak_for_another_one(encrypt: bool) -> None:
    plan = simple_plan(3)
    served = Served(encrypt=encrypt)
    spec = make_spec(plan, deadline_s=None)
    first = connect(served.endpoints, spec, 0, plan, encrypt=encrypt)
    first.join(PATIENCE_S)
    with raw(served.endpoints[0], as_member(2, encrypt)) as member:
        member.send([encode_message(messages.Hello(version=messages.PROTOCOL_VERSION, worker=1, step=0, spec=spec))])
        answer = messages.decode_from_aggregator(member.dealer.recv_multipart()[0])
        assert isinstance(answer, messages.Rejected)
        assert "worker 2, whose key it is, got one of worker 1" in answer.text
    assert served.aggregators[0]._lobby.peer_of(1) is None
    first.close()
    served.close()


# --- bounds -------------------------------------------------------------------------------------------------


SMALL = Bounds(message_bytes=1 << 20, queue_bytes=4 << 20, connections=12)


@pytest.mark.parametrize("prepare", [as_member(1), lambda dealer: None], ids=["member", "stranger"])
def test_an_oversized_frame_is_cut_off_before_it_is_read(prepare: Any) -> None:
    with job(2, bounds=SMALL, deadline_s=None) as (served, workers, plan):
        with raw(served.endpoints[0], prepare) as sender:
            for _ in range(20):
                sender.send([bytes(8 << 20)])
            until(lambda: sender.saw(zmq.EVENT_DISCONNECTED))
        assert_goes_on(workers, plan)
        assert served.aggregators[0].stats["bad_messages"] == 0  # none of it reached the aggregator


@pytest.mark.parametrize(
    ("encrypt", "prepare"),
    [(True, as_member(1)), (False, as_member(1, encrypt=False)), (True, lambda dealer: None)],
    ids=["member", "member without encryption", "stranger"],
)
def test_a_message_of_endless_frames_is_cut_off_while_it_comes(encrypt: bool, prepare: Any) -> None:
    """ZeroMQ keeps its frames until the last has come, and bounds their size alone."""
    with job(2, encrypt=encrypt, bounds=SMALL, deadline_s=None) as (served, workers, plan):
        with raw(served.endpoints[0], prepare) as sender:
            frame = bytes(1 << 19)
            sender.send([frame] * 400)  # 200 MiB
            until(lambda: sender.saw(zmq.EVENT_DISCONNECTED))
            denied = sender.was_denied
        assert_goes_on(workers, plan)
        report = served.servers[0].report()
        assert report["malformed"] == 0  # it never came to its end
        assert denied != (report["cut"] == 1)


def test_a_message_of_too_many_frames_is_dropped() -> None:
    with job(2, bounds=SMALL, deadline_s=None) as (served, workers, plan):
        with raw(served.endpoints[0], as_member(1)) as member:
            member.send([BEGIN, *[b""] * MOST_FRAMES])
            until(lambda: served.servers[0].report()["malformed"] == 1)
        assert_goes_on(workers, plan)


@BOTH
def test_a_member_that_never_reads_costs_a_bounded_queue_and_finds_the_rest_in_the_log(encrypt: bool) -> None:
    plan, numel, steps = simple_plan(2, bits_per_coordinate=2), 1 << 18, 40  # results of 1 MiB, of which TCP holds some
    served = Served(encrypt=encrypt, bounds=SMALL)
    spec = make_spec(plan, numel=numel, chunk_numel=numel, deadline_s=0.01)
    first = connect(served.endpoints, spec, 0, plan, encrypt=encrypt)
    first.join(PATIENCE_S)
    with raw(served.endpoints[0], as_member(1, encrypt)) as silent:
        hello = messages.Hello(version=messages.PROTOCOL_VERSION, worker=1, step=0, spec=spec)
        silent.send([encode_message(hello)])
        until(lambda: served.aggregators[0]._lobby.peer_of(1))
        peer = served.aggregators[0]._lobby.peer_of(1)
        assert peer is not None
        for step in range(steps):
            first.begin(step)
            push_all(first, plan, step, torch.ones(numel))
            take(first)
            assert served.servers[0].queued_bytes(peer) <= SMALL.queue_bytes
        assert served.servers[0].report()["dropped"] > 0
        got: list[int] = []
        while steps - 1 not in got:
            message = messages.decode_from_aggregator(silent.dealer.recv_multipart()[0])
            if isinstance(message, messages.Result):
                got.append(message.step)
            elif isinstance(message, messages.Ping):  # as a worker does now and then: the queue may still be full
                silent.send([encode_message(messages.Fetch(steps - 1, 0))])
        assert got[:-1] == sorted(got[:-1])
        assert len(set(got)) < steps
    first.close()
    served.close()


def test_connections_are_bounded_and_strangers_push_out_strangers() -> None:
    with job(2, bounds=SMALL, deadline_s=None) as (served, workers, plan), contextlib.ExitStack() as stack:
        for _ in range(50):
            stack.enter_context(tcp(served))
        until(lambda: served.servers[0].report()["cut"] >= 50 + 2 - SMALL.connections)
        assert_goes_on(workers, plan)
        assert all(worker.session.gone == {} for worker in workers)


def test_connections_of_a_member_are_bounded_and_the_newest_go() -> None:
    with job(2, bounds=SMALL, deadline_s=None) as (served, workers, plan), contextlib.ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(raw(served.endpoints[0], as_member(1))).send([BEGIN])
        until(lambda: served.servers[0].report()["cut"] >= 20 + 2 - SMALL.connections)
        assert_goes_on(workers, plan)
        assert all(worker.session.gone == {} for worker in workers)


def test_connections_leave_descriptors_for_everything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (80, 80))
    with job(2, deadline_s=None) as (served, workers, plan), contextlib.ExitStack() as stack:
        for _ in range(50):
            stack.enter_context(tcp(served))
        until(lambda: served.servers[0].report()["cut"] >= 50 + 2 - (80 - SPARE_DESCRIPTORS))
        assert_goes_on(workers, plan)


def test_who_shows_no_key_in_time_is_cut() -> None:
    server = ZmqServer("tcp://127.0.0.1:*", door(), bounds=Bounds(handshake_s=0.1))
    host, port = server.endpoint.removeprefix("tcp://").split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as silent:
        while silent.recv(4096):  # ZeroMQ's greeting, and then the end
            pass
    server.close()


def test_who_has_sent_much_that_is_not_read_yet_is_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a pause of the aggregator: each of three members has more complete messages than one may be long."""
    monkeypatch.setattr(server_module, "LEAST_AT_ONCE", 1)
    server = ZmqServer("tcp://127.0.0.1:*", door(), bounds=SMALL)
    with contextlib.ExitStack() as stack:
        members = [stack.enter_context(raw(server.endpoint, as_member(worker))) for worker in range(3)]
        for member in members:
            member.send([BEGIN])
        came: list[Any] = []
        until(lambda: came.extend(server.poll(0.0)) or len(came) == 3)
        until(lambda: server.poll(0.0) == [] and not server._gate._delivered)  # it has looked
        for member in members:
            for _ in range(16):
                member.send([BEGIN, bytes(1 << 20)])
        most = server._gate._most_unread_bytes
        until(lambda: all(received_bytes(descriptor) > most for descriptor in server._gate._open))
        server._gate._looked_at_s = 0.0
        until(lambda: came.extend(server.poll(0.0)) or len(came) == 3 + 3 * 16 or server.report()["cut"])
        assert server.report()["cut"] == 0
    server.close()


@contextlib.contextmanager
def met(bounds: Bounds) -> Iterator[tuple[ZmqServer, Raw, Peer]]:
    """A server that nobody drives, and a member whose connection is made; it queues one message."""

    def few(dealer: Any) -> None:
        as_member(1)(dealer)
        dealer.setsockopt(zmq.SNDHWM, 1)

    server = ZmqServer("tcp://127.0.0.1:*", door(), bounds=bounds)
    with raw(server.endpoint, few) as member:
        member.send([BEGIN])
        received: list[Any] = []
        until(lambda: received.extend(server.poll(0.0)) or received)
        yield server, member, received[0][0]
    server.close()


def test_a_member_that_sends_more_than_is_read_has_to_wait() -> None:
    """4 messages of 1 MiB, and what TCP and the sender's own queue of 1 hold, are under way at most."""
    with met(Bounds(received_messages=4)) as (_, member, _):
        taken = 0
        while taken < 200 and member.dealer.poll(500, zmq.POLLOUT):
            member.send([bytes(1 << 20)])
            taken += 1
        assert taken < 100


def test_small_messages_to_a_member_that_never_reads_are_dropped_at_a_number() -> None:
    with met(Bounds(sent_messages=10)) as (server, _, peer):
        sent = 0
        while server.send(peer, [bytes(4096)]) is Sent.OK:
            sent += 1
            assert sent < 100_000  # 400 MB
        assert server.send(peer, [BEGIN]) is Sent.FULL


def test_bounds_hold_what_a_job_sends() -> None:
    plan = simple_plan(3)
    spec = make_spec(plan, numel=(1 << 22) + 5, chunk_numel=1 << 20)
    bounds = Bounds.of(spec, plan)
    assert (4 << 20) <= bounds.message_bytes < (5 << 20)
    assert bounds.queue_bytes >= 2 * spec.step_bytes(0)
    assert BOUNDS.message_bytes > bounds.message_bytes
    assert bounds.connections > 2 * spec.workers
