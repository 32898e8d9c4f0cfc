"""Draws from a worker's own share: unbiased wherever they are cut, and even."""

from __future__ import annotations

from itertools import chain
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from torch_qgc.ddp.sampler import CodedSampler, Cut, Stream, random_partitions

Share = tuple[NDArray[np.float64], list[NDArray[np.int64]], "list[float] | None"]


@st.composite
def shares(draw: Any) -> Share:
    """Chances of partitions, their indices, and weights of samples or None."""
    lengths = draw(st.lists(st.integers(1, 30), min_size=1, max_size=5))
    some = st.floats(0.01, 1)
    raw = np.array(draw(st.lists(st.just(0.0) | some, min_size=len(lengths), max_size=len(lengths)).filter(any)))
    blocks = np.split(np.arange(sum(lengths)), np.cumsum(lengths)[:-1])
    weights = draw(st.none() | st.lists(some, min_size=sum(lengths), max_size=sum(lengths)))
    return raw / raw.sum(), blocks, weights


def chances(probs: NDArray[np.float64], blocks: list[NDArray[np.int64]], weights: Any) -> NDArray[np.float64]:
    """The definition: each sample's chance is its partition's, divided in proportion to the weights."""
    each = np.zeros(sum(map(len, blocks)))
    for prob, block in zip(probs, blocks):
        own = np.ones(len(block)) if weights is None else np.asarray(weights)[block]
        each[block] = prob * own / own.sum()
    return each


@given(share=shares(), sizes=st.lists(st.integers(1, 20), min_size=1, max_size=12), seed=st.integers(0, 2**16))
def test_batches_of_any_sizes_are_cut_one_after_the_other_from_the_same_stream(
    share: Share, sizes: list[int], seed: int
) -> None:
    probs, blocks, weights = share
    left = iter([sizes[0], *sizes])  # the first is asked for to skip no batch
    options = {"batch_size": 3, "batches": len(sizes), "seed": seed, "weights": weights}
    sampler = CodedSampler(probs, blocks, cut=lambda: Cut(0, next(left), 0), **options)  # type: ignore[arg-type]
    batches = list(sampler)
    assert [len(batch) for batch in batches] == list(sampler.sizes) == sizes
    draws = list(chain(*batches))
    assert draws == sampler.stream().take(sum(sizes)).tolist()
    equal = chain(*CodedSampler(probs, blocks, **options))  # type: ignore[arg-type]
    assert all(mine == other for mine, other in zip(draws, equal))


@given(share=shares(), seed=st.integers(0, 2**16), draws=st.integers(1, 400))
def test_every_sample_has_come_its_expected_number_of_times_wherever_the_stream_is_cut(
    share: Share, seed: int, draws: int
) -> None:
    each = chances(*share)
    held = np.flatnonzero(each)
    stream = Stream(held, each[held], np.random.default_rng(seed))
    length = int(1 / each.max() + 1e-6)
    taken = stream.take(min(draws, 100 * length))
    came = np.cumsum(taken[:, None] == np.arange(len(each)), axis=0)  # [draws, samples]
    expected = np.arange(1, len(taken) + 1)[:, None] * each
    even = np.ptp(each[held]) < 1e-12
    assert np.all(np.abs(came - expected) < (1 + 1e-6 if even else 4))
    for start in range(0, len(taken), length):
        assert np.bincount(taken[start : start + length]).max() == 1  # nobody twice in a pass


def test_each_position_is_an_unbiased_draw_in_all_passes() -> None:
    """The mean over epochs of f(sample at a fixed position) is the share's mean of f, within 4 standard errors."""
    probs, partitions = np.array([0.6, 0.0, 0.4]), [np.arange(0, 7), np.arange(7, 20), np.arange(20, 23)]
    weights = np.random.default_rng(1).random(23)
    values = np.random.default_rng(0).normal(size=23)
    each = chances(probs, partitions, weights)
    assert 1 / each.max() < 8  # so that 24 draws go through several passes
    sampler = CodedSampler(probs, partitions, batch_size=4, batches=6, seed=3, weights=weights)
    runs = []
    for epoch in range(4000):
        sampler.set_epoch(epoch)
        runs.append(values[sampler.stream().take(24)])
    errors = np.std(runs, axis=0, ddof=1) / np.sqrt(len(runs))
    assert np.all(np.abs(np.mean(runs, axis=0) - each @ values) < 4 * errors)


def test_epochs_and_workers_draw_differently_and_reproducibly() -> None:
    def draws(worker: int, epoch: int) -> list[list[int]]:
        sampler = CodedSampler(np.ones(1), [np.arange(100)], batch_size=10, batches=5, seed=1, worker=worker)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert draws(0, 0) == draws(0, 0)
    assert draws(0, 0) != draws(0, 1)
    assert draws(0, 0) != draws(1, 0)


@given(data=st.data(), workers=st.integers(1, 6), samples=st.integers(1, 60), seed=st.integers(0, 2**16))
def test_of_data_that_move_every_sample_comes_once_in_a_pass_whoever_draws_it(
    data: st.DataObject, workers: int, samples: int, seed: int
) -> None:
    sizes = data.draw(st.lists(st.lists(st.integers(1, 9), min_size=workers, max_size=workers), min_size=1, max_size=8))

    def draws(worker: int) -> list[list[int]]:
        left = iter([sizes[0], *sizes])  # the first is asked for to skip no batch
        options = {"batch_size": 1, "batches": len(sizes), "seed": seed, "worker": None}
        return list(
            CodedSampler(np.ones(1), [np.arange(samples)], cut=lambda: Cut.of(next(left), worker), **options)  # type: ignore[arg-type]
        )

    by_worker = [draws(worker) for worker in range(workers)]
    assert [[len(batch) for batch in step] for step in zip(*by_worker)] == sizes
    everybodys = list(chain(*chain(*zip(*by_worker))))
    for start in range(0, len(everybodys), samples):
        assert len(set(everybodys[start : start + samples])) == len(everybodys[start : start + samples])


@pytest.mark.parametrize("skip", [0, 3, 7])
def test_skipped_batches_are_those_of_the_present_size(skip: int) -> None:
    sampler = CodedSampler(np.ones(1), [np.arange(20)], batch_size=2, batches=7, cut=lambda: Cut(0, 5, 0))
    whole = list(sampler)
    sampler.skip = skip
    assert list(sampler) == whole[skip:]


def test_random_partitions_are_a_partition() -> None:
    blocks = random_partitions(103, 10, seed=5)
    assert sorted(np.concatenate(blocks).tolist()) == list(range(103))
    assert {len(b) for b in blocks} == {10, 11}
