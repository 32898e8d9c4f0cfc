"""Delay models against their own samples, fits against simulated truth."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from torch_qgc.errors import PlanError
from torch_qgc.planner.delays import (
    DelayModel,
    Empirical,
    ShiftedExponential,
    StragglePosterior,
    fit_shifted_exponential,
    straggle_probability,
)

MU = np.array([0.5, 1.0, 4.0])
MODELS: list[DelayModel] = [
    ShiftedExponential(mu=MU, shift=np.array([1.0, 0.5, 1.2]), load=np.array([1.0, 2.0, 0.5])),
    ShiftedExponential(mu=MU, shift=0.0),
    Empirical(delays_s=1 + np.random.default_rng(0).gamma(2.0, 0.5, size=(50, 3)), caution=0.0),
]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: type(model).__name__)
def test_samples_are_late_as_often_as_the_model_says(model: DelayModel) -> None:
    samples = model.sample(np.random.default_rng(1), 40_000)
    assert samples.shape == (40_000, 3)
    for deadline in (0.3, 1.3, 2.5):
        p = model.straggle_probability(deadline)
        error = np.sqrt(np.maximum(p * (1 - p), 1e-9) / len(samples))
        assert np.all(np.abs((samples > deadline).mean(axis=0) - p) <= 4 * error)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: type(model).__name__)
def test_tails_broadcast_over_deadlines_and_never_rise(model: DelayModel) -> None:
    times = np.linspace(0.0, 6.0, 60).reshape(6, 10)
    p = model.late_fraction(times)
    assert p.shape == (6, 10, 3)
    np.testing.assert_array_equal(p[2, 3], model.late_fraction(float(times[2, 3])))
    assert np.all(np.diff(p.reshape(60, 3), axis=0) <= 0)
    assert np.all((p >= 0) & (p <= 1))


def test_scalar_models_describe_one_worker() -> None:
    model = ShiftedExponential(mu=2.0, shift=1.0)
    assert model.sample(np.random.default_rng(0), (4, 5)).shape == (4, 5)
    assert model.straggle_probability(2.0) == pytest.approx(np.exp(-2.0))
    assert model.straggle_probability(0.5) == 1.0
    assert Empirical(delays_s=[1.0, 2.0, np.inf]).straggle_probability(5.0) == pytest.approx(1.5 / 4)
    recorded = Empirical(delays_s=[1.0, 2.0, np.inf]).sample(np.random.default_rng(0), 100)
    assert set(recorded) == {1.0, 2.0, np.inf}


def test_more_load_is_slower_in_both_terms() -> None:
    p = straggle_probability(mu=1.0, shift=1.0, deadline=4.0, load=np.array([1.0, 2.0, 3.0, 5.0]))
    np.testing.assert_allclose(p, [np.exp(-3), np.exp(-1), np.exp(-1 / 3), 1.0])


def test_the_corrected_fit_has_no_bias_and_the_likeliest_one_has() -> None:
    rng = np.random.default_rng(3)
    true = ShiftedExponential(mu=1.2, shift=1.0)
    fits, raw = [], []
    for _ in range(4000):
        delays = true.sample(rng, 8)
        fit, likeliest = fit_shifted_exponential(delays), fit_shifted_exponential(delays, corrected=False)
        fits.append((1 / np.float64(fit.mu), fit.shift))
        raw.append((1 / np.float64(likeliest.mu), likeliest.shift))
    error = np.std(fits, axis=0) / np.sqrt(len(fits))
    assert np.all(np.abs(np.mean(fits, axis=0) - [1 / 1.2, 1.0]) < 4 * error)
    assert np.all(np.abs(np.mean(raw, axis=0) - [1 / 1.2, 1.0]) > 10 * error)


def test_the_fit_sees_through_censoring() -> None:
    rng = np.random.default_rng(4)
    delays = ShiftedExponential(mu=0.8, shift=2.0).sample(rng, 20_000)
    fit = fit_shifted_exponential(delays[delays <= 3.0], np.full(np.count_nonzero(delays > 3.0), 3.0))
    assert fit.mu == pytest.approx(0.8, rel=0.05)
    assert fit.shift == pytest.approx(2.0, rel=0.01)


def test_the_likeliest_fit_maximises_the_likelihood() -> None:
    rng = np.random.default_rng(5)
    delays, missed = 1 + rng.exponential(size=12), np.full(4, 2.5)
    fit = fit_shifted_exponential(delays, missed, corrected=False)

    def log_likelihood(mu: float, shift: float) -> float:
        return float(stats.expon.logpdf(delays, shift, 1 / mu).sum() + stats.expon.logsf(missed, shift, 1 / mu).sum())

    mu, shift = float(np.float64(fit.mu)), float(np.float64(fit.shift))
    best = log_likelihood(mu, shift)
    for factor in (0.9, 0.99, 1.01, 1.1):
        assert log_likelihood(mu * factor, shift) < best
    assert log_likelihood(mu, shift * 0.999) < best
    assert log_likelihood(mu, shift * 1.001) == -np.inf


def test_equal_delays_fit_a_worker_that_is_never_late_after_them() -> None:
    fit = fit_shifted_exponential([2.0, 2.0, 2.0])
    assert fit.straggle_probability(2.001) == pytest.approx(0.0, abs=1e-12)
    assert fit.straggle_probability(1.9) == 1.0


@given(st.integers(0, 2**32 - 1), st.floats(0.05, 0.95), st.integers(0, 200))
@settings(max_examples=30, deadline=None)
def test_the_posterior_is_the_beta_posterior(seed: int, p: float, count: int) -> None:
    arrived = np.random.default_rng(seed).random((count, 2)) >= p
    posterior = StragglePosterior(0.3, 2, strength=5.0)
    posterior.update(arrived)
    late = np.count_nonzero(~arrived, axis=0)
    exact = stats.beta(1.5 + late, 3.5 + count - late)
    np.testing.assert_allclose(posterior.mean(), exact.mean(), rtol=1e-12)
    np.testing.assert_allclose(posterior.quantile(0.9), exact.ppf(0.9), rtol=1e-12)
    assert np.all((posterior.mean() > 0) & (posterior.mean() < 1))


def test_the_posterior_forgets() -> None:
    posterior = StragglePosterior([0.5, 0.5], memory=20.0)
    posterior.update(np.ones((500, 2), dtype=bool))
    assert np.all(posterior.mean() < 0.05)
    posterior.update(np.tile([True, False], (100, 1)))
    assert posterior.mean()[1] > 0.9
    assert posterior.mean()[0] < 0.05
    np.testing.assert_allclose(posterior.rounds, 20.0, rtol=0.01)


def test_bad_input_is_refused() -> None:
    with pytest.raises(PlanError, match="mu > 0"):
        ShiftedExponential(mu=[1.0, 0.0])
    with pytest.raises(PlanError, match="shift >= 0"):
        ShiftedExponential(mu=1.0, shift=-1.0)
    with pytest.raises(PlanError, match="delays_s"):
        Empirical(delays_s=[])
    with pytest.raises(PlanError, match="delays_s"):
        Empirical(delays_s=[1.0, np.nan])
    with pytest.raises(PlanError, match="at least 2 arrivals, got 1"):
        fit_shifted_exponential([1.0], [2.0])
    with pytest.raises(PlanError, match="finite delays"):
        fit_shifted_exponential([1.0, np.inf])
    with pytest.raises(PlanError, match="prior in"):
        StragglePosterior(0.0, 3)
