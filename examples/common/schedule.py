"""The learning rate over a job."""

import math
from collections.abc import Callable


def warmup_cosine(total_steps: int, *, warmup_fraction: float = 0.1) -> Callable[[int], float]:
    """Return the factor on the learning rate, for LambdaLR: a linear warm-up, then half a cosine down to zero."""
    warmup = max(1, round(warmup_fraction * total_steps))

    def factor(step: int) -> float:
        return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * min(step, total_steps) / total_steps)))

    return factor
