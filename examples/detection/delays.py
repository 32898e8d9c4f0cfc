"""The delays that make this machine's equal workers unequal, the same for every job."""

import time

import numpy as np

from torch_qgc.planner.delays import ShiftedExponential

# Seconds before a worker begins a step: at least SHIFT_S, and an exponential wait of mean WAIT_S on top. The
# last worker is the slow one; it is on time now and then.
SHIFT_S = np.array([0.00, 0.01, 0.02, 0.10])
WAIT_S = np.array([0.01, 0.02, 0.02, 0.70])
SLOW_WORKER = 3


def delay_s(worker: int, step: int, *, seed: int) -> float:
    """Return how long a worker is delayed in a step: a function of its arguments, whatever came before."""
    rng = np.random.default_rng([seed, worker, step])
    return float(ShiftedExponential(mu=1 / WAIT_S[worker], shift=SHIFT_S[worker]).sample(rng, ()))


def wait(worker: int, step: int, *, seed: int) -> None:
    """Sleep for `delay_s`."""
    time.sleep(delay_s(worker, step, seed=seed))


def missed_rounds(deadline_s: float, compute_s: float) -> np.ndarray:
    """Return [K], the part of all rounds that each worker will miss if its own work takes `compute_s`.

    A late worker misses the rounds that close while it is late, too: it contributes once in every
    max(deadline, delay + compute) seconds, so on average it misses 1 - deadline / E max(deadline, delay + compute).
    """
    least_s = SHIFT_S + compute_s
    late = ShiftedExponential(mu=1 / WAIT_S, shift=least_s).straggle_probability(deadline_s)
    return 1 - deadline_s / (np.maximum(deadline_s, least_s) + WAIT_S * late)
