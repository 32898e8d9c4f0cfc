"""The flat gradient on its way out and back: gather buckets, encode chunks, decode results.

On CPU all of it happens on the calling thread. On CUDA encoding runs on a side stream and payloads go through
pinned memory; the background thread waits for the copy, the training thread does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from torch_qgc.kernels import Encoded, decode_sum, encode
from torch_qgc.worker.connection import ClosedRound
from torch_qgc.worker.layout import Chunk, Layout, Slot

__all__ = ["FlatGradient"]


class FlatGradient:
    """Flat fp32 buffers of one replica: its own gradient, and the decoded tracks.

    Memory: 4 bytes per coordinate for the gradient and for each track.

    Args:
        layout: where parameters and chunks lie.
        tracks: 1, or 2 with the second track.
    """

    def __init__(self, layout: Layout, *, tracks: int) -> None:
        self.layout = layout
        self.device = layout.parameters[0].device
        self._own = torch.zeros(layout.numel, device=self.device)
        self.tracks = [torch.zeros(layout.numel, device=self.device) for _ in range(tracks)]
        self._missing = [chunk.numel for chunk in layout.chunks]
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def gather(self, slot: Slot, gradient: torch.Tensor, scale: torch.Tensor | None = None) -> list[Chunk]:
        """Copy one parameter's gradient to its place, divided by scale; return the chunks that are complete now."""
        place = self._own[slot.span].view(slot.shape).copy_(gradient)
        if scale is not None:
            place.div_(scale)
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

    def encode(
        self, chunk: Chunk, bits: int, *, key: tuple[int, int], norm: Any
    ) -> Callable[[], tuple[Any, float, float]]:
        """Encode a complete chunk; return a call that waits for it and gives (buffer, variance, squared norm)."""
        values = self._own[chunk.span]
        if self._stream is None:
            encoded = encode(values, bits, key=key, norm=norm, offset=chunk.offset)
            return lambda: (encoded.to_buffer(), encoded.variance, encoded.squared_norm)
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

        return payload_when_done

    def decode(self, result: ClosedRound) -> None:
        """Write a closed round into the tracks."""
        chunk = self.layout.chunks[result.chunk]
        for payload, track in zip(result.tracks, self.tracks):
            encoded = Encoded.from_buffer(payload, chunk.numel, result.bits)
            if self._stream is not None:
                on_device = encoded.buffer.to(self.device, non_blocking=True)
                encoded = Encoded(on_device, chunk.numel, result.bits)
            decode_sum([encoded], [1.0], track[chunk.span], accumulate=False)

    def view(self, slot: Slot, track: int = 0) -> torch.Tensor:
        """Return a parameter's part of a decoded track, fp32, in the parameter's shape; valid until the next step."""
        return self.tracks[track][slot.span].view(slot.shape)

    def put(self, slot: Slot, gradient: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        """Write a parameter's decoded gradient, times scale, to where the optimizer looks for it."""
        gradient.copy_(self.view(slot))
        return gradient if scale is None else gradient.mul_(scale)


def _to_pinned(tensor: torch.Tensor) -> torch.Tensor:
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)
