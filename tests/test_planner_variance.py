"""Variance bounds against vectors, and running estimates against a quantizer written out here."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_qgc.errors import PlanError
from torch_qgc.planner import make_plan, quantization_variance
from torch_qgc.planner.variance import Bound, NoiseRatio, Norm, RunningVariance, sign_variance


def exact_variance(v: np.ndarray, bits: int, norm: Norm) -> float:
    """Variance of stochastic rounding of one block: (s / L)^2 sum f (1 - f)."""
    levels = 2 ** (bits - 1) - 1
    scale = np.abs(v).max() if norm == "max" else np.linalg.norm(v)
    y = levels * np.abs(v) / scale
    fraction = y - np.floor(y)
    return float((scale / levels) ** 2 * np.sum(fraction * (1 - fraction)))


@given(st.integers(2, 8), st.integers(1, 64), st.sampled_from(["max", "l2"]), st.integers(0, 2**32 - 1))
@settings(max_examples=200)
def test_no_vector_exceeds_the_tight_bound(bits: int, size: int, norm: Norm, seed: int) -> None:
    rng = np.random.default_rng(seed)
    v = rng.normal(size=size) * rng.choice([0.01, 1.0, 5.0], size=size)
    bound = quantization_variance(bits, size, norm=norm, bound="tight")
    rounding = 1e-13 * (v @ v)  # of the fractions, where the bound is 0
    assert exact_variance(v, bits, norm) <= bound * (v @ v) * (1 + 1e-9) + rounding


@pytest.mark.parametrize("bits", [2, 3, 5])
def test_the_tight_bounds_are_attained(bits: int) -> None:
    d, levels = 64, 2 ** (bits - 1) - 1
    if levels <= np.sqrt(d) / 2:
        equal = np.ones(d)
        q = exact_variance(equal, bits, "l2") / d
        assert q == pytest.approx(float(quantization_variance(bits, d, norm="l2", bound="tight")))
    # Max norm: one coordinate at the scale, the rest equal; the best height is found numerically.
    heights = np.linspace(1e-3, 1 / levels, 20_000)
    y = heights * levels
    ratios = (d - 1) * y * (1 - y) / levels**2 / (1 + (d - 1) * heights**2)
    tight = quantization_variance(bits, d, norm="max", bound="tight")
    assert ratios.max() == pytest.approx(float(tight), rel=1e-6)


@pytest.mark.parametrize("norm", ["max", "l2"])
def test_typical_variance_is_that_of_gaussian_blocks(norm: Norm) -> None:
    rng = np.random.default_rng(0)
    for size in (64, 512, 2048):
        blocks = rng.normal(size=(300, size))
        for bits in (5, 6, 8):
            measured = np.mean([exact_variance(v, bits, norm) / (v @ v) for v in blocks])
            typical = quantization_variance(bits, size, norm=norm)
            if norm == "l2" and 2 ** (bits - 1) - 1 < np.sqrt(size):
                continue  # few coordinates reach the first level: D / (6 L^2) is far off
            assert measured == pytest.approx(float(typical), rel=0.12)


@pytest.mark.parametrize("bound", ["typical", "tight", "paper"])
@pytest.mark.parametrize("norm", ["max", "l2"])
@pytest.mark.parametrize("block_size", [1, 2, 512, 10**7])
def test_more_bits_are_never_noisier(bound: Bound, norm: Norm, block_size: int) -> None:
    q = quantization_variance(np.arange(33), block_size, norm=norm, bound=bound)
    assert np.all(np.isinf(q[:2]))
    assert np.all(np.isfinite(q[2:]))
    assert np.all(np.diff(q[2:]) <= 0)
    assert q[32] == 0.0
    assert np.all(q <= quantization_variance(np.arange(33), block_size, norm="l2", bound="paper") * (1 + 1e-12))


@pytest.mark.parametrize("norm", ["max", "l2"])
def test_typical_is_never_above_tight(norm: Norm) -> None:
    for block_size in (1, 3, 100, 512, 10**6):
        typical, tight = (
            quantization_variance(np.arange(2, 33), block_size, norm=norm, bound=bound)
            for bound in ("typical", "tight")
        )
        assert np.all(typical <= tight)


@pytest.mark.parametrize(
    "arguments",
    [
        {"bits": 33, "block_size": 512},
        {"bits": -1, "block_size": 512},
        {"bits": 2.5, "block_size": 512},
        {"bits": float("nan"), "block_size": 512},
        {"bits": 4, "block_size": 0},
        {"bits": 4, "block_size": 512, "norm": "l1"},
        {"bits": 4, "block_size": 512, "bound": "loose"},
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, object]) -> None:
    with pytest.raises(PlanError, match="expected"):
        quantization_variance(**arguments)  # type: ignore[arg-type]


def test_measured_variance_converges_and_extrapolates() -> None:
    """Laplace gradients are noisier than the Gaussian model; 4 bits measured must carry over to 6."""
    rng = np.random.default_rng(0)
    running = RunningVariance(2, memory=200.0)
    for _ in range(300):
        v = rng.laplace(size=512) * rng.exponential()
        running.update(1, 4, exact_variance(v, 4, "max"), float(v @ v))
    table = running.table(max_bits=8)
    blocks = rng.laplace(size=(400, 512))

    def measured(bits: int) -> float:
        lost = sum(exact_variance(v, bits, "max") for v in blocks)
        return lost / float(np.sum(blocks**2))

    np.testing.assert_array_equal(table[0], quantization_variance(np.arange(9), 512))
    assert table[1, 4] == pytest.approx(measured(4), rel=0.1)
    assert table[1, 6] == pytest.approx(measured(6), rel=0.2)
    assert table[1, 6] > 1.2 * table[0, 6]
    assert np.all(np.isinf(table[:, :2]))
    plan = make_plan([0.1, 0.1], max_bits=8, variance=table, noise_ratio=0.0)
    assert plan.variance[1] == table[1, plan.bits[1]]


def test_rounds_count_by_their_energy() -> None:
    running = RunningVariance(1, memory=1e9)
    running.update(0, 3, lost=2.0, energy=1.0)
    running.update(0, 3, lost=10.0, energy=99.0)
    assert running.table(4)[0, 3] == pytest.approx(12 / 100)


@pytest.mark.parametrize(("lost", "energy"), [(np.nan, 1.0), (np.inf, np.inf), (0.0, 0.0), (1.0, np.nan)])
def test_gradients_that_overflowed_or_vanished_are_passed_over(lost: float, energy: float) -> None:
    running = RunningVariance(1)
    running.update(0, 4, 0.02, 1.0)
    before = running.table(8)
    running.update(0, 4, lost, energy)
    np.testing.assert_array_equal(running.table(8), before)


@pytest.mark.parametrize("eta", [0.2, 2.0])
def test_noise_ratio_is_recovered_from_what_the_aggregator_sees(eta: float) -> None:
    rng = np.random.default_rng(1)
    k, dim = 5, 400
    noise = NoiseRatio(k, memory=1e9)
    mean = rng.normal(size=dim)
    scale = np.sqrt(eta * np.array([1.0, 1.0, 1.0, 2.0, 2.0]) * float(mean @ mean) / dim)
    for _ in range(400):
        h = mean + scale[:, None] * rng.normal(size=(k, dim))
        decoded = h + 0.3 * rng.normal(size=(k, dim))  # an unbiased quantizer
        coefficients = np.where(rng.random(k) < 0.8, rng.uniform(0.1, 0.5, k), 0.0)
        result = coefficients @ decoded
        noise.update(coefficients, np.sum(h**2, axis=1), np.sum(decoded**2, axis=1), float(result @ result))
    expected = eta * np.array([1.0, 1.0, 1.0, 2.0, 2.0])
    np.testing.assert_allclose(noise.ratios(), expected, rtol=0.1)


def test_noise_ratio_is_that_of_a_mean_batch_whatever_batches_there_were() -> None:
    """Batches differ between workers and change on the way; the ratio at unit batch stays, and at B it is 1/B of it."""
    rng = np.random.default_rng(2)
    k, dim, eta = 4, 400, np.array([1.0, 1.0, 1.0, 2.5])
    noise, unaware = NoiseRatio(k, memory=1e9), NoiseRatio(k, memory=1e9)
    mean = rng.normal(size=dim)
    for round_ in range(600):
        batches = np.array([0.25, 0.5, 1.25, 2.0]) if round_ % 3 else np.array([2.0, 1.0, 0.5, 0.5])
        scale = np.sqrt(eta / batches * float(mean @ mean) / dim)
        h = mean + scale[:, None] * rng.normal(size=(k, dim))
        decoded = h + 0.3 * rng.normal(size=(k, dim))
        coefficients = np.where(rng.random(k) < 0.8, batches / 4.0, 0.0)
        result = coefficients @ decoded
        energies = np.sum(h**2, axis=1), np.sum(decoded**2, axis=1), float(result @ result)
        noise.update(coefficients, *energies, batches)
        unaware.update(coefficients, *energies)
    np.testing.assert_allclose(noise.ratios(), eta, rtol=0.1)
    np.testing.assert_allclose(noise.ratios(batches=[0.1, 1.0, 2.0, 4.0]), noise.ratios() / [0.1, 1.0, 2.0, 4.0])
    assert np.abs(unaware.ratios() / eta - 1.0).max() > 0.5


def test_noise_of_a_payload_follows_from_the_ratio_at_its_batch_and_the_measured_variance() -> None:
    """v = q (1 + eta / B) + eta / B is E||Q(h) - g||^2 / ||g||^2 also for q measured on that worker's own batches."""
    rng = np.random.default_rng(3)
    bits, eta, batches = 4, 1.5, np.array([0.25, 4.0])
    running, levels = RunningVariance(2, memory=1e9), 2**3 - 1
    gradient = rng.laplace(size=512)
    lost = np.zeros(2)
    for _ in range(1500):
        for k, batch in enumerate(batches):
            h = gradient + np.sqrt(eta / batch * np.mean(gradient**2)) * rng.normal(size=512)
            scale = np.abs(h).max()
            sent = np.sign(h) * np.floor(levels * np.abs(h) / scale + rng.random(512)) * scale / levels
            running.update(k, bits, exact_variance(h, bits, "max"), float(h @ h))
            lost[k] += float(np.sum((sent - gradient) ** 2) / np.sum(gradient**2)) / 1500
    q = running.table(bits)[:, bits]
    np.testing.assert_allclose(q * (1.0 + eta / batches) + eta / batches, lost, rtol=0.02)
    assert lost[1] < lost[0] / 8


