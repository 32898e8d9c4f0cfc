"""Has a worker changed, or was it chance? A rank test with a false-alarm rate that holds for any noise."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from torch_qgc.planner.checks import Floats, Ints

__all__ = ["ChangeTest"]

#: Newest steps that are compared with all before them: few show a large change soon, many a small one at all.
_NEWEST = (4, 8, 16, 32)

#: Times that differ by less are the same: nobody plans anew for 5 %, and clocks and sums round.
_MARGIN = 1.05


class ChangeTest:
    """Compare the newest steps of a worker with those before, in several kinds of time at once.

    Step i is slower than step j if both its time and its time per unit of size are, by more than 5 %. If

        time = fixed + rate size + noise,   none of them negative,

    then a change of size alone never makes a step slower (a larger size does not raise the time per unit, a smaller
    one not the time), nor quicker. So while the worker stays the same, however its time splits into fixed and rate, the
    number U of pairs of a new and an old step in which the new one is slower is no larger than in the Mann-Whitney
    test of exchangeable times without ties, whose distribution is known exactly, whatever the noise and the sizes. The
    false-alarm rate is divided equally among directions, kinds of time and numbers of newest steps.

    Args:
        memory: most steps that will be compared, new and old ones together.
        kinds: of times, each with its own size.
        false_alarm: chance of an alarm in a step in which nothing has changed, at most.
    """

    def __init__(self, memory: int, kinds: int, false_alarm: float) -> None:
        self._least = _least_counts(memory, false_alarm / (2 * kinds * len(_NEWEST)))

    def newest(self, sizes: Floats, times: Floats) -> int:
        """Return how many of the newest steps differ from all before them, 0 if that may be chance.

        Args:
            sizes: [kinds, n] > 0, oldest first. times: [kinds, n] >= 0.
        """
        count, rates = times.shape[1], times / sizes
        new_times, new_rates = times[:, -_NEWEST[-1] :, None], rates[:, -_NEWEST[-1] :, None]
        old_times, old_rates = times[:, None, :], rates[:, None, :]
        slower = (new_times > old_times * _MARGIN) & (new_rates > old_rates * _MARGIN)
        quicker = (new_times < old_times / _MARGIN) & (new_rates < old_rates / _MARGIN)
        for newest, least in zip(_NEWEST, self._least):
            for pairs in (*slower, *quicker):
                if newest < count and np.count_nonzero(pairs[-newest:, :-newest]) >= least[count - newest]:
                    return newest
        return 0


@lru_cache(maxsize=16)
def _least_counts(memory: int, level: float) -> tuple[Ints, ...]:
    """Return, for each number m of newest steps, [memory] the least U that m and r = 0, 1, ... older steps reach by
    chance with probability `level` at most.

    The largest of m + r exchangeable times is new with probability m / (m + r) and then exceeds r old ones, so

        P(U = u; m, r) = m / (m + r) P(U = u - r; m - 1, r) + r / (m + r) P(U = u; m, r - 1)
    """
    most = _NEWEST[-1]
    least = np.zeros((most + 1, memory), dtype=np.int64)
    chance = np.zeros((most + 1, most * memory + 2))
    chance[:, 0] = 1.0
    for r in range(memory):
        for m in range(1, most + 1):
            if r:
                chance[m] *= r / (m + r)
                chance[m, r:] += m / (m + r) * chance[m - 1, :-r]
            least[m, r] = np.count_nonzero(np.cumsum(chance[m, ::-1])[::-1] > level)
    return tuple(least[m] for m in _NEWEST)
