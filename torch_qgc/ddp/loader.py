"""Batches from a worker's own share of the data, and the skipping of those it was too late for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

from torch_qgc.ddp.sampler import CodedSampler, checked_partitions
from torch_qgc.errors import ConfigError
from torch_qgc.worker.replica import Replica

__all__ = ["CodedLoader", "looping", "make_loader"]


class CodedLoader:
    """Iterate over an epoch's steps; those that closed without this worker are replayed and their batches skipped.

    Every rank's loop ends at the same step, so what follows it (evaluation, checkpoints, collectives) lines up.
    A late rank sees fewer batches than `len(loader)`.

    Args:
        replica: whose steps these are.
        loader: batches of this worker's share.
        sampler: the loader's.
        accumulate: batches per step.
        together: replicas of other models that make as many steps in the same loop.
        seed: of the random numbers that the loader's processes start with; None leaves the loader's generator alone.
    """

    def __init__(
        self,
        replica: Replica,
        loader: DataLoader[Any],
        sampler: CodedSampler,
        accumulate: int,
        *,
        together: Sequence[Replica] = (),
        seed: int | None = None,
    ) -> None:
        self._replica, self._loader, self._accumulate, self._seed = replica, loader, accumulate, seed
        self.replicas = (replica, *together)
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
        for each in self.replicas:
            each.check_replayable()
        done = self.steps_done if self._epoch_start is None or self.steps_done == self._resume_at else 0
        self._resume_at, self._epoch_start = done, self._replica.step - done
        starts = [each.step - done for each in self.replicas]
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
                        f"the loader gave all {len(self)} batches of the epoch but only step {self._replica.step} "
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
        if any(each.in_step for each in self.replicas):
            return 0  # between two micro-batches of one step there is nothing to catch up
        for each, start in zip(self.replicas, starts):
            each.catch_up(start + self.steps)
        most = max(each.step - start for each, start in zip(self.replicas, starts))
        for each, start in zip(self.replicas, starts):
            if each.step < start + most:
                each.await_step(start + most)
        return most

    @property
    def steps_done(self) -> int:
        """Steps of the epoch that were made so far."""
        if self._epoch_start is None:
            return self._resume_at
        return min(self._replica.step - self._epoch_start, self.steps)

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
        return self._replica.spec.workers * self.sampler.batch_size * self._accumulate


_looping: list[CodedLoader] = []


def looping() -> Sequence[CodedLoader]:
    """Return the loaders over which this process is iterating."""
    return _looping


def make_loader(
    replica: Replica,
    dataset: Any,
    *,
    batch_size: int,
    partitions: Sequence[Sequence[int]] | None = None,
    accumulate: int = 1,
    together: Sequence[Replica] = (),
    seed: int = 0,
    **kwargs: Any,
) -> CodedLoader:
    """Make a loader over this worker's share of the data.

    Args:
        replica: whose loader it is.
        dataset: a map-style data set, the same on every rank (each rank only touches what its share needs).
        batch_size: samples per worker and batch.
        partitions: N lists of sample indices, one per partition of the plan, for data that cannot move; a random
            permutation of the data set is cut into N equal blocks if None.
        accumulate: batches per step, for gradient accumulation with no_sync().
        together: the replicas of other models that make as many steps in the same loop, one per `accumulate` batches.
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
    plan = replica.plan
    blocks = checked_partitions(plan, len(dataset), partitions, seed)
    samples = sum(len(block) for block in blocks)
    steps = math.ceil(samples / (plan.num_workers * batch_size * accumulate))
    probs = plan.partition_probabilities(replica.worker)
    sampler = CodedSampler(
        probs, blocks, batch_size=batch_size, batches=steps * accumulate, seed=seed, worker=replica.worker
    )
    if not probs.any():
        raise ConfigError(
            f"worker {replica.worker} has no share of the data in this plan (it is always late, or was given no bits): "
            "start the job without it, or make the plan with allow_drop=False"
        )
    own_generator = kwargs.get("generator") is None
    if own_generator:
        kwargs["generator"] = torch.Generator()
    return CodedLoader(
        replica,
        DataLoader(dataset, batch_sampler=sampler, **kwargs),
        sampler,
        accumulate,
        together=together,
        seed=seed if own_generator else None,
    )
