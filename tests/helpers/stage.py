"""A job of real processes on which faults are staged: its ranks are forked, watched and hit, and ended if they hang."""

from __future__ import annotations

import contextlib
import fnmatch
import json
import math
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable, Collection, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import psutil

from helpers.processes import Descendants, described, is_listened_on
from helpers.proxy import Proxy
from helpers.ranks import PATIENCE_S
from helpers.script import Board, End, Member, read_end, run_as_script
from helpers.training import STEPS

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
        killed: ranks that the case has killed.
        hit: ranks that it has done something to.
        others_files: a pattern of temporary files that may remain, as they are not the package's.
    """

    def __init__(self, folder: Path, limit_s: float = PATIENCE_S) -> None:
        self.folder, self.limit_s = folder, limit_s
        self.steps = STEPS
        self.killed: set[int] = set()
        self.hit: set[Role] = set()
        self.hung: set[int] = set()
        self.others_files = ""
        self.proxies: dict[int, Proxy] = {}
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._stopped: set[int] = set()
        self.descendants = Descendants()
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
        self.board.fault()
        yield
        self.board.gate = math.inf

    def until(self, condition: Callable[[], Any], what: str) -> None:
        """Wait for what must happen."""
        give_up_s = time.monotonic() + self.limit_s
        while not condition():
            running = [rank for rank in self.ranks if self._processes[rank].is_alive()]
            over = time.monotonic() > give_up_s or (self._processes and not running)
            if over and not condition():
                raise AssertionError(f"{what}: it has not happened. {self._tell_of(running)}")
            time.sleep(0.002)

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
        self.hit.add(role)
        if role != "aggregator" and how in (signal.SIGKILL, signal.SIGTERM):
            self.killed.add(role)

    def stop(self, role: Role, for_s: float | None = None) -> None:
        """Stop a process, until `resume`, or for some time, in which the others may go on."""
        pid = self.pid(role)
        os.kill(pid, signal.SIGSTOP)
        self.hit.add(role)
        self._stopped.add(pid)
        if for_s is not None:
            self.let_go_on()
            time.sleep(for_s)
            self.resume()
            self.until_back(role)

    def cut(self, *ranks: int) -> None:
        """Reset the connections of ranks that have a proxy; they may come back."""
        for rank in ranks:
            self.proxies[rank].cut()
        self.hit |= set(ranks)

    def cut_off(self, *ranks: int, for_s: float, noticed: bool) -> None:
        """Take their network from ranks that have a proxy, for some time, in which the others may go on."""
        for rank in ranks:
            self.proxies[rank].silent = True
            if noticed:
                self.proxies[rank].cut()
        self.hit |= set(ranks)
        self.let_go_on()
        time.sleep(for_s)
        for rank in ranks:
            self.proxies[rank].silent = False
        self.until_back(*ranks)

    def until_back(self, *roles: Role) -> None:
        """Wait until ranks have come to the gate, too."""
        for rank in set(roles) & set(self.ranks):
            self.until(lambda rank=rank: self.board.made_s[rank, self.steps - 2] > 0, f"return of rank {rank}")

    def let_go_on(self) -> None:
        """Move the gate to the last step, so that whoever is not there is not too late for the end."""
        self.board.gate = self.steps - 1

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

    def assert_equal_or_failed(self, text: str) -> None:
        """Assert either, where it depends on chance what can be done."""
        ends = [self.came_to(rank) for rank in self.ranks if rank not in self.killed]
        if any(end is not None and end.error is not None for end in ends):
            self.assert_failed(text)
        else:
            self.assert_equal()

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
        self.descendants.wait(1.0 if self.hung else self.limit_s)
        left = self.descendants.running()
        behind = [f"process {described(process)}" for process in left]
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.descendants.wait(self.limit_s)
        endpoints = {json.loads(path.read_text()) for path in self.folder.glob("*.endpoint")}
        behind += [f"port {endpoint}" for endpoint in endpoints if is_listened_on(endpoint)]
        files = {path.name for path in (self.folder / "tmp").iterdir()}
        behind += [f"file {name}" for name in files if not fnmatch.fnmatch(name, self.others_files)]
        if not self.hung:
            assert not behind, f"left behind: {behind}"

    def _tell_of(self, running: list[int]) -> str:
        """End all processes that run, and say where they were."""
        told = [self._where(rank) for rank in self.ranks]
        logs = {rank: len(self.log(rank)) for rank in running}
        self.hung |= set(running)
        self.resume()
        for process in self.descendants.running():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGABRT)  # which faulthandler answers with a traceback
        for rank in running:
            self._processes[rank].join(5.0)
        told += [f"rank {rank} was here:\n{_own_lines(self.log(rank)[logs[rank] :])}" for rank in running]
        return "\n".join(told)

    def _where(self, rank: int) -> str:
        made = int((self.board.made_s[rank] > 0).sum())
        end = self.came_to(rank)
        if not self.has_ended(rank):
            state = "runs" if end is None else f"does not end after {end.error or 'its script has returned'}"
        else:
            state = f"has ended ({self._processes[rank].exitcode})"
        return f"rank {rank} {state}, {made} steps made"


def _straight(endpoint: str) -> str:
    return endpoint


def _own_lines(dump: str) -> str:
    """Return a traceback without what is the same in all: who has forked the process, and what it has loaded."""
    return re.sub(r"(?m) in run_as_script\n(  File .*\n)*|^Extension modules: .*\n", "\n", dump)
