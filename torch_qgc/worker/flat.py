"""The flat gradient on its way out and back: gather buckets, encode chunks, decode results.

On CPU all of it happens on the calling thread. On CUDA encoding runs on a side stream and payloads go through
pinned memory; the background thread waits for the copy, the training thread does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from torch_qgc.kernels import Encoded, decode_sum, encode
from torch_qgc.worker.inbox import ClosedRound
from torch_qgc.worker.layout import Chunk, Layout, Slot

__all__ = ["FlatGradient"]


class FlatGradient:
    """Flat fp32 buffers of one replica: its own gradient, and the decoded one.

    Memory: 4 bytes per coordinate for each of the two.

    Args:
        layout: where parameters and chunks lie.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.device = layout.parameters[0].device
        self._own = torch.zeros(layout.numel, dtype=torch.float32, device=self.device)
        self._decoded = torch.zeros(layout.numel, dtype=torch.float32, device=self.device)
        self._base: torch.Tensor | None = None
        self._second_scales = [1.0] * len(layout.chunks)
        self._missing = [chunk.numel for chunk in layout.chunks]
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def gather(self, slot: Slot, gradient: torch.Tensor, scale: torch.Tensor | None = None) -> list[Chunk]:
        """Copy one parameter's gradient to its place, divided by scale; return the chunks that are complete now.

        What earlier steps have left in `.grad` (`remember`) is not part of this step's gradient.
        """
        place = self._own[slot.span].view(slot.shape).copy_(gradient)
        if self._base is not None:
            place.sub_(self._base[slot.span].view(slot.shape))
        if scale is not None:
            place.div_(scale)
        return self.mark(slot)

    def mark(self, slot: Slot) -> list[Chunk]:
        """Note that a parameter's gradient is there; return the chunks that are complete now."""
        complete = []
        for index, covered in self.layout.chunks_under(slot):
            self._missing[index] -= covered
            if self._missing[index] == 0:
                complete.append(self.layout.chunks[index])
        return complete

    @property
    def gathered(self) -> bool:
        """Every parameter's gradient is in."""
        return not any(self._missing)

    def reset(self) -> None:
        """Expect the next step's gradient."""
        self._missing = [chunk.numel for chunk in self.layout.chunks]
        self._base = None

    @torch.no_grad()
    def remember(self) -> None:
        """Remember what is in `.grad` before a step: a loop may step every n-th batch only, and add up until then.

        DDP hands over the sum of what was there and the new gradient. What was there is the same on all ranks; it must
        be neither encoded again nor weighed by who arrives.
        """
        self.forget()
        left = self.left_in_grad()
        if left:
            self._base = torch.zeros_like(self._own)
            for slot, gradient in left:
                self._base[slot.span].view(slot.shape).copy_(gradient)

    def forget(self) -> None:
        """Take everything that DDP hands over for this step's gradient."""
        self._base = None

    def left_in_grad(self) -> list[tuple[Slot, torch.Tensor]]:
        """Return the gradients that are there, none if all of them are zero."""
        left = [(slot, p.grad) for slot, p in zip(self.layout.slots, self.layout.parameters) if p.grad is not None]
        return left if any(torch.count_nonzero(gradient) for _, gradient in left) else []

    def encode(
        self, chunk: Chunk, bits: int, *, key: tuple[int, int], norm: Any
    ) -> tuple[Callable[[], tuple[Any, float, float]], bool]:
        """Encode a complete chunk.

        Returns:
            A call that waits for it and gives (buffer, variance, squared norm); and whether it is finite, as far as
            that is known without waiting for a device.
        """
        values = self._own[chunk.span]
        if self._stream is None:
            encoded = encode(values, bits, key=key, norm=norm, offset=chunk.offset)
            finite = math.isfinite(encoded.squared_norm)
            return lambda: (encoded.to_buffer(), encoded.variance, encoded.squared_norm), finite
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            encoded = encode(values, bits, key=key, norm=norm, offset=chunk.offset)
            payload = _to_pinned(encoded.buffer)
            assert encoded.statistics is not None
            statistics = _to_pinned(encoded.statistics)
            done = torch.cuda.Event()
            done.record(self._stream)
        # The next step's gather must not overwrite what the side stream still reads.
        torch.cuda.current_stream(self.device).wait_event(done)

        def payload_when_done() -> tuple[Any, float, float]:
            done.synchronize()
            variance, squared_norm = statistics.tolist()
            return memoryview(payload.numpy().data), variance, squared_norm

        return payload_when_done, True

    def decode(self, result: ClosedRound) -> None:
        """Write a closed round into the decoded gradient."""
        chunk = self.layout.chunks[result.chunk]
        encoded = Encoded.from_buffer(result.payload, chunk.numel, result.bits)
        if self._stream is not None:
            on_device = encoded.buffer.to(self.device, non_blocking=True)
            encoded = Encoded(on_device, chunk.numel, result.bits)
        decode_sum([encoded], [1.0], self._decoded[chunk.span], accumulate=False)
        self._second_scales[chunk.index] = result.second_scale

    def second_scale(self, slot: Slot) -> float | torch.Tensor:
        """Return what a parameter's gradient is to be multiplied with before Adam squares it.

        Returns:
            One number, or fp32 in the parameter's shape if it lies in chunks whose numbers differ.
        """
        pieces = [(self._second_scales[index], covered) for index, covered in self.layout.chunks_under(slot)]
        if all(scale == pieces[0][0] for scale, _ in pieces):
            return pieces[0][0] if pieces else 1.0
        scales = torch.tensor([scale for scale, _ in pieces], dtype=torch.float32)
        counts = torch.tensor([covered for _, covered in pieces])
        return scales.repeat_interleave(counts).view(slot.shape).to(self.device)

    def put(self, slot: Slot, gradient: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        """Write a parameter's decoded gradient, times scale, to where the optimizer looks for it."""
        gradient.copy_(self._decoded[slot.span].view(slot.shape))
        if scale is not None:
            gradient.mul_(scale)
        if self._base is not None:
            gradient.add_(self._base[slot.span].view(slot.shape).to(gradient.dtype))
        return gradient


def _to_pinned(tensor: torch.Tensor) -> torch.Tensor:
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)
