"""The temperature of a step: its learning rate over the highest one so far. The decoder "annealed" heeds it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from torch_qgc.errors import PlanError
from torch_qgc.planner.checks import Floats

__all__ = ["LEAST", "Thermometer", "temperatures"]

#: A step at learning rate 0 moves nothing, so its coefficients do not matter; they must only be finite.
LEAST = 1e-12


class Thermometer:
    """Follow the learning rate of a job, and tell the temperature of each step.

        theta_t = lr_t / max(lr_0 .. lr_t)

    It is 1 while a learning rate warms up or is constant, and falls with it. The job so far decides: a peak still to
    come cannot be known.

    Args:
        peak: the highest learning rate of the steps before, of a job that is resumed.
    """

    def __init__(self, peak: float = 0.0) -> None:
        self.peak = peak

    def read(self, lr: float) -> float:
        """Return the temperature of a step, in (0, 1].

        Args:
            lr: its learning rate; with several parameter groups the highest one.
        Raises:
            PlanError: a learning rate below 0, or not finite.
        """
        if not 0.0 <= lr < float("inf"):
            raise PlanError(f"lr: expected a finite learning rate >= 0, got {lr}")
        self.peak = max(self.peak, lr)
        return max(lr / self.peak, LEAST) if self.peak > 0.0 else 1.0


def temperatures(rates: Sequence[float]) -> Floats:
    """Return the temperatures [T] of steps with learning rates [T].

    Raises:
        PlanError: a learning rate below 0, or not finite.
    """
    thermometer = Thermometer()
    return np.array([thermometer.read(lr) for lr in rates])
