"""Delay models against their own samples, fits against simulated truth."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from torch_qgc.errors import PlanError
from torch_qgc.planner.delays import (
    DelayModel,
    Empirical,
    LogNormal,
    ShiftedExponential,
    fit_log_normal,
    fit_shifted_exponential,
    straggle_probability,
)
from torch_qgc.planner.goodness import choose_model
from torch_qgc.planner.posterior import StragglePosterior

MU = np.array([0.5, 1.0, 4.0])
MODELS: list[DelayModel] = [
    ShiftedExponential(mu=MU, shift=np.array([1.0, 0.5, 1.2]), load=np.array([1.0, 2.0, 0.5])),
    ShiftedExponential(mu=MU, shift=0.0),
    LogNormal(median=np.array([1.0, 1.4, 0.5]), sigma=np.array([0.2, 0.5, 1.0])),
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


def test_the_log_normal_fit_is_that_of_the_logarithms() -> None:
    logs = np.random.default_rng(6).normal(0.3, 0.7, size=500)
    fit = fit_log_normal(np.exp(logs))
    assert fit.median == pytest.approx(np.exp(logs.mean()))
    assert fit.sigma == pytest.approx(logs.std(ddof=1))
    frozen = stats.lognorm(s=fit.sigma, scale=fit.median)
    times = np.array([0.0, 0.4, 1.0, 3.0])
    np.testing.assert_allclose(fit.straggle_probability(times), frozen.sf(times), rtol=1e-12)
    np.testing.assert_allclose(frozen.cdf(fit.breakpoints()), [stats.norm.cdf(-4), stats.norm.cdf(4)])


@pytest.mark.parametrize("draw", ["exponential", "lognormal"])
def test_the_model_that_delays_were_drawn_from_is_chosen(draw: str) -> None:
    """Of 64 delays: the true family in nine of ten cases, none (at the stated 1 %) in few."""
    rng = np.random.default_rng(7)
    chosen = []
    for _ in range(500):
        delays = 1.0 + 0.5 * rng.exponential(size=64) if draw == "exponential" else rng.lognormal(0.0, 0.3, size=64)
        chosen.append(type(choose_model(delays)))
    true = ShiftedExponential if draw == "exponential" else LogNormal
    assert chosen.count(true) > 0.9 * len(chosen)
    assert chosen.count(Empirical) < 0.01 * len(chosen) + 3 * np.sqrt(0.01 * len(chosen))


def test_misfit_is_scipys_anderson_darling_statistic(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model is taken if the limit is just above scipy's statistic (in Stephens' correction), not if just below."""
    from torch_qgc.planner import goodness

    rng = np.random.default_rng(8)
    delays = np.concatenate([rng.uniform(1.0, 1.2, size=30), rng.uniform(4.0, 4.2, size=10)])
    assert isinstance(choose_model(delays), Empirical)
    n = len(delays)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer versions want to be told how to find a p-value
        normal = stats.anderson(np.log(delays), "norm").statistic * (1 + 0.75 / n + 2.25 / n**2)
        waits = stats.anderson(np.sort(delays)[1:] - delays.min(), "expon").statistic * (1 + 0.6 / (n - 1))
    monkeypatch.setattr(goodness, "_NORMAL", normal * 1.001)
    assert isinstance(choose_model(delays), LogNormal)
    monkeypatch.setattr(goodness, "_NORMAL", normal * 0.999)
    assert isinstance(choose_model(delays), Empirical)
    monkeypatch.setattr(goodness, "_EXPONENTIAL", waits * 1.001)
    assert isinstance(choose_model(delays), ShiftedExponential)
    monkeypatch.setattr(goodness, "_EXPONENTIAL", waits * 0.999)
    assert isinstance(choose_model(delays), Empirical)


@pytest.mark.parametrize("delays", [[1.0], [1.0, 2.0], [2.0, 2.0, 2.0, 2.0], [0.0, 1.0, 2.0, 3.0], [1.0, 2.0, np.inf]])
def test_delays_that_say_nothing_of_their_distribution_are_taken_as_they_are(delays: list[float]) -> None:
    model = choose_model(delays)
    assert isinstance(model, Empirical)
    np.testing.assert_array_equal(model.delays_s, delays)


def test_equal_delays_fit_a_worker_that_is_never_late_after_them() -> None:
    fit = fit_shifted_exponential([2.0, 2.0, 2.0])
    assert fit.straggle_probability(2.001) == pytest.approx(0.0, abs=1e-12)
    assert fit.straggle_probability(1.9) == 1.0


@given(st.integers(0, 2**32 - 1), st.floats(0.05, 0.95), st.integers(0, 200))
@settings(max_examples=30)
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
    with pytest.raises(PlanError, match="sigma > 0"):
        LogNormal(median=1.0, sigma=0.0)
    with pytest.raises(PlanError, match="at least 2 finite delays > 0"):
        fit_log_normal([1.0, 0.0])
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
