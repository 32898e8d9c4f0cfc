"""Batches that are thin for steps that have closed without this worker, of loaders of one's own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch_qgc.ddp.thin import batch_size_of, first_samples
from torch_qgc.errors import ConfigError
from torch_qgc.worker.replica import Replica

__all__ = ["FollowedLoader", "Slice", "Thinner"]

#: (batch, samples to keep) -> the batch with the first samples only.
Slice = Callable[[Any, int], Any]


class Thinner:
    """Make batches thin for steps that have closed without this worker, and see which batches made no step.

    Args:
        replica: whose steps these are.
        count: samples of a thin batch.
        cut: returns the first samples of a batch; None: `torch_qgc.ddp.thin.first_samples`.
        batch_size: samples of the batch that is handed out next, where that is known.
    """

    def __init__(
        self, replica: Replica, count: int = 2, cut: Slice | None = None, batch_size: int | None = None
    ) -> None:
        if count < 1:
            raise ConfigError(f"thin: expected at least 1 sample, got {count}")
        self.replica, self.count, self.batch_size = replica, count, batch_size
        self._cut = cut
        self._handed_out_at: int | None = None  # the step at which the newest batch was handed out
        self._begin()

    def closed_without_us(self) -> bool:
        """Tell whether the batch that is handed out next is for a step that has closed without this worker."""
        replica = self.replica
        if replica.in_training_thread and self._handed_out_at == replica.step and not replica.in_step:
            replica.decide_again()
            self._unused += 1
        self._handed_out_at = replica.step
        return replica.missed()

    def __call__(self, batch: Any) -> Any:
        """Return the batch, thin if the next step has closed without this worker, else cut to this worker's size.

        The latter makes a gradient, so nothing is cut unless all parts of the batch have as many samples as expected.
        """
        if self.closed_without_us():
            return self.thin(batch)
        size = self.batch_size
        if size is None:
            return batch
        count = int(self.replica.batch_sizes(size, self.replica.batch_step)[self.replica.worker])
        sure = count < size and (self._cut is not None or batch_size_of(batch, size) == size)
        return self._first(batch, count) if sure else batch

    def thin(self, batch: Any) -> Any:
        """Return a thin batch."""
        return self._first(batch, self.count)

    def _first(self, batch: Any, count: int) -> Any:
        return first_samples(batch, count, self.batch_size) if self._cut is None else self._cut(batch, count)

    def loop(self, batches: Iterator[Any], another: Callable[[], Any]) -> Iterator[Any]:
        """Hand out a loop's batches, and more of them for steps that this worker alone has not made.

        Args:
            batches: of the loop, thin where they have to be.
            another: returns one more.
        """
        self._begin()
        told = False
        try:
            yield from batches
            owed = self.owed
            if owed and self._began_steps:
                told = True
                yield from self._make_up(self.replica.loop_ended(owed=owed), owed, another)
        finally:
            if self._began_steps and not told:
                with contextlib.suppress(Exception):  # an iterator may be closed at any time; the next step raises it
                    self.replica.loop_ended(owed=0)

    @property
    def owed(self) -> int:
        """Batches of the loop that made no step, as far as this worker can tell.

        One too many does no harm: where all ranks have made as many steps, nobody makes up for anything.
        """
        replica = self.replica
        newest = self._handed_out_at == replica.step and (not replica.in_step or replica.awaits_backward)
        return self._unused + replica.abandoned_steps - self._abandoned_before + newest

    def _begin(self) -> None:
        replica = self.replica
        replica.loop_begins()
        self._first_step, self._in_step_before = replica.step, replica.in_step
        self._abandoned_before = replica.abandoned_steps
        self._unused = 0  # batches that no forward pass has seen
        self._handed_out_at = None

    @property
    def _began_steps(self) -> bool:
        """This was a loop of the job's, and no mere look at the data, even if all its steps were given up here."""
        replica = self.replica
        before = self._first_step, self._in_step_before, self._abandoned_before
        return (replica.step, replica.in_step, replica.abandoned_steps) != before

    def _make_up(self, loop: int, owed: int, another: Callable[[], Any]) -> Iterator[Any]:
        """Hand out batches for the steps that others make in this loop, unless too many make no step again."""
        replica, in_vain = self.replica, 0
        while in_vain < owed and replica.owes_step(loop):
            step = replica.step
            yield self.thin(another()) if replica.missed() else another()
            in_vain = 0 if replica.step > step else in_vain + 1
        replica.state_now()


class FollowedLoader:
    """Hand out another loader's batches, thin where the step has closed without this worker.

    All else is the loader's own: attributes, length, `set_epoch`.

    Args:
        source: anything that can be iterated over.
        thinner: makes batches thin.
    """

    def __init__(self, source: Any, thinner: Thinner) -> None:
        self._source, self._thinner = source, thinner

    def __iter__(self) -> Iterator[Any]:
        newest: list[Any] = []

        def batches() -> Iterator[Any]:
            for batch in self._source:
                newest[:] = [batch]
                yield self._thinner(batch)

        return self._thinner.loop(batches(), lambda: newest[0])

    def __len__(self) -> int:
        return len(self._source)

    def __getattr__(self, name: str) -> Any:
        if name == "_source":  # not there yet, as in copies
            raise AttributeError(name)
        return getattr(self._source, name)
