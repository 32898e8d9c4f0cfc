"""Processes that a test leaves behind, or does not: children and grandchildren, and ports on which somebody listens."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import psutil

_PR_SET_CHILD_SUBREAPER = 36


@contextlib.contextmanager
def adopting_orphans() -> Iterator[None]:
    """Let processes whose parent dies become children of this one, so that none of them gets out of sight."""
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


class Descendants:
    """The processes that come from this one from now on, those that come from them, and so on."""

    def __init__(self) -> None:
        self._before = {process.pid for process in psutil.Process().children(recursive=True)}

    def running(self) -> list[psutil.Process]:
        """Return those that run."""
        found = psutil.Process().children(recursive=True)
        return [each for each in found if each.pid not in self._before and not _has_ended(each)]

    def wait(self, timeout_s: float) -> None:
        """Wait until none runs, at most for that long, and clear away those that were adopted."""
        give_up_s = time.monotonic() + timeout_s
        while self.running() and time.monotonic() < give_up_s:
            time.sleep(0.01)
        for each in psutil.Process().children():
            if each.pid not in self._before and _has_ended(each):
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(each.pid, os.WNOHANG)


def _has_ended(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def described(process: psutil.Process) -> str:
    """Return a process's number and command line."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return f"{process.pid} ({' '.join(process.cmdline())[:200]})"
    return f"{process.pid} (has ended)"


def most_memory_bytes(pid: int) -> int:
    """Return the most memory that a process has had resident."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def is_listened_on(endpoint: str) -> bool:
    """Tell whether somebody listens at tcp://host:port."""
    parts = urlsplit(endpoint)
    with socket.socket() as probe:
        return probe.connect_ex((parts.hostname, parts.port)) == 0
