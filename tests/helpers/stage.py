"""A job of real processes on which faults are staged: its ranks are forked, watched and hit, and ended if they hang."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Collection, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil

from helpers.processes import described, is_listened_on, running_descendants
from helpers.proxy import Proxy
from helpers.ranks import PATIENCE_S
from helpers.script import STEPS, Board, End, Member, read_end, run_as_script

CONTEXT = multiprocessing.get_context("fork")
GATE = 40  # no rank goes on before the fault has happened
#: A rank, or the aggregator that rank 0 has started.
Role = int | Literal["aggregator"]


class Stage:
    """The processes of one case.

    Args:
        folder: for what they leave: notes, logs, and temporary files, of which nothing may remain.
        limit_s: for whatever is waited for; then everybody's traceback is told.
    Attributes:
        steps: that the scripts are to make.
        fault_s: time.monotonic() when the fault was staged.
        killed: ranks that the case has killed.
    """

    def __init__(self, folder: Path, limit_s: float = PATIENCE_S) -> None:
        self.folder, self.limit_s = folder, limit_s
        self.steps = STEPS
        self.fault_s = math.inf
        self.killed: set[int] = set()
        self.hung: set[int] = set()
        self.proxies: dict[int, Proxy] = {}
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._stopped: set[int] = set()
        (folder / "tmp").mkdir()

    # --- before -------------------------------------------------------------------------------------------

    def proxy(self, rank: int) -> Proxy:
        """Lay a rank's way to the aggregator through a proxy; before the job is started."""
        self.proxies[rank] = Proxy(lambda: self.note(0, "endpoint"))
        return self.proxies[rank]

    def start(
        self,
        script: Callable[[Member], Any],
        *,
        ranks: int = 4,
        steps: int = STEPS,
        gate: float = GATE,
        gloo_timeout_s: float = PATIENCE_S,
    ) -> None:
        """Fork a process for each rank that runs a script."""
        self.steps, self.board = steps, Board(ranks)
        self.board.gate = gate
        for rank in range(ranks):
            through = self.proxies[rank].through if rank in self.proxies else _straight
            member = Member(rank, ranks, self.folder, self.board, through)
            process = CONTEXT.Process(target=run_as_script, args=(script, member, timedelta(seconds=gloo_timeout_s)))
            process.start()
            self._processes.append(process)
        for proxy in self.proxies.values():
            proxy.start()

    @property
    def ranks(self) -> range:
        """All ranks."""
        return range(len(self._processes))

    # --- during -------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def after(self, step: int, *, of: int = 0) -> Iterator[None]:
        """Wait until a rank has made a step; open the gate when the fault in this block has been staged."""
        self.until(lambda: self.board.made_s[of, step] > 0, f"step {step} of rank {of}")
        self.fault_s = time.monotonic()
        yield
        self.board.gate = math.inf

    def until(self, condition: Callable[[], Any], what: str) -> None:
        """Wait for what must happen."""
        give_up_s = time.monotonic() + self.limit_s
        while not condition():
            running = [rank for rank in self.ranks if self._processes[rank].is_alive()]
            if time.monotonic() > give_up_s or not running:
                raise AssertionError(f"{what}: it has not happened. {self._tell_of(running)}")
            time.sleep(0.002)

    def wait(self, seconds: float) -> None:
        """Let a fault last."""
        time.sleep(seconds)

    def note(self, rank: int, name: str) -> Any:
        """Wait for a note that a rank leaves."""
        path = self.folder / f"{rank}.{name}"
        self.until(path.exists, f"note {name!r} of rank {rank}")
        return json.loads(path.read_text())

    def pid(self, role: Role) -> int:
        """Return the number of a rank's process, or of the aggregator that rank 0 has started."""
        if role != "aggregator":
            pid = self._processes[role].pid
            assert pid is not None
            return pid
        started = psutil.Process(self.pid(0)).children()
        return next(each.pid for each in started if any("torch_qgc.aggregator" in part for part in each.cmdline()))

    def kill(self, role: Role, how: signal.Signals = signal.SIGKILL) -> None:
        """End a process by a signal."""
        os.kill(self.pid(role), how)
        if role != "aggregator" and how == signal.SIGKILL:
            self.killed.add(role)

    def stop(self, role: Role) -> int:
        """Stop a process; return its number."""
        pid = self.pid(role)
        os.kill(pid, signal.SIGSTOP)
        self._stopped.add(pid)
        return pid

    def resume(self) -> None:
        """Let all go on that were stopped."""
        for pid in self._stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        self._stopped.clear()

    def has_ended(self, rank: int) -> bool:
        """Tell whether a rank's process has ended."""
        return not self._processes[rank].is_alive()

    # --- the end ------------------------------------------------------------------------------------------

    def end(self, *, but: Collection[int] = ()) -> None:
        """Wait until the processes of all ranks have ended, but for some."""
        awaited = [rank for rank in self.ranks if rank not in but]
        self.until(lambda: all(self.has_ended(rank) for rank in awaited), f"end of ranks {awaited}")

    def came_to(self, rank: int) -> End | None:
        """Return what a rank's script has come to; None if it was killed before."""
        return read_end(self.folder, rank)

    def assert_equal(self, ranks: Collection[int] | None = None) -> None:
        """Assert that all ranks, but for those that were killed, have made all steps and have equal parameters."""
        survivors = [rank for rank in self.ranks if rank not in self.killed] if ranks is None else list(ranks)
        ends = {rank: self.came_to(rank) for rank in survivors}
        for rank, end in ends.items():
            assert end is not None, f"rank {rank} has come to no end:\n{self.log(rank)}"
            assert end.error is None, f"rank {rank} failed:\n{self.log(rank)}"
            assert self._processes[rank].exitcode == 0, f"rank {rank} has ended badly:\n{self.log(rank)}"
        values = {rank: end.value for rank, end in ends.items() if end is not None}
        assert {value["step"] for value in values.values()} == {self.steps}, values
        assert len({value["parameters"] for value in values.values()}) == 1, values

    def assert_failed(self, text: str, *, but: Collection[int] = ()) -> None:
        """Assert that all ranks, but for those that were killed and some, have raised an error of torch_qgc's own.

        Args:
            text: that the errors have in them, so that one knows whose fault it is.
            but: ranks with an error of another kind: the one in which it began.
        """
        for rank in self.ranks:
            if rank in self.killed:
                continue
            end = self.came_to(rank)
            assert end is not None, f"rank {rank} has come to no end:\n{self.log(rank)}"
            assert end.error is not None, f"rank {rank} has raised nothing, and returned {end.value}"
            assert self._processes[rank].exitcode != 0, f"rank {rank} has exited as if nothing had happened"
            if rank not in but:
                assert "QGCError" in end.names, f"rank {rank}: expected an error by name, got {end.error}"
                assert text in end.error, f"rank {rank}: expected an error with {text!r}, got {end.error}"

    def log(self, rank: int) -> str:
        """Return what a rank has written to stdout and stderr."""
        path = self.folder / f"{rank}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def close(self) -> None:
        """End what is left, and assert that there was nothing."""
        self.resume()
        for rank, process in enumerate(self._processes):
            if process.is_alive():
                self.hung.add(rank)
                process.kill()
            process.join()
        for proxy in self.proxies.values():
            proxy.close()
        left = running_descendants()
        give_up_s = time.monotonic() + (1.0 if self.hung else self.limit_s)
        while left and time.monotonic() < give_up_s:
            time.sleep(0.01)
            left = running_descendants()
        behind = [f"process {described(process)}" for process in left]
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        running_descendants()
        endpoints = {json.loads(path.read_text()) for path in self.folder.glob("*.endpoint")}
        behind += [f"port {endpoint}" for endpoint in endpoints if is_listened_on(endpoint)]
        behind += [f"file {path.name}" for path in (self.folder / "tmp").iterdir()]
        if not self.hung:
            assert not behind, f"left behind: {behind}"

    def _tell_of(self, running: list[int]) -> str:
        """End all processes that run, and say where they were."""
        told = [self._where(rank) for rank in self.ranks]
        logs = {rank: len(self.log(rank)) for rank in running}
        self.hung |= set(running)
        self.resume()
        for process in running_descendants():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGABRT)  # which faulthandler answers with a traceback
        for rank in running:
            self._processes[rank].join(5.0)
        told += [f"rank {rank} was here:\n{self.log(rank)[logs[rank] :]}" for rank in running]
        return "\n".join(told)

    def _where(self, rank: int) -> str:
        made = int((self.board.made_s[rank] > 0).sum())
        end = self.came_to(rank)
        if not self.has_ended(rank):
            state = "runs" if end is None else f"does not end after {end.error or 'its script has returned'}"
        else:
            state = f"has ended ({self._processes[rank].exitcode})"
        return f"rank {rank} {state}, {made} steps made"

    # --- what was seen ------------------------------------------------------------------------------------

    def measured(self) -> dict[str, Any]:
        """Return what was seen of the case, for a table."""
        survivors = [rank for rank in self.ranks if rank not in self.killed]
        ends = {rank: self.came_to(rank) for rank in survivors}
        failed = [rank for rank, end in ends.items() if end is not None and end.error is not None]
        went_on = [rank for rank, end in ends.items() if end is not None and end.error is None]
        outcomes: dict[str, list[int]] = {}
        for rank, end in ends.items():
            if rank in self.hung:
                name = "hung"
            else:
                name = "ended" if end is None else (end.error or "trained to the end").split(":")[0]
            outcomes.setdefault(name, []).append(rank)
        gaps = [gap for rank in went_on for gap in self._gaps_s(rank)]
        told_s = [self.board.failed_s[rank] - self.fault_s for rank in failed]
        made = [int((self.board.made_s[rank] > 0).sum()) for rank in went_on or survivors]
        return {
            "ranks": len(self.ranks),
            "outcome": "; ".join(f"{name}: {_shown(ranks)}" for name, ranks in outcomes.items()),
            "killed": _shown(sorted(self.killed)),
            "steps": self.steps,
            "steps_lost": self.steps - min(made, default=0),
            "stall_s": f"{max(gaps):.3f}" if gaps else "",
            "told_s": f"{max(told_s):.3f}" if told_s and math.isfinite(self.fault_s) else "",
        }

    def _gaps_s(self, rank: int) -> Iterator[float]:
        """Yield the times between a rank's steps that end after the fault."""
        made_s = self.board.made_s[rank]
        for before_s, after_s in itertools.pairwise(np.sort(made_s[made_s > 0]).tolist()):
            if after_s > self.fault_s:
                yield after_s - before_s


def _straight(endpoint: str) -> str:
    return endpoint


def _shown(ranks: Collection[int]) -> str:
    return " ".join(map(str, ranks))
