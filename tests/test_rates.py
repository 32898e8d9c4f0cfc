"""Measured contributions per round: coefficients from them are unbiased in time."""

import numpy as np
import pytest

from torch_qgc.errors import PlanError
from torch_qgc.job.rates import ArrivalRates


def time_average(contributions: np.ndarray, prior: float) -> float:
    """Mean over rounds of contributions / rate, which is 1 when unbiased; contributions [rounds] int."""
    rates = ArrivalRates(np.array([prior]), 1)
    total = 0.0
    for count in contributions:
        if count:
            total += count / rates.rates(0)[0]
        rates.update(0, np.array([count]), np.array([True]))
    return total / len(contributions)


def bursts(rng: np.random.Generator, rounds: int, sleep: int) -> np.ndarray:
    """A worker that, each time it is awake, sleeps through `sleep` rounds with probability one half."""
    arrived, out = 0, []
    while len(out) < rounds:
        if arrived % 2 == 0 and rng.random() < 0.5:
            out += [0] * sleep
        out.append(1)
        arrived += 1
    return np.array(out[:rounds])


def standard_error(runs: list[float]) -> float:
    return float(np.std(runs, ddof=1) / np.sqrt(len(runs)))


@pytest.mark.parametrize("rate", [0.15, 0.5, 0.9])
def test_independent_arrivals_are_weighted_without_bias(rate: float) -> None:
    rng = np.random.default_rng(1)
    runs = [time_average(rng.random(3000) < rate, prior=rate) for _ in range(60)]
    assert abs(np.mean(runs) - 1) < 4 * standard_error(runs) + 8 / 3000  # the last open gap is not paid yet


@pytest.mark.parametrize("prior", [0.29, 0.9])
def test_bursts_of_absence_are_weighted_without_bias_once_learned(prior: float) -> None:
    rng = np.random.default_rng(2)
    runs = []
    for _ in range(60):
        contributions = bursts(rng, 6000, sleep=6)
        rates = ArrivalRates(np.array([prior]), 1)
        paid = []
        for count in contributions:
            paid.append(count / rates.rates(0)[0] if count else 0.0)
            rates.update(0, np.array([count]), np.array([True]))
        runs.append(float(np.mean(paid[3000:])))  # the first half is where a wrong prior is forgotten
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
    assert rates.rates(0)[0] == pytest.approx(1 / 5)


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
    assert rates.rates(0) == pytest.approx([learned[0], 0.25, learned[2]])
    assert rates.rates(1) == pytest.approx([0.5] * 3)
    rates.expect(0, None, np.array([0.5, 0.8, 0.1]))  # the steps before have waited for all
    assert rates.rates(0) == pytest.approx([0.5, 0.8, 0.1])


@pytest.mark.parametrize("every", [37, 150])
def test_a_change_of_plan_in_the_middle_of_a_gap_costs_less_than_half_a_gap(every: int) -> None:
    """A gap that a change falls into is longer than others: if it were counted, it would cost twice as much."""
    rng, truth, runs = np.random.default_rng(4), np.array([1 / 2.5]), []  # gaps of one round, or of seven
    for _ in range(60):
        paid, rates = [], ArrivalRates(truth, 1)
        start = int(rng.integers(50))
        for step, count in enumerate(bursts(rng, 6050, sleep=6)[start : start + 6000]):
            if step % every == 0 and step:
                rates.expect(0, truth * (1 - 1e-9), truth)
            paid.append(count / rates.rates(0)[0] if count else 0.0)
            rates.update(0, np.array([count]), np.array([True]))
        runs.append(float(np.mean(paid)))
    assert abs(np.mean(runs) - 1) < 4 * standard_error(runs) + 1.25 / every
