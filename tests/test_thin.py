"""The first samples of a batch: the same structure, in which every part has the same samples."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torch_qgc.ddp.thin import batch_size_of, first_samples

Pair = namedtuple("Pair", ["x", "y"])


@dataclass
class Record:
    """A batch as a dataclass."""

    x: Any
    rest: Any


def leaves(part: Any) -> list[Any]:
    if isinstance(part, dict):
        return [leaf for value in part.values() for leaf in leaves(value)]
    if isinstance(part, Record):
        return leaves([part.x, part.rest])
    if isinstance(part, (list, tuple)):
        return [leaf for item in part for leaf in leaves(item)]
    return [part]


def looks_listed(batch: Any) -> bool:
    """A list of mappings in a list or tuple is taken for one mapping per sample, as detection models have it."""
    parts = batch if isinstance(batch, (list, tuple)) else []
    return any(isinstance(part, (list, tuple)) and all(isinstance(item, dict) for item in part) for part in parts)


def structures(size: int) -> Any:
    """Nested batches of that many samples, all parts of which are per sample, and none of which lists samples."""
    tensors = st.integers(1, 3).map(
        lambda ndim: torch.arange(size).view(size, *[1] * (ndim - 1)).expand(size, *[7] * (ndim - 1))
    )
    texts = st.just([f"sample {i}" for i in range(size)])
    return st.recursive(
        tensors | texts,
        lambda inner: (
            st.lists(inner, min_size=1, max_size=3)
            | st.lists(inner, min_size=1, max_size=3).map(tuple)
            | st.dictionaries(st.text(max_size=3), inner, min_size=1, max_size=3)
            | st.tuples(inner, inner).map(lambda pair: Pair(*pair))
            | st.tuples(inner, inner).map(lambda pair: Record(*pair))
        ),
        max_leaves=6,
    ).filter(lambda part: any(isinstance(leaf, torch.Tensor) for leaf in leaves(part)) and not looks_listed(part))


@given(data=st.data(), size=st.sampled_from([5, 6, 64]), count=st.integers(1, 4))
def test_every_part_keeps_its_first_samples_and_the_structure_stays(data: Any, size: int, count: int) -> None:
    batch = data.draw(structures(size))
    assert batch_size_of(batch) == size
    for known in (None, size):
        thin = first_samples(batch, count, known)
        assert type(thin) is type(batch)
        found = leaves(thin)
        assert sum(isinstance(leaf, torch.Tensor) for leaf in found) == sum(
            isinstance(leaf, torch.Tensor) for leaf in leaves(batch)
        )
        for leaf in found:
            if isinstance(leaf, torch.Tensor):
                assert leaf.flatten(1)[:, 0].tolist() == list(range(count)) if leaf.ndim > 1 else leaf.tolist()
            else:
                assert leaf in [f"sample {i}" for i in range(count)]


IMAGES = [torch.ones(3, 5 + i, 4) for i in range(4)]
TARGETS = [{"boxes": torch.ones(i + 1, 4), "labels": torch.ones(i + 1)} for i in range(4)]


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("kind", [list, tuple])
@pytest.mark.parametrize("known", [None, 4, 6])
def test_detection_batches_keep_as_many_images_as_targets(kind: Any, channels: int, known: int | None) -> None:
    """Also where there are as many channels as samples, and in an epoch's last batch, which is smaller."""
    images = [image[:1].expand(channels, -1, -1) for image in IMAGES]
    thin = first_samples((kind(images), kind(TARGETS)), 2, known)
    assert [len(part) for part in thin] == [2, 2]
    assert all(a is b for a, b in zip(thin[0], images))
    assert all(a is b for a, b in zip(thin[1], TARGETS))


