"""Mean gradients of a model over given samples, written into a flat buffer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch.utils.data import TensorDataset, default_collate

from torch_qgc.kernels import derive_key
from torch_qgc.worker.layout import Layout

__all__ = ["Collate", "Gradients", "Loss", "Samples"]

#: (model, collated batch) -> scalar, the mean over the batch's samples.
Loss: TypeAlias = Callable[[torch.nn.Module, Any], torch.Tensor]
Collate: TypeAlias = Callable[[list[Any]], Any]

_STREAM = 0x6AD  # makes the model's own random numbers (dropout) others than the codec's


class Samples(Protocol):
    """A map-style data set: a list, or a torch Dataset with a length."""

    def __len__(self) -> int:
        """Return the number of samples."""

    def __getitem__(self, index: Any, /) -> Any:
        """Return one sample."""


class Gradients:
    """Compute gradients at the model's present parameters.

    Args:
        model: the module, in training mode. Its buffers change with every pass, as they do on a worker.
        loss: see `Loss`.
        dataset: the samples.
        collate: makes a batch of a list of samples; None takes torch's default.
        micro_batch: the most samples per forward pass, which bounds memory.
        seed: the seed of the model's own random numbers, which depend on it, on the step and on who computes alone.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        loss: Loss,
        dataset: Samples,
        *,
        collate: Collate | None = None,
        micro_batch: int | None = None,
        seed: int = 0,
    ) -> None:
        self.model, self.layout = model, Layout(model.named_parameters())
        self._loss, self._dataset, self._collate = loss, dataset, collate
        self._micro_batch, self._seed = micro_batch, seed
        device = self.layout.parameters[0].device
        self.scratch = torch.zeros(self.layout.numel, device=device)
        self._views = [self.scratch[slot.span].view(slot.shape) for slot in self.layout.slots]

    def mean(self, indices: Sequence[int], step: int, who: int) -> float:
        """Write the mean gradient over samples into `scratch` [P] fp32; return their mean loss.

        Args:
            indices: which samples, at least one.
            step: the step, for the model's random numbers.
            who: the worker or partition, for the same.
        """
        self.reseed(step, who)
        self.scratch.zero_()
        size = self._micro_batch or len(indices)
        total = 0.0
        for start in range(0, len(indices), size):
            part = indices[start : start + size]
            loss = self._loss(self.model, self._batch(part))
            found = torch.autograd.grad(loss, self.layout.parameters, allow_unused=True, materialize_grads=True)
            weight = len(part) / len(indices)
            torch._foreach_add_(self._views, [gradient.float() for gradient in found], alpha=weight)
            total += weight * float(loss.detach())
        return total

    def reseed(self, step: int, who: int) -> None:
        """Seed torch's generators, so that what the model draws depends on seed, step and who computes alone."""
        low, high = derive_key(self._seed, step, who, _STREAM)
        seed = low | (high & 0x7FFFFFFF) << 32
        torch.default_generator.manual_seed(seed)  # torch.manual_seed takes a millisecond: it formats a traceback
        if self.scratch.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _batch(self, indices: Sequence[int]) -> Any:
        dataset = self._dataset
        if self._collate is None and type(dataset) is TensorDataset:  # at once instead of sample by sample
            chosen = torch.as_tensor(indices)
            return [tensor[chosen] for tensor in dataset.tensors]
        if hasattr(dataset, "__getitems__"):
            samples = dataset.__getitems__(list(indices))
        else:
            samples = [dataset[i] for i in indices]
        return (self._collate or default_collate)(samples)
