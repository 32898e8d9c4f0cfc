"""The decoder "annealed" and the temperature it heeds."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_qgc.errors import PlanError
from torch_qgc.planner import make_plan
from torch_qgc.planner.temperature import LEAST, Thermometer, temperatures

LATE = [0.05, 0.2, 0.5, 0.8]
EVERYBODY = np.ones(4, dtype=bool)
RATES = st.lists(st.floats(0.01, 1.5), min_size=4, max_size=4).map(np.array)
TEMPERATURE = st.floats(1e-6, 1.0)
BURST = st.floats(1.0, 8.0)


# --------------------------------------------------------------------------------------- its coefficients
@settings(max_examples=200, deadline=None)
@given(RATES, TEMPERATURE, BURST)
def test_no_payload_moves_further_than_the_burst_at_the_peak(
    rates: np.ndarray, temperature: float, burst: float
) -> None:
    """lr_t c_k <= burst lr_max m_k, and never more than the unbiased weight."""
    plan = make_plan(LATE, decoder="annealed", burst=burst)
    coefficients = plan.coefficients(EVERYBODY, rates=rates, temperature=temperature)
    assert np.all(temperature * coefficients <= burst * plan.shares * (1 + 1e-12))
    assert np.all(coefficients <= plan.shares / rates)


@settings(max_examples=200, deadline=None)
@given(RATES, TEMPERATURE, BURST)
def test_it_is_exactly_unbiased_from_the_stated_temperature_on(
    rates: np.ndarray, temperature: float, burst: float
) -> None:
    """Bit for bit m_k / r_k where theta <= burst r_k; less than that where it is not."""
    exact = make_plan(LATE).coefficients(EVERYBODY, rates=rates)
    plan = make_plan(LATE, decoder="annealed", burst=burst)
    coefficients = plan.coefficients(EVERYBODY, rates=rates, temperature=temperature)
    cold = temperature <= burst * rates * (1 - 1e-12)
    np.testing.assert_array_equal(coefficients[cold], exact[cold])
    hot = temperature > burst * rates * (1 + 1e-12)
    assert np.all(coefficients[hot] < exact[hot])


@given(TEMPERATURE, BURST)
def test_workers_in_every_round_always_count_their_share(temperature: float, burst: float) -> None:
    plan = make_plan(LATE, decoder="annealed", burst=burst)
    np.testing.assert_array_equal(plan.coefficients(EVERYBODY, rates=np.ones(4), temperature=temperature), plan.shares)


def test_at_a_constant_learning_rate_the_burst_is_the_highest_weight() -> None:
    """c_k = m_k / max(r_k, 1 / burst)."""
    rates = np.array([1.0, 0.7, 0.4, 0.1])
    for burst in (1.0, 2.0, 5.0):
        plan = make_plan(LATE, decoder="annealed", burst=burst)
        expected = plan.shares / np.maximum(rates, 1 / burst)
        np.testing.assert_allclose(plan.coefficients(EVERYBODY, rates=rates), expected, rtol=1e-12)


@pytest.mark.parametrize("burst", [1.0, 2.0])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.2, 0.01])
def test_the_expected_weight_of_a_round_is_what_is_stated(burst: float, temperature: float) -> None:
    """m_k min(1, burst r_k / theta) per round: workers are late for several rounds at a time, 4 standard errors."""
    rng = np.random.default_rng(3)
    plan = make_plan(LATE, decoder="annealed", burst=burst)
    rounds, gaps = 60_000, np.array([1.0, 1.3, 3.0, 8.0])
    coefficients = plan.coefficients(EVERYBODY, rates=1 / gaps, temperature=temperature)
    for k, gap in enumerate(gaps):
        times = np.cumsum(rng.geometric(1 / gap, size=2 * rounds))
        got = coefficients[k] * np.count_nonzero(times <= rounds) / rounds
        error = coefficients[k] * math.sqrt((1 - 1 / gap) / gap / rounds)
        assert abs(got - plan.shares[k] * min(1.0, burst / gap / temperature)) <= 4 * error + 1e-12


def test_other_decoders_do_not_heed_the_temperature() -> None:
    for decoder in ("unbiased", "hajek", "ridge", "uncorrected"):
        plan = make_plan(LATE, decoder=decoder)
        np.testing.assert_array_equal(plan.coefficients(EVERYBODY, temperature=0.1), plan.coefficients(EVERYBODY))


def test_a_second_track_by_hajek_sums_to_one_at_any_temperature() -> None:
    plan = make_plan(LATE, decoder="annealed", second_track="hajek")
    counts = np.array([1, 0, 2, 1])
    for temperature in (1.0, 0.3, 0.01):
        second = plan.second_coefficients(counts, rates=np.array([1.0, 0.8, 0.5, 0.2]), temperature=temperature)
        assert second is not None
        assert second @ counts == pytest.approx(1.0)


def test_a_rate_of_zero_gives_coefficient_zero_at_any_temperature() -> None:
    plan = make_plan(LATE, decoder="annealed")
    rates = np.array([1.0, 0.8, 0.0, 0.2])
    for temperature in (1.0, LEAST):
        assert plan.coefficients(EVERYBODY, rates=rates, temperature=temperature)[2] == 0.0


@pytest.mark.parametrize("temperature", [0.0, -0.1, 1.01, math.nan, math.inf])
def test_temperatures_out_of_range_are_refused(temperature: float) -> None:
    plan = make_plan(LATE, decoder="annealed", second_track="hajek")
    for use in (plan.coefficients, plan.second_coefficients, plan.second_scale):
        with pytest.raises(PlanError, match=r"temperature: expected .* in \(0, 1\]"):
            use(EVERYBODY, temperature=temperature)


@pytest.mark.parametrize("burst", [0.99, 0.0, -1.0, math.nan, math.inf])
def test_bursts_out_of_range_are_refused(burst: float) -> None:
    with pytest.raises(PlanError, match="burst: expected a finite number >= 1"):
        make_plan(LATE, decoder="annealed", burst=burst)


# ------------------------------------------------------------------------------------------ temperatures
@given(st.lists(st.floats(0, 10), min_size=1, max_size=30))
def test_the_temperature_is_the_rate_over_the_highest_so_far(rates: list[float]) -> None:
    got = temperatures(rates)
    for t, lr in enumerate(rates):
        peak = max(rates[: t + 1])
        assert got[t] == (max(lr / peak, LEAST) if peak > 0 else 1.0)


def test_a_warm_up_is_hot_and_the_end_of_a_schedule_cold() -> None:
    steps = 100
    rates = [0.1 * (t + 1) / 10 if t < 10 else 0.05 * (1 + math.cos(math.pi * (t - 10) / 90)) for t in range(steps)]
    got = temperatures(rates)
    np.testing.assert_array_equal(got[:11], 1.0)
    assert np.all(np.diff(got[10:]) < 0)
    assert got[-1] < 1e-3


def test_a_resumed_thermometer_goes_on() -> None:
    whole = Thermometer()
    first = [whole.read(lr) for lr in (0.1, 0.4, 0.2)]
    assert first == [1.0, 1.0, 0.5]
    assert Thermometer(whole.peak).read(0.1) == whole.read(0.1) == 0.25


@pytest.mark.parametrize("lr", [-0.1, math.nan, math.inf])
def test_learning_rates_that_cannot_be_are_refused(lr: float) -> None:
    with pytest.raises(PlanError, match="lr: expected a finite learning rate"):
        Thermometer().read(lr)
