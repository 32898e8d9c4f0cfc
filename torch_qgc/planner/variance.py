"""How noisy the quantizer is: bounds, a model of what gradients really show, and running measurements.

The relative variance q of an unbiased quantizer Q is the least number with E||Q(v) - v||^2 <= q ||v||^2.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from torch_qgc.errors import PlanError
from torch_qgc.kernels import BLOCK
from torch_qgc.kernels import PASS_THROUGH as PASS_THROUGH_BITS
from torch_qgc.planner.checks import Floats, per_worker

__all__ = [
    "BLOCK",
    "LEAST_BITS",
    "MOST_BITS",
    "PASS_THROUGH_BITS",
    "Bound",
    "NoiseRatio",
    "Norm",
    "RunningVariance",
    "quantization_variance",
    "sign_variance",
]

Norm = Literal["max", "l2"]
Bound = Literal["typical", "tight", "paper"]

#: Least and most bits per coordinate that the codec quantizes to without sending mere signs.
LEAST_BITS, MOST_BITS = 2, 16

# Gaussian blocks of 512 coordinates with max-norm scale, averaged over 3 to 8 bits, have q = 1.77 / L^2.
_KAPPA_MAX_512 = 1.77


def quantization_variance(
    bits: ArrayLike, block_size: int = BLOCK, *, norm: Norm = "max", bound: Bound = "typical"
) -> Floats:
    """Return the relative variance of stochastic rounding to L = 2^(bits-1) - 1 levels each side of zero.

    With D = block_size coordinates sharing one scale:

        "paper"    D / (4 L^2)                                         Song & Choi eq. (5), L2 scale
        "tight"    L2 scale: sqrt(D)/L - 1 while L <= sqrt(D)/2, then D / (4 L^2)
                   max scale: (sqrt(1 + (D-1)/L^2) - 1) / 2            both are exact suprema over all v
        "typical"  L2 scale: D / (6 L^2); max scale: kappa / L^2 with kappa = 1.77 at D = 512, the mean over
                   Gaussian blocks; never above "tight"

    Args:
        bits: integers in [0, 32], any shape. 32 means the gradient is sent unquantized: variance 0. Below 2
            bits nothing can be said: infinite variance.
        block_size: D >= 1; 512 in the codec.
        norm: what the scale of a block is: its largest magnitude ("max") or its Euclidean norm ("l2").
        bound: which of the above; "paper" is stated for the L2 scale and is used as it is for both.
    Returns:
        float64 of the shape of `bits`, >= 0.
    Raises:
        PlanError: bits that are not integers in [0, 32], block_size < 1, an unknown norm or bound.
    """
    b = np.asarray(bits, dtype=np.float64)
    if not np.all((b >= 0) & (b <= PASS_THROUGH_BITS) & (b == np.floor(b))):
        raise PlanError(f"bits: expected integers in [0, {PASS_THROUGH_BITS}], got {bits!r}")
    if block_size < 1:
        raise PlanError(f"block_size: expected at least 1 coordinate, got {block_size}")
    if norm not in ("max", "l2"):
        raise PlanError(f"norm: expected 'max' or 'l2', got {norm!r}")
    levels = np.maximum(np.exp2(b - 1.0) - 1.0, 0.0)
    with np.errstate(divide="ignore"):
        if bound == "paper":
            q = block_size / (4.0 * levels**2)
        elif bound == "tight":
            q = _tight(levels, block_size, norm)
        elif bound == "typical":
            kappa = block_size / 6.0 if norm == "l2" else _kappa_max(block_size)
            q = np.minimum(kappa / levels**2, _tight(levels, block_size, norm))
        else:
            raise PlanError(f"bound: expected 'typical', 'tight' or 'paper', got {bound!r}")
    return np.where(b == PASS_THROUGH_BITS, 0.0, q)


def sign_variance(block_size: int = BLOCK, *, norm: Norm = "max", bound: Bound = "typical") -> float:
    """Return the relative variance of one bit per coordinate: +s or -s, + with chance (1 + v_i / s) / 2.

        V = D s^2 - ||v||^2:   D - 1 for the L2 scale; for the max scale at most that, E[max z^2] - 1 for Gaussians

    Args:
        block_size: D >= 1 coordinates that share the scale s.
        norm, bound: as in `quantization_variance`.
    """
    if block_size < 1:
        raise PlanError(f"block_size: expected at least 1 coordinate, got {block_size}")
    if norm == "max" and bound == "typical":
        return max(_mean_square_maximum(block_size) - 1.0, 0.0)
    return block_size - 1.0


def _tight(levels: Floats, block_size: int, norm: Norm) -> Floats:
    if norm == "l2":
        root = math.sqrt(block_size)
        return np.where(levels <= root / 2.0, root / levels - 1.0, block_size / (4.0 * levels**2))
    excess = (block_size - 1) / levels**2 if block_size > 1 else np.where(levels > 0, 0.0, np.inf)
    # (sqrt(1 + x) - 1) / 2 without the cancellation that would cost all digits at 16 bits.
    with np.errstate(invalid="ignore"):
        q = excess / (2.0 * (1.0 + np.sqrt(1.0 + excess)))
    return np.where(np.isinf(excess), np.inf, q)


def _kappa_max(block_size: int) -> float:
    """Scale the measured 1.77 at 512 by E[max_i z_i^2] of `block_size` standard normals."""
    return _KAPPA_MAX_512 * _mean_square_maximum(block_size) / _mean_square_maximum(512)


@lru_cache(maxsize=64)
def _mean_square_maximum(count: int) -> float:
    """Return E[max_i z_i^2] = int_0^inf P(max_i |z_i| > r) 2 r dr for `count` standard normals."""
    radii = np.linspace(0.0, 12.0, 4801)
    log_inside = np.array([math.log1p(-math.erfc(r / math.sqrt(2.0))) if r > 0 else -math.inf for r in radii])
    integrand = -np.expm1(count * log_inside) * 2.0 * radii
    return float(np.sum((integrand[1:] + integrand[:-1]) * np.diff(radii)) / 2.0)


class RunningVariance:
    """Estimate q of every worker at every number of bits from what its encoder really lost.

    For a vector s with scale `scale` per block the exact variance of one encoding is, with
    f_i the fractional part of L |s_i| / scale,

        V = sum over blocks (scale / L)^2 sum_i f_i (1 - f_i);   q = EMA(V) / EMA(||s||^2)

    It is a ratio of averages, so that rounds count by their energy, as they do in the error.

    Args:
        num_workers: K.
        norm: of the codec; it sets the model for bits that were not measured.
        memory: measurements over which the average forgets (more: steadier, slower to follow), >= 1.
    """

    def __init__(self, num_workers: int, *, norm: Norm = "max", memory: float = 100.0) -> None:
        if not memory >= 1:
            raise PlanError(f"memory: expected at least 1 measurement, got {memory}")
        self._keep = 1.0 - 1.0 / memory
        self._lost = np.zeros((num_workers, PASS_THROUGH_BITS + 1))
        self._energy = np.zeros_like(self._lost)
        columns = np.arange(PASS_THROUGH_BITS + 1)
        self._typical = quantization_variance(columns, norm=norm)
        self._tight = quantization_variance(columns, norm=norm, bound="tight")

    def update(self, worker: int, bits: int, lost: float, energy: float) -> None:
        """Enter one encoding: `lost` is V, `energy` ||s||^2, over all blocks or the same subset of them.

        Zero or non-finite vectors say nothing about q and are passed over.
        """
        if not (math.isfinite(lost) and math.isfinite(energy) and energy > 0 and lost >= 0):
            return
        self._lost[worker, bits] = self._keep * self._lost[worker, bits] + lost
        self._energy[worker, bits] = self._keep * self._energy[worker, bits] + energy

    def table(self, max_bits: int) -> Floats:
        """Return q [K, max_bits + 1] as `make_plan(variance=...)` takes it.

        Bits that a worker has not used get the typical variance times the factor by which the worker's
        measured one differs from it at the nearest bits measured; a worker without measurements gets the
        typical one.
        """
        bits = np.arange(max_bits + 1)
        table = np.tile(self._typical[: max_bits + 1], (len(self._lost), 1))
        for k, (lost, energy) in enumerate(zip(self._lost, self._energy)):
            seen = np.flatnonzero((energy > 0) & (self._typical > 0) & np.isfinite(self._typical))
            if not seen.size:
                continue
            factor = lost[seen] / energy[seen] / self._typical[seen]
            nearest = np.abs(bits[:, None] - seen).argmin(axis=1)
            table[k] = np.minimum(table[k] * factor[nearest], self._tight[: max_bits + 1])
            table[k, :2] = np.inf
            direct = seen[seen <= max_bits]
            table[k, direct] = lost[direct] / energy[direct]
        return table


class NoiseRatio:
    """Estimate eta, the variance of a worker's batch gradient over the squared norm of its mean.

    Batches are independent, so products of different workers' gradients estimate the squared norm of the
    common mean without bias. They follow from the energy of what the aggregator decodes, ghat = sum_k c_k Q(h_k):

        ||ghat||^2 - sum_k c_k^2 ||Q(h_k)||^2 = sum over j != k of c_j c_k <Q(h_j), Q(h_k)>
        signal = that / ((sum_k c_k)^2 - sum_k c_k^2);    eta_k = EMA(B_k (||h_k||^2 - signal)) / EMA(signal)

    A batch of B_k mean batches has the variance eta_k / B_k, hence the factor: eta_k is that of a mean batch, whatever
    batches the worker has had meanwhile.

    It takes the workers' mean gradients for equal, as they are when data is shuffled; with data that differs
    between workers eta is overestimated.

    Args:
        num_workers: K.
        memory: rounds over which the average forgets, >= 1.
        ceiling: largest ratio reported, also when no signal stands out of the noise.
    """

    def __init__(self, num_workers: int, *, memory: float = 100.0, ceiling: float = 100.0) -> None:
        if not memory >= 1:
            raise PlanError(f"memory: expected at least 1 round, got {memory}")
        self._keep = 1.0 - 1.0 / memory
        self._ceiling = ceiling
        self._noise = np.zeros(num_workers)
        self._signal = np.zeros(num_workers)

    def update(
        self,
        coefficients: Floats,
        energy: Floats,
        decoded_energy: Floats,
        result_energy: float,
        batches: ArrayLike = 1.0,
    ) -> None:
        """Enter one round.

        Args:
            coefficients: [K] c_k, 0 for workers that are not in.
            energy: [K] ||h_k||^2, as the worker sent it along.
            decoded_energy: [K] ||Q(h_k)||^2.
            result_energy: ||ghat||^2.
            batches: scalar or [K] B_k >= 0, samples that h_k is the mean of, in units of the mean batch.
        A round with fewer than two arrivals, or with non-finite gradients, is passed over.
        """
        present = coefficients > 0
        squares = coefficients[present] ** 2
        pairs = float(coefficients[present].sum()) ** 2 - float(squares.sum())
        cross = result_energy - float(squares @ decoded_energy[present])
        if np.count_nonzero(present) < 2 or not np.isfinite([cross, *energy[present]]).all():
            return
        signal = cross / pairs
        noise = per_worker(batches, len(coefficients), "batches")[present] * (energy[present] - signal)
        self._noise[present] = self._keep * self._noise[present] + noise
        self._signal[present] = self._keep * self._signal[present] + signal

    def ratios(self, default: float = 0.0, *, batches: ArrayLike = 1.0) -> Floats:
        """Return eta [K], in [0, ceiling]; `default` for a worker never seen together with another.

        Args:
            default: of a mean batch.
            batches: scalar or [K] B_k > 0: return eta_k / B_k, the ratio at these batches.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            eta = np.where(self._signal > 0, self._noise / self._signal, self._ceiling)
        eta = np.where((self._signal != 0) | (self._noise != 0), eta, default)
        return np.clip(eta / per_worker(batches, len(eta), "batches", least=1e-9), 0.0, self._ceiling)
