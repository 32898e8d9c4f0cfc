"""What workers compute in a step: mean gradients over partitions, or over batches that each worker draws."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from torch_qgc.ddp.sampler import CodedSampler, Cut, Stream
from torch_qgc.planner import Plan
from torch_qgc.planner.batches import apportion
from torch_qgc.planner.checks import Floats
from torch_qgc.simulator.coding import SchemeCodec
from torch_qgc.simulator.gradients import Gradients

__all__ = ["Computed", "PartitionWork", "Send", "Work", "WorkerWork"]

#: Takes a worker and the mean gradient that it encodes, fp32 [mixed_numel], which is valid during the call only.
Send = Callable[[int, torch.Tensor], None]
Partitions = Sequence[NDArray[np.int64]]

_STREAM = 0xBA7C  # makes the draws of batches others than those of delays


@dataclass(frozen=True)
class Computed:
    """The mean loss of a step, and its true gradient [P], or None if that was not computed."""

    loss: float
    gradient: torch.Tensor | None


class Work(Protocol):
    """The computing side of one run."""

    def compute(self, step: int, wanted: AbstractSet[int], send: Send) -> Computed:
        """Compute the mean gradients of the wanted workers, and call `send` with each as soon as it is complete."""


class PartitionWork:
    """Compute the gradient of every partition once per step, for all workers that hold the partition.

    Memory: 4 bytes per coordinate for the partition at hand, for the whole gradient, and for every worker of which some
    but not all partitions have been computed: two or three with segment codes, up to K with random ones.

    Args:
        gradients: computes gradients of the model.
        codec: mixes them as the scheme says.
        blocks: N lists of sample indices.
        fractions: [N], the fraction of the data in each partition.
        batch_size: samples drawn from each partition in each step; None takes all of them.
        seed: the seed of these draws.
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
        self._finished: list[list[int]] = [[] for _ in blocks]  # workers whose last partition each one is
        for worker, last in enumerate(codec.last_partition()):
            if last >= 0:
                self._finished[last].append(worker)

    def compute(self, step: int, wanted: AbstractSet[int], send: Send) -> Computed:
        """See `Work`. All workers that hold a partition get the same batch of it."""
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
    """Let every worker draw batches from its share with `CodedSampler`, and compute the wanted workers only.

    The batches of an epoch are cut from one stream per worker, one for each step, whether the worker makes it or not.

    Memory: 4 bytes per coordinate, and as much again in steps in which the true gradient is computed as well.

    Args:
        gradients: computes gradients of the model.
        plan: the plan from whose shares workers draw.
        plan_at: step -> the plan that holds for it, in a job that plans anew; None: `plan` in all steps.
        blocks: N lists of sample indices.
        moves: all workers draw from all of them, one after the other, instead.
        batch_size: samples per worker and step, which the plan's batches are multiples of.
        seed: the seed of the draws.
        exact_every: steps between two computations of the true gradient, each of which takes a pass over the data;
            0 never computes it.
    Raises:
        PlanError: the code subtracts gradients, which drawing samples cannot do.
    """

    def __init__(
        self,
        gradients: Gradients,
        plan: Plan,
        blocks: Partitions,
        *,
        batch_size: int,
        moves: bool = False,
        seed: int = 0,
        exact_every: int = 0,
        plan_at: Callable[[int], Plan] | None = None,
    ) -> None:
        self._gradients, self._plan, self._blocks = gradients, plan, blocks
        self._batch_size, self._exact_every = batch_size, exact_every
        self._plan_at = plan_at if plan_at is not None else lambda step: plan
        self._moves = moves
        self._sizes: dict[Plan, list[int]] = {}  # each worker's batch
        samples = sum(len(block) for block in blocks)
        self._epoch_steps = math.ceil(samples / (plan.num_workers * batch_size))  # as make_loader counts
        self._samplers = [
            CodedSampler(
                np.ones(1) if moves else plan.partition_probabilities(worker),
                [np.concatenate(blocks)] if moves else blocks,
                batch_size=batch_size,
                batches=self._epoch_steps,
                seed=seed,
                worker=None if moves else worker,
            )
            for worker in range(plan.num_workers)
        ]
        self._streams: dict[int, tuple[int, int, Stream]] = {}  # worker -> epoch, the step whose batch is next, stream

    def compute(self, step: int, wanted: AbstractSet[int], send: Send) -> Computed:
        """See `Work`. The loss is that of all data where it is computed, else the mean of the workers' by share."""
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
        if worker not in self._streams or self._streams[worker][0] != epoch:
            self._samplers[worker].set_epoch(epoch)
            self._streams[worker] = epoch, step - batch, self._samplers[worker].stream()
        _, following, stream = self._streams[worker]
        stream.take(sum(sum(self._cut(skipped, worker)) for skipped in range(following, step)))
        self._streams[worker] = epoch, step + 1, stream
        return stream.cut(self._cut(step, worker))

    def _cut(self, step: int, worker: int) -> Cut:
        plan = self._plan_at(step)
        if plan not in self._sizes:
            self._sizes[plan] = apportion(plan.batches, self._batch_size).tolist()
        return Cut.of(self._sizes[plan], worker) if self._moves else Cut(0, self._sizes[plan][worker], 0)

    def _exact(self, step: int) -> Computed:
        whole = torch.zeros_like(self._gradients.scratch)
        loss = 0.0
        for n, fraction in enumerate(self._plan.partition_fractions.tolist()):
            loss += fraction * self._gradients.mean(self._blocks[n].tolist(), step, self._plan.num_workers + n)
            whole.add_(self._gradients.scratch, alpha=fraction)
        return Computed(loss, whole)
