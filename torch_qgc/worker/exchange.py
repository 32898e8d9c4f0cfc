"""One worker's gradient on its way out and back: buckets in, chunks out, results in, buckets back."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from torch_qgc.errors import ConfigError
from torch_qgc.kernels import derive_key
from torch_qgc.planner import Plan
from torch_qgc.worker.connection import Worker
from torch_qgc.worker.flat import FlatGradient
from torch_qgc.worker.layout import Layout, Slot
from torch_qgc.worker.report import Report

__all__ = ["Exchange"]

Bucket = Any  # dist.GradBucket
_Places = list[tuple[Slot, torch.Tensor]]


class Exchange:
    """What happens between DDP's buckets and the aggregators, for one replica that has joined.

    Args:
        layout: where parameters and chunks lie.
        plan: this worker's bits, and the norm.
        worker: the connection.
        rank: this worker's number.
        tracks: 1, or 2 with the second track.
        seed: of the dither.
        counts: where it is noted what was done.
    """

    def __init__(
        self, layout: Layout, plan: Plan, worker: Worker, *, rank: int, tracks: int, seed: int, counts: Report
    ) -> None:
        self.worker = worker
        self.flat = FlatGradient(layout, tracks=tracks)
        self.own_times_s: deque[float] = deque(maxlen=16)  # BEGIN to last push, of the newest computed steps
        self._layout, self._counts = layout, counts
        self._bits, self._norm = int(plan.bits[rank]), plan.norm
        self._seed, self._rank = seed, rank
        self._begun_at: float | None = None
        self._pending: list[tuple[torch.futures.Future[torch.Tensor], torch.Tensor, _Places]] = []

    @property
    def in_step(self) -> bool:
        """A step has begun whose gradient has not been exchanged."""
        return self._begun_at is not None

    @property
    def half_way(self) -> bool:
        """Some buckets of the step were taken, and others not yet."""
        return bool(self._pending)

    def without_gradient(self) -> list[str]:
        """Return the names of the parameters that the last backward pass has left out, as far as can be told."""
        slots = self._layout.slots
        if self._pending:
            found = {slot.name for _, _, places in self._pending for slot, _ in places}
        else:
            found = {slot.name for slot, p in zip(slots, self._layout.parameters) if p.grad is not None}
        return [slot.name for slot in slots if slot.name not in found] if found else []

    def begin(self, step: int) -> None:
        """Announce the step in which this worker now computes."""
        self._begun_at = time.monotonic()
        self.worker.begin(step)

    def take(
        self, bucket: Bucket, step: int, loss_scale: torch.Tensor | None
    ) -> tuple[torch.futures.Future[torch.Tensor], bool]:
        """Gather a bucket and send the chunks it completes.

        Args:
            loss_scale: what GradScaler multiplied the loss with, or None. Gradients travel without it: a payload that
                is folded into a later step may meet another scale there.
        Returns:
            The future of the bucket's decoded gradient, and whether this was the step's last bucket.
        """
        buffer = bucket.buffer()
        if buffer.is_sparse:
            raise ConfigError("expected dense gradients, got a sparse one: use Embedding(..., sparse=False)")
        slots = [self._layout.slot(p) for p in bucket.parameters()]
        places = [(slot, slot.as_in_bucket(g)) for slot, g in zip(slots, bucket.gradients())]
        key = derive_key(self._seed, step, self._rank)
        closed_without_us = self.worker.closed(step)
        for slot, gradient in places:
            for chunk in self.flat.gather(slot, gradient, loss_scale):
                payload = self.flat.encode(chunk, self._bits, key=key, norm=self._norm)
                self.worker.push(step, chunk.index, self._bits, payload)
        devices = [buffer.device] if buffer.device.type == "cuda" else []
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future(devices=devices)
        self._pending.append((future, buffer, places))
        if self.flat.gathered:
            assert self._begun_at is not None
            self.own_times_s.append(time.monotonic() - self._begun_at)
            self._counts.late_steps += closed_without_us
        return future, self.flat.gathered

    def finish(self, step: int, loss_scale: torch.Tensor | None) -> NDArray[np.float64]:
        """Wait for the step's results, and hand them to DDP; return what `receive` does."""
        waiting_since = time.monotonic()
        contributions = self.receive(step)
        self._counts.wait_s += time.monotonic() - waiting_since
        for future, buffer, places in self._pending:
            for slot, gradient in places:
                self.flat.put(slot, gradient, loss_scale)
            future.set_result(buffer)
        self._pending.clear()
        self.flat.reset()
        self._begun_at = None
        self._counts.computed_steps += 1
        return contributions

    def receive(self, step: int) -> NDArray[np.float64]:
        """Take a step's results into the tracks; return [K] payloads of each worker per chunk."""
        contributions = np.zeros(self._counts.workers)
        for result in self.worker.results(step):
            self.flat.decode(result)
            contributions += result.contributions
        return contributions / len(self._layout.chunks)
