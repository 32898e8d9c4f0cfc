"""Injected delays: they make this machine's equal workers unequal, the same way in every job."""

import time
from dataclasses import dataclass

import numpy as np

from torch_qgc.planner.delays import ShiftedExponential

PROMPT_WAIT_S = 0.01  # mean delay of a worker that is not slow: everybody is late by a little


@dataclass(frozen=True, kw_only=True)
class Delays:
    """How late each worker begins its steps: at least `shift_s`, and an exponential wait of mean `wait_s` on top.

    The shifted-exponential model of Song & Choi eq. (37). A delay is a function of seed, worker and step, so jobs that
    are compared meet the same delays, and a resumed job meets those it would have met.

    Args:
        shift_s: [K] seconds, >= 0.
        wait_s: [K] seconds, > 0.
        seed: of the draws.
    """

    shift_s: tuple[float, ...]
    wait_s: tuple[float, ...]
    seed: int = 0

    @classmethod
    def one_slow(cls, workers: int, *, slow_worker: int, shift_s: float, wait_s: float, seed: int = 0) -> "Delays":
        """Delay one worker by shift_s + Exp(wait_s), the others by a hundredth of a second on average."""
        slow = np.arange(workers) == slow_worker
        return cls(
            shift_s=tuple(np.where(slow, shift_s, 0.0).tolist()),
            wait_s=tuple(np.where(slow, max(wait_s, PROMPT_WAIT_S), PROMPT_WAIT_S).tolist()),
            seed=seed,
        )

    def seconds(self, worker: int, step: int) -> float:
        """Return how long a worker is delayed in a step."""
        rng = np.random.default_rng([self.seed, worker, step])
        return float(ShiftedExponential(mu=1 / self.wait_s[worker], shift=self.shift_s[worker]).sample(rng, ()))

    def wait(self, worker: int, step: int) -> None:
        """Sleep for `seconds(worker, step)`."""
        time.sleep(self.seconds(worker, step))

    def missed_rounds(self, deadline_s: float, compute_s: float) -> np.ndarray:
        """Return [K], the part of all rounds that each worker will miss if its own work takes `compute_s`.

        A late worker misses the rounds that close while it is late, too: it contributes once in every
        max(deadline, delay + compute) seconds, so on average it misses 1 - deadline / E max(deadline, delay + compute).
        """
        wait_s = np.array(self.wait_s)
        least_s = np.array(self.shift_s) + compute_s
        late = ShiftedExponential(mu=1 / wait_s, shift=least_s).straggle_probability(deadline_s)
        return 1 - deadline_s / (np.maximum(deadline_s, least_s) + wait_s * late)

    def __str__(self) -> str:
        return ", ".join(f"{shift:.2f} + Exp({wait:.2f})" for shift, wait in zip(self.shift_s, self.wait_s))
