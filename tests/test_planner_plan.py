"""Plans: what make_plan promises, decode coefficients by Monte Carlo, identity, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, sparse

from torch_qgc.ddp.settings import choose_plan
from torch_qgc.errors import PlanError
from torch_qgc.planner import Plan, PlanOptions, make_plan, quantization_variance
from torch_qgc.planner.shares import error_factors

REFERENCE = [0.05, 0.08, 0.12, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5]


# ------------------------------------------------------------------------------------------ design
@pytest.mark.parametrize(
    ("options", "load", "residual"),
    [({}, 1.9, 0.02746), ({"allow_drop": True}, 1.4, 0.02248)],
)
def test_reference_plans_of_the_paper_model(options: dict[str, Any], load: float, residual: float) -> None:
    """Ten workers, 40 bits, D / (4 L^2): values from an exhaustive evaluation of all arrival patterns."""
    plan = make_plan(REFERENCE, bit_budget=40, variance="paper", noise_ratio=0.0, **options)
    assert plan.residual_bound == pytest.approx(residual, rel=2e-4)
    assert plan.load == pytest.approx(load)
    assert plan.bits.sum() <= 40


@pytest.mark.parametrize("seed", range(5))
def test_joint_design_beats_every_other_allocation(seed: int) -> None:
    """Proposition 1: over all allocations of a small budget, with the best shares for each."""
    rng = np.random.default_rng(seed)
    p, eta = rng.uniform(0, 0.6, 3), rng.uniform(0, 0.5, 3)
    q = quantization_variance(np.arange(9), 512)
    plan = make_plan(p, bit_budget=13, max_bits=8, noise_ratio=eta)
    best = np.inf
    for a in range(2, 9):
        for b in range(2, 9):
            c = min(13 - a - b, 8)
            if c >= 2:
                v = q[[a, b, c]] * (1 + eta) + eta
                best = min(best, 1 / np.sum((1 - p) / (p + v)))
    assert plan.residual_bound == pytest.approx(best, rel=1e-9)


@settings(max_examples=80)
@given(
    st.integers(1, 12),
    st.floats(2.0, 20.0),
    st.integers(1, 30),
    st.integers(0, 2**32 - 1),
    st.fixed_dictionaries(
        {},
        optional={
            "norm": st.sampled_from(["max", "l2"]),
            "variance": st.sampled_from(["typical", "tight", "paper"]),
            "noise_ratio": st.floats(0, 10),
            "gamma": st.sampled_from([0.0, 0.1, 3.0]),
            "allow_drop": st.booleans(),
            "decoder": st.sampled_from(["unbiased", "annealed", "hajek", "ridge", "uncorrected"]),
            "second_track": st.sampled_from([None, "ridge", "hajek", "lmmse"]),
        },
    ),
)
def test_every_plan_keeps_its_budget_and_is_balanced(
    k: int, mean_bits: float, n: int, seed: int, options: dict[str, Any]
) -> None:
    p = np.random.default_rng(seed).uniform(0, 0.95, k)
    plan = make_plan(p, bits_per_coordinate=mean_bits, num_partitions=n, **options)
    weights = np.asarray(plan.weights)
    assert plan.bits.sum() <= int(k * mean_bits + 1e-9)
    np.testing.assert_allclose(weights.sum(axis=0), 1.0, atol=1e-9)
    np.testing.assert_allclose(weights.sum(axis=1), n * plan.shares, atol=1e-9)
    assert Plan.from_json(plan.to_json()) == plan
    coefficients = plan.coefficients(np.ones(k, dtype=bool))
    assert np.all(np.isfinite(coefficients))
    assert np.all(coefficients[plan.shares == 0] == 0)


def test_noise_moves_shares_towards_the_chance_to_arrive() -> None:
    p = np.array([0.05, 0.3, 0.6])
    shares = [make_plan(p, noise_ratio=eta).shares for eta in (0.0, 1.0, 1e6)]
    assert shares[0][0] > shares[1][0] > shares[2][0]
    np.testing.assert_allclose(shares[2], (1 - p) / np.sum(1 - p), rtol=1e-5)


def test_32_bits_per_coordinate_means_no_quantization() -> None:
    plan = make_plan(REFERENCE, bits_per_coordinate=32, noise_ratio=0.0)
    assert plan.bits.tolist() == [32] * 10
    assert not plan.variance.any()
    p = np.array(REFERENCE)
    assert plan.residual_bound == pytest.approx(1 / np.sum((1 - p) / p))


def test_a_job_without_a_plan_has_that_of_make_plan() -> None:
    assert choose_plan(None, 4, None, 4) == make_plan([0.05] * 4, decoder="annealed")
    assert make_plan([0.1, 0.3]) == make_plan([0.1, 0.3], noise_ratio=1.0, second_track="hajek")
    for decoder in ("uncorrected", "unbiased"):
        make_plan([0.1, 0.3], decoder=decoder).check_trainable()


def test_the_default_is_four_bits() -> None:
    plan = make_plan(REFERENCE)
    assert plan == make_plan(REFERENCE, bits_per_coordinate=4) == make_plan(REFERENCE, bit_budget=40)


@pytest.mark.parametrize(("workers", "mean", "budget"), [(100, 2.29, 229), (10, 4.1, 41), (3, 2.5, 7)])
def test_budget_is_the_floor_of_workers_times_mean_bits(workers: int, mean: float, budget: int) -> None:
    assert make_plan(np.full(workers, 0.1), bits_per_coordinate=mean).bit_budget == budget


def test_a_worker_that_never_arrives_gets_neither_data_nor_bits() -> None:
    plan = make_plan([0.1, 1.0, 0.2], bit_budget=9)
    assert plan.bits[1] == 0
    assert plan.shares[1] == 0
    assert plan.bits.sum() == 9
    assert plan.coefficients(np.array([True, True, True]))[1] == 0
    assert plan.partition_probabilities(1).tolist() == [0, 0, 0]


@pytest.mark.parametrize("seed", range(5))
def test_joint_design_with_batches_and_caps_beats_every_other_allocation(seed: int) -> None:
    """Proposition 1 with v = q (1 + eta / B) + eta / B, over all allocations that the links carry."""
    rng = np.random.default_rng(seed)
    p, eta, batches = rng.uniform(0, 0.6, 3), float(rng.uniform(0, 3)), rng.uniform(0.2, 4, 3)
    batches /= batches.mean()
    caps = rng.integers(2, 9, 3)
    q = quantization_variance(np.arange(9), 512)
    plan = make_plan(p, bit_budget=13, max_bits=8, noise_ratio=eta, batches=batches, most_bits=caps)
    best = np.inf
    for bits in itertools.product(*(range(2, cap + 1) for cap in caps)):
        if sum(bits) <= 13:
            v = q[list(bits)] * (1 + eta / batches) + eta / batches
            best = min(best, 1 / np.sum((1 - p) / (p + v)))
    assert plan.residual_bound == pytest.approx(best, rel=1e-9)
    assert np.all(plan.bits <= caps)
    np.testing.assert_array_equal(plan.batches, batches)


@pytest.mark.parametrize("bits", [4, 8, 32])
def test_noisy_batches_get_shares_by_the_samples_that_arrive(bits: float) -> None:
    """The limit is (1 - p_k) B_k / (1 + q_k): quantization noise makes a sample worth 1 / (1 + q) of one."""
    p, batches = np.array([0.05, 0.3, 0.6]), np.array([1.5, 1.2, 0.3])
    plan = make_plan(p, noise_ratio=1e6, batches=batches, bits_per_coordinate=bits)
    worth = (1 - p) * batches / (1 + quantization_variance(plan.bits))
    np.testing.assert_allclose(plan.shares, worth / worth.sum(), rtol=1e-5)


def test_data_that_cannot_move_keeps_its_shares_whatever_the_batches() -> None:
    fixed: dict[str, Any] = {"placement": np.eye(3), "partition_sizes": [5, 3, 2]}
    equal, unequal = (make_plan([0.1] * 3, batches=b, **fixed) for b in (None, [2.5, 0.25, 0.25]))
    np.testing.assert_allclose(unequal.shares, [0.5, 0.3, 0.2])
    np.testing.assert_allclose(equal.shares, unequal.shares)
    assert unequal.residual_bound > equal.residual_bound  # its small batches are noisy


def test_a_narrow_link_sends_few_bits_where_the_others_send_plain_fp32() -> None:
    plan = make_plan([0.1] * 3, bits_per_coordinate=32, most_bits=[32, 20, 3])
    assert plan.bits.tolist() == [32, 16, 3]
    assert plan.variance[0] == 1.0 < plan.variance[1] < plan.variance[2]
    assert make_plan([0.1] * 3, bits_per_coordinate=8, most_bits=[16, 3, 2]).bits.tolist() == [16, 3, 2]


def test_a_measured_table_decides_the_bits() -> None:
    """A worker whose gradient compresses well needs fewer bits than its equally reliable peer."""
    easy, hard = np.full(9, np.inf), np.full(9, np.inf)
    easy[2:] = 0.01 * 4.0 ** -np.arange(7)
    hard[2:] = 20.0 * 4.0 ** -np.arange(7)
    plan = make_plan([0.2, 0.2], bit_budget=10, max_bits=8, variance=np.stack([easy, hard]))
    assert plan.bits[0] < plan.bits[1]


def test_a_tolerance_saves_copies_of_the_data_at_a_small_price() -> None:
    exact = make_plan(REFERENCE, num_partitions=20)
    coarse = make_plan(REFERENCE, num_partitions=20, tolerance=0.2)
    assert coarse.load < exact.load
    assert exact.residual_bound <= coarse.residual_bound < exact.residual_bound * 1.02


@pytest.mark.parametrize("seed", range(4))
def test_placed_plans_are_within_a_tenth_of_the_best_of_all_allocations(seed: int) -> None:
    """Exhaustive over allocations, each with its best code: alternation may stop short, but only a little."""
    rng = np.random.default_rng(seed)
    p = rng.uniform(0.05, 0.5, 3)
    holds = rng.random((3, 4)) < 0.5
    holds[rng.integers(3, size=4), np.arange(4)] = True
    options: dict[str, Any] = {"placement": holds, "max_bits": 6, "partition_sizes": rng.uniform(0.5, 2, 4)}
    plan = make_plan(p, bit_budget=11, **options)
    assert not np.asarray(plan.weights)[~holds].any()
    np.testing.assert_allclose(plan.weights.sum(axis=0) / 4, plan.partition_fractions, rtol=1e-12)
    q = quantization_variance(np.arange(7), 512)
    errors = []
    for bits in np.ndindex(5, 5, 5):
        b = np.array(bits) + 2
        if b.sum() <= 11:
            fixed = make_plan(p, bit_budget=18, variance=_only(b, q), **options)
            errors.append(fixed.residual_bound)
    assert min(errors) * (1 - 1e-9) <= plan.residual_bound <= 1.1 * min(errors)


def _only(bits: np.ndarray, q: np.ndarray) -> np.ndarray:
    """A table in which worker k is as noisy at every number of bits as it is at bits[k]."""
    table = np.tile(q[bits][:, None], (1, 7))
    table[:, :2] = np.inf
    return table


def test_plans_for_100_000_workers_are_sparse() -> None:
    plan = make_plan(np.random.default_rng(0).uniform(0.01, 0.5, 100_000))
    assert isinstance(plan.weights, sparse.csr_array)
    assert plan.load < 2
    assert plan.partition_probabilities(17).sum() == pytest.approx(1.0)


# ----------------------------------------------------------------------------------------- decoding
def rounds(rng: np.random.Generator, p: np.ndarray, count: int) -> np.ndarray:
    return rng.random((count, len(p))) >= p


def test_decoding_is_unbiased_when_workers_are_late() -> None:
    """Partition gradients differ; samples, arrivals and quantizer are drawn: 4 standard errors."""
    rng = np.random.default_rng(0)
    p = np.array([0.05, 0.3, 0.6, 0.2])
    sizes = np.array([1.0, 3.0, 2.0, 2.0, 0.5])
    plan = make_plan(p, partition_sizes=sizes)
    gradients = rng.normal(size=5)
    true = float(plan.partition_fractions @ gradients)
    decoded = np.empty(40_000)
    chances = [plan.partition_probabilities(k) for k in range(4)]
    drawn = np.stack([rng.choice(5, size=len(decoded), p=c) for c in chances], axis=1)
    sent = gradients[drawn] + rng.choice([-0.5, 0.5], size=drawn.shape)
    for i, arrived in enumerate(rounds(rng, p, len(decoded))):
        decoded[i] = plan.coefficients(arrived) @ sent[i]
    error = decoded.std() / np.sqrt(len(decoded))
    assert abs(decoded.mean() - true) < 4 * error


def test_the_residual_bound_is_the_error_when_all_gradients_are_equal() -> None:
    rng = np.random.default_rng(1)
    plan = make_plan([0.1, 0.4, 0.7], bits_per_coordinate=3)
    count = 60_000
    arrived = rounds(rng, plan.straggle_probs, count)
    noisy = 1.0 + np.sqrt(plan.variance) * rng.choice([-1.0, 1.0], size=arrived.shape)
    decoded = np.array([plan.coefficients(a) @ s for a, s in zip(arrived, noisy)])
    squares = (decoded - 1.0) ** 2
    assert abs(squares.mean() - plan.residual_bound) < 4 * squares.std() / np.sqrt(count)


def test_folded_payloads_with_measured_rates_stay_unbiased() -> None:
    """A worker may contribute twice in a round; with m / r for each contribution the sum is m on average."""
    rng = np.random.default_rng(2)
    plan = make_plan([0.1, 0.2, 0.5])
    rates = np.array([0.9, 0.8, 1.3])
    counts = rng.poisson(rates, size=(40_000, 3))
    totals = np.array([plan.coefficients(c, rates=rates) * c for c in counts])
    error = totals.std(axis=0) / np.sqrt(len(totals))
    assert np.all(np.abs(totals.mean(axis=0) - plan.shares) < 4 * error)


def test_hajek_weights_sum_to_one_whatever_arrives() -> None:
    plan = make_plan([0.1, 0.2, 0.5, 0.3], decoder="hajek", second_track="hajek")
    for counts in np.ndindex(3, 3, 3, 3):
        c = np.array(counts)
        coefficients = plan.coefficients(c)
        second = plan.second_coefficients(c, rates=np.array([1.0, 0.5, 0.5, 0.2]))
        assert second is not None
        assert coefficients @ c == pytest.approx(float(c.any()))
        assert second @ c == pytest.approx(float(c.any()))


def test_uncorrected_decoding_ignores_stragglers() -> None:
    plan = make_plan([0.1, 0.2, 0.5], decoder="uncorrected")
    np.testing.assert_array_equal(
        plan.coefficients(np.array([1, 0, 2]), rates=np.array([0.1, 0.1, 0.1])), plan.shares * [1, 0, 1]
    )


def test_ridge_is_the_uniform_shrink_with_the_least_weighted_error() -> None:
    plan = make_plan(REFERENCE, decoder="ridge", second_track_alpha=0.3)
    unbiased = make_plan(REFERENCE)
    everybody = np.ones(10, dtype=bool)
    shrink = plan.coefficients(everybody) / unbiased.coefficients(everybody)
    r = unbiased.residual_bound
    best = optimize.minimize_scalar(lambda c: 0.3 * (1 - c) ** 2 + c**2 * r, bounds=(0, 1), method="bounded")
    np.testing.assert_allclose(shrink, best.x, rtol=1e-5)


@pytest.mark.parametrize("correlation", [0.0, 0.6, 1.0])
def test_lmmse_weights_minimise_the_error_given_the_arrivals(correlation: float) -> None:
    p = np.array([0.1, 0.2, 0.4, 0.3])
    plan = make_plan(p, second_track="lmmse", gradient_correlation=correlation, bits_per_coordinate=3)
    counts = np.array([1, 0, 2, 1])
    rows = np.stack([plan.partition_probabilities(k) for k in range(4)])
    gram = (1 - correlation) * np.eye(4) + correlation

    def error(each: np.ndarray) -> float:
        weights = np.zeros(4)
        weights[counts > 0] = each * counts[counts > 0]
        miss = weights @ rows - plan.partition_fractions
        energy = np.einsum("kn,nm,km->k", rows, gram, rows)
        noise = np.divide(weights**2, counts, out=np.zeros(4), where=counts > 0)
        return float(miss @ gram @ miss + np.sum(plan.variance * energy * noise))

    got = plan.second_coefficients(counts)
    assert got is not None
    assert got[1] == 0
    best = optimize.minimize(error, np.full(3, 0.3), method="BFGS", options={"gtol": 1e-10}).fun
    assert error(got[counts > 0]) == pytest.approx(best, rel=1e-8, abs=1e-10)


def test_nobody_arriving_decodes_to_zero_with_every_rule() -> None:
    nobody = np.zeros(3, dtype=bool)
    for decoder in ("unbiased", "annealed", "hajek", "ridge", "uncorrected"):
        assert not make_plan([0.1, 0.2, 0.3], decoder=decoder).coefficients(nobody).any()
    for second in ("ridge", "hajek", "lmmse"):
        coefficients = make_plan([0.1, 0.2, 0.3], second_track=second).second_coefficients(nobody)
        assert coefficients is not None
        assert not coefficients.any()
    assert make_plan([0.1, 0.2, 0.3], second_track=None).second_coefficients(nobody) is None


def test_a_rate_of_zero_gives_coefficient_zero() -> None:
    plan = make_plan([0.1, 0.2, 0.3])
    assert plan.coefficients(np.ones(3, bool), rates=np.array([0.9, 0.0, 0.7]))[1] == 0.0


# ----------------------------------------------------------------------------------------- identity
def variants() -> list[Plan]:
    return [
        make_plan(REFERENCE),
        make_plan([0.1, 1.0, 0.3], second_track="lmmse", decoder="hajek"),
        make_plan([0.3, 0.1], bits_per_coordinate=32, partition_sizes=[3, 1, 1]),
        make_plan(REFERENCE, allow_drop=True, norm="l2"),
        make_plan([0.1, 0.1, 0.6], batches=[1.3, 1.3, 0.4], most_bits=[16, 4, 2]),
        make_plan(np.linspace(0.01, 0.5, 3000), num_partitions=3000),
    ]


@pytest.mark.parametrize("plan", variants(), ids=lambda plan: f"K{plan.num_workers}-{plan.decoder}")
def test_plans_survive_json_pickle_and_copies(plan: Plan) -> None:
    text = plan.to_json()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    for other in (Plan.from_json(text), Plan.from_json(text.encode()), copy.deepcopy(plan)):
        assert other == plan
        assert hash(other) == hash(plan)
        assert other.to_json() == text
        assert other.digest() == plan.digest()
        assert type(other.weights) is type(plan.weights)
    again = pickle.loads(pickle.dumps(plan))
    np.testing.assert_array_equal(again.bits, plan.bits)
    np.testing.assert_array_equal(again.variance, plan.variance)
    np.testing.assert_array_equal(again.batches, plan.batches)


def test_sparse_and_dense_weights_make_the_same_plan() -> None:
    plan = make_plan(REFERENCE)
    assert dataclasses.replace(plan, weights=sparse.csr_array(plan.weights)) == plan


def test_plans_that_differ_have_different_digests() -> None:
    plan = make_plan(REFERENCE)
    others = [
        dataclasses.replace(plan, decoder="hajek"),
        dataclasses.replace(plan, norm="l2"),
        make_plan([*REFERENCE[:-1], 0.51]),
    ]
    assert len({plan.digest(), *(other.digest() for other in others)}) == 4
    assert plan != "plan"


def test_arrays_of_a_plan_cannot_be_changed() -> None:
    p = np.array(REFERENCE)
    plan = make_plan(p)
    p[0] = 0.9
    assert plan.straggle_probs[0] == 0.05
    for name in ("straggle_probs", "bits", "shares", "weights", "variance"):
        with pytest.raises(ValueError, match="read-only"):
            getattr(plan, name)[0] = 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.bits = plan.bits  # type: ignore[misc]


def test_repr_is_a_table_of_workers() -> None:
    lines = repr(make_plan([0.1, 0.4], second_track="ridge")).splitlines()
    assert lines[0].startswith("Plan(2 workers, 2 partitions, 8 of 8 bits per coordinate, max norm, unbiased")
    assert "second track ridge" in lines[0]
    assert len(lines) == 4
    assert "batch" not in lines[1]
    unequal = repr(make_plan([0.1, 0.4], batches=[1.5, 0.5])).splitlines()
    assert unequal[1].split() == ["worker", "late", "bits", "batch", "share", "coefficient"]
    assert unequal[3].split()[3] == "0.5"
    assert "and 84 more" in repr(make_plan(np.full(100, 0.1)))


# ---------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("p", "options", "message"),
    [
        ([0.1, 1.5], {}, "got 1.5 for worker 1"),
        ([0.1, -0.1], {}, "got -0.1 for worker 1"),
        ([np.nan], {}, "got nan for worker 0"),
        ([], {}, "shape"),
        ([1.0, 1.0], {}, "extend the deadline"),
        ([0.1, 0.2], {"bits_per_coordinate": 1.5}, "at least 4, the least bits of all 2 workers, got 3"),
        ([0.1, 0.2], {"bit_budget": 3}, "raise the budget"),
        ([0.1, 0.2], {"bit_budget": 8, "bits_per_coordinate": 4}, "got both"),
        ([0.1, 0.2], {"bits_per_coordinate": 33}, r"in \(0, 32\]"),
        ([0.1, 0.2], {"bits_per_coordinate": float("nan")}, r"in \(0, 32\]"),
        ([0.1, 0.2], {"num_partitions": 0}, "num_partitions"),
        ([0.1, 0.2], {"num_partitions": 3, "partition_sizes": [1, 2]}, "one number of partitions"),
        ([0.1, 0.2], {"nrom": "l2"}, "did you mean 'norm'"),
        ([0.1, 0.2], {"norm": "l1"}, "'max' or 'l2'"),
        ([0.1, 0.2], {"variance": "wishful"}, "'typical', 'tight' or 'paper'"),
        ([0.1, 0.2], {"variance": np.zeros((2, 5))}, r"\[2, 17\]"),
        ([0.1, 0.2], {"variance": np.full((2, 17), np.nan)}, "negative one or NaN"),
        ([0.1, 0.2], {"noise_ratio": -1.0}, "noise_ratio"),
        ([0.1, 0.2], {"batches": [0.5, 0.5]}, "divide them by their mean"),
        ([0.1, 0.2], {"batches": [2.0, 0.0]}, "batches"),
        ([0.1, 0.2], {"batches": [1.0, 1.0, 1.0]}, "batches"),
        ([0.1, 0.2], {"most_bits": [4, 1]}, "a later deadline"),
        ([0.1, 0.2], {"most_bits": [4, 3], "min_bits": 4}, "at least 4 bits, .*, got 3 for worker 1"),
        ([0.1, 0.2], {"gamma": "balanced"}, "gamma"),
        ([0.1, 0.2], {"gamma": np.inf}, "gamma"),
        ([0.1, 0.2], {"min_bits": 1}, "one bit is the sign"),
        ([0.1, 0.2], {"max_bits": 24}, "the codec has no more than 16; to send plain fp32"),
        ([0.1, 0.2], {"allocator": "magic"}, "method"),
        ([0.1, 0.2], {"decoder": "best"}, "decoder"),
        ([0.1, 0.2], {"second_track": "unbiased"}, "second_track"),
        ([0.1, 0.2], {"second_track_alpha": 0.0}, "second_track_alpha"),
        ([0.1, 0.2], {"second_track_alpha": np.inf}, "second_track_alpha"),
        ([0.1, 0.2], {"second_track": "ridge", "second_track_alpha": 1e-20}, "shrinks gradients to"),
        ([0.1, 0.2], {"gradient_correlation": 1.5}, "gradient_correlation"),
        ([0.1, 0.2], {"max_share": 0.3}, "max_share"),
        ([0.1, 0.2], {"max_share": 0.7, "tolerance": 0.1}, "expected 0 with max_share"),
        ([0.1, 0.2], {"partition_sizes": [1, 2], "tolerance": 0.1}, "expected 0 with partition_sizes"),
        ([0.1, 0.2], {"placement": [[1, 0]]}, r"\[2, N\]"),
        ([0.1, 0.2], {"placement": [[1, 0, 0], [1, 0, 1]]}, "partition 1"),
        ([0.1, 0.2], {"block_size": 256}, "expected an option out of"),
    ],
)
def test_bad_input_is_refused_with_what_was_expected(p: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make_plan(p, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": np.array([4.0, 4.0])}, "integers"),
        ({"bits": np.array([4, 24])}, "0 .. 16, or 32 for plain fp32, got 24 for worker 1"),
        ({"bit_budget": 8.0}, "bit_budget"),
        ({"bit_budget": 7}, "at most 7"),
        ({"shares": np.array([0.6, 0.6])}, "sum 1"),
        ({"shares": np.array([0.4, 0.6])}, "row of worker"),
        ({"weights": np.array([[1.0, 0.1], [0.0, 0.9]])}, "off by"),
        ({"weights": np.array([[2.0, -1.0], [-1.0, 2.0]])}, "entries >= 0"),
        ({"weights": np.ones((3, 2))}, r"\[2, N\]"),
        ({"partition_sizes": np.array([1.0, 2.0])}, "column of partition"),
        ({"straggle_probs": np.array([0.1, 1.0])}, "data would be missing"),
        ({"variance": np.array([0.1, np.inf])}, "data would be missing"),
        ({"variance": np.array([0.1, -1.0])}, "variance"),
    ],
)
def test_an_inconsistent_plan_cannot_be_built(change: dict[str, Any], message: str) -> None:
    plan = make_plan([0.1, 0.1])
    with pytest.raises(PlanError, match=message):
        dataclasses.replace(plan, **change)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null", '{"format":0}', '{"format":3}', b"\xff"])
def test_text_that_is_no_plan_is_refused(text: str | bytes) -> None:
    with pytest.raises(PlanError, match="plan: expected JSON"):
        Plan.from_json(text)


def test_wrong_shapes_of_a_round_are_refused() -> None:
    plan = make_plan([0.1, 0.1])
    with pytest.raises(PlanError, match="arrived"):
        plan.coefficients(np.ones(3, dtype=bool))
    with pytest.raises(PlanError, match="rates"):
        plan.coefficients(np.ones(2, dtype=bool), rates=np.ones(3))


def test_options_can_be_shared_between_plans() -> None:
    options = PlanOptions(norm="l2", decoder="hajek")
    assert make_plan(REFERENCE, options=options) == make_plan(REFERENCE, norm="l2", decoder="hajek")
    assert make_plan(REFERENCE, options=options, norm="max").norm == "max"


def test_error_factors_of_perfect_workers_are_finite() -> None:
    assert np.isfinite(error_factors(np.array([0.0]), np.array([0.0]))).all()


@pytest.mark.parametrize(
    "change",
    [
        {"weights": {"columns": 2, "starts": [0, 1, 2], "partitions": [0, 7], "values": [1.0, 1.0]}},
        {"weights": {"columns": 2, "starts": [0, 1, 2], "partitions": [0, -7], "values": [1.0, 1.0]}},
        {"weights": {"columns": 2, "starts": [0, 9, 2], "partitions": [0, 1], "values": [1.0, 1.0]}},
        {"weights": {"columns": 2, "starts": [0, 1, 9], "partitions": [0, 1], "values": [1.0, 1.0]}},
        {"weights": {"columns": 10**15, "starts": [0, 1, 2], "partitions": [0, 1], "values": [1.0, 1.0]}},
        {"weights": {"columns": 1, "starts": [0, 10**30, 2], "partitions": [0, 1], "values": [1.0, 1.0]}},
        {"weights": []},
        {"weights": {"columns": "2", "starts": [], "partitions": [], "values": []}},
        {"bit_budget": "many"},
        {"bit_budget": float("inf")},
        {"partition_sizes": [1.0, float("inf")], "decoder": "uncorrected"},
        {"norm": None},
        {"decoder": ["unbiased"]},
        {"shares": 3},
        {"shares": [[0.5], [0.5]]},
        {"bits": [4, 4.5]},
        {"bits": [4, 10**40]},
        {"variance": [{}, {}]},
        {"partition_sizes": [1.0, -1.0]},
        {"second_track_alpha": []},
        {"gradient_correlation": "x"},
    ],
    ids=str,
)
def test_json_that_is_not_a_plan_is_refused_and_nothing_else_happens(change: dict[str, Any]) -> None:
    """A plan comes over the network: columns beyond the last once wrote past the end of an array."""
    values = json.loads(make_plan([0.1, 0.1]).to_json())
    with pytest.raises(PlanError):
        Plan.from_json(json.dumps({**values, **change}))


def test_nesting_without_end_is_refused() -> None:
    with pytest.raises(PlanError):
        Plan.from_json("[" * 200_000)
