"""Pauses of a worker, told apart from the tail of its ordinary steps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from torch_qgc.job.line import Interval
from torch_qgc.planner.checks import Floats, Mask

__all__ = ["Pauses", "find_pauses", "share_of"]

# Share of windows without pauses in which one is found, at most, if ordinary steps follow one of the two models.
_MISTAKES = 0.05


@dataclass(frozen=True)
class Pauses:
    """The share of steps with a pause, and the seconds (median) by which it prolongs them, 0 if there are none."""

    share: Interval
    length_s: float


def find_pauses(times_s: Floats) -> Mask:
    """Return [n] which steps are longer than the tail of all shorter ones explains.

    The chance that one more step is as long as the one tested follows from the steps shorter than that, once as a
    shifted exponential and once as a log-normal, with the uncertainty of their parameters: the predictive
    distributions are a Lomax and, for the logarithm, Student's t. If both chances are below .05 / n, the step and all
    longer ones are pauses. At least four steps and a third of them are ordinary.

    Args:
        times_s: [n] seconds that steps of the same size take, >= 0.
    """
    from scipy.special import stdtr

    n = len(times_s)
    shorter = np.arange(max(4, n // 3), n)  # how many steps each tested one is compared with
    if not shorter.size:
        return np.zeros(n, dtype=bool)
    ordered = np.sort(times_s)
    waits = ordered - ordered[0]
    logs = np.log(np.maximum(ordered, max(1e-3 * ordered[n // 2], 1e-12)))
    logs -= logs[0]
    with np.errstate(divide="ignore", invalid="ignore"):  # equal steps have no spread: 0 / 0 is no pause
        exponential = (1.0 + waits[shorter] / np.cumsum(waits)[shorter - 1]) ** (1.0 - shorter)
        mean = np.cumsum(logs)[shorter - 1] / shorter
        variance = (np.cumsum(logs**2)[shorter - 1] - shorter * mean**2) / (shorter - 1)
        z = (logs[shorter] - mean) / np.sqrt(np.maximum(variance, 0.0) * (1.0 + 1.0 / shorter))
        unexplained = np.maximum(exponential, stdtr(shorter - 1, -z)) < _MISTAKES / n
    if not unexplained.any():
        return np.zeros(n, dtype=bool)
    return np.asarray(times_s >= ordered[shorter[np.argmax(unexplained)]])


def share_of(count: int, steps: int) -> Interval:
    """Return the share of steps with its 95 % interval (Clopper and Pearson 1934: never less sure than stated)."""
    from scipy.special import betaincinv

    low = betaincinv(count, steps - count + 1, 0.025) if count else 0.0
    high = betaincinv(count + 1, steps - count, 0.975) if count < steps else 1.0
    return Interval(count / steps, float(low), float(high))
