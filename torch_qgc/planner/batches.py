"""Batches by speed: how large each worker's is, so that all end a step together, and in whole samples."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from torch_qgc.errors import PlanError
from torch_qgc.planner.checks import Floats, Ints, Mask, batch_sizes, per_worker

__all__ = ["Batches", "apportion", "choose_batches"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Batches:
    """Batches that go with the workers' speeds.

    Attributes:
        batches: [K] float64 > 0, each worker's batch in units of the batch size, as `Plan` takes them. Their mean is 1
            if everybody makes the step, and above 1 otherwise.
        step_s: how long a round lasts in which everybody who can make it does.
        asynchronous: [K] bool, workers that cannot make it: they give a batch every few rounds.
    """

    batches: Floats
    step_s: float
    asynchronous: Mask


def choose_batches(
    per_batch_s: ArrayLike, fixed_s: ArrayLike, *, least: float = 1.0 / 8.0, most: float = 8.0
) -> Batches:
    """Choose batches with which everybody ends a step at the same time.

        B_k = (T - F_k) / s_k, at most `most`              where that is at least `least`
        B_k = F_k / s_k, in [least, most]                  else: as much work as overhead, every few rounds
        sum_k B_k min(1, T / (F_k + s_k B_k)) = K          fixes the round's length T

    The samples that enter a round are K batch sizes on average: that is what keeps the meaning of the learning rate,
    of the batch size and of an epoch. A worker that cannot make the step counts with what it gives per round, so the
    batches of all workers together are more than K batch sizes if there is one. Of several solutions the one with the
    shortest round is taken, which has the most samples per second, but at least half of the workers make the step: a
    round closes on no fewer. If that needs a longer round than the samples do, the largest batches are cut.

    Args:
        per_batch_s: [K], s_k > 0, seconds that worker k computes for one batch size of samples.
        fixed_s: scalar or [K], F_k >= 0, seconds of a step that do not depend on the batch: a median, because a mean
            is fooled by pauses.
        least: smallest batch worth a worker's step, in (0, 1]; more: fewer workers make every step.
        most: largest batch, >= 1; its samples must fit into the worker's memory.
    Raises:
        PlanError: times or limits out of range.
    """
    s, fixed = _seconds(per_batch_s, fixed_s)
    if not 0.0 < least <= 1.0 <= most < np.inf:
        raise PlanError(f"least, most: expected 0 < least <= 1 <= most, got {least} and {most}")
    round_ = _shortest_round(s, fixed, least, most)
    alone = np.clip(fixed / s, least, most)
    batches = np.where(round_.asynchronous, alone, np.clip((round_.step_s - fixed) / s, least, most))

    def samples(largest: float) -> float:
        size = np.minimum(batches, largest)
        return float(np.sum(size * np.minimum(1.0, round_.step_s / (fixed + s * size))))

    if samples(most) > len(s):
        low, high = least, most
        while high - low > 1e-12 * high:
            middle = (low + high) / 2.0
            low, high = (low, middle) if samples(middle) > len(s) else (middle, high)
        batches = np.minimum(batches, high)
    return Batches(batches=batches, step_s=round_.step_s, asynchronous=round_.asynchronous)


class _Round(NamedTuple):
    step_s: float
    asynchronous: Mask


def _shortest_round(s: Floats, fixed: Floats, least: float, most: float) -> _Round:
    """Return the shortest round that half of the workers make, and that has at least K batch sizes of samples.

    The samples of a round of T seconds are linear in T between the times at which a worker joins or has its largest
    batch, so this is exact. They fall where a worker joins, so that there may be several solutions.
    """
    joins, full = fixed + least * s, fixed + most * s
    alone = np.clip(fixed / s, least, most)
    rate = alone / (fixed + s * alone)
    times = np.concatenate([joins, full])
    order = np.argsort(times, kind="stable")
    begins = times[order]
    # From each of these times on: samples = slope T + start.
    slope = rate.sum() + np.cumsum(np.concatenate([1.0 / s - rate, -1.0 / s])[order])
    start = np.cumsum(np.concatenate([-fixed / s, fixed / s + most])[order])
    earliest_s = np.sort(joins)[max(len(s) // 2, 1) - 1]
    first = int(np.searchsorted(begins, earliest_s, side="right")) - 1
    with np.errstate(divide="ignore", invalid="ignore"):
        solution = np.where(slope > 1e-12 * rate.sum(), (len(s) - start) / slope, np.inf)
    ends = np.append(begins[first + 1 :], np.inf) * (1.0 + 1e-12)
    inside = np.flatnonzero(np.isfinite(solution[first:]) & (solution[first:] <= ends))
    if not inside.size:  # most = 1: the round lasts until the last has a whole batch
        return _Round(float(begins[-1]), joins > begins[-1])
    at = first + int(inside[0])
    return _Round(max(float(solution[at]), float(begins[at])), joins > begins[at])


def apportion(batches: ArrayLike, batch_size: int, least: int = 1) -> Ints:
    """Return each worker's batch in whole samples, by largest remainder.

    They sum to sum_k batches_k * batch_size, rounded: to exactly K * batch_size if the batches' mean is 1. Arithmetic
    is exact and ties go to the lower worker, so all machines agree.

    Args:
        batches: [K] > 0 in units of the batch size: `Plan.batches`.
        batch_size: samples, >= 1.
        least: samples that everybody gets at least, >= 1.
    Returns:
        [K] int64. Unless `least` binds, each within one sample of batches_k * batch_size.
    Raises:
        PlanError: fewer samples than `least` for each worker, or arguments out of range.
    """
    sizes = [Fraction(float(b)) for b in batch_sizes(batches, int(np.size(np.asarray(batches))))]
    if batch_size < 1 or least < 1:
        raise PlanError(f"batch_size, least: expected whole numbers of at least 1 sample, got {batch_size} and {least}")
    left, open_ = round(sum(sizes) * batch_size), list(range(len(sizes)))
    if left < least * len(sizes):
        raise PlanError(
            f"batch_size: expected at least {least} samples for each of {len(sizes)} workers, got {left} for all; "
            "raise batch_size"
        )
    samples = np.full(len(sizes), least, dtype=np.int64)
    while True:
        unit = left / sum(sizes[k] for k in open_)
        small = {k for k in open_ if sizes[k] * unit < least}
        if not small:
            break
        left -= least * len(small)
        open_ = [k for k in open_ if k not in small]
    quotas = {k: sizes[k] * unit for k in open_}
    whole = {k: int(quota) for k, quota in quotas.items()}
    samples[open_] = list(whole.values())
    spare = left - sum(whole.values())
    samples[sorted(open_, key=lambda k: (whole[k] - quotas[k], k))[:spare]] += 1
    return samples


def _seconds(per_batch_s: ArrayLike, fixed_s: ArrayLike) -> tuple[Floats, Floats]:
    s = np.atleast_1d(np.asarray(per_batch_s, dtype=np.float64))
    s = per_worker(s, len(s), "per_batch_s")
    fixed = per_worker(fixed_s, len(s), "fixed_s")
    bad = np.flatnonzero(~((s > 0) & (s < np.inf) & (fixed < np.inf)))
    if bad.size:
        raise PlanError(
            f"per_batch_s, fixed_s: expected finite seconds, of a batch > 0 and of the rest >= 0, got {s[bad[0]]} and "
            f"{fixed[bad[0]]} for worker {bad[0]}; leave a worker out that never ends a step"
        )
    return s, fixed
