"""Codes that are graphs: random ones decoded optimally, and expanders."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import ArrayLike

from torch_qgc.errors import PlanError
from torch_qgc.planner import Plan
from torch_qgc.planner.checks import Floats, Mask
from torch_qgc.schemes.setting import Options, Setting

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["expander", "optimal_decoding"]

_DRAWS = 64  # of random regular graphs, of which the one with the largest spectral gap is taken
_ATTEMPTS = 1000  # at a graph without parallel edges; with more than N (N - 1) / 2 workers there is none


def optimal_decoding(
    straggle_probs: ArrayLike, *, graph: Literal["regular", "bernoulli"] = "regular", **options: Unpack[Options]
) -> Plan:
    """Place data by a random graph and solve for the best weights of those who arrived, round by round.

        w(S) = argmin ||W_S^T w - 1||^2

    Workers are edges, partitions vertices: a worker holds two partitions, a partition lies at 2K/N workers. A
    component of arrivals with sides x and y that is bipartite misses (x - y)^2 / (x + y) of ||1||^2, any other
    nothing. M. Glasgow and M. Wootters, "Approximate gradient coding with optimal decoding", IEEE JSAIT 2(3), 2021.

    Args:
        straggle_probs: [K] in [0, 1].
        graph: "regular": random with degrees as equal as they can be; "bernoulli": any worker holds any partition
            with probability 2/K, so that degrees vary.
        options: see `Setting`.
    """
    setting = Setting(straggle_probs=straggle_probs, **options)
    if graph == "bernoulli":
        holds = setting.random().random((setting.workers, setting.partitions)) < 2.0 / setting.workers
        return setting.plan(setting.spread(_not_empty(holds)), "least_squares")
    if graph != "regular":
        raise PlanError(f"graph: expected 'regular' or 'bernoulli', got {graph!r}")
    if not 2 <= setting.partitions <= 2 * setting.workers:
        raise PlanError(
            f"num_partitions: expected 2 .. {2 * setting.workers}, the vertices {setting.workers} edges can reach, "
            f"got {setting.partitions}"
        )
    return setting.plan(setting.spread(_random_edges(setting)), "least_squares")


def expander(straggle_probs: ArrayLike, *, degree: int = 2, **options: Unpack[Options]) -> Plan:
    """Average over neighbours in a regular graph with a large spectral gap, and weigh arrivals by K / |S|.

    With s stragglers and orthonormal gradients the error is at most (lambda / degree)^2 K s / (K - s), lambda the
    second singular value of the adjacency matrix. Raviv et al. (see `cyclic_mds`), section on approximate codes.

    Args:
        straggle_probs: [K] in [0, 1].
        degree: partitions per worker (times N / K) in [1, K]; 2 is the cycle, more: worker k holds k + t for random
            steps t, the set of several drawn that has the largest gap.
        options: see `Setting`; `num_partitions` must be a multiple of K.
    """
    setting = Setting(straggle_probs=straggle_probs, **options)
    k = setting.workers
    if not 1 <= degree <= k:
        raise PlanError(f"degree: expected a number in [1, {k}], got {degree}")
    rng = setting.random()
    first = np.zeros((_DRAWS, k))
    for row in first:
        row[np.arange(degree) if degree <= 2 else rng.choice(k, size=degree, replace=False)] = 1.0
    # The singular values of a circulant are the magnitudes of its first row's Fourier transform.
    second = np.abs(np.fft.fft(first, axis=1))[:, 1:].max(axis=1, initial=0.0)
    best = first[int(np.argmin(second))]
    return setting.plan(setting.spread(np.stack([np.roll(best, row) for row in range(k)])), "arrival_count")


def _random_edges(setting: Setting) -> Floats:
    """Return [K, N] zeros and ones, two ones a row: a random graph with degrees as equal as possible.

    The ends of K edges are dealt to the vertices. Loops, and for a number of attempts parallel edges, are removed by
    swapping an end with that of a random other edge.
    """
    rng, k, n = setting.random(), setting.workers, setting.partitions
    ends = rng.permutation(np.resize(rng.permutation(n), 2 * k)).reshape(k, 2)
    for attempt in itertools.count():
        name = np.sort(ends, axis=1) @ (n, 1)
        _, first = np.unique(name, return_index=True)
        repeated = np.ones(k, dtype=bool)
        repeated[first] = False
        loops = ends[:, 0] == ends[:, 1]
        if not loops.any() and (not repeated.any() or attempt >= _ATTEMPTS):
            break
        for edge in np.flatnonzero(loops | repeated):
            other = rng.integers(k)
            ends[edge, 1], ends[other, 1] = ends[other, 1], ends[edge, 1]
    edges = np.zeros((k, n))
    edges[np.arange(k)[:, None], ends] = 1.0
    return edges


def _not_empty(holds: Mask) -> Floats:
    if not holds.any():
        raise PlanError("seed: expected a code that gives somebody data, got an empty draw; take another seed")
    return holds.astype(np.float64)
