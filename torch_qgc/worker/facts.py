"""What a worker tells of a step when it begins it: its batch, the time before it, and the learning rate."""

from __future__ import annotations

from typing import Any

from torch_qgc.job.courses import Courses
from torch_qgc.planner.batches import apportion
from torch_qgc.planner.checks import Ints
from torch_qgc.planner.temperature import LEAST, Thermometer
from torch_qgc.worker.statement import Statement

__all__ = ["Facts"]


class Facts:
    """Keep what `torch_qgc.protocol.messages.Begin` is to say.

    Args:
        statement: knows the optimizers.
        courses: the plans of the job.
    """

    def __init__(self, statement: Statement, courses: Courses) -> None:
        self.courses = courses
        self.thermometer = Thermometer()  # of the learning rate
        self._statement = statement
        self._samples = self._batch_size = 0
        self._moves = False
        self._lr_changes = False
        self._made_at_s: float | None = None  # the step before
        self._sizes: dict[tuple[int, int, int], Ints] = {}  # (plan's version, mean, least) -> everybody's

    def batch_sizes(self, batch_size: int, step: int, least: int) -> Ints:
        """Return how many samples each worker's batches have in a step; see `Replica.batch_sizes`."""
        course = self.courses.at(step)
        key = course.version, batch_size, least
        if key not in self._sizes:
            self._sizes = {known: sizes for known, sizes in self._sizes.items() if known[0] == course.version}
            self._sizes[key] = apportion(course.plan.batches, batch_size, least)
        return self._sizes[key]

    def took(self, samples: int, batch_size: int, *, moves: bool) -> None:
        """Note the batch at hand, of a loader that cuts batches to any size.

        Args:
            samples: that it has.
            batch_size: the mean over workers.
            moves: any worker could have drawn it.
        """
        self._samples, self._batch_size, self._moves = samples, batch_size, moves

    def made(self, now: float) -> None:
        """Note that a step was made."""
        self._made_at_s = now

    def at(self, now: float) -> dict[str, Any]:
        """Return what a step that begins now is announced with."""
        return {
            "samples": self._samples,
            "batch_size": self._batch_size,
            "moves": self._moves,
            "outside_s": 0.0 if self._made_at_s is None else now - self._made_at_s,
            "temperature": self._temperature(),
        }

    def _temperature(self) -> float:
        """Return the temperature of the step, see `torch_qgc.planner.temperature`.

        A learning rate that nobody has set out to change stays what it is, and what is decoded is to be unbiased with
        it: its temperature is next to 0.
        """
        lr, scheduled = self._statement.learning_rate()
        before, theta = self.thermometer.peak, self.thermometer.read(lr)
        self._lr_changes |= scheduled or theta < 1.0 or 0.0 < before < lr
        return theta if self._lr_changes else LEAST
