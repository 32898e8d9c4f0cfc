"""What workers compute in a step: mean gradients over whole partitions, or over batches of their own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from torch_qgc.ddp.sampler import CodedSampler
from torch_qgc.planner import Plan
from torch_qgc.planner.checks import Floats
from torch_qgc.simulator.coding import SchemeCodec
from torch_qgc.simulator.gradients import Gradients

__all__ = ["Computed", "PartitionWork", "Send", "Work", "WorkerWork"]

#: (worker, its mean gradient as it is to be encoded, fp32 [mixed_numel], valid during the call).
Send = Callable[[int, torch.Tensor], None]
Partitions = Sequence[NDArray[np.int64]]

_STREAM = 0xBA7C  # keeps the draws of batches apart from those of delays


@dataclass(frozen=True)
class Computed:
    """What is known of a step's gradient: the mean loss, and the gradient [P] itself or None."""

    loss: float
    gradient: torch.Tensor | None


class Work(Protocol):
    """The computing side of one run."""

    def compute(self, step: int, wanted: AbstractSet[int], send: Send) -> Computed:
        """Compute the mean gradients of the wanted workers, and send each as soon as it is there."""


class PartitionWork:
    """Compute every partition's gradient once, and add it to what all that hold it send.

    Memory: 4 bytes per coordinate for the partition at hand, for the whole gradient, and for every worker of which some
    but not all partitions have been computed: two or three with segment codes, up to K with random ones.

    Args:
        gradients: of the model.
        codec: of the scheme.
        blocks: N index lists.
        fractions: [N] of the data.
        batch_size: samples drawn from each partition in each step; None: all of them.
        seed: of these draws.
    """

    def __init__(
        self,
        gradients: Gradients,
        codec: SchemeCodec,
        blocks: Partitions,
        fractions: Floats,
        *,
        batch_size: int | None = None,
        seed: int = 0,
    ) -> None:
        self._gradients, self._codec = gradients, codec
        self._blocks, self._fractions = blocks, fractions
        self._batch_size, self._seed = batch_size, seed
        self._finished: list[list[int]] = [[] for _ in blocks]  # workers that a partition completes
        for worker, last in enumerate(codec.last_partition()):
            if last >= 0:
                self._finished[last].append(worker)

    def compute(self, step: int, wanted: AbstractSet[int], send: Send) -> Computed:
        """See `Work`. Draws of partitions stand for all workers that hold them."""
        scratch = self._gradients.scratch
        whole = torch.zeros_like(scratch)
        mixed: dict[int, torch.Tensor] = {}

        def target(worker: int) -> torch.Tensor | None:
            if worker not in wanted:
                return None
            if worker not in mixed:
                mixed[worker] = torch.zeros(self._codec.mixed_numel, device=scratch.device)
            return mixed[worker]

        loss = 0.0
        for n, fraction in enumerate(self._fractions.tolist()):
            loss += fraction * self._gradients.mean(self._indices(step, n), step, n)
            whole.add_(scratch, alpha=fraction)
            self._codec.mix(n, scratch, target)
            for worker in self._finished[n]:
                if worker in wanted:
                    send(worker, mixed.pop(worker))
        return Computed(loss, whole)

    def _indices(self, step: int, partition: int) -> list[int]:
        block = self._blocks[partition]
        if self._batch_size is None or self._batch_size >= len(block):
            return list(block.tolist())
        rng = np.random.default_rng([_STREAM, self._seed, step, partition])
        return list(rng.choice(block, self._batch_size, replace=False).tolist())


class WorkerWork:
    """Let every worker draw batches from its share as `CodedSampler` does, and compute only what is wanted.

    Memory: 4 bytes per coordinate, once (twice in the steps in which the whole gradient is computed, too).

    Args:
        gradients: of the model.
        plan: whose shares are drawn from.
        blocks: N index lists.
        batch_size: samples per worker and step.
        seed: of the draws.
        exact_every: steps between computations of the whole gradient, which takes a pass over the data; 0: never.
    Raises:
        PlanError: a code that sampling cannot do, since it subtracts gradients or cuts them.
    """

    def __init__(
        self,
        gradients: Gradients,
        plan: Plan,
        blocks: Partitions,
        *,
        batch_size: int,
        seed: int = 0,
        exact_every: int = 0,
    ) -> None:
        self._gradients, self._plan, self._blocks = gradients, plan, blocks
        self._batch_size, self._exact_every = batch_size, exact_every
        samples = sum(len(block) for block in blocks)
        self._epoch_steps = math.ceil(samples / (plan.num_workers * batch_size))  # as make_loader counts
        self._samplers = [
            CodedSampler(
                plan.partition_probabilities(worker),
                blocks,
                batch_size=batch_size,
                batches=self._epoch_steps,
                seed=seed,
                worker=worker,
            )
            for worker in range(plan.num_workers)
        ]
        self._draws: dict[int, tuple[int, NDArray[np.int64]]] = {}  # worker -> epoch, samples

    def compute(self, step: int, wanted: AbstractSet[int], send: Send) -> Computed:
        """See `Work`. The loss is the workers' own, weighted by their shares; or of all data where that is computed."""
        exact = self._exact(step) if self._exact_every and step % self._exact_every == 0 else None
        total = weights = 0.0
        for worker in sorted(wanted):
            share = float(self._plan.shares[worker])
            total += share * self._gradients.mean(self._indices(step, worker), step, worker)
            weights += share
            send(worker, self._gradients.scratch)
        return exact or Computed(total / weights if weights > 0.0 else math.nan, None)

    def _indices(self, step: int, worker: int) -> list[int]:
        epoch, batch = divmod(step, self._epoch_steps)
        if worker not in self._draws or self._draws[worker][0] != epoch:
            self._samplers[worker].set_epoch(epoch)
            self._draws[worker] = epoch, self._samplers[worker].draws()
        start = batch * self._batch_size
        return list(self._draws[worker][1][start : start + self._batch_size].tolist())

    def _exact(self, step: int) -> Computed:
        whole = torch.zeros_like(self._gradients.scratch)
        loss = 0.0
        for n, fraction in enumerate(self._plan.partition_fractions.tolist()):
            loss += fraction * self._gradients.mean(self._blocks[n].tolist(), step, self._plan.num_workers + n)
            whole.add_(self._gradients.scratch, alpha=fraction)
        return Computed(loss, whole)
