"""One worker's gradient on its way out and back: buckets in, chunks out, results in, buckets back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from torch_qgc.errors import ConfigError
from torch_qgc.job.courses import Courses
from torch_qgc.kernels import derive_key
from torch_qgc.worker.connection import Connection
from torch_qgc.worker.flat import FlatGradient
from torch_qgc.worker.inbox import ClosedRound
from torch_qgc.worker.layout import Layout, Slot
from torch_qgc.worker.spans import Spans

__all__ = ["Exchange"]

_Places = list[tuple[Slot, torch.Tensor]]


class Exchange:
    """What happens between DDP's buckets and the aggregators, for one replica that has joined.

    Args:
        layout: where parameters and chunks lie.
        courses: this worker's bits, and the norm, in each step.
        connection: to the job.
        worker: this worker's number.
        seed: of the dither.
        spans: names what takes time.
    """

    def __init__(
        self, layout: Layout, courses: Courses, connection: Connection, *, worker: int, seed: int, spans: Spans
    ) -> None:
        self.flat = FlatGradient(layout)
        self._layout, self._connection, self._spans = layout, connection, spans
        self._courses = courses
        self._seed, self._worker = seed, worker
        self._pending: list[tuple[torch.futures.Future[torch.Tensor], torch.Tensor, _Places]] = []
        self._thin = False
        self._backward_begun = False  # a backward pass of the step has begun
        self.not_finite = False  # this worker's gradient of the step

    def begin(self, *, thin: bool) -> None:
        """Begin a step; of a thin one nothing is encoded or sent."""
        self._thin = thin
        if not self._backward_begun:
            self.flat.remember()

    def backward_begins(self) -> None:
        """Look at what is in `.grad` before a backward pass of the step.

        Before the first one it is what earlier steps have left; what is there later is this step's own (micro-batches
        under no_sync), unless everything was cleared in between.
        """
        if not self._backward_begun:
            self.flat.remember()
        elif not self.flat.left_in_grad():
            self.flat.forget()
        self._backward_begun = True

    def reset(self) -> None:
        """Expect the next step's gradient."""
        self._pending.clear()
        self.flat.reset()
        self._backward_begun = False
        self.not_finite = False

    def without_gradient(self) -> list[str]:
        """Return the names of the parameters that the last backward pass has left out, as far as can be told."""
        slots = self._layout.slots
        if self._pending:
            found = {slot.name for _, _, places in self._pending for slot, _ in places}
        else:
            found = {slot.name for slot, p in zip(slots, self._layout.parameters) if p.grad is not None}
        return [slot.name for slot in slots if slot.name not in found] if found else []

    def take(self, bucket: Any, step: int, loss_scale: torch.Tensor | None) -> torch.futures.Future[torch.Tensor]:
        """Gather a bucket, send the chunks it completes, and return the future of its decoded gradient.

        Args:
            bucket: GradBucket.
            loss_scale: what GradScaler multiplied the loss with, or None. Gradients travel without it: a payload that
                is folded into a later step may meet another scale there.
        Raises:
            ConfigError: it is none that can be taken.
        """
        if not isinstance(bucket, dist.GradBucket):  # type: ignore[attr-defined]
            raise ConfigError(
                f"expected a GradBucket, got {type(bucket).__name__}: DDP compiled with the python_reducer cannot be "
                "used; set torch._dynamo.config.optimize_ddp = True"
            )
        buffer = bucket.buffer()
        if buffer.is_sparse:
            raise ConfigError("expected dense gradients, got a sparse one: use Embedding(..., sparse=False)")
        slots = [self._layout.slot(p) for p in bucket.parameters()]
        places = [(slot, slot.as_in_bucket(g)) for slot, g in zip(slots, bucket.gradients())]
        if self._thin:
            for slot, _ in places:
                self.flat.mark(slot)
        else:
            self._send(places, step, loss_scale)
        devices: list[int | str | torch.device] = [buffer.device] if buffer.device.type == "cuda" else []
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future(devices=devices)
        self._pending.append((future, buffer, places))
        return future

    def _send(self, places: _Places, step: int, loss_scale: torch.Tensor | None) -> None:
        """Gather some parameters' gradients, and send the chunks that are complete with them."""
        with self._spans("gather", step=step):
            complete = [chunk for slot, g in places for chunk in self.flat.gather(slot, g, loss_scale)]
        key, plan = derive_key(self._seed, step, self._worker), self._courses.at(step).plan
        bits = int(plan.bits[self._worker])
        for chunk in complete:
            with self._spans("encode", step=step, chunk=chunk.index):
                payload, finite = self.flat.encode(chunk, bits, key=key, norm=plan.norm)
            self.not_finite |= not finite
            self._connection.push(step, chunk.index, bits, payload)
            self._spans.mark("push", step=step, chunk=chunk.index)

    @property
    def gathered(self) -> bool:
        """Every parameter's gradient of the step is in."""
        return self.flat.gathered

    def finish(self, step: int, loss_scale: torch.Tensor | None, note: Callable[[ClosedRound], None]) -> None:
        """Wait for the step's results, and hand them to DDP."""
        self.receive(step, note)
        with self._spans("put", step=step):
            for future, buffer, places in self._pending:
                for slot, gradient in places:
                    self.flat.put(slot, gradient, loss_scale)
                future.set_result(buffer)
        self.reset()

    def receive(self, step: int, note: Callable[[ClosedRound], None]) -> None:
        """Decode a step's results as they come; `note` is told of each."""
        with self._spans("wait", step=step):
            for result in self._connection.results():
                self.flat.decode(result)
                note(result)