@pytest.mark.parametrize("samples", [4, 3])
def test_lists_of_samples_without_mappings_are_known_by_the_batch_size(samples: int) -> None:
    images, labels = tuple(IMAGES[:samples]), tuple(range(samples))
    assert [len(part) for part in first_samples((images, labels), 2, 4)] == [2, 2]
    masks = tuple(torch.ones(3, 4) for _ in images)
    assert [len(part) for part in first_samples((images, masks), 2, 4)] == [2, 2]


@pytest.mark.parametrize("channels", [3, 4])
def test_a_list_with_a_mapping_for_each_sample_is_cut_and_not_its_images(channels: int) -> None:
    """detectron2's batches; several loaders' batches, as mappings, are each cut."""
    samples = [{"image": torch.ones(channels, 5, 5), "file": str(i)} for i in range(4)]
    assert batch_size_of(samples, 4) == 4
    assert first_samples(samples, 2, 4) == samples[:2]
    loaders = ({"x": torch.ones(4, 6), "y": torch.ones(4)}, {"x": torch.ones(4, 6)})
    assert [len(part["x"]) for part in first_samples(loaders, 2, 4)] == [2, 2]


def test_views_of_images_are_batches_and_not_samples() -> None:
    crops, labels = [torch.ones(8, 3, size, size) for size in (6, 6, 4, 4, 4, 4, 4, 4)], torch.ones(8)
    thin = first_samples([crops, labels], 2, 8)
    assert [len(crop) for crop in thin[0]] == [2] * 8
    assert len(thin[1]) == 2


@pytest.mark.parametrize("known", [None, 4])
def test_several_loaders_batches_are_each_cut(known: int | None) -> None:
    labelled, unlabelled = (torch.ones(4, 6), torch.ones(4)), (torch.ones(4, 6), torch.ones(4, 6))
    thin = first_samples((labelled, unlabelled), 2, known)
    assert [len(t) for part in thin for t in part] == [2] * 4
    other = first_samples(((torch.ones(4, 6), torch.ones(4)), (torch.ones(28, 6), torch.ones(28))), 2)
    assert [len(t) for part in other for t in part] == [2] * 4


def test_what_is_not_per_sample_stays_whole() -> None:
    weights, scale = torch.ones(10, 2), torch.tensor(3.0)
    batch = {
        "x": torch.ones(8, 3),
        "y": torch.ones(8),
        "class_weights": weights,
        "scale": scale,
        "epoch": 3,
        "no": None,
    }
    thin = first_samples(batch, 2, 8)
    assert len(thin["x"]) == len(thin["y"]) == 2
    assert thin["class_weights"] is weights
    assert thin["scale"] is scale
    assert (thin["epoch"], thin["no"]) == (3, None)


@pytest.mark.parametrize("kind", [OrderedDict, UserDict])
def test_mappings_of_other_types_stay_what_they_are(kind: Any) -> None:
    batch = kind(input_ids=torch.ones(8, 5), mask=torch.ones(8, 5))
    thin = first_samples(batch, 2)
    assert type(thin) is kind
    assert {key: len(value) for key, value in thin.items()} == {"input_ids": 2, "mask": 2}
    assert len(batch["mask"]) == 8  # the batch itself is not changed


@pytest.mark.parametrize("batch", [torch.ones(1, 3), (torch.ones(1, 3), torch.ones(1)), {"x": torch.ones(0, 3)}])
def test_batches_of_no_more_samples_than_asked_for_stay(batch: Any) -> None:
    for mine, other in zip(leaves(first_samples(batch, 2)), leaves(batch)):
        assert torch.equal(mine, other)


def test_batches_without_tensors_are_returned_whole_or_cut_by_the_known_size() -> None:
    texts = [f"sample {i}" for i in range(8)]
    assert first_samples(texts, 2, 8) == texts[:2]
    assert first_samples("text", 2, 4) == "text"
    assert first_samples(None, 2, 4) is None
    columns = {"text": texts, "label": list(range(8))}
    assert first_samples(columns, 2, 8) == {"text": texts[:2], "label": [0, 1]}
