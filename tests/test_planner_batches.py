"""Batches by speed against a scan over round lengths, whole samples against the definition, plans with batches."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_qgc.errors import PlanError
from torch_qgc.planner import apportion, choose_batches


# ------------------------------------------------------------------------------------------- choose_batches
def samples_per_round(round_s: float, s: np.ndarray, fixed: np.ndarray, least: float, most: float) -> np.ndarray:
    """The definition, worker by worker: what each gives to a round of this length."""
    given = np.empty(len(s))
    for k in range(len(s)):
        size = (round_s - fixed[k]) / s[k]
        if size >= least:
            given[k] = min(size, most)
        else:
            size = min(max(fixed[k] / s[k], least), most)
            given[k] = size * min(1.0, round_s / (fixed[k] + s[k] * size))
    return given


@st.composite
def speeds(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Seconds per batch and fixed seconds of all kinds: equal, spread over decades, with and without overhead."""
    k, rng = draw(st.integers(1, 9)), np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    s = draw(st.sampled_from([np.ones(k), 10.0 ** rng.uniform(-2, 2, k), rng.uniform(1, 4, k)]))
    fixed = draw(
        st.sampled_from([np.zeros(k), 10.0 ** rng.uniform(-3, 2, k), np.full(k, 0.1), rng.choice([0.1, 6], k)])
    )
    return s, fixed, draw(st.sampled_from([1 / 8, 1 / 64, 1.0])), draw(st.sampled_from([8.0, 1.0, 2.5, 1000.0]))


