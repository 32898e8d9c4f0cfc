"""A worker of the demo: what its machine does to it, and the clock that all of them share."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from common.clock import SharedClock
from common.machines import Emulation
from torch.nn.parallel import DistributedDataParallel

from detection.settings import PAUSES, Settings
from torch_qgc.ddp.network import Network


class Worker:
    """One rank as one of the machines."""

    def __init__(self, s: Settings, rank: int) -> None:
        self._s, self._number = s, s.variant.workers[rank]
        self._machine = s.machines[rank]
        self._emulation = Emulation(self._machine)
        self._clock: SharedClock | None = None

    def attach(self, ddp: DistributedDataParallel) -> Callable[[], float]:
        """Slow DDP's all-reduces by the link; return what computes the part of fp32's bytes that they take."""
        bf16 = self._s.variant.bf16
        self._emulation.slow_all_reduce(ddp, bf16=bf16)
        return lambda: 0.5 if bf16 else 1.0

    def network(self) -> Network:
        """Say how this worker reaches the aggregator: through its link."""
        return Network(through=self._emulation.through_link, trace=str(self._s.folder / "events.jsonl"))

    def start(self, step: int, elapsed_s: float) -> None:
        """Start the clock, and the pauses that this machine makes: the same seconds in every job."""
        s = self._s
        file = s.folder / "clock"
        self._clock = SharedClock(file, step=step, elapsed_s=elapsed_s)
        pauses = self._machine.pauses(s.total_s, np.random.default_rng([s.seed, self._number]))
        if self._number == PAUSES and s.stop_s:
            middle_s, stop_s = s.total_s / 2, s.stop_s * s.pace
            kept = [(at, length) for at, length in pauses if not middle_s <= at + length or at > middle_s + stop_s]
            pauses = sorted([*kept, (middle_s, stop_s)])
        self._emulation.stand_still([(at - elapsed_s, length) for at, length in pauses if at >= elapsed_s])

    def seconds(self, step: int) -> float:
        """Return at which second of the job a step is made, the same on every rank."""
        return 0.0 if self._clock is None else self._clock.at(step)

    def compute(self, samples: int) -> None:
        """Take the machine's time for a batch."""
        self._emulation.compute(samples)

    def stop(self) -> None:
        """Make no more pauses."""
        self._emulation.stop_pausing()

    def close(self) -> None:
        """End what was started for this worker."""
        self._emulation.close()


def forever(loader: Iterable[Any]) -> Iterator[Any]:
    """Yield a loader's batches, one epoch after the other."""
    while True:
        yield from loader
