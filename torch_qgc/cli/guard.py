"""A small process that outlives `qgc run`: if that is killed, it ends the workers and removes the job's key.

It is told of every worker over a pipe, and the pipe's end is the news that nobody is there any more.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable

__all__ = ["Guard", "main", "remaining"]

_RUN = "from torch_qgc.cli.guard import main; main()"


class Guard:
    """The guard, as `qgc run` sees it.

    Args:
        folder: that is removed in the end.
    """

    def __init__(self, folder: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _RUN, folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert self._process.stdin is not None
        self._pipe = self._process.stdin.fileno()

    def enter(self) -> None:
        """Say that this process leads a process group that must not be left behind.

        A worker calls it itself, before it becomes the script: so there is no moment at which it is not guarded.
        """
        self._tell(f"+{os.getpid()}")

    def leave(self, group: int) -> None:
        """Say that a process group has ended."""
        self._tell(f"-{group}")

    def close(self) -> None:
        """Let it remove the folder, and end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _tell(self, text: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # somebody has killed it; the workers need it only if we are, too
            os.write(self._pipe, f"{text}\n".encode())  # short enough to come whole


def remaining(said: Iterable[str]) -> set[int]:
    """Return the process groups that have been entered and not left."""
    groups: set[int] = set()
    for line in said:
        (groups.add if line[0] == "+" else groups.discard)(int(line[1:]))
    return groups


def main() -> None:
    """Be the guard: the folder is the command's argument, standard input is the pipe."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    for group in remaining(sys.stdin):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
    shutil.rmtree(sys.argv[1], ignore_errors=True)
