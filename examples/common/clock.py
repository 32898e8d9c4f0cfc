"""The time that a job has taken, alike on all ranks: for what depends on it, and must be the same everywhere."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import torch.distributed as dist

BLOCK = 4  # steps that share a time; more: a job ends later than it should, fewer: ranks wait for rank 0 more often


class SharedClock:
    """Tell at which second of the job a step is made: rank 0's clock, without a collective.

    Rank 0 says when the next block of steps will begin whenever it begins one, by how long blocks usually take. Ranks
    that need the time of a block read it there; one waits only where it is a block ahead of rank 0. Learning rates that
    follow time and the end of the job are the same on every rank then.

    Args:
        file: where rank 0 leaves the times; rank 0 makes it anew, so that all ranks must come here together.
        step, elapsed_s: where it goes on.
    """

    def __init__(self, file: Path, *, step: int = 0, elapsed_s: float = 0.0) -> None:
        self._rank = dist.get_rank()
        if self._rank == 0:
            file.unlink(missing_ok=True)
        dist.barrier()
        self._store = dist.FileStore(str(file), -1)
        self._first = step // BLOCK
        self._times_s = {self._first: elapsed_s, self._first + 1: elapsed_s}
        self._zero_s, self._begun_s = time.monotonic() - elapsed_s, time.monotonic()
        self._taken_s: list[float] = []  # by blocks

    def at(self, step: int) -> float:
        """Return the second of the job at which a step's block begins."""
        block = step // BLOCK
        if block not in self._times_s:
            self._times_s[block] = float(self._store.get(str(block)))
        if self._rank == 0 and block + 1 not in self._times_s:
            now_s = time.monotonic()
            self._taken_s.append(now_s - self._begun_s)
            self._begun_s = now_s
            ahead_s = now_s - self._zero_s + statistics.median(self._taken_s)
            self._times_s[block + 1] = max(ahead_s, self._times_s[block])
            self._store.set(str(block + 1), repr(self._times_s[block + 1]))
        return self._times_s[block]
