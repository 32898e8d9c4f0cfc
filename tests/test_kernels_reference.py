"""The codec's definition: golden vectors, wire size, unbiasedness, exact variance, independence of draws."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from torch_qgc.kernels import BLOCK, Encoded, decode_sum, derive_key, encode, payload_bytes, reference
from torch_qgc.kernels.format import _splitmix64

GOLDEN = {
    ("max", 2): "94eb86a08fb003a9",
    ("max", 4): "1e0b842b7e703803",
    ("max", 9): "73f97269eda42d57",
    ("l2", 2): "4e3fe1a67f3f84f2",
    ("l2", 4): "082526b58e9a84ce",
    ("l2", 9): "a5452c2a89bc5cc8",
}
SIZES = (0, 1, 511, 512, 513, 2000)


def gaussian(numel: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


def decoded(encoded: Encoded, coefficient: float = 1.0) -> torch.Tensor:
    out = torch.zeros(encoded.numel)
    decode_sum([encoded], [coefficient], out)
    return out


def exact_variance(values: torch.Tensor, scale: torch.Tensor, bits: int) -> float:
    """Sum the variances of ideal stochastic rounding in float64: (s/L)^2 f (1 - f); s^2 - v^2 at one bit."""
    v = torch.nn.functional.pad(values.double(), (0, -len(values) % BLOCK)).view(-1, BLOCK)
    s = scale.double().view(-1, 1)
    if bits == 1:
        return float((s.square() - v.square()).view(-1)[: len(values)].sum())
    levels = 2 ** (bits - 1) - 1
    f = (v.abs() * levels / s).frac()
    return float(((s / levels).square() * f * (1 - f)).sum())


def test_keys_follow_splitmix64() -> None:
    assert _splitmix64(0) == 0xE220A8397B1DCDAF
    assert derive_key(1, 2, 3) == (0x9DCE88A7, 0x12588D80)
    assert derive_key(-1, 0, 0) == derive_key(2**64 - 1, 0, 0)


@pytest.mark.parametrize(("norm", "bits"), list(GOLDEN))
def test_payloads_of_format_version_1_never_change(norm: str, bits: int) -> None:
    values = ((37 * torch.arange(1000)) % 101 - 50).float() / 16
    encoded = encode(values, bits, key=derive_key(1, 2, 3), norm=norm)  # type: ignore[arg-type]
    assert hashlib.sha256(encoded.to_buffer()).hexdigest()[:16] == GOLDEN[norm, bits]


@pytest.mark.parametrize("bits", [*range(1, 17), 32])
@pytest.mark.parametrize("numel", SIZES)
def test_a_payload_has_b_bits_per_coordinate_and_one_scale_per_block(numel: int, bits: int) -> None:
    encoded = encode(gaussian(numel), bits, key=(1, 2))
    wire = encoded.to_buffer()
    assert wire.nbytes == payload_bytes(numel, bits)
    if bits == 32:
        assert wire.nbytes == 4 * numel
    else:
        assert 8 * wire.nbytes == math.ceil(numel / BLOCK) * (32 + BLOCK * bits)


@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=1100),
    st.integers(1, 16),
    st.sampled_from(["max", "l2"]),
    st.integers(0, 2**32 - 1),
)
@example([torch.finfo(torch.float32).max], 6, "max", 0)
@settings(max_examples=60, deadline=None)
def test_decoding_lands_on_a_neighbouring_level(values: list[float], bits: int, norm: str, word: int) -> None:
    v = torch.tensor(values, dtype=torch.float32)
    encoded = encode(v, bits, key=(word, 7), norm=norm)  # type: ignore[arg-type]
    error = (decoded(encoded).double() - v.double()).abs()
    scale = encoded.scales.double().repeat_interleave(BLOCK)[: len(v)]
    step = 2 * scale if bits == 1 else scale / (2 ** (bits - 1) - 1)
    beyond = scale.isnan()  # an L2 norm beyond fp32
    last = scale == torch.finfo(torch.float32).max  # L (s / L) may round up, which leaves fp32
    # 2^-90: what is sent as zero; 2^-15 steps: the fixed point; 1e-6: fp32 roundings of the result
    bound = torch.maximum(step * (1 + 2**-15) + 1e-6 * scale, torch.tensor(2.0**-90))
    assert bool((error <= bound)[~(beyond | last)].all())
    assert norm == "l2" or not beyond.any()


@pytest.mark.parametrize("norm", ["max", "l2"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8, 12])
def test_decoding_is_unbiased_with_the_stated_variance(bits: int, norm: str) -> None:
    values, draws = gaussian(1000, seed=bits), 400
    mean = torch.zeros(1000, dtype=torch.float64)
    errors = torch.zeros(draws, dtype=torch.float64)
    for draw in range(draws):
        encoded = encode(values, bits, key=derive_key(0, draw, 0), norm=norm)  # type: ignore[arg-type]
        error = decoded(encoded).double() - values.double()
        mean += error / draws
        errors[draw] = error.square().sum()
    assert encoded.variance == pytest.approx(exact_variance(values, encoded.scales, bits), rel=2e-3)
    assert abs(float(errors.mean()) - encoded.variance) < 4 * float(errors.std()) / math.sqrt(draws)
    # sum over coordinates of mean^2: expectation variance / draws, deviation below sqrt(2 / 1000) of it times
    # the spread of the coordinates' variances, hence the factor
    assert float(mean.square().sum()) < 1.5 * encoded.variance / draws
    assert abs(float(mean.sum())) < 4 * math.sqrt(encoded.variance / draws)


def test_statistics_hold_for_real_coordinates_only() -> None:
    for numel in (1, 511, 513):
        for bits in (1, 2, 4, 9):
            values = gaussian(numel, seed=bits)
            encoded = encode(values, bits, key=(3, 4))
            expected = exact_variance(values, encoded.scales, bits)
            assert encoded.variance == pytest.approx(expected, rel=2e-3, abs=1e-3 * expected + 1e-4)
            assert encoded.squared_norm == pytest.approx(float(values.double().square().sum()), rel=1e-5)


def test_draws_do_not_depend_on_how_the_gradient_is_cut() -> None:
    values, key = gaussian(6 * BLOCK + 17), derive_key(1, 2, 3)
    whole = decoded(encode(values, 4, key=key))
    for cut in (BLOCK, 2 * BLOCK, 5 * BLOCK):
        head = decoded(encode(values[:cut], 4, key=key))
        tail = decoded(encode(values[cut:], 4, key=key, offset=cut))
        assert torch.equal(whole, torch.cat([head, tail]))


def test_dither_is_uniform_and_independent_across_coordinates_steps_and_workers() -> None:
    blocks = 512
    size = blocks * BLOCK
    streams = [
        reference.dither(derive_key(0, step, worker), 0, blocks).view(-1).double() / 65536 - 0.5
        for step, worker in ((0, 0), (1, 0), (0, 1), (1, 1))
    ]
    for u in streams:
        assert abs(float(u.mean())) < 4 * math.sqrt(1 / 12 / size)
        assert abs(float(u.square().mean()) - 1 / 12) < 4 * math.sqrt(1 / 180 / size)
    base = streams[0] * math.sqrt(12)
    correlations = [float((base[lag:] * base[:-lag]).mean()) for lag in (1, 2, 15, 16, 17, 255, 256, 257, 512)]
    correlations += [float((base * other * math.sqrt(12)).mean()) for other in streams[1:]]
    # 12 correlations at once: 5 standard errors
    assert max(map(abs, correlations)) < 5 / math.sqrt(size)


@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("bits", [1, 2, 4, 16])
def test_a_block_that_is_not_finite_decodes_to_nan_and_the_others_are_unharmed(bits: int, poison: float) -> None:
    values = gaussian(3 * BLOCK)
    clean = decoded(encode(values, bits, key=(1, 2)))
    values[BLOCK + 5] = poison
    encoded = encode(values, bits, key=(1, 2))
    out = decoded(encoded).view(3, BLOCK)
    assert bool(out[1].isnan().all())
    assert torch.equal(out[[0, 2]], clean.view(3, BLOCK)[[0, 2]])
    assert math.isnan(encoded.variance)
    assert math.isnan(encoded.squared_norm)


@pytest.mark.parametrize("bits", [1, 2, 4, 16, 32])
def test_zeros_are_exact_and_cost_nothing(bits: int) -> None:
    encoded = encode(torch.zeros(700), bits, key=(1, 2))
    assert torch.equal(decoded(encoded), torch.zeros(700))
    assert encoded.variance == encoded.squared_norm == 0


def test_pass_through_is_exact() -> None:
    values = gaussian(700)
    encoded = encode(values, 32, key=(1, 2))
    assert torch.equal(decoded(encoded), values)
    assert encoded.variance == 0
    assert encoded.squared_norm == pytest.approx(float(values.double().square().sum()))
    assert torch.equal(decode_half := decoded(encode(values.half(), 32, key=(1, 2))), values.half().float())
    assert decode_half.dtype == torch.float32


def test_terms_are_added_in_payload_order_with_one_rounding_each() -> None:
    values = gaussian(600)
    payloads = [encode(values, bits, key=derive_key(0, 0, bits)) for bits in (4, 32, 2, 1, 9)]
    coefficients = [0.3, -1.7, 0.01, 3.0, 0.9]
    out = gaussian(600, seed=1)
    expected = out.clone()
    for payload, c in zip(payloads, coefficients):
        expected += decoded(payload, c)
    decode_sum(payloads, coefficients, out)
    assert torch.equal(out, expected)


def test_overwriting_equals_adding_to_zeros() -> None:
    payloads = [encode(gaussian(600, seed=k), bits, key=(1, k)) for k, bits in enumerate((2, 4, 32, 9))]
    coefficients = [0.1, -1.0, 2.0, 0.0]
    overwritten, added = torch.full((600,), torch.nan), torch.zeros(600)
    decode_sum(payloads, coefficients, overwritten, accumulate=False)
    decode_sum(payloads, coefficients, added)
    assert torch.equal(overwritten, added)
