"""Start a job on this machine and see it to its end: a key, aggregators, workers that are supervised one by one."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch_qgc.aggregator.process import AggregatorProcess, Serving
from torch_qgc.cli.guard import Guard
from torch_qgc.cli.signals import Signals
from torch_qgc.cli.supervisor import Patience, Standing, Supervisor
from torch_qgc.cli.workers import WorkerProcess, environment_of
from torch_qgc.errors import ConfigError
from torch_qgc.protocol.identity import SHARE_A_KEY, Secret
from torch_qgc.protocol.server import Bounds

__all__ = ["Job", "launch"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be started on this machine.

    Args:
        command: of a worker.
        workers: of the job.
        here: the numbers of those on this machine.
        aggregators: how many are started; 0 if `endpoints` are given.
        bind: where they listen; the i-th one i ports further, or each on a free port (*).
        endpoints: of the aggregators that run already.
        key_file: of the job; None: a key is made, and removed in the end.
        encrypt: all that is sent.
        patience: with workers that fail.
        grace_s: between a signal to end and SIGKILL.
    Raises:
        ConfigError: it cannot be started like this; names the remedy.
    """

    command: Sequence[str]
    workers: int
    here: range
    aggregators: int = 1
    bind: str | None = None
    endpoints: Sequence[str] = ()
    key_file: str | None = None
    encrypt: bool = True
    patience: Patience = Patience()
    grace_s: float = 10.0

    def __post_init__(self) -> None:
        if not (0 <= self.here.start < self.here.stop <= self.workers):
            raise ConfigError(
                f"first_worker: expected workers with numbers in [0, {self.workers}) on this machine, got "
                f"{self.here.start} .. {self.here.stop - 1}: --workers is the number of all workers of the job"
            )
        if self.endpoints and self.bind is not None:
            raise ConfigError("expected --bind, where aggregators are started, or --endpoints, got both")
        if self.endpoints and self.key_file is None:
            raise ConfigError(f"key_file: expected the key of the aggregators that run already: {SHARE_A_KEY}")
        if self.elsewhere and not self.endpoints and (self.bind is None or self.key_file is None):
            raise ConfigError(
                "expected --bind tcp://ADDRESS:PORT that other machines reach, and --key-file FILE that they have, too "
                f"(`qgc keygen FILE`), where {len(self.here)} of {self.workers} workers are on this machine: start the "
                "others there with --first-worker, --endpoints tcp://ADDRESS:PORT and --key-file"
            )

    @property
    def elsewhere(self) -> bool:
        """There are workers on other machines."""
        return len(self.here) < self.workers


def launch(job: Job) -> int:
    """Start a job's workers here, and its aggregators unless they run already; wait for the end of all.

    Returns:
        0 if every worker has done its work, 128 + n if signal n has ended them before, else 1.
    Raises:
        ConfigError, JobFailed: it cannot be started.
    """
    with contextlib.ExitStack() as stack:
        signals = stack.enter_context(Signals())
        folder = tempfile.mkdtemp(prefix="qgc-")
        guard = Guard(folder)
        stack.callback(guard.close)
        key_file = os.path.join(folder, "job.key") if job.key_file is None else os.path.abspath(job.key_file)
        if job.key_file is None:
            Secret.make().save(key_file)
        aggregators = [] if job.endpoints else stack.enter_context(_aggregators(job, Secret.load(key_file)))
        endpoints = job.endpoints or [aggregator.endpoint for aggregator in aggregators]
        if job.elsewhere and aggregators:
            reached = ",".join(endpoints).replace("//0.0.0.0:", f"//{socket.gethostname()}:")
            _say(f"aggregators listen: --endpoints {reached}")
        crew = _Crew(job, endpoints, key_file, guard, aggregators, signals)
        stack.callback(crew.kill)
        return crew.run()


@contextlib.contextmanager
def _aggregators(job: Job, secret: Secret) -> Iterator[list[AggregatorProcess]]:
    """Run aggregators while this is open; they hear from worker 0 what the job is."""
    address, _, port = (job.bind or "tcp://127.0.0.1:*").rpartition(":")
    ports = [str(int(port) + index) if port.isdecimal() else port for index in range(job.aggregators)]
    started: list[AggregatorProcess] = []
    try:
        for index, each in enumerate(ports):
            serving = Serving(
                door=secret.door_of(index, job.workers, encrypt=job.encrypt),
                bind=f"{address}:{each}",
                index=index,
                count=job.aggregators,
                bounds=Bounds(connections=2 * job.workers + 64),
                announced=False,
            )
            started.append(AggregatorProcess(serving))
        yield started
    finally:
        for aggregator in started:
            aggregator.stop(timeout_s=0.0)


class _Crew:
    """The workers of this machine."""

    def __init__(
        self,
        job: Job,
        endpoints: Sequence[str],
        key_file: str,
        guard: Guard,
        aggregators: Sequence[AggregatorProcess],
        signals: Signals,
    ) -> None:
        self._job, self._endpoints, self._key_file, self._guard = job, endpoints, key_file, guard
        self._aggregators, self._signals = aggregators, signals
        self._supervisor = Supervisor(job.here, job.patience, time.monotonic())
        self._processes: dict[int, WorkerProcess] = {}
        self._owners: dict[int, WorkerProcess] = {}  # descriptor -> whose output it is
        self._ended_by: int | None = None  # a signal
        self._kill_at_s: float | None = None
        self._selector = selectors.DefaultSelector()
        self._selector.register(signals, selectors.EVENT_READ)

    def run(self) -> int:
        """Supervise the workers until all have come to their end; return the exit status."""
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
        return self._job.elsewhere and aggregates and self._ended_by is None

    def _start_due(self) -> None:
        for worker in self._supervisor.due(time.monotonic()):
            variables = environment_of(
                worker,
                workers=self._job.workers,
                here=self._job.here,
                endpoints=self._endpoints,
                key_file=self._key_file,
                restarts=self._supervisor.standings[worker].starts,
            )
            process = WorkerProcess(worker, self._job.command, variables, self._guard)
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
                _say(f"workers {waiting} are not started again: the job has ended")

    def _all_aggregators_run(self) -> bool:
        return all(aggregator.poll() is None for aggregator in self._aggregators)

    def _end(self, signum: int) -> None:
        """Pass a signal on, and have some patience; a second one needs none."""
        now = time.monotonic()
        self._kill_at_s = now + self._job.grace_s if self._ended_by is None else now
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
            _say(f"worker {worker} {how}, and is given up")
        else:
            patience = self._job.patience
            _say(
                f"worker {worker} {how}, and is started again in {patience.delay_s(standing.failures):g} s "
                f"({standing.failures} of {patience.max_restarts})"
            )


def _name(signum: int) -> str:
    return next((each.name for each in signal.Signals if each == signum), f"signal {signum}")


def _say(text: str) -> None:
    print(f"qgc: {text}", file=sys.stderr, flush=True)