@settings(max_examples=200, deadline=None)
@given(speeds())
def test_the_round_is_the_shortest_in_which_the_samples_are_k_batch_sizes(
    case: tuple[np.ndarray, np.ndarray, float, float],
) -> None:
    s, fixed, least, most = case
    chosen = choose_batches(s, fixed, least=least, most=most)
    k, step_s, alone = len(s), chosen.step_s, chosen.asynchronous
    own_s = fixed + s * chosen.batches
    counted = chosen.batches * np.where(alone, np.minimum(1.0, step_s / own_s), 1.0)
    assert counted.sum() == pytest.approx(k, rel=1e-7)
    assert np.all((chosen.batches >= least * (1 - 1e-9)) & (chosen.batches <= most))
    np.testing.assert_array_less(own_s[~alone], step_s * (1 + 1e-9))
    waiting = ~alone & (own_s < step_s * (1 - 1e-6))
    np.testing.assert_allclose(chosen.batches[waiting], chosen.batches.max())  # only who has the largest batch waits
    earliest_s = np.sort(fixed + least * s)[max(k // 2, 1) - 1]  # half of the workers have to make it
    largest = min(chosen.batches.max(), most) if step_s <= earliest_s * (1 + 1e-9) else most
    np.testing.assert_allclose(chosen.batches[alone], np.clip(fixed / s, least, largest)[alone], rtol=1e-6)
    assert np.all((step_s - fixed[alone]) / s[alone] <= least * (1 + 1e-9))
    assert np.count_nonzero(~alone) >= max(k // 2, 1)
    assert chosen.batches.mean() >= 1.0 - 1e-9
    if not alone.any():
        assert chosen.batches.mean() == pytest.approx(1.0)
    for shorter in np.r_[np.linspace(earliest_s, step_s, 400), step_s * (1 - np.geomspace(1e-6, 1e-2, 50))]:
        if earliest_s * (1 + 1e-9) <= shorter < step_s * (1 - 1e-7):
            assert samples_per_round(shorter, s, fixed, least, most).sum() < k * (1 + 1e-8)


def test_equal_workers_get_equal_batches_and_five_times_slower_ones_a_fifth() -> None:
    equal = choose_batches([0.5, 0.5, 0.5], 0.1)
    np.testing.assert_allclose(equal.batches, 1.0)
    assert equal.step_s == pytest.approx(0.6)
    slow = choose_batches([1.0, 1.0, 1.0, 5.0], 0.0)
    np.testing.assert_allclose(slow.batches, np.array([1, 1, 1, 0.2]) / 0.8)
    assert not slow.asynchronous.any()


def test_a_worker_whose_overhead_exceeds_the_round_gives_a_large_batch_now_and_then() -> None:
    chosen = choose_batches(np.ones(5), [0.1, 0.1, 0.1, 0.1, 6.0])
    assert chosen.asynchronous.tolist() == [False] * 4 + [True]
    assert chosen.batches[4] == pytest.approx(6.0)  # six seconds of work for six of overhead
    gives = 6.0 * chosen.step_s / 12.0
    np.testing.assert_allclose(chosen.batches[:4], (5.0 - gives) / 4.0)
    assert choose_batches(np.ones(5), [0.1, 0.1, 0.1, 0.1, 60.0]).batches[4] == 8.0  # capped


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("fixed_s", [0.0, 0.1, 100.0])
def test_workers_with_the_same_overhead_make_every_step(workers: int, fixed_s: float) -> None:
    chosen = choose_batches(np.full(workers, 2.0), fixed_s)
    np.testing.assert_allclose(chosen.batches, 1.0, rtol=1e-9)
    assert chosen.step_s == pytest.approx(fixed_s + 2.0)


def test_half_of_the_workers_make_the_step_even_if_one_could_do_all_the_work() -> None:
    chosen = choose_batches([1.0, 1.0, 1.0, 1.0], [0.1, 6.0, 6.0, 6.0])
    assert not chosen.asynchronous.any()
    assert chosen.step_s == pytest.approx(6.125)
    np.testing.assert_allclose(chosen.batches, [3.625, 0.125, 0.125, 0.125])  # worker 0 waits for the others


@pytest.mark.parametrize(
    ("per_batch_s", "fixed_s", "options", "message"),
    [
        ([1.0, 0.0], 0.1, {}, "0.0 and 0.1 for worker 1"),
        ([1.0, np.inf], 0.1, {}, "leave a worker out"),
        ([1.0, 1.0], -0.1, {}, "fixed_s"),
        ([1.0, 1.0], [0.1, 0.1, 0.1], {}, "fixed_s"),
        ([1.0, np.nan], 0.1, {}, "per_batch_s"),
        ([1.0, 1.0], 0.1, {"least": 0.0}, "0 < least"),
        ([1.0, 1.0], 0.1, {"most": 0.5}, "1 <= most"),
    ],
)
def test_times_and_limits_that_cannot_be_are_refused(
    per_batch_s: list[float], fixed_s: float, options: dict[str, float], message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        choose_batches(per_batch_s, fixed_s, **options)


# ------------------------------------------------------------------------------------------------ apportion
@st.composite
def relative_batches(draw: st.DrawFn) -> np.ndarray:
    k, rng = draw(st.integers(1, 12)), np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    raw = draw(
        st.sampled_from([np.ones(k), rng.uniform(0.1, 8, k), 10.0 ** rng.uniform(-6, 2, k), rng.choice([1, 2, 3], k)])
    )
    return np.asarray(raw / raw.mean())


@settings(max_examples=300, deadline=None)
@given(relative_batches(), st.integers(1, 5000), st.integers(1, 4))
def test_whole_samples_sum_exactly_and_are_the_nearest_to_the_batches(
    batches: np.ndarray, size: int, least: int
) -> None:
    if least > size:
        with pytest.raises(PlanError, match="raise batch_size"):
            apportion(batches, size, least)
        return
    samples = apportion(batches, size, least)
    assert samples.dtype == np.int64
    assert samples.sum() == len(batches) * size
    assert samples.min() >= least
    order = np.argsort(batches, kind="stable")
    assert np.all(np.diff(samples[order]) >= -1)  # equal batches may differ by the sample that is left over
    assert np.all(np.diff(samples[order])[np.diff(batches[order]) > 1.0 / size] >= 0)
    if np.all(batches * size >= least):
        assert np.all(np.abs(samples - batches * size) < 1.0 + 1e-6)


@pytest.mark.parametrize("batches", [[1.7, 0.9, 0.4], [1.0, 1.0, 1.0], [0.05, 0.05, 2.9], [2.5, 0.25, 0.25]])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_whole_samples_are_the_best_of_all(batches: list[float], size: int) -> None:
    """By exhaustive search: the largest remainders have the least squared distance among those with everybody at 1."""
    due = np.array(batches) * size
    best = min(
        float(np.sum((np.array(samples) - due) ** 2))
        for samples in itertools.product(range(1, 3 * size + 1), repeat=3)
        if sum(samples) == 3 * size
    )
    assert float(np.sum((apportion(batches, size) - due) ** 2)) == pytest.approx(best)


def test_batches_of_asynchronous_workers_come_on_top() -> None:
    chosen = choose_batches(np.ones(5), [0.1, 0.1, 0.1, 0.1, 6.0])
    samples = apportion(chosen.batches, 16)
    assert samples.sum() == round(16 * chosen.batches.sum()) > 5 * 16
    assert samples[4] == 96


def test_ties_and_rounding_do_not_depend_on_floating_point() -> None:
    assert apportion(np.ones(3), 1).tolist() == [1, 1, 1]
    assert apportion([1.5, 0.75, 0.75], 2).tolist() == [3, 2, 1]  # the lower worker has the sample left over
    thirds = np.array([1.0, 1.0, 1.0]) * (1.0 + 1e-12)
    assert apportion(thirds, 10**9).sum() == round(sum(map(Fraction, thirds.tolist())) * 10**9)


@pytest.mark.parametrize(
    ("batches", "size", "message"),
    [
        ([1.0, 1.0], 0, "batch_size"),
        ([1.0, -1.0, 3.0], 4, "-1.0 for worker 1"),
        ([0.2, 0.8], 4, "divide them by their mean"),
        ([[1.0, 1.0]], 4, "shape"),
        ([], 4, "shape"),
        ([np.inf, 1.0], 4, "finite"),
    ],
)
def test_batches_that_cannot_be_are_refused(batches: list[float], size: int, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        apportion(batches, size)
