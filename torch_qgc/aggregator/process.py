"""Run an aggregator: the loop, the process, and how a training process starts one as its child."""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

from torch_qgc.aggregator.job import Aggregator
from torch_qgc.errors import ConfigError, JobFailed
from torch_qgc.protocol.transport import Clock, MonotonicClock, Sent, Transport, ZmqServer

__all__ = ["AggregatorProcess", "check_bind", "main", "serve"]

READY = "torch_qgc aggregator at "
_RUN = "import sys; from torch_qgc.aggregator.process import main; sys.exit(main())"


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
        for peer in gone:
            aggregator.lost(peer)
        if gone:
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run one aggregator in this process; what `qgc aggregator` and the children of a job do."""
    parser = argparse.ArgumentParser(prog="qgc aggregator", description="Run a torch_qgc aggregator.")
    parser.add_argument("--bind", default="tcp://127.0.0.1:*", help="tcp://host:port; port * picks a free one")
    parser.add_argument("--index", type=int, default=0, help="which aggregator this is")
    parser.add_argument("--count", type=int, default=1, help="of how many")
    parser.add_argument("--threads", type=int, default=1, help="threads that decode")
    parser.add_argument("--max-message-mib", type=int, default=256, help="larger messages are cut off")
    parser.add_argument("--insecure", action="store_true", help="allow an address that other machines can reach")
    parser.add_argument("--child", action="store_true", help="stop when standard input is closed")
    options = parser.parse_args(argv)
    try:
        check_bind(options.bind, insecure=options.insecure)
    except ConfigError as error:
        parser.error(str(error))
    stopping = _stop_signals(ignore_interrupt=options.child)
    transport = ZmqServer(options.bind, max_message_bytes=options.max_message_mib << 20)
    print(f"{READY}{transport.endpoint}", flush=True)
    aggregator = Aggregator(options.index, options.count, threads=options.threads)
    try:
        serve(aggregator, transport, MonotonicClock(), stop=lambda: stopping() or (options.child and _orphaned()))
        if not aggregator.finished:
            aggregator.fail("the aggregator was stopped, or the process that had started it (rank 0) has ended")
    except Exception as error:
        aggregator.fail(f"the aggregator failed: {error!r}")
        raise
    finally:
        for peer, frames in aggregator.drain():
            transport.send(peer, frames)
        transport.close()
    with contextlib.suppress(BrokenPipeError):  # a parent that is gone reads nothing
        os.write(1 if options.child else 2, f"torch_qgc aggregator: {aggregator.report()}\n".encode())
    return 1 if aggregator.failed else 0


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
    Raises:
        ConfigError: the host is not allowed.
        JobFailed: the process did not come up.
    """

    def __init__(self, host: str, *, index: int = 0, count: int = 1, insecure: bool = False) -> None:
        bind = f"tcp://{host}:*"
        check_bind(bind, insecure=insecure)
        command = [sys.executable, "-c", _RUN, "--child", "--bind", bind]
        command += ["--index", str(index), "--count", str(count)] + ["--insecure"] * insecure
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
