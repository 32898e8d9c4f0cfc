"""Signals as something that can be waited for beside other things."""

from __future__ import annotations

import contextlib
import signal
import socket
from types import FrameType, TracebackType

__all__ = ["Signals"]


class Signals:
    """While this is open, signals that ask for an end are kept until somebody looks; the end of a child wakes, too.

    Signals that were ignored go on to be, as under nohup.
    """

    _ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self._waking, self._woken = socket.socketpair()
        self._waking.setblocking(False)
        self._woken.setblocking(False)
        self._came: list[int] = []

    def __enter__(self) -> Signals:
        ends = [signum for signum in self._ENDS if signal.getsignal(signum) is not signal.SIG_IGN]
        self._before = {signum: signal.signal(signum, self._note) for signum in (*ends, signal.SIGCHLD)}
        self._woke_before = signal.set_wakeup_fd(self._waking.fileno(), warn_on_full_buffer=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._woke_before)
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._waking.close()
        self._woken.close()

    def fileno(self) -> int:
        """Return what becomes readable when a signal comes."""
        return self._woken.fileno()

    def take(self) -> list[int]:
        """Return the signals that have asked for an end since the last look."""
        with contextlib.suppress(BlockingIOError):
            while self._woken.recv(4096):
                pass
        came, self._came[:] = list(self._came), []
        return came

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if signum != signal.SIGCHLD:
            self._came.append(signum)
