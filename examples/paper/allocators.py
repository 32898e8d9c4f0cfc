"""Fig. 1: the residual that each bit allocator leads to, against the budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from paper.config import Allocation, Cluster
from torch_qgc.planner import allocate_bits, quantization_variance
from torch_qgc.planner.bits import Method
from torch_qgc.planner.shares import error_factors

METHODS: tuple[Method, ...] = ("exact", "dp", "low_complexity", "greedy", "relaxation", "equal")
LABELS = {
    "exact": "exact (ours)",
    "dp": "dynamic program",
    "low_complexity": "Algorithm 1",
    "greedy": "greedy",
    "relaxation": "relaxation",
    "equal": "equal bits",
}
QUANTIZERS = {
    "paper_whole": "paper's bound, one scale per gradient",
    "paper_512": "paper's bound, one scale per 512",
    "max_512": "max norm, one scale per 512",
}
MAX_BITS = 16
BLOCK = 512
FIELDS = ("quantizer", "workers", "bits", "draw", "method", "residual")

Row = dict[str, Any]


def quantizers(allocation: Allocation) -> dict[str, np.ndarray]:
    """Return q [MAX_BITS + 1] at 0 .. MAX_BITS bits of each of QUANTIZERS."""
    bits = np.arange(MAX_BITS + 1)
    return {
        "paper_whole": quantization_variance(bits, allocation.dimension, norm="l2", bound="paper"),
        "paper_512": quantization_variance(bits, BLOCK, norm="l2", bound="paper"),
        "max_512": quantization_variance(bits, BLOCK, norm="max"),
    }


def rows(allocation: Allocation, progress: Callable[[Iterable[Any]], Iterable[Any]] = iter) -> Iterator[Row]:
    """Yield the residual 1 / sum_k U_k(b_k) of every allocation (Song & Choi Lemma 2, in units of C N^2).

    Args:
        progress: wraps the settings that are gone through.
    """
    settings = [
        (name, q, workers, draw)
        for name, q in quantizers(allocation).items()
        for workers in allocation.workers
        for draw in range(allocation.draws)
    ]
    for name, q, workers, draw in progress(settings):
        cluster = Cluster(workers=workers)
        late = cluster.delays(draw).straggle_probability(cluster.deadline_s)[:, None]
        utility = np.where(np.isfinite(q), 1.0 / error_factors(late, q), -np.inf)  # [K, MAX_BITS + 1]
        for mean_bits in allocation.bits:
            for method in METHODS:
                bits = allocate_bits(utility, int(mean_bits * workers), method)
                residual = 1.0 / float(utility[np.arange(workers), bits].sum())
                yield dict(zip(FIELDS, (name, workers, mean_bits, draw, method, residual)))
