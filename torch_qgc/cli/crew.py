"""The workers of one machine while they run: what they print, who has ended, what signals ask for."""

from __future__ import annotations

import selectors
import signal
import sys
import time
from collections.abc import Callable, Sequence

from torch_qgc.aggregator.process import AggregatorProcess
from torch_qgc.cli.signals import Signals
from torch_qgc.cli.supervisor import Standing, Supervisor
from torch_qgc.cli.workers import WorkerProcess

__all__ = ["Crew", "say"]


def say(text: str) -> None:
    """Tell the user."""
    print(f"qgc: {text}", file=sys.stderr, flush=True)


class Crew:
    """Do what the supervisor decides, and tell it what has become of it.

    Args:
        supervisor: of these workers.
        start: (worker, its restarts so far) -> its process.
        signals: that ask for an end; a worker's end wakes, too.
        grace_s: between such a signal and SIGKILL.
        aggregators: that run here; when one has ended, so has the job.
        elsewhere: other machines' workers need these aggregators, also when all workers here have ended.
    """

    def __init__(
        self,
        supervisor: Supervisor,
        start: Callable[[int, int], WorkerProcess],
        signals: Signals,
        *,
        grace_s: float,
        aggregators: Sequence[AggregatorProcess] = (),
        elsewhere: bool = False,
    ) -> None:
        self._supervisor, self._start, self._signals, self._grace_s = supervisor, start, signals, grace_s
        self._aggregators, self._elsewhere = aggregators, elsewhere
        self._processes: dict[int, WorkerProcess] = {}
        self._owners: dict[int, WorkerProcess] = {}  # descriptor -> whose output it is
        self._ended_by: int | None = None  # a signal
        self._kill_at_s: float | None = None
        self._selector = selectors.DefaultSelector()
        self._selector.register(signals, selectors.EVENT_READ)

    def run(self) -> int:
        """Go on until all have come to their end.

        Returns:
            0 if every worker has done its work, 128 + n if signal n has ended them before, else 1.
        """
        self._look_after()
        while not self._supervisor.finished or self._is_needed_elsewhere:
            self._start_due()
            self._wait()
            self._look_after()
        if all(standing.done for standing in self._supervisor.standings.values()):
            return 0
        return 1 if self._ended_by is None else 128 + self._ended_by

    def kill(self) -> None:
        """End all workers at once."""
        for process in self._processes.values():
            process.kill()
        for worker in list(self._processes):
            self._clear_away(worker)
        self._selector.close()

    @property
    def _is_needed_elsewhere(self) -> bool:
        """Workers on other machines need the aggregators that run here."""
        aggregates = bool(self._aggregators) and self._all_aggregators_run()
        return self._elsewhere and aggregates and self._ended_by is None

    def _start_due(self) -> None:
        for worker in self._supervisor.due(time.monotonic()):
            process = self._start(worker, self._supervisor.standings[worker].starts)
            self._supervisor.started(worker, time.monotonic())
            self._processes[worker] = process
            for descriptor in process.descriptors:
                self._selector.register(descriptor, selectors.EVENT_READ)
                self._owners[descriptor] = process

    def _wait(self) -> None:
        """Wait until something is to be done, and pass on what workers print."""
        now = time.monotonic()
        waits = [self._supervisor.wakeup_in(now), None if self._kill_at_s is None else max(0.0, self._kill_at_s - now)]
        timeout_s = min((wait for wait in waits if wait is not None), default=None)
        for key, _ in self._selector.select(timeout_s):
            process = self._owners.get(key.fd)
            if process is not None and not process.pass_on(key.fd):
                self._forget(key.fd)

    def _look_after(self) -> None:
        """Obey signals, and see who has ended."""
        for signum in self._signals.take():
            self._end(signum)
        if self._kill_at_s is not None and time.monotonic() >= self._kill_at_s:
            self._kill_at_s = None
            for process in self._processes.values():
                process.kill()
        for worker in [k for k, process in self._processes.items() if process.has_ended]:
            status = self._clear_away(worker)
            self._tell(worker, self._supervisor.ended(worker, status, time.monotonic()))
        if not self._all_aggregators_run():
            waiting = [k for k, s in self._supervisor.standings.items() if s.due_at_s is not None]
            self._supervisor.stop()
            if waiting:
                say(f"workers {waiting} are not started again: the job has ended")

    def _all_aggregators_run(self) -> bool:
        return all(aggregator.poll() is None for aggregator in self._aggregators)

    def _end(self, signum: int) -> None:
        """Pass a signal on, and have some patience; a second one needs none."""
        now = time.monotonic()
        self._kill_at_s = now + self._grace_s if self._ended_by is None else now
        if self._ended_by is None:
            self._ended_by = signum
            self._supervisor.stop()
            for process in self._processes.values():
                process.send_signal(signum)

    def _clear_away(self, worker: int) -> int:
        process = self._processes.pop(worker)
        for descriptor in process.descriptors:
            self._forget(descriptor)
        return process.clear_away()

    def _forget(self, descriptor: int) -> None:
        if self._owners.pop(descriptor, None) is not None:
            self._selector.unregister(descriptor)

    def _tell(self, worker: int, standing: Standing) -> None:
        if standing.done or self._ended_by is not None:
            return
        assert standing.status is not None
        status = standing.status
        how = f"was ended by {_name(-status)}" if status < 0 else f"has ended with exit status {status}"
        if standing.given_up:
            say(f"worker {worker} {how}, and is given up")
        else:
            patience = self._supervisor.patience
            say(
                f"worker {worker} {how}, and is started again in {patience.delay_s(standing.failures):g} s "
                f"({standing.failures} of {patience.max_restarts})"
            )


def _name(signum: int) -> str:
    return next((each.name for each in signal.Signals if each == signum), f"signal {signum}")
