"""Fig. 1: the residual that each bit allocator leads to, against the budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from paper.config import Allocation, Cluster
from torch_qgc.planner import allocate_bits, quantization_variance
from torch_qgc.planner.bits import Method
from torch_qgc.planner.shares import error_factors

METHODS: tuple[Method, ...] = ("exact", "dp", "low_complexity", "greedy", "relaxation", "equal")
MAX_BITS = 16
BLOCK = 512
GAP = 1e-3  # residuals further above the optimum are different from it
#: One row per setting, over draws of workers: the median residual, and the relative excess over the dynamic program's:
#: its median, its largest, and in which part of the draws it is above GAP.
FIELDS = ("quantizer", "workers", "bits", "method", "draws", "residual", "excess", "worst", "stuck")

Row = dict[str, Any]


def quantizers(allocation: Allocation) -> dict[str, np.ndarray]:
    """Return q [MAX_BITS + 1] at 0 .. MAX_BITS bits: the paper's bound with a scale per gradient or block, and ours."""
    bits = np.arange(MAX_BITS + 1)
    return {
        "paper_whole": quantization_variance(bits, allocation.dimension, norm="l2", bound="paper"),
        "paper_512": quantization_variance(bits, BLOCK, norm="l2", bound="paper"),
        "max_512": quantization_variance(bits, BLOCK, norm="max"),
    }


def rows(allocation: Allocation, progress: Callable[[Iterable[Any]], Iterable[Any]] = iter) -> Iterator[Row]:
    """Yield rows of FIELDS; a residual is 1 / sum_k U_k(b_k) (Song & Choi Lemma 2, in units of C N^2).

    Args:
        progress: wraps the settings that are gone through.
    """
    settings = [
        (name, q, workers, bits)
        for name, q in quantizers(allocation).items()
        for workers in allocation.workers
        for bits in allocation.bits
    ]
    for name, q, workers, bits in progress(settings):
        utilities = [_utility(workers, draw, q) for draw in range(allocation.draws)]
        found = {method: [_residual(u, bits, method) for u in utilities] for method in METHODS}
        for method, residuals in found.items():
            yield thinned((name, workers, bits, method), residuals, found["dp"])


def thinned(setting: tuple[Any, ...], residuals: Sequence[float], best: Sequence[float]) -> Row:
    """Return a row of FIELDS from one residual per draw, and the dynamic program's."""
    excess = np.array(residuals) / np.array(best) - 1
    numbers = (np.median(residuals), np.median(excess), excess.max(), (excess > GAP).mean())
    return dict(zip(FIELDS, (*setting, len(excess), *map(float, numbers))))


def _utility(workers: int, draw: int, q: np.ndarray) -> np.ndarray:
    """Return U [K, MAX_BITS + 1] of one draw of workers."""
    cluster = Cluster(workers=workers)
    late = cluster.delays(draw).straggle_probability(cluster.deadline_s)[:, None]
    return np.where(np.isfinite(q), 1.0 / error_factors(late, q), -np.inf)


def _residual(utility: np.ndarray, mean_bits: float, method: Method) -> float:
    bits = allocate_bits(utility, int(mean_bits * len(utility)), method)
    return 1.0 / float(utility[np.arange(len(utility)), bits].sum())
