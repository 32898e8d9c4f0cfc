"""Control variates: unbiased whatever is remembered, robust to wrong rates, and less noisy where payloads are alike."""

from __future__ import annotations

import numpy as np
import pytest

from torch_qgc.aggregator.variates import ControlVariates
from torch_qgc.errors import PlanError

SHARES = np.array([0.5, 0.3, 0.2])
NUMEL = 6


def arrivals(rng: np.random.Generator, rounds: int) -> tuple[np.ndarray, np.ndarray]:
    """Return who is in, [rounds, K], and rates: pauses of several rounds, whose gaps are drawn independently."""
    chance, length = np.array([0.0, 0.1, 0.3]), np.array([1, 6, 3])
    present = np.zeros((rounds, 3), dtype=bool)
    for k in range(3):
        gaps = 1 + length[k] * (rng.random(2 * rounds) < chance[k])
        times = np.cumsum(gaps)
        present[times[times < rounds], k] = True
    return present, 1.0 / (1.0 + length * chance)


def batch_error(values: np.ndarray, batch: int = 200) -> np.ndarray:
    """Return the standard error of the mean of correlated rows, by the method of batch means."""
    means = values[: len(values) // batch * batch].reshape(-1, batch, values.shape[1]).mean(1)
    return means.std(axis=0, ddof=1) / np.sqrt(len(means))


def run(memory: ControlVariates, rounds: int, *, noise: float, wrong: float = 1.0, seed: int = 0) -> np.ndarray:
    """Return what is decoded, [rounds, NUMEL], of payloads with means `truths`; rates are `wrong` times too large."""
    rng = np.random.default_rng(seed)
    present, rates = arrivals(rng, rounds)
    decoded = np.empty((rounds, NUMEL))
    for t in range(rounds):
        sent = (truths() + noise * rng.standard_normal((3, NUMEL))).astype(np.float32)
        payloads = [(int(k), sent[k], SHARES[k] / (wrong * rates[k])) for k in np.flatnonzero(present[t])]
        decoded[t] = memory.decode(payloads, SHARES, rates)
    return decoded


def truths() -> np.ndarray:
    return np.random.default_rng(9).normal(size=(3, NUMEL))


def plain() -> ControlVariates:
    """No worker is in more than twice a round, so nobody's memory is used."""
    return ControlVariates(3, NUMEL, least_rate=2.0)


@pytest.mark.parametrize("follow", [0.02, 0.3, 1.0])
@pytest.mark.parametrize("noise", [0.0, 2.0])
def test_the_time_average_is_unbiased_whatever_is_remembered(follow: float, noise: float) -> None:
    """Also from a memory that is wrong at the beginning: 4 standard errors by batch means, and one unfinished gap."""
    memory = ControlVariates(3, NUMEL, follow=follow, least_rate=0.0)
    memory.mean[:] = np.random.default_rng(1).normal(size=(3, NUMEL))
    decoded = run(memory, 6000, noise=noise)
    error = batch_error(decoded)
    assert np.all(np.abs(decoded.mean(0) - SHARES @ truths()) <= 4 * error + 6 / 6000)


def test_a_round_is_the_stated_sum() -> None:
    """Against the formula in float64, memory and all, over rounds with late workers and with two payloads of one."""
    rng = np.random.default_rng(2)
    memory = ControlVariates(3, NUMEL, follow=0.1)
    rates = np.array([1.0, 0.6, 0.4])  # the last one is below the least rate
    u, alike, size = np.zeros((3, NUMEL)), np.zeros(3), np.zeros(3)
    for workers in ([0, 1, 2], [0], [0, 1, 1], [2], [0, 1, 2]):
        sent = [(k, rng.normal(size=NUMEL).astype(np.float32)) for k in workers]
        b = np.clip([a / s if s else 0.0 for a, s in zip(alike, size)], 0, 1) * (rates >= 0.5)
        c = SHARES / rates
        expected = sum((SHARES[k] * b[k] * u[k] for k in range(3)), np.zeros(NUMEL))
        expected += sum(c[k] * (h - b[k] * u[k]) for k, h in sent)
        for k, h in sent:
            if u[k].any():
                alike[k] = 0.95 * alike[k] + 0.05 * (h @ u[k])
                size[k] = 0.95 * size[k] + 0.05 * (u[k] @ u[k])
                u[k] += 0.1 * (h - u[k])
            else:
                u[k] = h
        payloads = [(k, h, c[k]) for k, h in sent]
        np.testing.assert_allclose(memory.decode(payloads, SHARES, rates), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(memory.mean, u, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wrong", [0.5, 2.0])
def test_a_wrong_rate_hardly_matters_where_payloads_are_alike(wrong: float) -> None:
    true = SHARES @ truths()
    off = run(plain(), 2000, noise=0.1, wrong=wrong).mean(0) - true
    kept = run(ControlVariates(3, NUMEL), 2000, noise=0.1, wrong=wrong).mean(0) - true
    assert np.linalg.norm(kept) < 0.05 * np.linalg.norm(off)


def test_rounds_vary_less_where_payloads_are_alike_and_no_more_where_they_are_not() -> None:
    def spread(memory: ControlVariates, noise: float) -> float:
        return float(run(memory, 2500, noise=noise)[500:].var(axis=0).sum())

    assert spread(ControlVariates(3, NUMEL), 0.1) < 0.1 * spread(plain(), 0.1)
    assert spread(ControlVariates(3, NUMEL), 10.0) < 1.1 * spread(plain(), 10.0)


def test_what_is_not_finite_is_decoded_and_not_remembered() -> None:
    memory, rates = ControlVariates(3, NUMEL), np.ones(3)
    usual = [(k, np.full(NUMEL, k + 1, dtype=np.float32), SHARES[k]) for k in range(3)]
    before = [memory.decode(usual, SHARES, rates) for _ in range(3)][-1]
    for value in (np.nan, np.inf):
        broken = [(0, np.full(NUMEL, value, dtype=np.float32), SHARES[0]), *usual[1:]]
        assert not np.isfinite(memory.decode(broken, SHARES, rates)).any()
    np.testing.assert_allclose(memory.decode(usual, SHARES, rates), before, rtol=1e-5)


@pytest.mark.parametrize("options", [{"follow": 0.0}, {"follow": 1.1}, {"least_rate": -0.1}, {"follow": float("nan")}])
def test_values_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(PlanError, match="expected follow in"):
        ControlVariates(3, NUMEL, **options)
