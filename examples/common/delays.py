"""Injected delays: they make this machine's equal workers unequal, the same way in every job."""

from dataclasses import dataclass

import numpy as np

from torch_qgc.planner.delays import ShiftedExponential

PROMPT_WAIT_S = 0.01  # mean delay of a worker that is not slow: everybody is late by a little


@dataclass(frozen=True, kw_only=True)
class Delays:
    """How late each worker begins its steps: at least `shift_s`, and an exponential wait of mean `wait_s` on top.

    The shifted-exponential model of Song & Choi eq. (37), [K] seconds each. A delay is a function of seed, worker and
    step, so jobs that are compared meet the same delays, and a resumed job meets those it would have met.
    """

    shift_s: tuple[float, ...]
    wait_s: tuple[float, ...]
    seed: int = 0

    def seconds(self, worker: int, step: int) -> float:
        """Return how long a worker is delayed in a step."""
        rng = np.random.default_rng([self.seed, worker, step])
        return float(ShiftedExponential(mu=1 / self.wait_s[worker], shift=self.shift_s[worker]).sample(rng, ()))

    def missed_rounds(self, deadline_s: float | None, compute_s: float) -> np.ndarray:
        """Return [K], the part of all rounds that each worker will miss if its own work takes `compute_s`.

        It contributes once in every max(deadline, delay + compute) seconds: 1 - deadline / E max(...).
        """
        wait_s = np.array(self.wait_s)
        if deadline_s is None:
            return np.zeros_like(wait_s)
        least_s = np.array(self.shift_s) + compute_s
        late = ShiftedExponential(mu=1 / wait_s, shift=least_s).straggle_probability(deadline_s)
        return 1 - deadline_s / (np.maximum(deadline_s, least_s) + wait_s * late)
