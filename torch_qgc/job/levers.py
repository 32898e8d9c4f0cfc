"""Batches for slow processors and bits for slow links, by what steps usually take; the deadline is for the rest."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from torch_qgc.job.measure import Estimate
from torch_qgc.kernels import payload_bytes
from torch_qgc.planner.batches import apportion, choose_batches
from torch_qgc.planner.bits import allocate_bits
from torch_qgc.planner.checks import Floats, Ints
from torch_qgc.planner.links import bits_within
from torch_qgc.planner.variance import LEAST_BITS, MOST_BITS

__all__ = ["LEAST_SAMPLES", "WORTHWHILE", "Speeds", "UsualRounds", "choose_bits", "cut_batches"]

#: Samples that every batch has: as many as a thin one.
LEAST_SAMPLES = 2

#: A plan is changed if a loss is then expected sooner by this factor: below, estimates differ by chance.
WORTHWHILE = 1.1

_BETTER = 1.03  # the same for bits: nobody waits for a change of these
_LEAST = (1 / 8, 1 / 4, 1 / 2)  # batches, below which a worker makes no step with the others
_FAR = 1.2  # a batch that is off by this factor is changed in any case: its worker is not what it was
_TRIED_BITS = (2, 3, 4, 6, 8)  # of the slowest link
_TAIL = 1.2  # usual over quick steps
_MOST_ENDS = 16  # of rounds that are tried
_QUEUES = 32.0  # rounds that payloads are late then
_NOTICEABLE = 0.02  # of a step: what a link takes at least to matter


@dataclass(frozen=True, eq=False)
class Speeds:
    """What the steps of A workers usually take, [A] seconds each.

    Attributes:
        per_batch_s: of computing, per mean batch. fixed_s: of their own, whatever the batch.
        per_byte_s, latency_s: on the link. down_s: for results on their way back.
    """

    per_batch_s: Floats
    fixed_s: Floats
    per_byte_s: Floats
    latency_s: Floats
    down_s: Floats

    @classmethod
    def of(cls, estimates: Mapping[int, Estimate], batches: Floats) -> Speeds:
        """Read them off estimates of workers with these batches, [A].

        All others wait for whoever is thought to be quick with any batch, and sizes that hardly differ cannot tell. So
        as much of a worker's quick steps as may be counts as the batch's; by how much its usual step is longer than
        those is a tail, which no batch cures, unless they hardly differ.
        """
        usual_s = np.array([e.usual_own_s(b) for e, b in zip(estimates.values(), batches)])
        quick = [e.quick[0] for e in estimates.values()]
        quick_s = np.array([float(line.at(b)) for line, b in zip(quick, batches)])
        computing_s = np.where(usual_s < _TAIL * quick_s, usual_s, quick_s)
        per_batch_s = np.maximum(np.minimum([line.slope.high for line in quick], computing_s / batches), 1e-9)
        link = np.array([(e.per_byte_s.value, e.latency_s.value, e.down_s) for e in estimates.values()]).T
        return cls(per_batch_s, np.maximum(usual_s - per_batch_s * batches, 0.0), *link)

    def own_s(self, batches: Floats) -> Floats:
        """Return [A] seconds of their own."""
        return np.asarray(self.fixed_s + self.per_batch_s * batches)

    def ways_s(self, nbytes: Floats) -> Floats:
        """Return [2, A] seconds on their links, of payloads of [A] bytes and of results."""
        return np.stack([self.latency_s + self.per_byte_s * nbytes, self.down_s])


@dataclass(frozen=True, kw_only=True, eq=False)
class UsualRounds:
    """Rounds of a job if steps always take what they usually do.

    Args:
        shares: [A] m_k, sum 1.
        limit_s: rounds are no longer, unless half of the workers need that.
        folds: late payloads are folded in; False: they are dropped.
        moves: data can move, and shares are what workers deliver.
    """

    shares: Floats
    limit_s: float = math.inf
    folds: bool = True
    moves: bool = False

    def cost(self, batches: Floats, own_s: Floats, ways_s: Floats, variance: Floats) -> float:
        """Return what the time to a given loss is proportional to.

            min over T of  T (1 + sum_k m_k s_k + sum_k m_k^2 (1 - r_k + v_k) / r_k)

        the objective of `choose_deadline` with the rounds of `JobRounds`, without tails and pauses: r_k = 1 and s_k = 0
        for those that make a round of T seconds. The others, whose steps take t_k, have r_k = T / (the largest part of
        t_k), at most 1, and s_k = t_k / T, or _QUEUES where payloads queue.

        Args:
            batches: [A]. own_s: [A]. ways_s: [2, A]; see `Speeds`. All parts of a step together are t_k > 0.
            variance: [A] v_k.
        """
        times_s, busy_s = own_s + ways_s.sum(axis=0), ways_s.max(axis=0)
        ends = np.sort(times_s)[max(len(times_s) // 2, 1) - 1 :]
        if len(ends) > _MOST_ENDS:
            ends = np.quantile(ends, np.linspace(0.0, 1.0, _MOST_ENDS))
        ends = np.maximum(np.minimum(ends, self.limit_s), ends[0])
        in_time, part = times_s <= ends[:, None], ends[:, None] / np.maximum(own_s, busy_s)
        rates = np.where(in_time, 1.0, np.minimum(part, 1.0) if self.folds else 1e-9)
        stale = np.where(busy_s > np.maximum(own_s, ends[:, None]), _QUEUES, times_s / ends[:, None])
        stale = np.where(in_time, 0.0, stale)
        shares = rates * batches if self.moves else np.broadcast_to(self.shares, rates.shape)
        shares = shares / shares.sum(axis=1, keepdims=True)
        error = (1.0 - rates + variance) / rates
        return float(np.min(ends * (1.0 + np.sum(stale * shares + error * shares**2, axis=1))))


def cut_batches(
    speeds: Speeds, rounds: UsualRounds, ways_s: Floats, variance: Floats, now: Floats, batch_size: int, most: float
) -> Floats:
    """Return batches with which a loss is reached soonest, in whole samples; those at hand if they are about as good.

    Everybody ends a step together, but for those of which too little would be left then: they give large batches now
    and then. How little that is is tried out.

    Args:
        speeds: of the workers. rounds: that they make.
        ways_s, variance: see `UsualRounds.cost`; with the batches at hand.
        now: [A] batches at hand, in mean batches.
        batch_size: samples of a mean batch.
        most: the largest batch, in mean batches.
    """
    link_s = ways_s.sum(axis=0)

    def cost(batches: Floats) -> float:
        # A batch of B mean batches has 1 / B of the noise.
        return rounds.cost(batches, speeds.own_s(batches), ways_s, variance * now / batches)

    def cuts() -> Iterator[Floats]:
        for least in _LEAST:
            # What the link takes is no time for computing.
            made = choose_batches(speeds.per_batch_s, speeds.fixed_s + link_s, least=least, most=most)
            alone = made.asynchronous
            # How long an asynchronous worker would take for a smaller batch may not be known well: keep it large first.
            yield np.where(alone, np.maximum(made.batches, now), made.batches)
            if alone.any():
                yield made.batches
                yield np.where(alone, most, made.batches)

    best, *others = cuts()
    for each in others:
        best = each if cost(best) > WORTHWHILE * cost(each) else best
    best = apportion(best, batch_size, min(batch_size, LEAST_SAMPLES)) / batch_size
    times_s = speeds.own_s(best) + link_s
    makes = times_s < 1.5 * np.median(times_s)  # nobody waits for the others, whose batches may be off
    far = np.abs(np.log(best / now))[makes] > np.log(_FAR)
    # The samples of a round are what learning rates go by.
    total = bool(makes.all()) and abs(np.log(best.sum() / now.sum())) > np.log(WORTHWHILE)
    return best if cost(now) > WORTHWHILE * cost(best) or far.any() or total else now


def choose_bits(
    speeds: Speeds,
    rounds: UsualRounds,
    batches: Floats,
    variance: Floats,
    error: Floats,
    budget: int,
    numel: int,
    now: Ints,
) -> Ints:
    """Return the bits with which a loss is reached soonest, or those at hand if they are about as good.

    Of the budget every worker gets what its link carries in a time that is the same for all: links are tried with
    what the slowest takes for 2, 3, ... bits, as far as that is a noticeable part of a step. Fewer bits shorten the
    step and add to the error, and `UsualRounds.cost` weighs them. With a limit, links carry what is in time.

    Args:
        speeds: of the links. rounds: that the workers make.
        batches: [A], in mean batches.
        variance: [A, 17] v_k at each number of bits. error: [A, 17] what it adds to the error; inf where it cannot be.
        budget: bits per coordinate of all of them together.
        numel: coordinates of the gradient.
        now: [A] bits at hand.
    """
    own_s = speeds.own_s(batches)
    sizes = np.array([payload_bytes(numel, max(b, LEAST_BITS)) for b in range(MOST_BITS + 1)], dtype=np.float64)
    slowest, rows = float(speeds.per_byte_s.max()), np.arange(len(now))

    def cost(bits: Ints) -> float:
        return rounds.cost(batches, own_s, speeds.ways_s(sizes[bits]), variance[rows, bits])

    if math.isfinite(rounds.limit_s):
        left_s = rounds.limit_s - own_s - speeds.latency_s
        cap = np.where(left_s > 0.0, np.minimum(bits_within(left_s, speeds.per_byte_s, numel), MOST_BITS), MOST_BITS)
        best, late = allocate_bits(-error, budget, most_bits=cap), bool(np.any(now > cap))
        return best if late or cost(now) > _BETTER * cost(best) else now
    best = allocate_bits(-error, budget)
    for b in _TRIED_BITS:
        cap = np.minimum(bits_within(slowest * sizes[b], speeds.per_byte_s, numel), MOST_BITS)
        if slowest * sizes[b] > _NOTICEABLE * float(np.median(own_s)) and np.any(best > cap):
            best = min(best, allocate_bits(-error, budget, most_bits=cap), key=cost)
    return best if cost(now) > _BETTER * cost(best) else now
