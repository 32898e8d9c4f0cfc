"""What a link carries: the most bits per coordinate whose payload is through in time."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from torch_qgc.errors import PlanError
from torch_qgc.kernels import payload_bytes
from torch_qgc.planner.checks import Floats, Ints, per_worker
from torch_qgc.planner.variance import LEAST_BITS, MOST_BITS, PASS_THROUGH_BITS

__all__ = ["bits_within"]


def bits_within(seconds: ArrayLike, per_byte_s: ArrayLike, numel: int) -> Ints:
    """Return the most bits per coordinate with which a gradient passes each worker's link in time.

    Args:
        seconds: scalar or [K], what the transfer may take: the deadline less the time that the worker computes.
        per_byte_s: [K], seconds per byte of each worker's link, >= 0.
        numel: coordinates of the gradient.
    Returns:
        [K] int64 for `make_plan(most_bits=...)`: 2 .. 16, or 32 where the gradient fits as it is; 2 also where not even
        that is in time: then the payload is late, and only a later deadline helps.
    Raises:
        PlanError: NaN, a negative number of seconds per byte, or no coordinates.
    """
    link = np.atleast_1d(np.asarray(per_byte_s, dtype=np.float64))
    link = per_worker(link, len(link), "per_byte_s")
    left: Floats = per_worker(seconds, len(link), "seconds", least=-np.inf)
    if numel < 1:
        raise PlanError(f"numel: expected at least 1 coordinate, got {numel}")
    choices = np.array([*range(LEAST_BITS, MOST_BITS + 1), PASS_THROUGH_BITS])
    sizes = np.array([payload_bytes(numel, int(bits)) for bits in choices])
    fits = sizes * link[:, None] <= left[:, None]
    bits: Ints = np.max(np.where(fits, choices, LEAST_BITS), axis=1)
    return bits
