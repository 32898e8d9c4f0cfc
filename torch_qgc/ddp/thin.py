"""The first samples of a batch, whatever its structure."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["batch_size_of", "first_samples"]


def first_samples(batch: Any, count: int, batch_size: int | None = None) -> Any:
    """Return the first samples of a batch, in the same structure; parts that are not per sample stay as they are.

    Tensors whose first dimension is the batch's are sliced along it, lists with one item per sample are cut; in tuples,
    lists, mappings and dataclasses, nested as deep as it may be. What is of another type is returned whole: a step on a
    whole batch is as right as one on a few samples, only slower.

    Args:
        batch: what a loader hands out.
        count: samples to keep.
        batch_size: samples in the batch; None: found by `batch_size_of`, and if the batch holds several sizes (of
            zipped loaders), each tensor's first dimension.
    """
    size = batch_size if batch_size is not None else batch_size_of(batch)
    return _cut(batch, count, size)


def batch_size_of(batch: Any) -> int | None:
    """Return how many samples a batch has, None where that cannot be told: its tensors disagree, or there are none."""
    lists = _lists_of_mappings(batch)
    if len(lists) == 1:  # as detection models take them: a list of images, and a list with a mapping for each
        return next(iter(lists))
    sizes = {t.shape[0] for t in _tensors(batch) if t.ndim}
    return next(iter(sizes)) if len(sizes) == 1 else None


def _cut(part: Any, count: int, size: int | None) -> Any:
    if isinstance(part, torch.Tensor):
        return part[:count] if part.ndim and size in (None, part.shape[0]) else part
    if isinstance(part, Mapping):
        return _like(part, {key: _cut(value, count, size) for key, value in part.items()})
    if isinstance(part, tuple) and hasattr(part, "_fields"):
        return type(part)(*(_cut(item, count, size) for item in part))
    if isinstance(part, (list, tuple)):
        if isinstance(part, list) and size is not None and len(part) == size and not _holds_batches(part, size):
            return part[:count]
        if isinstance(part, tuple) and size is not None and len(part) == size > 2 and _lists_of_mappings([list(part)]):
            return part[:count]
        return type(part)(_cut(item, count, size) for item in part)
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        values = {f.name: _cut(getattr(part, f.name), count, size) for f in dataclasses.fields(part) if f.init}
        return dataclasses.replace(part, **values)
    return part


def _like(original: Mapping[Any, Any], values: dict[Any, Any]) -> Any:
    """Return a mapping of the original's type (a tokenizer's, say) with other values."""
    if type(original) is dict:
        return values
    made = copy.copy(original)
    try:
        for key, value in values.items():
            made[key] = value  # type: ignore[index]
    except TypeError:
        return values
    return made


def _holds_batches(items: list[Any], size: int) -> bool:
    """Tell a list of tensors that are batches themselves (views of an image, say) from a list of samples."""
    return any(isinstance(item, torch.Tensor) and item.ndim > 0 and item.shape[0] == size for item in items)


def _lists_of_mappings(batch: Any) -> set[int]:
    """Return the lengths of the lists in a batch that hold a mapping for each sample."""
    parts = batch if isinstance(batch, (list, tuple)) else []
    return {
        len(p) for p in parts if isinstance(p, (list, tuple)) and p and all(isinstance(item, Mapping) for item in p)
    }


def _tensors(part: Any) -> list[torch.Tensor]:
    if isinstance(part, torch.Tensor):
        return [part]
    if isinstance(part, Mapping):
        return [t for value in part.values() for t in _tensors(value)]
    if isinstance(part, (list, tuple)):
        return [t for item in part for t in _tensors(item)]
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        return [t for f in dataclasses.fields(part) for t in _tensors(getattr(part, f.name))]
    return []
