"""A loader over this worker's part of the data: thin or left-out batches for steps that have closed without it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from torch_qgc.ddp.sampler import CodedSampler, Cut, checked_partitions
from torch_qgc.ddp.thinner import Slice, Thinner
from torch_qgc.errors import ConfigError
from torch_qgc.worker.replica import Replica

__all__ = ["CodedLoader", "make_loader"]


class CodedLoader:
    """Batches of this worker's share of the data, as many on every rank, and as large as its part of the work.

    For a step that has closed without this worker it hands out a thin batch; where the user has bound the update, it
    replays such a step and leaves its batches out.

    Args:
        replica: whose steps these are.
        loader: batches of this worker's share.
        sampler: the loader's.
        thinner: makes batches thin.
        seed: of the random numbers that the loader's processes start with; None leaves the loader's generator alone.
    """

    def __init__(
        self,
        replica: Replica,
        loader: DataLoader[Any],
        sampler: CodedSampler,
        thinner: Thinner,
        *,
        seed: int | None = None,
    ) -> None:
        self._replica, self._loader, self._thinner, self._seed = replica, loader, thinner, seed
        self.sampler = sampler
        self._handed = 0  # batches of the epoch that were handed out or left out
        self._start = 0  # batches of the epoch that were handed out before a checkpoint
        self._begun_at: int | None = None  # the step at which the epoch was begun
        self._per_step = 1  # batches that a step takes, as the newest full step has shown

    @property
    def dataset(self) -> Any:
        """The data set."""
        return self._loader.dataset

    @property
    def batch_size(self) -> int:
        """Samples per worker and batch, the mean over workers."""
        return self.sampler.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration takes; without it each iteration takes the next one."""
        if epoch != self.sampler.epoch:
            self._start = 0
        self._begun_at = None
        self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Any]:
        """Iterate over an epoch; if it makes steps, the next iteration takes the next order, even if it is left early.

        A look at some batches changes nothing: ranks need not look alike.
        """
        self._go_on()
        self._begun_at = self._replica.step
        self._handed = self.sampler.skip = self._start
        if self._seed is not None and self._loader.generator is not None:
            self._loader.generator.manual_seed(self._seed + self.sampler.epoch)
        yield from self._thinner.loop(self._epoch(), self._another)
        if self._handed >= len(self.sampler):  # else the others have left it early, and the next iteration goes on
            self._go_on()

    def _go_on(self) -> None:
        """Take the next epoch's order from now on, if this one's has made steps, or had none left to make."""
        if self._made_steps or (self._begun_at is not None and self._start == len(self.sampler)):
            self.sampler.set_epoch(self.sampler.epoch + 1)
            self._start, self._begun_at = 0, None

    @property
    def _made_steps(self) -> bool:
        return self._begun_at is not None and self._replica.step > self._begun_at

    @property
    def at_its_end(self) -> bool:
        """The loop over it has had all batches of the epoch, and is about to end."""
        return self._made_steps and self._handed >= len(self.sampler)

    def _epoch(self) -> Iterator[Any]:
        ahead = self._loader.num_workers > 0  # batches are cut and loaded before it is known which steps close
        batches, sampler = iter(self._loader), self.sampler
        count, first, ended = 0, self._replica.step, False
        while self._handed < len(sampler):
            if not self._replica.in_step:
                if count and self._replica.step > first:
                    self._per_step = max(1, round(count / (self._replica.step - first)))
                ended = self._replay((lambda: next(batches)) if ahead else sampler.cut)
                count, first = 0, self._replica.step
            if ended or self._handed == len(sampler):
                break
            thin = self._thinner.closed_without_us()
            sampler.keep = self._thinner.count if thin and not ahead else None
            batch, self._thinner.batch_size = next(batches), sampler.sizes.popleft()
            self._replica.facts.took(self._thinner.batch_size, self.batch_size, moves=sampler.moves)
            self._handed += 1
            count += 1
            yield self._thinner.thin(batch) if ahead and thin else batch

    def _replay(self, leave_out: Callable[[], Any]) -> bool:
        """Replay what has closed without this worker, if the user has said what the update is.

        Returns:
            The others' loops have ended before the step that is next, and so does this one.
        """
        replica = self._replica
        if not replica.update.known:
            return False
        replayed = False
        while self._handed < len(self.sampler):
            missed = replica.missed()
            if (missed or replayed) and replica.loop_ended_elsewhere():
                return True
            if not missed:
                return False
            for _ in range(min(self._per_step, len(self.sampler) - self._handed)):
                leave_out()
                self.sampler.sizes.popleft()
                self._handed += 1
            replica.replay()
            replayed = True
        return False

    def _another(self) -> Any:
        """Return one more batch, for a step that this worker has to make up for."""
        loader, indices = self._loader, self.sampler.first()
        collate, self._thinner.batch_size = loader.collate_fn, len(indices)
        return collate([loader.dataset[i] for i in indices])

    def state_dict(self) -> dict[str, int]:
        """Return the position: the epoch, and the samples that all workers together have drawn in it."""
        done = self._handed if self._made_steps else self._start
        return {"epoch": self.sampler.epoch, "samples": done * self._samples_per_batch}

    def load_state_dict(self, position: dict[str, int]) -> None:
        """Go on from a position, of a run with any number of workers; before the loop.

        With other workers or another batch size the position is rounded down to whole batches: some samples are drawn
        again rather than left out. Data that move are gone through together, so that other batches make no difference.
        Of data that stay, each worker skips as many batches of the size that it has now, since the position is the same
        on every rank: one whose batches were larger before draws some samples again, one whose batches were smaller
        leaves some out until the next epoch. Batches that are skipped are not
        loaded; random numbers that the data set itself takes (augmentation) are torch's, and not part of the position.
        """
        self.set_epoch(int(position["epoch"]))
        self._start = min(int(position["samples"]) // self._samples_per_batch, len(self.sampler))

    @property
    def _samples_per_batch(self) -> int:
        return self._replica.spec.workers * self.batch_size


def make_loader(
    replica: Replica,
    dataset: Any,
    *,
    batch_size: int,
    partitions: Sequence[Sequence[int]] | None = None,
    weights: Sequence[float] | NDArray[np.float64] | torch.Tensor | None = None,
    thin: int = 2,
    slice: Slice | None = None,
    seed: int = 0,
    **kwargs: Any,
) -> CodedLoader:
    """Make a loader over this worker's share of the data.

    Without partitions, and with a plan in which everybody has a part of the data to himself, the data can move: every
    epoch is one random permutation, from which each step takes the batches of all workers.

    Args:
        replica: whose loader it is.
        dataset: a map-style data set, the same on every rank (each rank only touches what its share needs).
        batch_size: samples per worker and batch, the mean over workers: a step takes workers * batch_size of them,
            and an epoch as many steps as the data set holds of these, however they are divided among the workers.
        partitions: N lists of sample indices, one per partition of the plan, for data that cannot move. If None, data
            move, or a random permutation of the data set is cut into N equal blocks where the plan codes.
        weights: [samples] >= 0, how often each sample is drawn in relation to the others of its partition, as for
            torch's WeightedRandomSampler; None: alike.
        thin: samples of a batch for a step that has closed without this worker, and the least that any batch has.
            Models that cannot do with two (a loss over pairs, say) need more.
        slice: (batch, samples) -> the batch with that many samples, for batches of your own type; used with
            `num_workers` > 0, where batches are loaded before it is known which steps close.
        seed: of the permutation and of the draws.
        **kwargs: any argument of torch's DataLoader that is not about sampling.
    Raises:
        ConfigError: arguments that contradict the sampling, or partitions that do not fit the plan.
    """
    clash = {"sampler", "batch_sampler", "shuffle", "drop_last"} & {k for k, v in kwargs.items() if v is not None}
    if clash:
        raise ConfigError(
            f"got {', '.join(sorted(clash))}: the plan decides which samples this worker draws, in random order; "
            "leave it out, or sample yourself: state.follow(any_loader)"
        )
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise ConfigError(
            f"dataset: expected a map-style data set (__len__ and __getitem__), got {type(dataset).__name__}: "
            "a worker's share is a set of indices; for a stream that each rank cuts itself: state.follow(loader)"
        )
    if batch_size < 1:
        raise ConfigError(f"batch_size: expected at least 1, got {batch_size}")
    plan, worker = replica.plan, replica.worker
    blocks = checked_partitions(plan, len(dataset), partitions, seed)
    weights = None if weights is None else _checked_weights(weights, len(dataset))
    samples = sum(len(block) for block in blocks)
    probs = plan.partition_probabilities(worker)
    moves = partitions is None and plan.one_part_each
    least = min(thin, batch_size)

    def cut() -> Cut:
        sizes = replica.batch_sizes(batch_size, replica.batch_step, least)
        return Cut.of(sizes, worker) if moves else Cut(0, int(sizes[worker]), 0)

    sampler = CodedSampler(
        np.ones(1) if moves else probs,
        [np.arange(samples)] if moves else blocks,
        batch_size=batch_size,
        batches=math.ceil(samples / (plan.num_workers * batch_size)),
        cut=cut,
        seed=seed,
        worker=None if moves else worker,
        weights=weights,
    )
    if not probs.any():
        raise ConfigError(
            f"worker {worker} has no share of the data in this plan (it is always late, or was given no bits): "
            "start the job without it, or make the plan with allow_drop=False"
        )
    own_generator = kwargs.get("generator") is None
    if own_generator:
        kwargs["generator"] = torch.Generator()
    return CodedLoader(
        replica,
        DataLoader(dataset, batch_sampler=sampler, **kwargs),
        sampler,
        Thinner(replica, thin, slice, batch_size),
        seed=seed if own_generator else None,
    )


def _checked_weights(weights: Any, samples: int) -> NDArray[np.float64]:
    values = np.asarray(weights, dtype=np.float64)
    if values.shape != (samples,) or not np.all(values >= 0) or not np.isfinite(values).all() or not values.any():
        raise ConfigError(
            f"weights: expected one finite number >= 0 for each of the {samples} samples, not all 0, got shape "
            f"{values.shape}"
        )
    return values
