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
        batch_size: samples of a batch but for an epoch's last one, which may be smaller; None: not known. If the batch
            holds several sizes then (of zipped loaders), each tensor is cut along its first dimension.
    """
    listed = _listed_samples(batch, batch_size)
    return _cut(batch, count, batch_size_of(batch, batch_size) or batch_size, listed is not None)


def batch_size_of(batch: Any, batch_size: int | None = None) -> int | None:
    """Return how many samples a batch has, None where that cannot be told: its tensors disagree, or there are none.

    Args:
        batch: what a loader hands out.
        batch_size: see `first_samples`.
    """
    listed = _listed_samples(batch, batch_size)
    if listed is not None:
        return listed
    sizes = {t.shape[0] for t in _tensors(batch) if t.ndim}
    return next(iter(sizes)) if len(sizes) == 1 else None


def _cut(part: Any, count: int, size: int | None, listed: bool) -> Any:
    if isinstance(part, torch.Tensor):
        return part[:count] if part.ndim and size in (None, part.shape[0]) else part
    if isinstance(part, Mapping):
        return _like(part, {key: _cut(value, count, size, listed) for key, value in part.items()})
    if isinstance(part, tuple) and hasattr(part, "_fields"):
        return type(part)(*(_cut(item, count, size, listed) for item in part))
    if isinstance(part, (list, tuple)):
        if len(part) == size and not any(_is_batch(item, size, listed) for item in part):
            return part[:count]
        return type(part)(_cut(item, count, size, listed) for item in part)
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        values = {f.name: _cut(getattr(part, f.name), count, size, listed) for f in dataclasses.fields(part) if f.init}
        return dataclasses.replace(part, **values)
    return part


def _is_batch(item: Any, size: int, listed: bool) -> bool:
    """Tell an item that is a batch itself (a view of an image, a list of texts) from one sample of several in a list.

    Args:
        listed: samples come in lists, so that a tensor is a sample, whatever its shape.
    """
    if isinstance(item, torch.Tensor):
        return not listed and item.ndim > 0 and item.shape[0] == size
    if isinstance(item, Mapping):
        return not listed and any(_is_batch(value, size, listed) for value in item.values())
    return isinstance(item, (list, tuple)) and len(item) == size


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


def _listed_samples(batch: Any, batch_size: int | None) -> int | None:
    """Return the number of samples of a batch that lists them, as detection models take it; None if it does not.

    It is a list of images and a list with a mapping for each; or lists of equal length, as `zip(*samples)` makes them;
    or a list with a mapping for each.
    """
    parts = batch if isinstance(batch, (list, tuple)) else ()
    if parts and len(parts) == batch_size and all(isinstance(part, Mapping) for part in parts):
        return batch_size
    lists = [part for part in parts if isinstance(part, (list, tuple)) and part]
    lengths = {len(part) for part in lists if all(isinstance(item, Mapping) for item in part)}
    if len(lengths) != 1 and batch_size is not None and len(lists) == len(parts) > 1:
        alike = {len(part) for part in lists}
        lengths = {n for n in alike if n <= batch_size and len(alike) == 1 and not _are_batches(parts, batch_size)}
    return next(iter(lengths)) if len(lengths) == 1 else None


def _are_batches(parts: Any, batch_size: int) -> bool:
    """Tell lists of batches (labelled and unlabelled, say) from lists of samples: all tensors have the batch's size."""
    sizes = {t.shape[0] if t.ndim else None for t in _tensors(parts)}
    return sizes == {batch_size} and len(parts[0]) != batch_size


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
