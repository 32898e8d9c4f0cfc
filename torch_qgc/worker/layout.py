"""Where every parameter lies in the flat gradient, and how that is cut into chunks.

DDP's buckets change after the first step and differ after a restart, so nothing here depends on them: the
canonical order is the reverse of the module's parameters (the order in which gradients tend to be ready).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from torch_qgc.errors import ConfigError
from torch_qgc.kernels import BLOCK

__all__ = ["Chunk", "Layout", "Slot"]


@dataclass(frozen=True)
class Slot:
    """One parameter's place in the flat gradient."""

    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]  # of the gradient in DDP's bucket: the parameter's own if it is dense
    dtype: str
    offset: int
    numel: int

    @property
    def span(self) -> slice:
        """The parameter's coordinates in the flat gradient."""
        return slice(self.offset, self.offset + self.numel)

    def as_in_bucket(self, gradient: torch.Tensor) -> torch.Tensor:
        """View an entry of GradBucket.gradients() in the memory order that DDP wrote it in.

        DDP fills buckets in the parameter's memory format (channels last, say), but gradients() always views them as
        contiguous: its elements are then in other places than the parameter's.
        """
        return gradient.as_strided(self.shape, self.stride, gradient.storage_offset())


@dataclass(frozen=True)
class Chunk:
    """A fixed slice of the flat gradient: the unit that is encoded, sent and closed."""

    index: int
    offset: int
    numel: int

    @property
    def span(self) -> slice:
        """The chunk's coordinates in the flat gradient."""
        return slice(self.offset, self.offset + self.numel)


class Layout:
    """Parameters -> flat offsets -> chunks.

    Args:
        named_parameters: (name, parameter) in the module's order; those that need no gradient are left out.
        chunk_numel: coordinates per chunk, a positive multiple of 512. Smaller chunks overlap better with the
            backward pass, larger ones have less overhead.
    Raises:
        ConfigError: no parameter needs a gradient, one is sparse or complex, or chunk_numel does not fit.
    """

    def __init__(
        self, named_parameters: Iterable[tuple[str, torch.nn.Parameter]], *, chunk_numel: int = 1 << 20
    ) -> None:
        if chunk_numel <= 0 or chunk_numel % BLOCK:
            raise ConfigError(f"chunk_numel: expected a positive multiple of {BLOCK}, got {chunk_numel}")
        trained = [(name, p) for name, p in named_parameters if p.requires_grad]
        if not trained:
            raise ConfigError("the model has no parameter with requires_grad=True: there is nothing to train")
        self.parameters: list[torch.nn.Parameter] = [p for _, p in reversed(trained)]
        if len({p.device for p in self.parameters}) > 1:
            raise ConfigError(
                f"expected all parameters on one device, got {sorted({str(p.device) for p in self.parameters})}"
            )
        self.slots: list[Slot] = []
        offset = 0
        for name, p in reversed(trained):
            if not p.is_floating_point():
                raise ConfigError(f"parameter {name!r}: expected a real floating-point dtype, got {p.dtype}")
            # empty_like keeps strides exactly when they are dense and do not overlap, which is DDP's condition.
            stride = tuple(torch.empty_like(p, device="meta").stride())
            self.slots.append(Slot(name, tuple(p.shape), stride, str(p.dtype), offset, p.numel()))
            offset += p.numel()
        self.numel = offset
        self.chunk_numel = chunk_numel
        self.chunks = [
            Chunk(i, start, min(chunk_numel, offset - start)) for i, start in enumerate(range(0, offset, chunk_numel))
        ]
        self._slot_of = {id(p): slot for p, slot in zip(self.parameters, self.slots)}

    def slot(self, parameter: torch.Tensor) -> Slot:
        """Return the parameter's slot.

        Raises:
            ConfigError: the parameter was not there (or was frozen) when the layout was made.
        """
        try:
            return self._slot_of[id(parameter)]
        except KeyError:
            raise ConfigError(
                f"got a gradient of a parameter of shape {tuple(parameter.shape)} that QGCState does not know: "
                "parameters must not be added, replaced or unfrozen after QGCState(model) was made"
            ) from None

    def __contains__(self, parameter: object) -> bool:
        return id(parameter) in self._slot_of

    def chunks_under(self, slot: Slot) -> Sequence[tuple[int, int]]:
        """Return (chunk index, coordinates of it that the slot covers) for every chunk the slot touches."""
        first, last = slot.offset // self.chunk_numel, (slot.offset + slot.numel - 1) // self.chunk_numel
        overlaps = []
        for index in range(first, last + 1):
            chunk = self.chunks[index]
            low = max(slot.offset, chunk.offset)
            high = min(slot.offset + slot.numel, chunk.offset + chunk.numel)
            overlaps.append((index, high - low))
        return overlaps

    @property
    def digest(self) -> str:
        """Hex digest of names, shapes, dtypes, order and chunking: equal exactly when two layouts are."""
        content = [[s.name, s.shape, s.dtype, s.offset] for s in self.slots]
        return hashlib.blake2b(json.dumps([self.chunk_numel, content]).encode(), digest_size=16).hexdigest()

    def parameter_digest(self) -> str:
        """Hex digest of the parameters' bytes: equal exactly when replicas are bit-identical."""
        digest = hashlib.blake2b(digest_size=16)
        for p in self.parameters:
            digest.update(p.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def __repr__(self) -> str:
        return f"Layout({len(self.slots)} parameters, {self.numel:,} coordinates, {len(self.chunks)} chunks)"
