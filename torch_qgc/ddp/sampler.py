"""Which samples a worker draws: its share of the data, and the partitions that shares are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from torch_qgc.errors import ConfigError
from torch_qgc.planner import Plan

__all__ = ["CodedSampler", "checked_partitions", "random_partitions"]


def random_partitions(num_samples: int, num_partitions: int, seed: int) -> list[NDArray[np.int64]]:
    """Cut a random permutation of the data set, the same on every rank, into blocks of (almost) equal size."""
    permutation = np.random.default_rng([seed, 0x9A7]).permutation(num_samples)
    return np.array_split(permutation, num_partitions)


class CodedSampler(Sampler[list[int]]):
    """Batches of sample indices drawn from one worker's share of the data.

    Worker k draws from partition n with probability a_kn / l_k (Song & Choi, Theorem 1), so the expected gradient
    of its batch is the one the plan's coefficients weigh. Within an epoch samples are drawn without replacement as
    far as the share allows: each sample's expected number of draws is exact, its actual number differs from it by
    less than one (systematic sampling), and the order is random.

    Args:
        probs: [N] chance that a sample comes from each partition: the plan's partition_probabilities(worker).
        partitions: N index lists.
        batch_size: samples per batch.
        batches: batches per epoch.
        seed: with the epoch and the worker's number it determines the draws.
        worker: this worker's number.
        weights: [samples] >= 0: within a partition, samples are drawn in proportion to these; None: alike.
    """

    def __init__(
        self,
        probs: NDArray[np.float64],
        partitions: Sequence[Sequence[int] | NDArray[np.int64]],
        *,
        batch_size: int,
        batches: int,
        seed: int = 0,
        worker: int = 0,
        weights: Sequence[float] | NDArray[np.float64] | None = None,
    ) -> None:
        self.batch_size, self.batches = batch_size, batches
        self._seed, self._worker = seed, worker
        self.epoch = 0
        self.skip = 0  # batches left out at the beginning, which a run before a checkpoint has had
        self.cut: Callable[[list[int]], list[int] | None] = lambda batch: batch  # what is loaded of a batch; None: skip
        held = [(np.asarray(block, dtype=np.int64), prob) for prob, block in zip(probs, partitions) if prob > 0]
        self._indices = np.concatenate([block for block, _ in held] or [np.zeros(0, dtype=np.int64)])
        self._probs = np.concatenate([_within(block, prob, weights) for block, prob in held] or [np.zeros(0)])

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration takes."""
        self.epoch = epoch

    def draws(self) -> NDArray[np.int64]:
        """Return the epoch's sample indices in order, [batches * batch_size]."""
        if not len(self._indices):
            return np.zeros(0, dtype=np.int64)
        rng = np.random.default_rng([self._seed, self._worker, self.epoch])
        total = self.batches * self.batch_size
        order = rng.permutation(len(self._indices))  # so that fractions of a draw do not always fall to the same
        ends = np.cumsum(self._probs[order]) * total
        ends[-1] = total
        ticks = np.arange(total) + rng.random()
        return rng.permutation(
            self._indices[order[np.searchsorted(ends, ticks, side="right").clip(max=len(order) - 1)]]
        )

    def __iter__(self) -> Iterator[list[int]]:
        draws = self.draws()
        for start in range(self.skip * self.batch_size, len(draws), self.batch_size):
            batch = self.cut(draws[start : start + self.batch_size].tolist())
            if batch is not None:
                yield batch

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
