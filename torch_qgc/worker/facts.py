"""What a worker tells of a step when it begins it: its batch, the time before it, and the learning rate."""

from __future__ import annotations

from typing import Any

from torch_qgc.job.courses import Courses
from torch_qgc.planner.batches import apportion
from torch_qgc.planner.temperature import LEAST, Thermometer
from torch_qgc.worker.statement import Statement

__all__ = ["Facts"]


class Facts:
    """Keep what `torch_qgc.protocol.messages.Begin` is to say.

    Args:
        statement: knows the optimizers.
        courses: the plans of the job.
        worker: this worker's number.
    """

    def __init__(self, statement: Statement, courses: Courses, worker: int) -> None:
        self.courses = courses
        self.thermometer = Thermometer()  # of the learning rate
        self._statement, self._worker = statement, worker
        self._samples = self._batch_size = 0
        self._lr_changes = False
        self._made_at_s: float | None = None  # the step before
        self._sizes: dict[tuple[int, int], int] = {}  # (plan's version, mean) -> this worker's

    def batch_size(self, batch_size: int, step: int, least: int) -> int:
        """Return how many samples this worker's batches have in a step; see `Replica.batch_size`."""
        course = self.courses.at(step)
        if (course.version, batch_size) not in self._sizes:
            self._sizes = {key: size for key, size in self._sizes.items() if key[0] == course.version}
            samples = apportion(course.plan.batches, batch_size, least)
            self._sizes[course.version, batch_size] = int(samples[self._worker])
        return self._sizes[course.version, batch_size]

    def took(self, samples: int, batch_size: int) -> None:
        """Note the batch at hand, of a loader that cuts batches to any size; `batch_size` is their mean."""
        self._samples, self._batch_size = samples, batch_size

    def made(self, now: float) -> None:
        """Note that a step was made."""
        self._made_at_s = now

    def at(self, now: float) -> dict[str, Any]:
        """Return what a step that begins now is announced with."""
        return {
            "samples": self._samples,
            "batch_size": self._batch_size,
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
