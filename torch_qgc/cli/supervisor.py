"""Which worker is started when: each on its own, and again after an end by an error, until it has done its work."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["Patience", "Standing", "Supervisor"]


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How often a worker is started again, and when.

    The n-th restart in a row comes min(first_delay_s 2^(n-1), longest_delay_s) after the end.

    Args:
        max_restarts: of one worker, in a row.
        first_delay_s, longest_delay_s: seconds.
        steady_s: a worker that has run for so long begins to count anew.
    """

    max_restarts: int = 3
    first_delay_s: float = 1.0
    longest_delay_s: float = 60.0
    steady_s: float = 300.0

    def delay_s(self, failures: int) -> float:
        """Return how long a worker waits that has failed so many times in a row."""
        return min(self.first_delay_s * 2.0 ** min(failures - 1, 64), self.longest_delay_s)


@dataclass
class Standing:
    """Where a worker is.

    Attributes:
        starts: so far.
        failures: in a row.
        status: of its newest end, as of `subprocess.Popen.returncode`: negative, the signal that has ended it.
        due_at_s: when it is to be started; None: it runs, or is not started any more.
        running_since_s: None while it does not run.
    """

    starts: int = 0
    failures: int = 0
    status: int | None = None
    due_at_s: float | None = None
    running_since_s: float | None = None

    @property
    def done(self) -> bool:
        """It has done its work."""
        return self.running_since_s is None and self.status == 0

    @property
    def given_up(self) -> bool:
        """It has not done its work, and is not started any more."""
        return self.running_since_s is None and self.due_at_s is None and self.status != 0


class Supervisor:
    """Decide on each worker by its own ends alone. It has neither clock nor processes.

    Args:
        workers: their numbers; all are to be started at once.
        patience: with those that fail.
        now: seconds that only go forward, as everywhere here.
    """

    def __init__(self, workers: Iterable[int], patience: Patience, now: float) -> None:
        self.patience = patience
        self.standings = {worker: Standing(due_at_s=now) for worker in workers}

    def due(self, now: float) -> list[int]:
        """Return the workers that are to be started now."""
        return [k for k, s in self.standings.items() if s.due_at_s is not None and s.due_at_s <= now]

    def wakeup_in(self, now: float) -> float | None:
        """Return the seconds until the next worker is due; None: none is, unless one ends."""
        times = [s.due_at_s for s in self.standings.values() if s.due_at_s is not None]
        return max(0.0, min(times) - now) if times else None

    def started(self, worker: int, now: float) -> None:
        """Note that a worker that was due runs."""
        standing = self.standings[worker]
        assert standing.due_at_s is not None, f"worker {worker} was not due"
        standing.starts += 1
        standing.due_at_s, standing.running_since_s = None, now

    def ended(self, worker: int, status: int, now: float) -> Standing:
        """Note that a worker has ended, and return where it is now: done, to be started again, or given up."""
        standing, patience = self.standings[worker], self.patience
        assert standing.running_since_s is not None, f"worker {worker} did not run"
        if now - standing.running_since_s >= patience.steady_s:
            standing.failures = 0
        standing.status, standing.running_since_s = status, None
        if status != 0:
            standing.failures += 1
            if standing.failures <= patience.max_restarts:
                standing.due_at_s = now + patience.delay_s(standing.failures)
        return standing

    def stop(self) -> None:
        """Start nobody any more, neither who is due nor who ends from now on."""
        self.patience = Patience(max_restarts=0)
        for standing in self.standings.values():
            standing.due_at_s = None

    @property
    def running(self) -> list[int]:
        """The workers that run."""
        return [k for k, s in self.standings.items() if s.running_since_s is not None]

    @property
    def finished(self) -> bool:
        """Nobody runs, nor will."""
        return all(s.running_since_s is None and s.due_at_s is None for s in self.standings.values())

    def __repr__(self) -> str:
        done, given_up = (sum(getattr(s, name) for s in self.standings.values()) for name in ("done", "given_up"))
        return f"Supervisor({len(self.running)} of {len(self.standings)} workers run, {done} done, {given_up} given up)"
