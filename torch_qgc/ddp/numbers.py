"""Which worker this is, of how many: a rank of the process group, or numbers that were given."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.utils.data import DistributedSampler

from torch_qgc.errors import ConfigError
from torch_qgc.protocol import environment

__all__ = ["Numbers", "check_framework", "check_sampler", "find_numbers"]


class Numbers(NamedTuple):
    """Which worker this is.

    Attributes:
        worker: its number.
        workers: how many there are.
        given: they are no rank and size of the process group, which is this worker's alone.
    """

    worker: int
    workers: int
    given: bool


def find_numbers(model: torch.nn.Module, group: dist.ProcessGroup, worker: int | None, workers: int | None) -> Numbers:
    """Return the numbers that were given, or else those in the environment, or else the process group's.

    Raises:
        ConfigError: they contradict each other, or need the process group of all workers; names the remedy.
    """
    worker = environment.number(environment.WORKER) if worker is None else worker
    workers = environment.number(environment.WORKERS) if workers is None else workers
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if worker is None and workers is None:
        return Numbers(rank, size, given=False)
    if worker is None or workers is None:
        raise ConfigError(
            f"expected worker and workers, or neither of them, got worker={worker} and workers={workers}: "
            "QGCState(model, worker=k, workers=K), or start the script with `qgc run`, which sets both"
        )
    if not 0 <= worker < workers:
        raise ConfigError(f"worker: expected a number in [0, {workers}), got {worker}: count workers from 0")
    if size > 1:
        raise ConfigError(
            f"worker: expected a process group of this worker alone where its number is given, got one of {size} ranks "
            f"and worker={worker} of {workers}: leave out worker and workers (unset {environment.WORKER} and "
            f"{environment.WORKERS}), or init_process_group(..., rank=0, world_size=1)"
        )
    if any(isinstance(module, torch.nn.SyncBatchNorm) for module in model.modules()):
        raise ConfigError(
            "SyncBatchNorm takes its statistics over the process group, which is this worker alone: use BatchNorm, "
            "whose statistics state.sync_buffers() averages before you evaluate"
        )
    return Numbers(worker, workers, given=True)


def check_sampler(loader: Any, numbers: Numbers) -> None:
    """Refuse a loader that divides the data over a process group of this worker alone: every worker would draw all.

    Raises:
        ConfigError: it does; names the remedy.
    """
    if not numbers.given:
        return
    sampler, got = getattr(loader, "sampler", None), None
    if isinstance(sampler, DistributedSampler):
        if (sampler.rank, sampler.num_replicas) != (numbers.worker, numbers.workers):
            got = f"a DistributedSampler for rank {sampler.rank} of {sampler.num_replicas}"
    elif type(loader).__module__.split(".")[0] == "accelerate":
        got = "accelerate's, which follows the process group"
    if got is not None:
        raise ConfigError(
            f"expected a loader for worker {numbers.worker} of {numbers.workers}, got {got}: state.loader(dataset), or "
            "DistributedSampler(dataset, rank=state.rank, num_replicas=state.workers)"
        )


def check_framework(name: str, workers: int) -> None:
    """Refuse a framework that shares data and metrics over the process group, where that is not of all workers.

    Raises:
        ConfigError: it is not; names the remedy.
    """
    size = dist.get_world_size()
    if workers != size:
        raise ConfigError(
            f"{name}: expected a process group of all {workers} workers, over which it divides data and gathers "
            f"metrics, got one of {size}: start the script with torchrun instead of `qgc run`"
        )
