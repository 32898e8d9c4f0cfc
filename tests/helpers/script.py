"""A script in a forked process of its own, which ends as an interpreter does, and what it tells those who watch it."""

from __future__ import annotations

import atexit
import faulthandler
import json
import logging
import mmap
import os
import pickle
import resource
import signal
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from torch_qgc import Network

MOST_STEPS = 4096


class Board:
    """Memory that all processes of a case share: when each rank has made each step, and how far they may go.

    Attributes:
        made_s: [ranks, MOST_STEPS] time.monotonic() at the end of each rank's each step; 0: it was not made.
        waited_s: [ranks, MOST_STEPS] for how long each rank stood at the gate before each step.
        failed_s: [ranks] time.monotonic() when a rank's script has raised; 0: it has not.
    """

    def __init__(self, ranks: int) -> None:
        steps = ranks * MOST_STEPS
        memory = np.frombuffer(mmap.mmap(-1, 8 * (2 * steps + ranks + 2)), dtype=np.float64)
        self.made_s, self.waited_s = memory[: 2 * steps].reshape(2, ranks, MOST_STEPS)
        self.failed_s = memory[2 * steps : -2]
        self._others = memory[-2:]

    @property
    def gate(self) -> float:
        """The step that no rank begins before the gate has been moved."""
        return float(self._others[0])

    @gate.setter
    def gate(self, step: float) -> None:
        self._others[0] = step

    @property
    def fault_s(self) -> float:
        """time.monotonic() when the fault was staged; 0: it was not yet."""
        return float(self._others[1])

    def fault(self) -> None:
        """Note that the fault is staged now."""
        self._others[1] = time.monotonic()


@dataclass
class End:
    """What a script has come to: a value, or an error, as type name and text.

    Attributes:
        value: what it has returned.
        error: "JobFailed: ...", or None.
        names: of the error's class and its base classes.
    """

    value: Any = None
    error: str | None = None
    names: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Member:
    """What a script is handed: its rank, and how those who watch it hear of it."""

    rank: int
    ranks: int
    folder: Path
    board: Board
    through: Callable[[str], str]

    def may_begin(self, step: int) -> None:
        """Wait at the gate."""
        begun_s = time.monotonic()
        while step >= self.board.gate:
            time.sleep(0.002)
        self.board.waited_s[self.rank, step] = time.monotonic() - begun_s

    def made(self, step: int) -> None:
        """Note that a step was made."""
        self.board.made_s[self.rank, step] = time.monotonic()

    def note(self, name: str, value: Any = None) -> None:
        """Leave a note, for `Stage.note`."""
        path = self.folder / f"{self.rank}.{name}"
        path.with_suffix(".half").write_text(json.dumps(value))
        path.with_suffix(".half").rename(path)

    def way(self, endpoint: str) -> str:
        """Note where an aggregator is, and return the address at which this rank is to reach it."""
        self.note("endpoint", endpoint)
        return self.through(endpoint)

    def network(self, **options: Any) -> Network:
        """Return a network that goes the way that the case has laid for this rank."""
        return Network(through=self.way, **options)


def run_as_script(script: Callable[[Member], Any], member: Member, timeout: Any) -> None:
    """Run a script in this process, which was forked for it, and end as an interpreter that runs it does."""
    _forget_parent()
    _prepare(member.folder / f"{member.rank}.log")
    status = 0
    try:
        store = f"file://{member.folder / 'store'}"
        dist.init_process_group("gloo", init_method=store, rank=member.rank, world_size=member.ranks, timeout=timeout)
        _write_end(member, End(value=script(member)))
        dist.destroy_process_group()
    except BaseException as error:
        member.board.failed_s[member.rank] = time.monotonic()
        names = [kind.__name__ for kind in type(error).__mro__]
        _write_end(member, End(error=f"{type(error).__name__}: {error}", names=names))
        status = 1
        if not isinstance(error, SystemExit):
            sys.excepthook(type(error), error, error.__traceback__)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.exit(status)


def read_end(folder: Path, rank: int) -> End | None:
    """Return what a rank's script has come to; None if it has not."""
    try:
        end: End = pickle.loads((folder / f"{rank}.end").read_bytes())
    except FileNotFoundError:
        return None
    return end


def _write_end(member: Member, end: End) -> None:
    half = member.folder / f"{member.rank}.half"
    half.write_bytes(pickle.dumps(end))
    half.rename(member.folder / f"{member.rank}.end")


def _forget_parent() -> None:
    """Forget what the parent has to do at its own end."""
    atexit._clear()
    weakref.finalize._registry.clear()  # type: ignore[attr-defined]
    weakref.finalize._registered_with_atexit = False  # type: ignore[attr-defined]
    sys.excepthook = sys.__excepthook__
    logging.getLogger().handlers.clear()


def _prepare(log: Path) -> None:
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(stream), "w", buffering=1) for stream in (1, 2))
    faulthandler.enable(sys.stderr)  # SIGABRT ends a process with its traceback
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ |= {"PYTHONFAULTHANDLER": "1", "TMPDIR": str(log.parent / "tmp"), "OMP_NUM_THREADS": "1"}
    tempfile.tempdir = None
    torch.set_num_threads(1)
    torch.manual_seed(0)
