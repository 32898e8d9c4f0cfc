"""A job on a virtual clock, as simple as can be: rounds await those that began them together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

#: (worker) -> seconds of its next step.
Draw = Callable[[int], float]


@dataclass
class Watched:
    """What was seen: [K] counts of contributions and of their age in rounds, and each worker's delays."""

    round_s: float
    rates: np.ndarray
    staleness: np.ndarray
    delays_s: list[list[float]] = field(repr=False)


def run_rounds(
    draw: Draw, workers: int, deadline_s: float, rounds: int, *, late: str = "fold", max_staleness: int = 8
) -> Watched:
    """Play rounds, and return what was seen of them.

    A round opens when the last one closes. Workers that are free begin it; one that is late sends what it has, and then
    begins the open round (late payloads folded) or waits for the next one (dropped). A round closes when all that began
    it together are in, or at the deadline once half of the workers are.
    """
    now, free, busy = 0.0, set(range(workers)), dict[int, tuple[float, int]]()  # worker: (ends at, made for)
    counts, ages = np.zeros(workers), np.zeros(workers)
    seen: list[list[float]] = [[] for _ in range(workers)]

    def begin(worker: int, step: int) -> None:
        delay_s = draw(worker)
        seen[worker].append(delay_s)
        busy[worker] = (now + delay_s, step)

    for step in range(rounds):
        together, present, began_at = set(free), set[int](), now
        for worker in sorted(free):
            begin(worker, step)
        free.clear()
        while True:
            all_in = together and together <= present
            if all_in or (now >= began_at + deadline_s and together and len(present) >= max(workers // 2, 1)):
                break
            ends = min(busy.values(), default=(np.inf, 0))[0]
            closes = began_at + deadline_s if together else np.inf
            if closes < ends and now < closes:
                now = closes
                continue
            worker = min(busy, key=lambda k: (busy[k], k))
            now, made_for = busy.pop(worker)
            if made_for == step:
                present.add(worker)
                free.add(worker)
                counts[worker] += 1
            elif late == "drop":
                free.add(worker)
            else:
                if step - made_for <= max_staleness:
                    counts[worker] += 1
                    ages[worker] += step - made_for
                if not together:  # nobody has begun the round: its clock starts now
                    together, began_at = {worker}, now
                begin(worker, step)
    return Watched(now / rounds, counts / rounds, ages / np.maximum(counts, 1), seen)
