"""The flat gradient's layout."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torch_qgc.errors import ConfigError
from torch_qgc.worker.layout import BLOCK, Layout

SIZES = st.lists(st.integers(1, 3000), min_size=1, max_size=8)


def layout_of(sizes: list[int], chunk_numel: int = BLOCK) -> Layout:
    return Layout([(f"p{i}", torch.nn.Parameter(torch.zeros(n))) for i, n in enumerate(sizes)], chunk_numel=chunk_numel)


@given(sizes=SIZES, blocks=st.integers(1, 5))
def test_slots_and_chunks_tile_the_flat_gradient(sizes: list[int], blocks: int) -> None:
    layout = layout_of(sizes, blocks * BLOCK)
    for parts in (layout.slots, layout.chunks):
        position = 0
        for part in parts:
            assert part.offset == position
            position += part.numel
        assert position == layout.numel == sum(sizes)
    covered = [0] * len(layout.chunks)
    for slot in layout.slots:
        for chunk, numel in layout.chunks_under(slot):
            assert numel > 0
            covered[chunk] += numel
    assert covered == [chunk.numel for chunk in layout.chunks]
    assert all(chunk.offset % BLOCK == 0 for chunk in layout.chunks)


def test_the_order_is_the_reverse_of_the_parameters_and_skips_frozen_ones() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
    module[0].weight.requires_grad_(False)
    layout = Layout(module.named_parameters())
    assert [s.name for s in layout.slots] == ["1.bias", "1.weight", "0.bias"]


def test_digests_differ_exactly_when_layouts_do() -> None:
    assert layout_of([3, 4]).digest == layout_of([3, 4]).digest
    others = [layout_of([4, 3]), layout_of([3, 4, 1]), layout_of([3, 4], 2 * BLOCK)]
    assert len({layout_of([3, 4]).digest, *(other.digest for other in others)}) == 4


def test_tied_weights_have_one_slot() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    module[1].weight = module[0].weight
    assert Layout(module.named_parameters()).numel == 16 + 4 + 4


def test_bad_input_is_refused_with_a_remedy() -> None:
    with pytest.raises(ConfigError, match="multiple of 512"):
        layout_of([3], 100)
    with pytest.raises(ConfigError, match="nothing to train"):
        Layout([("p", torch.nn.Parameter(torch.zeros(3), requires_grad=False))])
    with pytest.raises(ConfigError, match="complex64"):
        Layout([("p", torch.nn.Parameter(torch.zeros(3, dtype=torch.complex64)))])
    with pytest.raises(ConfigError, match="does not know"):
        layout_of([3]).slot(torch.zeros(3))
