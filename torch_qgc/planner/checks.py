"""Types of the planner, and the checks that every public function of it starts with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from torch_qgc.errors import PlanError

__all__ = ["Floats", "Ints", "Mask", "Received", "Rule", "batch_sizes", "per_worker", "probabilities"]

Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]
Mask: TypeAlias = NDArray[np.bool_]


class Received(NamedTuple):
    """What a decode rule is told of a round.

    Attributes:
        arrived: [K] bool, or int counts of payloads.
        corrected: [K] corrected shares m_k / r_k, 0 where r_k = 0.
        temperature: the learning rate over the highest one so far, in (0, 1].
    """

    arrived: NDArray[Any]
    corrected: Floats
    temperature: float


#: A decode rule: what is known of a round -> [K] coefficient of each contribution of a worker.
Rule: TypeAlias = Callable[[Received], Floats]


def probabilities(values: ArrayLike, name: str = "straggle_probs") -> Floats:
    """Return `values` as a [K] float64 vector of probabilities in [0, 1].

    Raises:
        PlanError: not a vector, empty, NaN, or outside [0, 1]; the message names the first bad worker.
    """
    p = _floats(values, name)
    if p.ndim != 1 or p.size == 0:
        raise PlanError(f"{name}: expected one probability per worker, shape [K] with K >= 1, got shape {p.shape}")
    bad = np.flatnonzero(~((p >= 0.0) & (p <= 1.0)))
    if bad.size:
        k = int(bad[0])
        raise PlanError(
            f"{name}: expected probabilities in [0, 1], got {p[k]} for worker {k}; "
            "estimate them with torch_qgc.planner.delays, or use 0.0 for a worker that is never late"
        )
    return p


def per_worker(values: ArrayLike, num_workers: int, name: str, *, least: float = 0.0) -> Floats:
    """Return `values`, a scalar or [K], as a finite-or-infinite [K] float64 vector with entries >= `least`.

    Raises:
        PlanError: wrong shape, NaN, or an entry below `least`.
    """
    v = _floats(values, name)
    if v.ndim == 0:
        v = np.full(num_workers, float(v))
    if v.shape != (num_workers,):
        raise PlanError(f"{name}: expected a scalar or one value per worker, shape [{num_workers}], got {v.shape}")
    bad = np.flatnonzero(~(v >= least))
    if bad.size:
        k = int(bad[0])
        raise PlanError(f"{name}: expected values >= {least:g}, got {v[k]} for worker {k}")
    return v


def batch_sizes(values: ArrayLike, num_workers: int) -> Floats:
    """Return `values` as a [K] float64 vector of batches in units of the batch size.

    Raises:
        PlanError: wrong shape, not positive and finite, or a mean below 1; the message names the first bad worker.
    """
    batches = _floats(values, "batches")
    if batches.shape != (num_workers,) or not num_workers:
        raise PlanError(f"batches: expected one batch per worker, shape [{num_workers}], got {batches.shape}")
    bad = np.flatnonzero(~((batches > 0.0) & (batches < np.inf)))
    if bad.size:
        raise PlanError(f"batches: expected finite values > 0, got {batches[bad[0]]} for worker {bad[0]}")
    if batches.mean() < 1.0 - 1e-9:
        raise PlanError(
            f"batches: expected a mean of at least 1, got {batches.mean():.6g}: they are in units of the batch size; "
            "divide them by their mean"
        )
    return batches


def _floats(values: ArrayLike, name: str) -> Floats:
    try:
        return np.array(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise PlanError(f"{name}: expected numbers, got {_short(values)}") from error


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
