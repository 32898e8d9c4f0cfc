"""Where the times of a run come from: machines, a delay model, or a recording."""

from __future__ import annotations

from typing import TypeAlias, cast

import numpy as np
from numpy.typing import ArrayLike

from torch_qgc.errors import ConfigError
from torch_qgc.planner.checks import Floats
from torch_qgc.planner.delays import DelayModel
from torch_qgc.simulator.machines import Load, Machines, Times

__all__ = ["DelaySource", "DelaysLike", "workers_of"]

#: Machines; a model that each step draws from; or recorded seconds [rounds, K], of which step t takes row t mod rounds.
DelaysLike: TypeAlias = Machines | DelayModel | ArrayLike

_STREAM = 0xDE1A  # makes the random numbers of the delays others than those of the data


def workers_of(delays: DelaysLike) -> int:
    """Return how many workers these are the delays of."""
    if isinstance(delays, Machines):
        return delays.workers
    if hasattr(delays, "sample"):
        return int(cast(DelayModel, delays).sample(np.random.default_rng(0), 1).size)
    return int(np.shape(np.asarray(delays))[-1])


class DelaySource:
    """The times of all workers in a step. Every scheme that is compared gets the same draws.

    The time of a machine depends on its batch and on the sizes of payloads. A delay model or a recording knows
    delays only: all the time from BEGIN to the arrival of the payload, whatever the load; inf means that the payload
    never arrives.

    Args:
        delays: see `DelaysLike`.
        workers: K.
        seed: the seed of the run.
    Raises:
        ConfigError: the delays are not those of K workers.
    """

    def __init__(self, delays: DelaysLike, workers: int, seed: int) -> None:
        self._workers, self._seed = workers, seed
        self._delays: Machines | DelayModel | Floats
        if isinstance(delays, Machines):
            self._delays = delays
            if delays.workers != workers:
                raise ConfigError(f"delays: expected {workers} machines, one per worker, got {delays.workers}")
        elif hasattr(delays, "sample"):
            self._delays = cast(DelayModel, delays)
            drawn = self._delays.sample(np.random.default_rng(0), 1)
            if drawn.shape not in ((1,), (1, workers)):
                raise ConfigError(
                    f"delays: expected a model of one worker or of all {workers}, got one that draws shape "
                    f"{drawn.shape[1:]}: give its parameters as scalars or as [{workers}]"
                )
        else:
            self._delays = np.asarray(delays, dtype=np.float64)
            if self._delays.ndim != 2 or self._delays.shape[1:] != (workers,) or not np.all(self._delays >= 0):
                raise ConfigError(
                    f"delays: expected machines, a delay model or seconds >= 0 of shape [rounds, {workers}], got shape "
                    f"{self._delays.shape}"
                )

    def draw(self, step: int, load: Load) -> Times:
        """Return the times of a step, the same whenever it is asked for."""
        if isinstance(self._delays, np.ndarray):
            return self._alone(np.asarray(self._delays[step % len(self._delays)]))
        rng = np.random.default_rng([_STREAM, self._seed, step])
        if isinstance(self._delays, Machines):
            return self._delays.times(rng, step, load)
        drawn = self._delays.sample(rng, 1)
        return self._alone(np.asarray(drawn[0] if drawn.ndim == 2 else self._delays.sample(rng, self._workers)))

    def delays_s(self, steps: int, load: Load) -> Floats:
        """Return [steps, K] seconds from BEGIN to the arrival of the payload, as a trial run would record them."""
        drawn = [self.draw(step, load) for step in range(steps)]
        return np.array([times.own_s + times.up_s for times in drawn])

    def _alone(self, delays_s: Floats) -> Times:
        return Times(delays_s, np.zeros(self._workers), np.zeros(self._workers))
