"""The training loader under Lightning: one item per step on every rank, loaded only where the step is computed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import islice
from typing import Any

from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

from torch_qgc.ddp.loader import make_loader
from torch_qgc.ddp.sampler import CodedSampler
from torch_qgc.errors import ConfigError
from torch_qgc.lightning.times import StepTimes
from torch_qgc.worker.replica import Replica

__all__ = ["ReplayingLoader", "Turn", "code_sampling"]


class Turn:
    """Whether this rank computes the current step or replays it; decided once per step, at its first batch.

    Args:
        replica: whose steps these are.
        times: is told when a computed step begins.
    """

    def __init__(self, replica: Replica, times: StepTimes | None = None) -> None:
        self._replica, self._times = replica, times
        self._decided_step = -1
        self.replays = False

    def reset(self) -> None:
        """Decide anew on a step that was left in the middle: an epoch may end there."""
        self._decided_step, self.replays = -1, False
        self._replica.decide_again()

    def take(self, *, may_replay: bool) -> bool:
        """Decide, unless the current step was decided on already; return whether it is replayed."""
        if self._decided_step != self._replica.step:
            self.replays = may_replay and self._replica.missed()
            self._decided_step = self._replica.step
            if not may_replay:
                self._replica.decide_again()  # it is computed in full, whatever was said before
            if not self.replays and self._times is not None:
                self._times.begin(self._replica.counts.wait_s)
        return self.replays

    def took(self, sampler: CodedSampler) -> None:
        """Note the batch at hand, which this sampler has cut."""
        self._replica.facts.took(sampler.sizes.popleft(), sampler.batch_size, moves=sampler.moves)


def code_sampling(replica: Replica, loader: Any, *, partitions: Any, seed: int) -> Any:
    """Return a copy of a DataLoader that draws from this worker's share where the original has a DistributedSampler.

    Everything else of the loader stays: class, batch size, workers, collate function, pinning. What has no
    DistributedSampler (`Trainer(use_distributed_sampler=False)`, iterable data sets) is returned as it is: there every
    rank brings its own data, and the plan's shares weigh them.

    Raises:
        ConfigError: a sampler or batch sampler of the user's own, that the coded one cannot replace.
    """
    sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    if not isinstance(loader, DataLoader) or not isinstance(sampler, DistributedSampler):
        if partitions is not None:
            raise ConfigError(
                "got partitions and a training loader of your own sampling: the plan's partitions need "
                "a DataLoader over the whole data set and Trainer(use_distributed_sampler=True)"
            )
        return loader
    if isinstance(sampler, DistributedSamplerWrapper):
        raise ConfigError(
            "the training DataLoader has a sampler of your own: the plan decides which samples a worker draws; leave "
            "the sampler out (for a part of the data take torch.utils.data.Subset), or let every rank sample its own "
            "data with Trainer(use_distributed_sampler=False)"
        )
    if type(loader.batch_sampler) is not BatchSampler or loader.batch_size is None:
        raise ConfigError(
            f"the training DataLoader has a batch sampler of type {type(loader.batch_sampler).__name__}: the plan "
            "decides which samples a worker draws; use DataLoader(dataset, batch_size=...), or let every rank batch "
            "its own data with Trainer(use_distributed_sampler=False)"
        )
    share = make_loader(replica, loader.dataset, batch_size=loader.batch_size, partitions=partitions, seed=seed).sampler
    coded = copy.copy(loader)
    # DataLoader refuses to have these set, lest its parts disagree; these two agree.
    vars(coded).update(sampler=share, batch_sampler=share)
    return coded


class ReplayingLoader:
    """Give one item per step, as many on every rank; where this rank replays, the last loaded batch once more.

    Lightning goes through the same loop on every rank, so counters, callbacks, validation and checkpoints line up. Only
    what costs time is left out of a replayed step: loading here, the forward and backward pass in the strategy. The
    first batch of each epoch is always computed, so that what is averaged over an epoch exists on every rank.

    Attributes, methods and assignments that are not its own are the wrapped loader's.

    Args:
        loader: a DataLoader, or any iterable with a length.
        turn: decides who replays.
    """

    _OWN = frozenset({"epoch", "_loader", "_turn", "_position", "_resumed"})

    def __init__(self, loader: Any, turn: Turn) -> None:
        self._loader, self._turn = loader, turn
        self.epoch = 0
        self._position = 0  # items of this epoch given so far
        self._resumed: tuple[int, int] | None = None  # epoch and position of a checkpoint

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_loader"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self if name in self._OWN else self._loader, name, value)

    def __len__(self) -> int:
        return len(self._loader)

    @property
    def sampler(self) -> ReplayingLoader:
        """Where Lightning looks for `set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; Lightning does so before each one."""
        self.epoch = epoch
        _set_sampler_epoch(self._loader, epoch)

    def __iter__(self) -> Iterator[Any]:
        epoch, start = self._resumed or (-1, 0)
        self._position = start if epoch == self.epoch else 0
        self._resumed = None
        self._turn.reset()
        batches = self._batches()
        batch, loaded = None, False
        while self._position < len(self):
            if not self._turn.take(may_replay=loaded):
                batch, loaded = next(batches), True
            self._position += 1
            yield batch

    def _batches(self) -> Iterator[Any]:
        """Iterate over the wrapped loader from the position on; the coded sampler skips without loading."""
        sampler = getattr(self._loader, "batch_sampler", None)
        if isinstance(sampler, CodedSampler):
            sampler.skip = self._position
            return self._cut_by(sampler)
        return islice(iter(self._loader), self._position, None)

    def _cut_by(self, sampler: CodedSampler) -> Iterator[Any]:
        for batch in self._loader:
            self._turn.took(sampler)
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return how far the epoch is; Lightning puts it into checkpoints."""
        return {"epoch": self.epoch, "position": self._position}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on from there, if the next iteration is of that epoch."""
        self._resumed = (state_dict["epoch"], state_dict["position"])
