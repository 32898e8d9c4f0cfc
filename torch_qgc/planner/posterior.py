"""The chance to be late at one deadline, from rounds that were watched."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from torch_qgc.errors import PlanError
from torch_qgc.planner.checks import Floats, per_worker, probabilities

__all__ = ["StragglePosterior"]


class StragglePosterior:
    """Track the chance to be late of every worker: a Beta posterior that forgets.

        p = (late + prior strength) / (rounds + strength),   both counts decaying by 1 - 1/memory a round

    It is never 0 or 1, so that a few lucky rounds do not make a worker infinitely reliable. It holds for one
    deadline only; to ask about another, fit a delay model.

    Args:
        prior: scalar or [K], expected p in (0, 1). The default with strength 1 is Jeffreys' prior.
        num_workers: K; may be left out if `prior` is [K].
        strength: rounds that the prior is worth, > 0.
        memory: rounds over which observations fade, >= 1, or inf.
    """

    def __init__(
        self,
        prior: ArrayLike = 0.5,
        num_workers: int | None = None,
        *,
        strength: float = 1.0,
        memory: float = float("inf"),
    ) -> None:
        count = num_workers if num_workers is not None else int(np.size(np.asarray(prior)))
        mean = probabilities(per_worker(prior, count, "prior"), "prior")
        if not np.all((mean > 0) & (mean < 1)) or not strength > 0 or not memory >= 1:
            raise PlanError(
                f"expected prior in (0, 1), strength > 0 and memory >= 1, got {prior!r}, {strength}, {memory}"
            )
        self._prior_late, self._strength, self._keep = mean * strength, strength, 1.0 - 1.0 / memory
        self.late = np.zeros(count)
        self.rounds = np.zeros(count)

    def update(self, arrived: ArrayLike) -> None:
        """Enter one round: arrived [K], or several: [rounds, K], oldest first."""
        for row in np.atleast_2d(np.asarray(arrived, dtype=bool)):
            self.late = self._keep * self.late + ~row
            self.rounds = self._keep * self.rounds + 1.0

    def mean(self) -> Floats:
        """Return [K] expected p."""
        return np.asarray((self.late + self._prior_late) / (self.rounds + self._strength))

    def quantile(self, level: float) -> Floats:
        """Return [K] p that the true one is below with probability `level`."""
        from scipy.stats import beta

        late = self.late + self._prior_late
        return np.asarray(beta.ppf(level, late, self.rounds + self._strength - late))
