"""Run an aggregator: the loop, the process, and how a training process starts one as its child."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import BinaryIO
from urllib.parse import urlsplit

import msgspec

from torch_qgc.aggregator.aggregator import Aggregator
from torch_qgc.errors import ConfigError, JobFailed
from torch_qgc.job.events import Event, Trace, silent
from torch_qgc.protocol.transport import Clock, MonotonicClock, Sent, Transport, ZmqServer

__all__ = ["AggregatorProcess", "Serving", "check_bind", "run", "serve"]

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
        gone = set()
        for peer, frames in aggregator.drain():
            if peer not in gone and transport.send(peer, frames) is Sent.GONE:
                gone.add(peer)
        if gone:  # a worker that has said goodbye may be gone before that is read
            for peer, frames in transport.poll(0.0):
                aggregator.receive(peer, frames, clock.now())
            for peer in gone:
                aggregator.lost(peer, clock.now())
            aggregator.tick(clock.now())
        if aggregator.finished:
            break


def check_bind(bind: str, *, insecure: bool) -> None:
    """Refuse to listen beyond this machine without an explicit word.

    Raises:
        ConfigError: the address is not tcp://host:port, or not loopback and `insecure` is False.
    """
    parts = urlsplit(bind)
    if parts.scheme != "tcp" or not parts.hostname:
        raise ConfigError(f"bind: expected tcp://host:port (port * picks a free one), got {bind!r}")
    try:
        loopback = ipaddress.ip_address(parts.hostname).is_loopback
    except ValueError:
        loopback = parts.hostname == "localhost"
    if not loopback and not insecure:
        raise ConfigError(
            f"bind: {bind} can be reached from other machines, and the traffic is neither encrypted nor authenticated: "
            "bind to 127.0.0.1, or allow it with insecure=True (--insecure) on a network you trust"
        )


class Serving(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one aggregator process is asked to do.

    Args:
        bind: tcp://host:port; port * picks a free one.
        index, count: which aggregator this is, of how many.
        threads: that decode.
        max_message_mib: larger messages are cut off.
        insecure: allow an address that other machines can reach.
        child: a training process has started it: stop when standard input is closed, leave Ctrl-C to the parent.
        trace: a file that gets one JSON line per event of the job (`torch_qgc.job.events`); None: none.
    """

    bind: str = "tcp://127.0.0.1:*"
    index: int = 0
    count: int = 1
    threads: int = 1
    max_message_mib: int = 256
    insecure: bool = False
    child: bool = False
    trace: str | None = None


def run(serving: Serving) -> int:
    """Run one aggregator in this process until its job is finished; return the exit status, 1 if that has failed.

    Raises:
        ConfigError: it cannot be served like this.
    """
    check_bind(serving.bind, insecure=serving.insecure)
    if not 0 <= serving.index < serving.count:
        raise ConfigError(
            f"index: expected a number in [0, {serving.count}), got {serving.index}: count aggregators from 0"
        )
    logging.basicConfig(
        format="%(asctime)s torch_qgc aggregator: %(message)s", level=logging.WARNING if serving.child else logging.INFO
    )
    stopping = _stop_signals(ignore_interrupt=serving.child)
    clock = MonotonicClock()
    with contextlib.ExitStack() as stack:
        trace = silent if serving.trace is None else _tracing(stack.enter_context(open(serving.trace, "wb")))
        transport = ZmqServer(serving.bind, max_message_bytes=serving.max_message_mib << 20)
        stack.callback(transport.close)
        print(f"{READY}{transport.endpoint}", flush=True)
        aggregator = Aggregator(serving.index, serving.count, threads=serving.threads, trace=trace)
        try:
            serve(aggregator, transport, clock, stop=lambda: stopping() or (serving.child and _orphaned()))
            if not aggregator.finished:
                why = "the aggregator was stopped, or the process that had started it (rank 0) has ended"
                aggregator.fail(why, clock.now())
        except Exception as error:
            aggregator.fail(f"the aggregator failed: {error!r}", clock.now())
            raise
        finally:
            for peer, frames in aggregator.drain():
                transport.send(peer, frames)
    with contextlib.suppress(BrokenPipeError):  # a parent that is gone reads nothing
        os.write(1 if serving.child else 2, f"torch_qgc aggregator: {aggregator.report()}\n".encode())
    return 0 if aggregator.finished and aggregator.failed is None else 1


def child() -> int:
    """Run the aggregator that the first argument describes, as JSON: what `AggregatorProcess` starts."""
    return run(msgspec.json.decode(sys.argv[1], type=Serving))


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


def _orphaned() -> bool:
    """Tell whether standard input, which the parent holds open, has been closed."""
    readable, _, _ = select.select([0], [], [], 0)
    return bool(readable) and os.read(0, 1) == b""


class AggregatorProcess:
    """An aggregator as a child of a training process; it ends with the job, or when its parent is gone.

    Args:
        host: address to listen on; the port is picked.
        index, count: which aggregator of how many.
        insecure: allow a host that other machines can reach.
        trace: a file for the events of the job, see `Serving`.
    Raises:
        ConfigError: the host is not allowed.
        JobFailed: the process did not come up.
    """

    def __init__(
        self, host: str, *, index: int = 0, count: int = 1, insecure: bool = False, trace: str | None = None
    ) -> None:
        bind = f"tcp://{host}:*"
        check_bind(bind, insecure=insecure)
        serving = Serving(bind=bind, index=index, count=count, insecure=insecure, child=True, trace=trace)
        command = [sys.executable, "-c", _RUN, msgspec.json.encode(serving).decode()]
        environment = dict(os.environ, OMP_NUM_THREADS="1")
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True, text=True
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.startswith(READY):
            self.stop(timeout_s=1.0)
            raise JobFailed(
                f"the aggregator process did not start (exit status {self._process.returncode}, it said {line!r}): "
                f"try it by hand with `qgc aggregator --bind {bind}`"
            )
        self.endpoint = line.removeprefix(READY).strip()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """Return the exit status, None while it runs."""
        return self._process.poll()

    def stop(self, timeout_s: float = 10.0) -> None:
        """Wait for the job's end, at most timeout_s; then make it stop."""
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
