"""Batches from a worker's own share of the data, and the skipping of those it was too late for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Sampler

from torch_qgc.errors import ConfigError

if TYPE_CHECKING:
    from torch_qgc.planner import Plan

__all__ = ["CodedLoader", "CodedSampler", "checked_partitions", "looping", "make_loader", "random_partitions"]


class Stepper(Protocol):
    """What the loader needs of QGCState."""

    workers: int

    @property
    def step(self) -> int:
        """The step that is made next, or is being made."""

    @property
    def may_be_late(self) -> bool:
        """Steps may close without this worker."""

    @property
    def in_step(self) -> bool:
        """Between a forward pass and the end of its backward pass."""

    def check_replayable(self) -> None:
        """Raise unless a late worker of this job could replay."""

    def catch_up(self, end_step: int) -> None:
        """Replay the steps below end_step that closed without this worker."""

    def await_step(self, end_step: int) -> None:
        """Replay the steps below end_step, waiting until they have closed."""


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
    ) -> None:
        self.batch_size, self.batches = batch_size, batches
        self._seed, self._worker = seed, worker
        self.epoch = 0
        self.skip = 0  # batches left out at the beginning, which a run before a checkpoint has had
        held = [(np.asarray(block, dtype=np.int64), prob) for prob, block in zip(probs, partitions) if prob > 0]
        self._indices = np.concatenate([block for block, _ in held] or [np.zeros(0, dtype=np.int64)])
        self._probs = np.concatenate([np.full(len(block), prob / len(block)) for block, prob in held] or [np.zeros(0)])

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
            yield draws[start : start + self.batch_size].tolist()

    def __len__(self) -> int:
        return self.batches


class CodedLoader:
    """Iterate over an epoch's steps; those that closed without this worker are replayed and their batches skipped.

    Every rank's loop ends at the same step, so what follows it (evaluation, checkpoints, collectives) lines up.
    A late rank sees fewer batches than `len(loader)`.

    Args:
        state: whose steps these are.
        loader: batches of this worker's share.
        sampler: the loader's.
        accumulate: batches per step.
        together: other states whose models make as many steps in the same loop.
        seed: of the random numbers that the loader's processes start with; None leaves the loader's generator alone.
    """

    def __init__(
        self,
        state: Stepper,
        loader: DataLoader[Any],
        sampler: CodedSampler,
        accumulate: int,
        *,
        together: Sequence[Stepper] = (),
        seed: int | None = None,
    ) -> None:
        self._state, self._loader, self._accumulate, self._seed = state, loader, accumulate, seed
        self.states = (state, *together)
        self.sampler = sampler
        self.steps = len(sampler) // accumulate
        self._resume_at = 0  # steps of the epoch that were made before a checkpoint
        self._epoch_start: int | None = None  # the state's step at which the epoch's step 0 was, or would have been

    @property
    def dataset(self) -> Any:
        """The data set."""
        return self._loader.dataset

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; without it each iteration is the next one."""
        if epoch != self.sampler.epoch:
            self._resume_at, self._epoch_start = 0, None
        self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Any]:
        for state in self.states:
            state.check_replayable()
        done = self.steps_done if self._epoch_start is None or self.steps_done == self._resume_at else 0
        self._resume_at, self._epoch_start = done, self._state.step - done
        starts = [state.step - done for state in self.states]
        self.sampler.skip = done * self._accumulate
        if self._seed is not None and self._loader.generator is not None:
            self._loader.generator.manual_seed(self._seed + self.sampler.epoch)
        batches = iter(self._loader)
        _looping.append(self)
        try:
            while self._caught_up(starts) < self.steps:
                try:
                    yield next(batches)
                except StopIteration:
                    raise ConfigError(
                        f"the loader gave all {len(self)} batches of the epoch but only step {self._state.step} "
                        f"of {starts[0] + self.steps} was made: expected one backward pass per {self._accumulate} "
                        "batches; "
                        "for gradient accumulation with no_sync() say how many: state.loader(..., accumulate=n)"
                    ) from None
        finally:
            _looping.remove(self)
        self.sampler.set_epoch(self.sampler.epoch + 1)
        self._resume_at, self._epoch_start = 0, None

    def _caught_up(self, starts: Sequence[int]) -> int:
        """Replay what closed without this worker; return the steps of the epoch that all states have made."""
        if any(state.in_step for state in self.states):
            return 0  # between two micro-batches of one step there is nothing to catch up
        for state, start in zip(self.states, starts):
            state.catch_up(start + self.steps)
        most = max(state.step - start for state, start in zip(self.states, starts))
        for state, start in zip(self.states, starts):
            if state.step < start + most:
                state.await_step(start + most)
        return most

    @property
    def steps_done(self) -> int:
        """Steps of the epoch that were made so far."""
        if self._epoch_start is None:
            return self._resume_at
        return min(self._state.step - self._epoch_start, self.steps)

    def state_dict(self) -> dict[str, int]:
        """Return the position: the epoch, and the samples that all workers together have drawn in it."""
        return {"epoch": self.sampler.epoch, "samples": self.steps_done * self._samples_per_step}

    def load_state_dict(self, position: dict[str, int]) -> None:
        """Go on from a position, of a run with any number of workers; before the loop.

        With other workers or another batch size the position is rounded down to whole steps: some samples are drawn
        again rather than left out. Batches that are skipped are not loaded; random numbers that the data set itself
        takes (augmentation) are torch's, and not part of the position.
        """
        self.sampler.set_epoch(int(position["epoch"]))
        self._epoch_start = None
        self._resume_at = min(int(position["samples"]) // self._samples_per_step, self.steps)

    @property
    def _samples_per_step(self) -> int:
        return self._state.workers * self.sampler.batch_size * self._accumulate


_looping: list[CodedLoader] = []


def looping() -> Sequence[CodedLoader]:
    """Return the loaders over which this process is iterating."""
    return _looping


def make_loader(
    state: Any,
    dataset: Any,
    *,
    batch_size: int,
    partitions: Sequence[Sequence[int]] | None = None,
    accumulate: int = 1,
    together: Sequence[Any] = (),
    seed: int = 0,
    **kwargs: Any,
) -> CodedLoader:
    """Make a loader over this worker's share of the data.

    Args:
        state: QGCState.
        dataset: a map-style data set, the same on every rank (each rank only touches what its share needs).
        batch_size: samples per worker and batch.
        partitions: N lists of sample indices, one per partition of the plan, for data that cannot move; a random
            permutation of the data set is cut into N equal blocks if None.
        accumulate: batches per step, for gradient accumulation with no_sync().
        together: the QGCStates of other models that make as many steps in the same loop, one per `accumulate` batches.
        seed: of the permutation and of the draws.
        **kwargs: any argument of torch's DataLoader that is not about sampling.
    Raises:
        ConfigError: arguments that contradict the sampling, or partitions that do not fit the plan.
    """
    clash = {"sampler", "batch_sampler", "shuffle", "drop_last"} & {k for k, v in kwargs.items() if v is not None}
    if clash:
        raise ConfigError(
            f"got {', '.join(sorted(clash))}: the plan decides which samples this worker draws, in random order; "
            "leave it out"
        )
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise ConfigError(
            f"dataset: expected a map-style data set (__len__ and __getitem__), got {type(dataset).__name__}: "
            "a worker's share is a set of indices; load an iterable data set into a list or an index first"
        )
    if batch_size < 1 or accumulate < 1:
        raise ConfigError(f"expected batch_size >= 1 and accumulate >= 1, got {batch_size} and {accumulate}")
    plan: Plan = state.plan
    blocks = checked_partitions(plan, len(dataset), partitions, seed)
    samples = sum(len(block) for block in blocks)
    steps = math.ceil(samples / (plan.num_workers * batch_size * accumulate))
    probs = plan.partition_probabilities(state.rank)
    sampler = CodedSampler(
        probs, blocks, batch_size=batch_size, batches=steps * accumulate, seed=seed, worker=state.rank
    )
    if not probs.any():
        raise ConfigError(
            f"worker {state.rank} has no share of the data in this plan (it is always late, or was given no bits): "
            "start the job without it, or make the plan with allow_drop=False"
        )
    own_generator = kwargs.get("generator") is None
    if own_generator:
        kwargs["generator"] = torch.Generator()
    return CodedLoader(
        state,
        DataLoader(dataset, batch_sampler=sampler, **kwargs),
        sampler,
        accumulate,
        together=together,
        seed=seed if own_generator else None,
    )


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
