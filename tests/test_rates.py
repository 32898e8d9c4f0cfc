"""Measured contributions per round: coefficients from them are unbiased in time."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_qgc.errors import PlanError
from torch_qgc.job.rates import ArrivalRates


def weights(contributions: np.ndarray, prior: float, every: int | None = None) -> np.ndarray:
    """Return [rounds, K] contributions / rate, which is 1 on average when unbiased.

    Args:
        contributions: [rounds, K] int; workers know nothing of each other.
        prior: what is expected of everybody, at first and by a new plan every so many rounds.
    """
    workers = contributions.shape[1]
    rates, paid, expected = ArrivalRates(np.full(workers, prior), 1), [], np.full(workers, prior)
    for step, counts in enumerate(contributions):
        if every and step and step % every == 0:
            rates.expect(0, None, expected)
        paid.append(counts / rates.rates(0))
        rates.update(0, counts, np.ones(workers, dtype=bool))
    return np.array(paid)


def bursts(rng: np.random.Generator, rounds: int, sleep: int) -> np.ndarray:
    """A worker that, each time it is awake, sleeps through `sleep` rounds with probability one half."""
    arrived, out = 0, []
    while len(out) < rounds:
        if arrived % 2 == 0 and rng.random() < 0.5:
            out += [0] * sleep
        out.append(1)
        arrived += 1
    return np.array(out[:rounds])


def standard_error(runs: Any) -> float:
    return float(np.std(runs, ddof=1) / np.sqrt(len(runs)))


@pytest.mark.parametrize("rate", [0.15, 0.5, 0.9])
def test_independent_arrivals_are_weighted_without_bias(rate: float) -> None:
    rng = np.random.default_rng(1)
    runs = weights((rng.random((3000, 60)) < rate).astype(int), prior=rate).mean(axis=0)
    assert abs(np.mean(runs) - 1) < 4 * standard_error(runs) + 8 / 3000  # the last open gap is not paid yet


@pytest.mark.parametrize("prior", [0.29, 0.9])
def test_bursts_of_absence_are_weighted_without_bias_once_learned(prior: float) -> None:
    rng = np.random.default_rng(2)
    contributions = np.stack([bursts(rng, 6000, sleep=6) for _ in range(60)], axis=1)
    runs = weights(contributions, prior)[3000:].mean(axis=0)  # the first half is where a wrong prior is forgotten
    assert abs(np.mean(runs) - 1) < 4 * standard_error(runs) + 12 / 3000


def test_a_prior_that_expects_too_little_is_soon_forgotten() -> None:
    """A plan may take a worker for almost always late, and be wrong: weights of 12 must not survive the first steps."""
    rates = ArrivalRates(np.array([0.08]), 1)
    assert rates.rates(0)[0] == pytest.approx(0.08)
    for _ in range(10):
        rates.update(0, np.array([0]), np.array([True]))
        rates.update(0, np.array([1]), np.array([True]))
    assert rates.rates(0)[0] == pytest.approx(0.5, rel=0.3)


def test_an_averaged_frequency_would_be_biased() -> None:
    """Why the mean gap is estimated: the obvious estimate, 1 / EMA(arrived), fails the very same test."""
    rng = np.random.default_rng(3)
    runs = []
    for _ in range(60):
        rate, paid = 1 / 2.5, []
        for count in bursts(rng, 6000, sleep=6):
            paid.append(count / rate)
            rate += (count - rate) / 50
        runs.append(float(np.mean(paid[3000:])))
    assert abs(np.mean(runs) - 1) > 4 * standard_error(runs) + 12 / 3000


def test_folded_payloads_count_each() -> None:
    rates = ArrivalRates(np.array([0.5]), 1)
    for _ in range(2000):
        rates.update(0, np.array([0]), np.array([True]))
        rates.update(0, np.array([2]), np.array([True]))
    assert rates.rates(0)[0] == pytest.approx(1.0, rel=0.05)


def test_chunks_are_tracked_apart_and_the_dead_are_not_counted_late() -> None:
    rates = ArrivalRates(np.array([0.5, 0.5]), 2)
    for _ in range(500):
        rates.update(0, np.array([1, 0]), np.array([True, False]))
    assert rates.rates(0)[0] == pytest.approx(1.0, rel=0.05)
    assert rates.rates(1) == pytest.approx([0.5, 0.5])
    rates.update(0, np.array([1, 1]), np.array([True, True]))
    assert rates.rates(0)[1] > 0.5  # a gap of one round, not of 501


def test_a_worker_without_prior_gets_weight_once_it_has_come() -> None:
    rates = ArrivalRates(np.array([0.0]), 1)
    assert rates.rates(0)[0] == 0
    for _ in range(4):
        rates.update(0, np.array([0]), np.array([True]))
    rates.update(0, np.array([1]), np.array([True]))
    assert rates.rates(0)[0] == pytest.approx(1 / 5, rel=0.05)  # a little less: nothing has stood for the five rounds


@pytest.mark.parametrize("bad", [[1.5], [-0.1], [[0.5]], [float("nan")]])
def test_bad_priors_are_refused(bad: list[float]) -> None:
    with pytest.raises(PlanError, match="expected"):
        ArrivalRates(np.array(bad), 1)


def test_a_new_plan_begins_anew_with_the_rates_that_it_changes_and_keeps_the_others() -> None:
    rates = ArrivalRates(np.array([0.5, 0.5, 0.5]), 2)
    for _ in range(50):
        rates.update(0, np.array([1, 1, 1]), np.array([True] * 3))
    learned = rates.rates(0)
    assert np.all(learned > 0.9)
    rates.expect(0, np.array([0.5, 0.5, 0.5]), np.array([0.5, 0.25, 0.5]))
    assert rates.rates(0)[0] == learned[0]
    assert rates.rates(0) == pytest.approx([learned[0], 0.25, learned[2]], rel=0.1)  # what is owed stays owed
    assert rates.rates(1) == pytest.approx([0.5] * 3)
    rates.expect(0, None, np.array([0.5, 0.8, 0.1]))  # the steps before have waited for all
    assert rates.rates(0) == pytest.approx([0.5, 0.8, 0.1], rel=0.15)


@pytest.mark.parametrize("every", [37, 150])
def test_changes_of_plan_in_the_middle_of_gaps_cost_nothing(every: int) -> None:
    """Nothing of a gap that a change falls into is lost, although it is longer than others and not counted as one."""
    rng = np.random.default_rng(4)  # gaps of one round, or of seven
    starts = rng.integers(50, size=60)
    contributions = np.stack([bursts(rng, 6050, sleep=6)[start : start + 6000] for start in starts], axis=1)
    runs = weights(contributions, 1 / 2.5, every).mean(axis=0)
    assert abs(np.mean(runs) - 1) < 4 * standard_error(runs) + 8 / 6000  # as if no plan had changed


plans = st.lists(st.tuples(st.floats(0.02, 1.0), st.integers(1, 60)), min_size=1, max_size=12)


@given(plans, st.sampled_from([0.1, 0.5, 1.0]), st.integers(0, 2**31))
@settings(max_examples=80, deadline=None)
def test_every_round_is_stood_for_or_owed_whatever_plans_expect(plans: list[Any], rate: float, seed: int) -> None:
    rng, rates, paid, rounds, gap = np.random.default_rng(seed), ArrivalRates(np.array([plans[0][0]]), 1), 0.0, 0, 0
    for before, (after, stretch) in zip([None, *plans], plans):
        rates.expect(0, None if before is None else np.array([before[0]]), np.array([after]))
        gap *= before is not None and before[0] == after
        for _ in range(stretch):
            alive, count = rng.random() < 0.9, int((rng.random() < rate) * rng.integers(1, 3))
            paid += count / rates.rates(0)[0]
            rates.update(0, np.array([count]), np.array([alive or count > 0]))
            rounds += alive or count > 0
            gap = 0 if count else gap + alive
    assert paid + rates.owed[0, 0] + gap == pytest.approx(rounds)


@pytest.mark.parametrize("every", [20, 50])
@pytest.mark.parametrize("expected", [0.3, 0.9])
def test_plans_that_expect_the_wrong_thing_again_and_again_cost_no_bias(expected: float, every: int) -> None:
    """Three contributions in five rounds on average, now more and now less: a plan has forgotten them when it ends."""
    rng = np.random.default_rng(5)
    chances = 0.6 + 0.3 * np.sin(np.arange(4000) / 50)
    runs = weights((rng.random((4000, 20)) < chances[:, None]).astype(int), expected, every).mean(axis=0)
    assert abs(np.mean(runs) - 1) < 4 * standard_error(runs) + 30 / 4000  # what is owed at the end


def test_what_is_owed_makes_weights_hardly_vary_more() -> None:
    """Of independent arrivals the weight's variance is (1 - r) / r at least; its mean may be off by a few rounds."""
    rng = np.random.default_rng(6)
    for rate in (0.2, 0.5, 0.9):
        assert weights((rng.random((2000, 20)) < rate).astype(int), rate).var() < 1.08 * (1 - rate) / rate
