"""The end of a process that takes part in a job: an error that nobody catches, or the interpreter's exit."""

from __future__ import annotations

import atexit
import os
import sys
import traceback
import weakref
from types import TracebackType
from typing import Protocol

from torch_qgc.errors import QGCError

__all__ = ["at_the_end"]


class Member(Protocol):
    """Whoever is to be told of the end."""

    def tell_all(self, problem: str) -> None:
        """Make the job end on every rank, because of an error here."""

    def close(self) -> None:
        """Leave the job in good order; twice does no harm."""


def at_the_end(member: Member, *, alone: bool = False) -> None:
    """Tell all of an error that nobody catches, and leave in good order when the process ends.

    Args:
        alone: tell nobody of an error, and end at once: the others go on without this process.
    """
    reference = weakref.ref(member)
    before, pid = sys.excepthook, os.getpid()
    raised = False

    def tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        nonlocal raised
        raised = True
        before(kind, error, trace)
        alive = reference()
        if alive is None:
            return
        if not alone:
            alive.tell_all("".join(traceback.format_exception_only(kind, error)).strip())
        elif os.getpid() == pid:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)  # a goodbye at the interpreter's exit would tell that this worker's loop has ended here

    def leave() -> None:
        alive = reference()
        if alive is None or os.getpid() != pid:
            return
        try:
            alive.close()
        except QGCError:
            if not raised:  # else the job has failed because of what was shown already
                traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)  # an exception here would not change the exit status

    sys.excepthook = tell
    atexit.register(leave)
