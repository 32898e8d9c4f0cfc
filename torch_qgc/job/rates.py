"""Measured contributions per round, from which a running job takes its decode coefficients.

A worker that was late misses the rounds it is late for, too, so its contributions per round r_k are not the
delay model's 1 - p_k and must be measured. The unbiased coefficient is m_k / r_k, i.e. m_k times the mean
number of rounds between two contributions. That mean gap is what is estimated here, not r_k itself: the
estimate enters the coefficient linearly, so by renewal theory (Wald) the time average of the decoded gradient
is unbiased even while the estimate is noisy; 1 / (an average frequency) would be biased upwards (Jensen).
Only gaps that ended before the present round enter, so the coefficient never depends on who is in now.

An estimate lags behind workers that change, and a new plan may expect what does not come true. So it is kept for how
many rounds no contribution has stood yet, and contributions make up for them little by little: over a run they stand
for as many rounds as have passed, whatever the workers do and however often plans change.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from torch_qgc.errors import PlanError

__all__ = ["ArrivalRates"]


class ArrivalRates:
    """Mean rounds between contributions, per worker and chunk.

    The first gaps are averaged with the plan's prior, later ones by an exponential average. The prior counts as rounds
    that were watched, so that a worker of which the plan expects little is believed after its first contributions.

    Args:
        prior_rates: [K] expected contributions per round, in (0, 1], from the plan: 1 - p_k. A worker with
            rate 0 keeps coefficient 0 until it has contributed.
        chunks: number of chunks C that are tracked separately (early chunks may arrive where late ones miss).
        prior_rounds: how many rounds the prior is worth (more: slower to learn, steadier).
        memory: contributions over which the average forgets (more: steadier, slower to follow a change).
        instalments: contributions that make up for what is owed (more: steadier, and more is owed in a change).
    """

    def __init__(
        self,
        prior_rates: NDArray[np.float64],
        chunks: int,
        *,
        prior_rounds: float = 8.0,
        memory: float = 128.0,
        instalments: float = 32.0,
    ) -> None:
        rates = np.asarray(prior_rates, dtype=np.float64)
        if rates.ndim != 1 or not np.all((rates >= 0) & (rates <= 1)):
            raise PlanError(f"prior_rates: expected [K] values in [0, 1], got {prior_rates!r}")
        if prior_rounds < 0 or memory < 1 or instalments < 1:
            raise PlanError(
                f"expected prior_rounds >= 0, memory >= 1 and instalments >= 1, got {prior_rounds}, {memory} and "
                f"{instalments}"
            )
        with np.errstate(divide="ignore"):
            prior_gap = np.where(rates > 0, 1.0 / rates, np.inf)
        self.mean_gap = np.repeat(prior_gap[:, None], chunks, axis=1)  # [K, C] rounds
        self.owed = np.zeros_like(self.mean_gap)  # rounds for which no contribution has stood, but for the open gap
        self._open_gap = np.zeros_like(self.mean_gap)  # rounds since the last contribution
        self._seen = np.zeros_like(self.mean_gap)  # contributions so far
        self._prior_contributions = np.repeat((prior_rounds * rates)[:, None], chunks, axis=1)
        self._prior_rounds, self._memory, self._instalments = prior_rounds, memory, instalments

    def rates(self, chunk: int) -> NDArray[np.float64]:
        """Return [K] expected contributions per round of a chunk, from past rounds alone."""
        return _one_over(self._stands_for(chunk))

    def overall(self) -> NDArray[np.float64]:
        """Return [K] expected contributions per round over all chunks; 0 for workers that none was seen of."""
        return _one_over(self.mean_gap.mean(axis=1))

    def expect(self, chunk: int, before: NDArray[np.float64] | None, after: NDArray[np.float64]) -> None:
        """Begin anew with the rates of a chunk that a new plan changes, from what it expects.

        Of a gap that is open then the rounds under the new plan count in the estimate: the whole gap is longer than
        others on average, because a change falls into a long one more easily. Those before are owed.

        Args:
            before: [K] what the plan before expected, in [0, 1]; None: it waited for all, and no rates were measured.
            after: [K] what the new one expects.
        """
        changed = np.full(len(after), True) if before is None else after != before
        with np.errstate(divide="ignore"):
            self.mean_gap[changed, chunk] = np.where(after > 0, 1.0 / after, np.inf)[changed]
        self._prior_contributions[changed, chunk] = self._prior_rounds * after[changed]
        self._seen[changed, chunk] = 0
        self.owed[changed, chunk] += self._open_gap[changed, chunk]
        self._open_gap[changed, chunk] = 0

    def update(self, chunk: int, counts: NDArray[np.int64], alive: NDArray[np.bool_]) -> None:
        """Enter a closed round: counts [K] payloads of each worker in it; the dead are not counted as late."""
        open_gap, stood_for = self._open_gap[:, chunk], self._stands_for(chunk)
        open_gap += alive
        stood_for[np.isinf(stood_for)] = 0.0  # it has had no weight
        self.owed[:, chunk] += (open_gap - counts * stood_for) * (counts > 0)
        for number in range(int(counts.max(initial=0))):
            self._enter(counts > number, chunk)  # a second payload in one round comes after a gap of zero rounds

    def _stands_for(self, chunk: int) -> NDArray[np.float64]:
        """Return [K] how many rounds a contribution stands for, at most by half or twice another number than usual."""
        gap = self.mean_gap[:, chunk]
        return np.minimum(np.maximum(gap + self.owed[:, chunk] / self._instalments, 0.5 * gap), 2.0 * gap)

    def _enter(self, came: NDArray[np.bool_], chunk: int) -> None:
        self._seen[came, chunk] += 1.0
        gap, mean = self._open_gap[came, chunk], self.mean_gap[came, chunk]
        mean = np.where(np.isinf(mean), gap, mean)
        contributions = self._prior_contributions[came, chunk] + self._seen[came, chunk]
        self.mean_gap[came, chunk] = mean + np.maximum(1.0 / contributions, 1.0 / self._memory) * (gap - mean)
        self._open_gap[came, chunk] = 0.0


def _one_over(gap: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return rates, 0 where no gap is known."""
    return np.where(np.isfinite(gap), 1.0 / np.maximum(gap, 1e-9), 0.0)
