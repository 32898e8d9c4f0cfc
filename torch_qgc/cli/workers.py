"""A worker's process: what it is told, what it prints, and that nothing of it is left."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import BinaryIO

from torch_qgc.cli.guard import Guard
from torch_qgc.cli.lines import Lines
from torch_qgc.protocol import environment
from torch_qgc.protocol.identity import KEY_FILE_VARIABLE

__all__ = ["WorkerProcess", "environment_of"]

_MOST_READS = 64  # of 64 KiB, after the end


def environment_of(
    worker: int, *, workers: int, here: range, endpoints: Sequence[str], key_file: str, restarts: int
) -> dict[str, str]:
    """Return the environment of a worker, in which `dist.init_process_group(...)` makes a group of it alone.

    Args:
        workers: of the job.
        here: the numbers of those on this machine.
        endpoints, key_file: of the job's aggregators.
        restarts: of this worker so far.
    """
    told = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC_")}
    if len(here) > 1:
        told.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does: not every worker takes all cores
    return {
        **told,
        **environment.variables(worker, workers, endpoints, restarts),
        KEY_FILE_VARIABLE: key_file,
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": str(worker - here.start),
        "LOCAL_WORLD_SIZE": str(len(here)),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",  # a free one: nobody else has to know it
        "PYTHONUNBUFFERED": "1",  # else lines come long after they were printed
    }


class WorkerProcess:
    """One worker, in a session and process group of its own.

    Args:
        worker: its number.
        command: of its script.
        variables: its environment.
        guard: ends it if this process cannot.
    """

    def __init__(self, worker: int, command: Sequence[str], variables: Mapping[str, str], guard: Guard) -> None:
        self._process = subprocess.Popen(
            command,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=guard.enter,  # this process has no other threads of Python's, which might hold a lock meanwhile
        )
        self._guard = guard
        prefix = f"[{worker}] ".encode()
        self._streams: dict[int, tuple[BinaryIO, Lines]] = {}
        for pipe, out in ((self._process.stdout, sys.stdout.buffer), (self._process.stderr, sys.stderr.buffer)):
            assert pipe is not None
            os.set_blocking(pipe.fileno(), False)
            self._streams[pipe.fileno()] = (out, Lines(prefix))

    @property
    def descriptors(self) -> list[int]:
        """Where it prints; each can be waited for."""
        return list(self._streams)

    @property
    def has_ended(self) -> bool:
        """It has ended, and is to be cleared away."""
        return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def pass_on(self, descriptor: int) -> bool:
        """Print some of what it has printed, with its number in front; tell whether more may come."""
        data = self._read(descriptor)
        if data is not None:
            self._print(descriptor, data)
        return data != b""

    def send_signal(self, signum: int) -> None:
        """Send a signal to the script, and to no helpers of it: it decides what becomes of these."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, signum)

    def kill(self) -> None:
        """End it, and all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def clear_away(self) -> int:
        """End what it may have left, print the rest, and return its status, as of `subprocess.Popen.returncode`."""
        self.kill()  # before it is waited for: until then nobody else can get its number
        self._guard.leave(self._process.pid)
        status = self._process.wait()
        for descriptor in self._streams:
            for _ in range(_MOST_READS):  # whoever has left its process group may go on printing
                if not (data := self._read(descriptor)):
                    break
                self._print(descriptor, data)
            self._print(descriptor, b"")
        for pipe in (self._process.stdout, self._process.stderr):
            assert pipe is not None
            pipe.close()
        return status

    def _read(self, descriptor: int) -> bytes | None:
        """Return what has been printed; empty: nothing will be any more; None: nothing was."""
        try:
            return os.read(descriptor, 1 << 16)
        except BlockingIOError:
            return None

    def _print(self, descriptor: int, data: bytes) -> None:
        """Print what has been read; nothing: the rest of a line that has no end."""
        out, lines = self._streams[descriptor]
        out.write(lines.feed(data) if data else lines.end())
        out.flush()
