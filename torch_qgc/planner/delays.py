"""Models of how long workers take, fitted to recorded delays, and the chance to be late that follows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike

from torch_qgc.errors import PlanError
from torch_qgc.planner.checks import Floats

__all__ = [
    "DelayModel",
    "Empirical",
    "LogNormal",
    "ShiftedExponential",
    "fit_log_normal",
    "fit_shifted_exponential",
    "straggle_probability",
]


class DelayModel(Protocol):
    """What a delay model can say. Parameters are scalars (one worker) or [K] (a job)."""

    def sample(self, rng: np.random.Generator, size: int | tuple[int, ...]) -> Floats:
        """Draw delays in seconds, independent over workers: shape (*size, *parameters' shape)."""

    def straggle_probability(self, deadline_s: ArrayLike) -> Floats:
        """Return P(delay > deadline_s), shape (*deadline's shape, *parameters' shape)."""

    def late_fraction(self, deadline_s: ArrayLike) -> Floats:
        """Return the same without the caution that estimates from few data need."""

    def breakpoints(self) -> Floats:
        """Return the sorted times at which the tail has a kink or a jump."""


def straggle_probability(*, mu: ArrayLike, shift: ArrayLike, deadline: ArrayLike, load: ArrayLike = 1) -> Floats:
    """Return the chance to miss the deadline under shifted-exponential delays.

        p = exp(-(mu / load) (deadline - shift load))  if deadline >= shift load, else 1

    Song & Choi eq. (37); the model is Lee et al.'s and Reisizadeh et al.'s: `shift` seconds per unit of load
    that nothing can shorten, then an exponential wait of mean load / mu.

    Args:
        mu: rate in 1/s, > 0. shift: seconds, >= 0. deadline: seconds. load: relative amount of work, > 0.
            All broadcast.
    Raises:
        PlanError: mu or load not positive, shift negative.
    """
    mu_, shift_, deadline_, load_ = np.broadcast_arrays(
        *(np.asarray(x, dtype=np.float64) for x in (mu, shift, deadline, load))
    )
    if not (np.all(mu_ > 0) and np.all(load_ > 0) and np.all(shift_ >= 0)):
        raise PlanError(f"expected mu > 0, load > 0 and shift >= 0, got {mu!r}, {load!r} and {shift!r}")
    wait = np.maximum(deadline_ - shift_ * load_, 0.0)
    return np.asarray(np.exp(-(mu_ / load_) * wait))


@dataclass(frozen=True, kw_only=True, eq=False)
class ShiftedExponential:
    """Delays of shift * load seconds plus an exponential wait: workers limited by computation.

    Args:
        mu: scalar or [K], rate in 1/s; more: rarely late.
        shift: scalar or [K], seconds that a unit of load takes at least.
        load: scalar or [K], relative amount of work; 1 is what mu and shift were measured at.
    """

    mu: ArrayLike
    shift: ArrayLike = 1.0
    load: ArrayLike = 1.0

    def __post_init__(self) -> None:
        straggle_probability(mu=self.mu, shift=self.shift, deadline=0.0, load=self.load)  # checks them

    def sample(self, rng: np.random.Generator, size: int | tuple[int, ...]) -> Floats:
        """Draw delays in seconds, shape (*size, *parameters' shape)."""
        mu, shift, load = np.broadcast_arrays(*map(np.asarray, (self.mu, self.shift, self.load)))
        waits = rng.standard_exponential((*_as_tuple(size), *mu.shape))
        return np.asarray(shift * load + waits * load / mu, dtype=np.float64)

    def straggle_probability(self, deadline_s: ArrayLike) -> Floats:
        """Return P(delay > deadline_s), shape (*deadline's shape, *parameters' shape)."""
        axes = np.broadcast(*map(np.asarray, (self.mu, self.shift, self.load))).ndim
        deadline = np.asarray(deadline_s, dtype=np.float64)
        deadline = deadline.reshape(deadline.shape + (1,) * axes)
        return straggle_probability(mu=self.mu, shift=self.shift, deadline=deadline, load=self.load)

    def late_fraction(self, deadline_s: ArrayLike) -> Floats:
        """Return P(delay > deadline_s), shape (*deadline's shape, *parameters' shape)."""
        return self.straggle_probability(deadline_s)

    def breakpoints(self) -> Floats:
        """Return the least delays: there the tail begins to fall."""
        return np.unique(np.asarray(self.shift, dtype=np.float64) * np.asarray(self.load, dtype=np.float64))


@dataclass(frozen=True, kw_only=True, eq=False)
class LogNormal:
    """Delays whose logarithm is normal: many causes that each slow a step down by a factor.

    Args:
        median: scalar or [K], seconds, > 0.
        sigma: scalar or [K], standard deviation of the logarithm, > 0; more: heavier tail.
    """

    median: ArrayLike
    sigma: ArrayLike

    def __post_init__(self) -> None:
        if not (np.all(np.asarray(self.median) > 0) and np.all(np.asarray(self.sigma) > 0)):
            raise PlanError(f"expected median > 0 and sigma > 0, got {self.median!r} and {self.sigma!r}")

    def sample(self, rng: np.random.Generator, size: int | tuple[int, ...]) -> Floats:
        """Draw delays in seconds, shape (*size, *parameters' shape)."""
        median, sigma = np.broadcast_arrays(*map(np.asarray, (self.median, self.sigma)))
        return np.asarray(median * np.exp(sigma * rng.standard_normal((*_as_tuple(size), *median.shape))))

    def straggle_probability(self, deadline_s: ArrayLike) -> Floats:
        """Return P(delay > deadline_s), shape (*deadline's shape, *parameters' shape)."""
        from scipy.special import ndtr

        median, sigma = np.broadcast_arrays(*map(np.asarray, (self.median, self.sigma)))
        deadline = np.asarray(deadline_s, dtype=np.float64)
        deadline = np.maximum(deadline, 0.0).reshape(deadline.shape + (1,) * median.ndim)
        with np.errstate(divide="ignore"):
            return np.asarray(ndtr((np.log(median) - np.log(deadline)) / sigma))

    def late_fraction(self, deadline_s: ArrayLike) -> Floats:
        """Return P(delay > deadline_s), shape (*deadline's shape, *parameters' shape)."""
        return self.straggle_probability(deadline_s)

    def breakpoints(self) -> Floats:
        """Return the ends of the stretch in which the tail falls: it has no kink, but is flat outside, to 3e-5."""
        median, sigma = np.broadcast_arrays(*map(np.asarray, (self.median, self.sigma)))
        return np.unique(median * np.exp(sigma * np.array([-4.0, 4.0]).reshape(2, *(1,) * median.ndim)))


@dataclass(frozen=True, kw_only=True, eq=False)
class Empirical:
    """Delays as they were recorded.

    Args:
        delays_s: [rounds] of one worker or [rounds, K], seconds; inf for a payload that never came.
        caution: pseudo-rounds, half of them late, that `straggle_probability` adds: (late + c/2) / (rounds +
            c). 1 is Jeffreys' prior; 0 believes that what was not seen cannot happen.
    """

    delays_s: ArrayLike
    caution: float = 1.0
    _columns: Floats = field(init=False, repr=False, compare=False)  # [K, rounds], sorted

    def __post_init__(self) -> None:
        delays = np.array(self.delays_s, dtype=np.float64)
        if delays.ndim not in (1, 2) or delays.size == 0 or not np.all(delays >= 0):
            raise PlanError(
                f"delays_s: expected seconds >= 0 of shape [rounds] or [rounds, K], got shape {delays.shape}"
            )
        delays.setflags(write=False)
        object.__setattr__(self, "delays_s", delays)
        object.__setattr__(self, "_columns", np.sort(delays.reshape(len(delays), -1), axis=0).T)

    def sample(self, rng: np.random.Generator, size: int | tuple[int, ...]) -> Floats:
        """Draw recorded delays with replacement, independently for every worker."""
        delays = np.asarray(self.delays_s)
        rows = rng.integers(len(delays), size=(*_as_tuple(size), *delays.shape[1:]))
        return np.asarray(np.take_along_axis(delays, rows.reshape(-1, *delays.shape[1:]), axis=0).reshape(rows.shape))

    def straggle_probability(self, deadline_s: ArrayLike) -> Floats:
        """Return the share of late rounds, with `caution`, shape (*deadline's shape, *(K,))."""
        rounds = len(np.asarray(self.delays_s))
        return (self.late_fraction(deadline_s) * rounds + self.caution / 2.0) / (rounds + self.caution)

    def late_fraction(self, deadline_s: ArrayLike) -> Floats:
        """Return the share of late rounds, shape (*deadline's shape, *(K,))."""
        delays, deadline = np.asarray(self.delays_s), np.asarray(deadline_s, dtype=np.float64)
        if deadline.size < len(self._columns):
            in_time = np.count_nonzero(self._columns <= deadline[..., None, None], axis=-1)
        else:
            in_time = np.stack([np.searchsorted(column, deadline, side="right") for column in self._columns], axis=-1)
        return np.asarray(1.0 - in_time.reshape(deadline.shape + delays.shape[1:]) / len(delays))

    def breakpoints(self) -> Floats:
        """Return the recorded delays that are finite."""
        delays = np.unique(np.asarray(self.delays_s))
        return np.asarray(delays[np.isfinite(delays)])


def _as_tuple(size: int | tuple[int, ...]) -> tuple[int, ...]:
    return (size,) if isinstance(size, int) else tuple(size)


def fit_shifted_exponential(
    delays_s: ArrayLike, censored_at_s: ArrayLike = (), *, corrected: bool = True
) -> ShiftedExponential:
    """Fit one worker's shifted exponential to arrivals and to rounds that closed without it.

    With n arrivals t_i, M - n missed deadlines z_j, and S = sum_i (t_i - min t) + sum_j max(z_j - min t, 0):

        maximum likelihood   shift = min t,              mu = n / S              (n >= 1)
        corrected            shift = min t - theta / M,  mu = 1 / theta,  theta = S / (n - 1)    (n >= 2)

    The correction removes the bias of the smallest of few observations (exactly so without misses).

    Args:
        delays_s: [n] seconds of the rounds it made, divided by its load if that varied.
        censored_at_s: [M - n] deadlines in seconds of the rounds it missed. A late payload that is still
            timed belongs into `delays_s`.
    Raises:
        PlanError: too few arrivals: use StragglePosterior until there are enough; negative or non-finite
            times.
    """
    arrived, missed = (np.asarray(x, dtype=np.float64).ravel() for x in (delays_s, censored_at_s))
    needed = 2 if corrected else 1
    if arrived.size < needed:
        raise PlanError(f"delays_s: expected at least {needed} arrivals, got {arrived.size}; use StragglePosterior")
    if not (np.all(np.isfinite(arrived)) and np.all(arrived >= 0) and np.all(missed >= 0)):
        raise PlanError("expected finite delays >= 0 and deadlines >= 0 in seconds, got others")
    first = float(arrived.min())
    waited = float(np.sum(arrived - first) + np.sum(np.maximum(missed - first, 0.0)))
    # All delays equal: the wait is below the clock's resolution, not zero.
    waited = max(waited, 1e-9 * max(first, 1e-9))
    if not corrected:
        return ShiftedExponential(mu=arrived.size / waited, shift=first)
    theta = waited / (arrived.size - 1)
    return ShiftedExponential(mu=1.0 / theta, shift=max(first - theta / (arrived.size + missed.size), 0.0))


def fit_log_normal(delays_s: ArrayLike) -> LogNormal:
    """Fit one worker's log-normal: the mean and the standard deviation, without bias, of the logarithms.

    Args:
        delays_s: [n], n >= 2, seconds > 0.
    Raises:
        PlanError: too few delays, or some that are not positive and finite.
    """
    delays = np.asarray(delays_s, dtype=np.float64).ravel()
    if delays.size < 2 or not np.all((delays > 0) & np.isfinite(delays)):
        raise PlanError(f"delays_s: expected at least 2 finite delays > 0, got {delays.size} or others")
    logs = np.log(delays)
    # All delays equal: the spread is below the clock's resolution, not zero.
    return LogNormal(median=float(np.exp(logs.mean())), sigma=max(float(logs.std(ddof=1)), 1e-9))
