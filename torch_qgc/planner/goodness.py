"""Which model of delays recorded ones agree with."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from torch_qgc.planner.checks import Floats
from torch_qgc.planner.delays import DelayModel, Empirical, fit_log_normal, fit_shifted_exponential

__all__ = ["choose_model"]

# Anderson-Darling statistics that 1 % of samples exceed (Stephens 1974, EDF statistics for goodness of fit).
_EXPONENTIAL, _NORMAL = 1.959, 1.035


def choose_model(delays_s: ArrayLike) -> DelayModel:
    """Fit the model of one worker's delays that agrees with them best; `Empirical` if none does.

    The Anderson-Darling statistic of a fit, with u_(i) the fitted distribution at the i-th smallest delay,

        A^2 = -n - (1/n) sum_i (2i - 1) (log u_(i) + log(1 - u_(n+1-i))),

    weighs the tails, which deadlines depend on. It is compared with the value that 1 % of samples from the fitted
    family exceed (Stephens 1974): the family with the least ratio is taken if that is below 1.

    Args:
        delays_s: [n], seconds >= 0.
    Raises:
        PlanError: no delays, or not seconds.
    """
    delays = np.sort(np.asarray(delays_s, dtype=np.float64).ravel())
    n = delays.size
    if n < 3 or not delays[0] > 0.0 or delays[0] == delays[-1] or not np.isfinite(delays[-1]):
        return Empirical(delays_s=delays)
    from scipy.special import log_ndtr

    # The excess over the least of n exponential delays is a sample of n - 1 whose shift is known to be 0.
    exponential, excess = fit_shifted_exponential(delays), delays[1:] - delays[0]
    wait = np.maximum(excess / excess.mean(), 1e-300)
    misfit_exponential = _anderson_darling(np.log(-np.expm1(-wait)), -wait) * (1.0 + 0.6 / (n - 1)) / _EXPONENTIAL
    log_normal, logs = fit_log_normal(delays), np.log(delays)
    z = (logs - logs.mean()) / logs.std(ddof=1)
    misfit_normal = _anderson_darling(log_ndtr(z), log_ndtr(-z)) * (1.0 + 0.75 / n + 2.25 / n**2) / _NORMAL
    if min(misfit_exponential, misfit_normal) > 1.0:
        return Empirical(delays_s=delays)
    return exponential if misfit_exponential <= misfit_normal else log_normal


def _anderson_darling(log_below: Floats, log_above: Floats) -> float:
    """Return A^2 from the logarithms of the fitted distribution and its complement at the sorted sample."""
    n = len(log_below)
    return float(-n - np.mean((2.0 * np.arange(n) + 1.0) * (log_below + log_above[::-1])))
