"""Run an aggregator: the loop, the process, and how a training process starts one as its child."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import msgspec

from torch_qgc.aggregator.aggregator import Aggregator
from torch_qgc.aggregator.pipe import Announced, Parent, tell
from torch_qgc.errors import ConfigError, JobFailed
from torch_qgc.job.events import Event, Trace, silent
from torch_qgc.planner import Plan
from torch_qgc.protocol.contract import JobSpec
from torch_qgc.protocol.identity import Door, check_unencrypted
from torch_qgc.protocol.server import Bounds, ZmqServer
from torch_qgc.protocol.transport import Clock, MonotonicClock, Peer, Sent, Transport

__all__ = ["AggregatorProcess", "Serving", "run", "serve"]

READY = "torch_qgc aggregator at "
_RUN = "import sys; from torch_qgc.aggregator.process import child; sys.exit(child())"


def serve(
    aggregator: Aggregator, transport: Transport, clock: Clock, *, stop: Callable[[], bool] = lambda: False
) -> None:
    """Drive the aggregator until its job is finished or `stop` says so."""
    while not stop():
        for peer, frames in transport.poll(aggregator.wakeup_in(clock.now())):
            aggregator.receive(peer, frames, clock.now())
        aggregator.tick(clock.now())
        gone = _send(aggregator, transport, clock.now())
        aggregator.plan(clock.now())
        gone |= _send(aggregator, transport, clock.now())
        if gone:  # a worker that has said goodbye may be gone before that is read
            for peer, frames in transport.poll(0.0):
                aggregator.receive(peer, frames, clock.now())
            for peer in gone:
                aggregator.lost(peer, clock.now())
            aggregator.tick(clock.now())
        if aggregator.finished:
            break


def _send(aggregator: Aggregator, transport: Transport, now: float) -> set[Peer]:
    """Send what is to be sent; return the connections that turn out to be gone."""
    gone: set[Peer] = set()
    unsent: dict[Peer, list[Sequence[Any]]] = {}  # to peers whose queue is full
    for peer, frames in aggregator.drain():
        sent = Sent.GONE if peer in gone else Sent.FULL if peer in unsent else transport.send(peer, frames)
        if sent is Sent.GONE:
            gone.add(peer)
        elif sent is Sent.FULL:
            unsent.setdefault(peer, []).append(frames)
    for peer, theirs in unsent.items():
        aggregator.unsent(peer, theirs, now)
    return gone


class Serving(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one aggregator process is asked to do.

    Args:
        door: by what it knows workers.
        bind: tcp://host:port; port * picks a free one.
        index, count: which aggregator this is, of how many.
        threads: that decode, and as many that move messages and encrypt.
        bounds: what its port takes.
        announced: the process that has started it, if one has, says what the job is; False: worker 0 does.
        trace: a file that gets one JSON line per event of the job (`torch_qgc.job.events`); None: none.
    """

    door: Door
    bind: str = "tcp://127.0.0.1:*"
    index: int = 0
    count: int = 1
    threads: int = 1
    bounds: Bounds = Bounds()
    announced: bool = True
    trace: str | None = None

    def check(self) -> None:
        """Check what can be checked before anything is started.

        Raises:
            ConfigError: it cannot be served like this.
        """
        parts = urlsplit(self.bind)
        if parts.scheme != "tcp" or not parts.hostname:
            raise ConfigError(f"bind: expected tcp://host:port (port * picks a free one), got {self.bind!r}")
        if not self.door.encrypts:
            check_unencrypted(parts.hostname)
        if not 0 <= self.index < self.count:
            raise ConfigError(
                f"index: expected a number in [0, {self.count}), got {self.index}: count aggregators from 0"
            )


