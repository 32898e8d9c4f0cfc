"""Which samples a worker draws: its share of the data, and the partitions that shares are made of."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from torch_qgc.errors import ConfigError
from torch_qgc.planner import Plan

__all__ = ["CodedSampler", "Cut", "Stream", "checked_partitions", "random_partitions"]

_GOLDEN = (5**0.5 - 1) / 2
_EVERYBODY = 1 << 32  # in place of a worker's number


def random_partitions(num_samples: int, num_partitions: int, seed: int) -> list[NDArray[np.int64]]:
    """Cut a random permutation of the data set, the same on every rank, into blocks of (almost) equal size."""
    permutation = np.random.default_rng([seed, 0x9A7]).permutation(num_samples)
    return np.array_split(permutation, num_partitions)


class Cut(NamedTuple):
    """What one step takes from a stream: this worker's samples, between those of the workers before and after it."""

    before: int
    own: int
    after: int

    @classmethod
    def of(cls, sizes: Sequence[int] | NDArray[np.int64], worker: int) -> Cut:
        """Return a worker's place among the batches of all workers, [K]."""
        return cls(int(sum(sizes[:worker])), int(sizes[worker]), int(sum(sizes[worker + 1 :])))


class Stream:
    """The draws of an epoch, one after the other and without end: a batch takes the next ones.

    Each draw is sample i with probability p_i. The stream is made of passes, each a systematic sample in random order
    (Madow, 1949) of 1 / max p draws, so many that no sample comes twice; with equal p it is a permutation. Passes begin
    at phases that follow the golden ratio, so that how often a sample has come hardly differs from its expected number
    wherever the stream is cut: by less than 1 with equal p, by less than 4 within 100 passes with any p.

    Args:
        indices: [M] the samples, at least one.
        probs: [M] p, sum 1.
        rng: decides about the order.
    """

    def __init__(self, indices: NDArray[np.int64], probs: NDArray[np.float64], rng: np.random.Generator) -> None:
        order = rng.permutation(len(indices))  # so that fractions of a draw do not always fall to the same
        self._indices, self._rng = indices[order], rng
        self._length = int(1.0 / probs.max() + 1e-6)
        self._ends = np.cumsum(probs[order]) * self._length
        self._ends[-1] = self._length
        self._phase = rng.random()
        self._left = indices[:0]  # of the newest pass

    def take(self, count: int) -> NDArray[np.int64]:
        """Return the next draws, [count] indices."""
        parts, missing = [self._left[:count]], count - len(self._left)
        self._left = self._left[count:]
        while missing > 0:
            whole = self._pass()
            parts.append(whole[:missing])
            self._left = whole[missing:]
            missing -= self._length
        return np.concatenate(parts)

    def cut(self, cut: Cut) -> list[int]:
        """Take what a step does, and return this worker's part of it."""
        self.take(cut.before)
        own: list[int] = self.take(cut.own).tolist()
        self.take(cut.after)
        return own

    def _pass(self) -> NDArray[np.int64]:
        ticks = np.arange(self._length) + self._phase
        self._phase = (self._phase + _GOLDEN) % 1.0
        drawn = np.searchsorted(self._ends, ticks, side="right").clip(max=len(self._indices) - 1)
        return self._rng.permutation(self._indices[drawn])


