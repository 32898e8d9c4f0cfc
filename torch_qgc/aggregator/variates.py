"""What an aggregator may remember of each worker's payloads, so that only the unusual in them comes in bursts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from torch_qgc.errors import PlanError
from torch_qgc.planner.checks import Floats

__all__ = ["ControlVariates"]


class ControlVariates:
    """Decode rounds with one control variate per worker: a running mean u_k of what it has sent.

        ghat = sum_k m_k b_k u_k  +  sum over payloads i of c_k(i) (h_i - b_k(i) u_k(i))

    The first sum stands, in every round, for workers that are late. u_k and b_k come from past rounds alone, so with
    c_k = m_k / r_k the time average is unbiased whatever they are, as long as delays do not depend on what is sent:
    over one gap of n rounds u_k is constant, and the mean of m_k b_k u_k (n - 1 / r_k) is 0. With smaller c_k, as of
    decoder "annealed", only h_i - b_k u_k counts too little. A wrong r_k matters less for the same reason.

        u_k += follow (h - u_k),   b_k = <h, u_k> / |u_k|^2 within [0, 1], both averaged over past payloads

    It pays where workers pause at random and are in most rounds all the same. Of a worker that is rarely in, u_k is so
    old that it does more harm than good, so those with r_k < `least_rate` are decoded without it.

    Memory: 4 bytes per worker and coordinate. Time: a pass over all of it in each round, and three over each payload.

    Args:
        workers: K.
        numel: coordinates of a payload; a chunk of the gradient has a memory of its own.
        follow: weight of a new payload in u_k, in (0, 1]; more: closer to the present gradient, noisier.
        least_rate: contributions per round from which a worker's memory is used.
    Raises:
        PlanError: a value out of range.
    """

    _DECAY = 0.95  # of the averages behind b_k: some 20 payloads

    def __init__(self, workers: int, numel: int, *, follow: float = 0.1, least_rate: float = 0.5) -> None:
        if not 0.0 < follow <= 1.0 or not least_rate >= 0.0:
            raise PlanError(f"expected follow in (0, 1] and least_rate >= 0, got {follow} and {least_rate}")
        self._follow, self._least_rate = follow, least_rate
        self.mean = np.zeros((workers, numel), dtype=np.float32)  # u
        self._alike = np.zeros(workers)  # average of <h, u>
        self._size = np.zeros(workers)  # average of |u|^2

    @property
    def trust(self) -> Floats:
        """[K] b_k in [0, 1]; 0 before a worker's second payload."""
        ratio = np.divide(self._alike, self._size, out=np.zeros_like(self._size), where=self._size > 0)
        trust: Floats = np.clip(ratio, 0.0, 1.0)
        return trust

    def decode(
        self, payloads: Sequence[tuple[int, NDArray[np.float32], float]], shares: Floats, rates: Floats
    ) -> NDArray[np.float32]:
        """Decode a round, then learn from its payloads.

        Args:
            payloads: (worker, [numel] fp32, c); a worker may come several times.
            shares: [K] m_k >= 0 of the workers that are in the job, 0 of others.
            rates: [K] expected contributions per round r_k.
        Returns:
            [numel] fp32.
        """
        trust = np.where(rates >= self._least_rate, self.trust, 0.0)
        weights = shares * trust
        for worker, _, coefficient in payloads:
            weights[worker] -= coefficient * trust[worker]
        out: NDArray[np.float32] = weights.astype(np.float32) @ self.mean
        for _, sent, coefficient in payloads:
            out += np.float32(coefficient) * sent
        for worker, sent, _ in payloads:
            self._learn(worker, sent)
        return out

    def _learn(self, worker: int, sent: NDArray[np.float32]) -> None:
        mean = self.mean[worker]
        size, alike = float(mean @ mean), float(sent @ mean)
        if not np.isfinite(alike) or not np.isfinite(sent).all():
            return  # what is not finite now says nothing about later
        if size == 0.0:
            mean += sent
            return
        self._alike[worker] += (1.0 - self._DECAY) * (alike - self._alike[worker])
        self._size[worker] += (1.0 - self._DECAY) * (size - self._size[worker])
        mean += np.float32(self._follow) * (sent - mean)
