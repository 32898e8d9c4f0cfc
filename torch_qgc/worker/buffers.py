"""BatchNorm's statistics and their like, kept from what a thin forward pass would do to them."""

from __future__ import annotations

import torch

__all__ = ["KeptBuffers"]


class KeptBuffers:
    """Put floating-point buffers back after a forward pass on a few samples, which says little about their statistics.

    Integers stay as the forward pass leaves them: they count steps, which every rank makes. So do the vectors of
    spectral norm, which do not depend on the batch.

    Args:
        module: whose buffers.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        iterated = {
            buffer
            for owner in module.modules()
            if type(owner).__name__ == "_SpectralNorm"
            for buffer in owner.buffers(recurse=False)
        }
        iterated |= {b for name, b in module.named_buffers() if name.endswith(("weight_u", "weight_v"))}
        self._buffers = [b for b in module.buffers() if b.is_floating_point() and b not in iterated]
        self._kept: list[torch.Tensor] | None = None

    @torch.no_grad()
    def keep(self) -> None:
        """Remember the buffers as they are, unless that was done since the last `restore`."""
        if self._kept is None:
            self._kept = [buffer.clone() for buffer in self._buffers]

    @torch.no_grad()
    def restore(self) -> None:
        """Put back what `keep` has remembered, if anything."""
        if self._kept is not None:
            for buffer, kept in zip(self._buffers, self._kept):
                buffer.copy_(kept)
            self._kept = None
