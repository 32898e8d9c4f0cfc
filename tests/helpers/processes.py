"""Processes that a test leaves behind, or does not: children and grandchildren, and ports on which somebody listens."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
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


def running_descendants() -> list[psutil.Process]:
    """Return the children of this process, their children and so on, as far as they run; wait for adopted ones."""
    running = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, ChildProcessError):
            if process.status() != psutil.STATUS_ZOMBIE:
                running.append(process)
            elif process.ppid() == os.getpid():
                os.waitpid(process.pid, os.WNOHANG)
    return running


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