def run(serving: Serving, parent: Parent | None = None) -> int:
    """Run one aggregator in this process until its job is finished; return the exit status, 1 if that has failed.

    Args:
        parent: the process that has started this one, with which it ends; None: it is on its own, and worker 0 says
            what the job is.
    Raises:
        ConfigError: it cannot be served like this.
    """
    serving.check()
    logging.basicConfig(
        format="%(asctime)s torch_qgc aggregator: %(message)s",
        level=logging.INFO if parent is None else logging.WARNING,
    )
    stopping = _stop_signals(ignore_interrupt=parent is not None)
    clock = MonotonicClock()
    with contextlib.ExitStack() as stack:
        trace = silent if serving.trace is None else _tracing(stack.enter_context(open(serving.trace, "wb")))
        transport = ZmqServer(serving.bind, serving.door, bounds=serving.bounds, io_threads=serving.threads)
        stack.callback(transport.close)
        print(f"{READY}{transport.endpoint}", flush=True)
        told = parent is not None and serving.announced
        aggregator = Aggregator(serving.index, serving.count, threads=serving.threads, told=told, trace=trace)

        def stop() -> bool:
            announced = None if parent is None else parent.announced()
            if announced is not None:
                aggregator.announce(announced.spec, Plan.from_json(announced.plan), clock.now())
            return stopping() or (parent is not None and parent.gone)

        if parent is not None:
            transport.watch(parent.descriptor)
        try:
            serve(aggregator, transport, clock, stop=stop)
            if not aggregator.finished:
                aggregator.fail(_why_stopped(serving, aggregator), clock.now())
        except Exception as error:
            aggregator.fail(f"the aggregator failed: {error!r}", clock.now())
            raise
        finally:
            for peer, frames in aggregator.drain():
                transport.send(peer, frames)
        report = aggregator.report() | transport.report()
    with contextlib.suppress(BrokenPipeError):  # a parent that is gone reads nothing
        os.write(2 if parent is None else 1, f"torch_qgc aggregator: {report}\n".encode())
    return 0 if aggregator.finished and aggregator.failed is None else 1


def _why_stopped(serving: Serving, aggregator: Aggregator) -> str:
    if not serving.announced or aggregator.job is None:
        return f"aggregator {serving.index} was stopped, or the process that had started it (`qgc run`) has ended"
    rank = serving.index % aggregator.job.spec.workers
    return f"rank {rank}, which had started aggregator {serving.index}, has ended, or the aggregator was stopped"


def child() -> int:
    """Run the aggregator that the parent describes on standard input: what `AggregatorProcess` starts."""
    parent = Parent(sys.stdin.fileno())
    serving = parent.hear(Serving)
    return 1 if serving is None else run(serving, parent)


def _tracing(file: BinaryIO) -> Trace:
    """Return a trace that writes events as JSON lines."""
    encoder = msgspec.json.Encoder(enc_hook=lambda value: value.tolist())  # numpy arrays

    def trace(event: Event) -> None:
        file.write(encoder.encode(event) + b"\n")
        if event.name == "close":
            file.flush()

    return trace


def _stop_signals(*, ignore_interrupt: bool) -> Callable[[], bool]:
    """Stop on SIGTERM and Ctrl-C; a child leaves Ctrl-C to its parent, whose end it notices."""
    received = []
    signal.signal(signal.SIGTERM, lambda signum, frame: received.append(signum))
    if ignore_interrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGINT, lambda signum, frame: received.append(signum))
    return lambda: bool(received)


class AggregatorProcess:
    """An aggregator as a child of this process; it ends with the job, or when this process is gone.

    Args:
        serving: what it is asked to do.
    Raises:
        ConfigError: it cannot be served like this.
        JobFailed: the process did not come up.
    """

    def __init__(self, serving: Serving) -> None:
        serving.check()
        self._process = subprocess.Popen(
            [sys.executable, "-c", _RUN],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=dict(os.environ, OMP_NUM_THREADS="1"),
            start_new_session=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(OSError):  # should it have ended, the next lines notice
            tell(self._process.stdin, serving)
        line = self._process.stdout.readline().decode()
        if not line.startswith(READY):
            self.stop(timeout_s=1.0)
            raise JobFailed(
                f"the aggregator process did not start (exit status {self._process.returncode}, it said {line!r}): "
                f"try it by hand with `qgc aggregator --bind {serving.bind}`"
            )
        self.endpoint = line.removeprefix(READY).strip()
        self.pid = self._process.pid
        _running.add(self)

    def forget_pipe(self) -> None:
        """Close the pipe in a fork of this process: else its end would not be noticed before the fork's."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def announce(self, spec: JobSpec, plan: Plan) -> None:
        """Say what the job is, once, before this process's worker joins.

        Raises:
            JobFailed: the process has ended.
        """
        assert self._process.stdin is not None
        try:
            tell(self._process.stdin, Announced(spec, plan.to_json()))
        except OSError as error:
            raise JobFailed(
                f"the aggregator at {self.endpoint} has ended (exit status {self.poll()}) before the job began"
            ) from error

    def poll(self) -> int | None:
        """Return the exit status, None while it runs."""
        return self._process.poll()

    def stop(self, timeout_s: float | None = 10.0) -> None:
        """Wait for the job's end, at most timeout_s (None: as long as it takes); then make it stop."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout_s)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(5.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


_running: weakref.WeakSet[AggregatorProcess] = weakref.WeakSet()


def _forget_pipes() -> None:
    for each in list(_running):
        each.forget_pipe()


os.register_at_fork(after_in_child=_forget_pipes)  # DataLoader's workers are such forks