class CodedSampler(Sampler[list[int]]):
    """Batches of sample indices drawn from one worker's share of the data, or from data that all workers share.

    Worker k draws from partition n with probability a_kn / l_k (Song & Choi, Theorem 1), so the expected gradient
    of its batch is the one the plan's coefficients weigh. The batches of an epoch are cut from one `Stream`, which does
    not depend on their sizes: small batches leave some of it over, large ones run into further passes. Data that all
    workers share are one stream, from which every step takes the batches of all workers, one after the other: each
    sample comes once in an epoch, whatever the sizes of the batches.

    Args:
        probs: [N] chance that a sample comes from each partition: the plan's partition_probabilities(worker).
        partitions: N index lists.
        batch_size: samples per batch; where workers differ, the mean over them.
        batches: batches per epoch, whatever their sizes.
        cut: returns what the batch that is cut now takes from the stream; None: batch_size samples.
        seed: with the epoch and the worker's number it determines the draws.
        worker: this worker's number; None: all workers share the stream.
        weights: [samples] >= 0: within a partition, samples are drawn in proportion to these; None: alike.
    """

    def __init__(
        self,
        probs: NDArray[np.float64],
        partitions: Sequence[Sequence[int] | NDArray[np.int64]],
        *,
        batch_size: int,
        batches: int,
        cut: Callable[[], Cut] | None = None,
        seed: int = 0,
        worker: int | None = 0,
        weights: Sequence[float] | NDArray[np.float64] | None = None,
    ) -> None:
        self.batch_size, self.batches = batch_size, batches
        self._next_cut = cut if cut is not None else lambda: Cut(0, batch_size, 0)
        self._seed, self._worker = seed, worker
        self.epoch = 0
        self.skip = 0  # batches left out at the beginning, which a run before a checkpoint has had
        self.keep: int | None = None  # samples that are loaded of the next batch, the first ones; None: all
        self.sizes: deque[int] = deque()  # of the batches that were cut; whoever needs them takes them out
        self._stream: Stream
        self._left = 0  # batches of the epoch that are still to be cut
        held = [(np.asarray(block, dtype=np.int64), prob) for prob, block in zip(probs, partitions) if prob > 0]
        self._indices = np.concatenate([block for block, _ in held] or [np.zeros(0, dtype=np.int64)])
        self._probs = np.concatenate([_within(block, prob, weights) for block, prob in held] or [np.zeros(0)])

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration takes."""
        self.epoch = epoch

    def stream(self) -> Stream:
        """Return the epoch's draws from the first one on."""
        number = _EVERYBODY if self._worker is None else self._worker
        return Stream(self._indices, self._probs, np.random.default_rng([self._seed, number, self.epoch]))

    @property
    def moves(self) -> bool:
        """All workers share the data, so that any of them may answer for any part of it."""
        return self._worker is None

    def first(self) -> list[int]:
        """Return the epoch's first batch, in the size that it has now."""
        return self.stream().cut(self._next_cut())

    def cut(self) -> list[int]:
        """Cut the epoch's next batch: called by the iteration, or by whoever leaves the batch out."""
        self._left -= 1
        cut = self._next_cut()
        self.sizes.append(cut.own)
        return self._stream.cut(cut)

    def __iter__(self) -> Iterator[list[int]]:
        self._stream, self._left = self.stream(), self.batches - self.skip
        self._stream.take(self.skip * sum(self._next_cut()))
        self.keep = None
        self.sizes.clear()
        return self._batches()

    def _batches(self) -> Iterator[list[int]]:
        while self._left > 0:
            yield self.cut()[: self.keep]

    def __len__(self) -> int:
        return self.batches


def _within(block: NDArray[np.int64], prob: float, weights: Sequence[float] | NDArray[np.float64] | None) -> Any:
    """Return each sample's chance to be drawn, for a partition that is drawn from with a probability."""
    if weights is None:
        return np.full(len(block), prob / len(block))
    own = np.asarray(weights, dtype=np.float64)[block]
    return prob * own / own.sum() if own.sum() > 0 else np.full(len(block), prob / len(block))


def checked_partitions(
    plan: Plan, num_samples: int, partitions: Sequence[Sequence[int]] | None, seed: int
) -> list[NDArray[np.int64]]:
    """Return the plan's N index lists: those given, checked, or a random permutation cut into blocks.

    Raises:
        ConfigError: they do not fit the plan or the data set.
    """
    if partitions is None:
        if num_samples < plan.num_partitions:
            raise ConfigError(
                f"expected at least one sample per partition ({plan.num_partitions}), got {num_samples} samples: "
                "make the plan with fewer partitions"
            )
        return random_partitions(num_samples, plan.num_partitions, seed)
    blocks = [np.asarray(block, dtype=np.int64) for block in partitions]
    if len(blocks) != plan.num_partitions:
        raise ConfigError(
            f"partitions: expected {plan.num_partitions} as in the plan, got {len(blocks)}: "
            f"make_plan(..., num_partitions={len(blocks)})"
        )
    for n, block in enumerate(blocks):
        if not len(block) or block.min() < 0 or block.max() >= num_samples:
            raise ConfigError(
                f"partition {n}: expected indices of the data set's {num_samples} samples, at least one, "
                f"got {len(block)} of them" + (f" from {block.min()} to {block.max()}" if len(block) else "")
            )
    return blocks