def test_noise_ratio_without_signal_or_partner() -> None:
    noise = NoiseRatio(3, ceiling=50.0)
    alone = np.array([0.5, 0.0, 0.0])
    noise.update(alone, np.ones(3), np.ones(3), 0.25)
    np.testing.assert_array_equal(noise.ratios(default=0.7), [0.7, 0.7, 0.7])
    opposed = np.array([0.5, 0.5, 0.0])  # Q(h_1) = -Q(h_2): the estimated signal is negative
    noise.update(opposed, np.ones(3), np.ones(3), 0.0)
    np.testing.assert_array_equal(noise.ratios(default=0.7), [50.0, 50.0, 0.7])
    before = noise.ratios()
    noise.update(opposed, np.full(3, np.inf), np.ones(3), 1.0)
    np.testing.assert_array_equal(noise.ratios(), before)


def test_one_bit_is_as_noisy_as_its_closed_form() -> None:
    """E||s sign - v||^2 = D s^2 - ||v||^2 for P(+) = (1 + v_i / s) / 2, summed over coordinates."""
    rng = np.random.default_rng(0)
    blocks = rng.standard_normal((2000, 512))
    for norm, scale in (("max", np.abs(blocks).max(axis=1)), ("l2", np.linalg.norm(blocks, axis=1))):
        up = (1 + blocks / scale[:, None]) / 2
        s = scale[:, None]
        lost = np.sum(up * (s - blocks) ** 2 + (1 - up) * (s + blocks) ** 2)
        q = sign_variance(512, norm=norm)  # type: ignore[arg-type]
        assert lost / np.sum(blocks**2) == pytest.approx(q, rel=0.02)
        assert q <= sign_variance(512, norm=norm, bound="tight") == 511  # type: ignore[arg-type]
    assert sign_variance(1) == 0.0
