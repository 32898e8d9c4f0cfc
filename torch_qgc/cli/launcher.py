"""Start a job on this machine and see it to its end: a key, aggregators, workers that are supervised one by one."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch_qgc.aggregator.process import AggregatorProcess, Serving
from torch_qgc.cli.crew import Crew, say
from torch_qgc.cli.guard import Guard
from torch_qgc.cli.signals import Signals
from torch_qgc.cli.supervisor import Patience, Supervisor
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
            say(f"aggregators listen: --endpoints {reached}")

        def start(worker: int, restarts: int) -> WorkerProcess:
            variables = environment_of(
                worker, workers=job.workers, here=job.here, endpoints=endpoints, key_file=key_file, restarts=restarts
            )
            return WorkerProcess(worker, job.command, variables, guard)

        supervisor = Supervisor(job.here, job.patience, time.monotonic())
        crew = Crew(supervisor, start, signals, grace_s=job.grace_s, aggregators=aggregators, elsewhere=job.elsewhere)
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
