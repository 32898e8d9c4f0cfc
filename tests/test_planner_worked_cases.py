"""Worked cases computed in exact rational or 50-digit arithmetic, independent of this implementation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from torch_qgc import planner
from torch_qgc.planner import cadence, deadline, delays, make_plan

CASES: dict[str, Any] = {
    case["id"]: case for case in json.loads((Path(__file__).parent / "worked_cases.json").read_text())["cases"]
}


def of_kind(kind: str) -> pytest.MarkDecorator:
    cases = [case for case in CASES.values() if case["kind"] == kind]
    assert cases
    return pytest.mark.parametrize("case", cases, ids=[case["id"] for case in cases])


def paper_variance(bits: Any, block_size: int) -> np.ndarray:
    return planner.quantization_variance(bits, block_size, bound="paper")


def utility_table(case: dict[str, Any]) -> np.ndarray:
    given = case["inputs"]
    p = np.array(given["p"])[:, None]
    least, most = given.get("bmin", 2), given["bmax"]
    if "q" in given:
        q = np.array(given["q"])
    else:
        # 32 bits are pass-through for us; the cases quantize there, too, which no optimum reaches.
        q = np.tile(paper_variance(np.arange(least, most + 1), given["D"]), (len(p), 1))
    table = np.full((len(p), most + 1), -np.inf)
    table[:, least:] = (1 - p) / (p + q)
    return table


@of_kind("q_table")
def test_variance_equals_the_closed_forms(case: dict[str, Any]) -> None:
    bits, d = case["inputs"]["b"], case["inputs"]["D"]
    expected = case["expected"]
    quantized = np.array(bits) < 32
    for got, name in (
        (paper_variance(bits, d), "paper"),
        (planner.quantization_variance(bits, d, norm="l2", bound="tight"), "tight_l2"),
        (planner.quantization_variance(bits, d, norm="max", bound="tight"), "tight_max"),
    ):
        np.testing.assert_allclose(got[quantized], np.array(expected[name])[quantized], rtol=case["tol"])
        assert np.all(got[~quantized] == 0.0)


@of_kind("code")
def test_code_is_theorem_1_in_segments(case: dict[str, Any]) -> None:
    given, expected, tol = case["inputs"], case["expected"], case["tol"]
    p, n = np.array(given["p"]), given["N"]
    q = paper_variance(given["bits"], given["D"])
    shares = planner.optimal_shares(p, q)
    weights = planner.segment_weights(shares, n)
    np.testing.assert_allclose(q, expected["q"], rtol=tol)
    np.testing.assert_allclose(n * shares, expected["row_sums"], rtol=tol)
    np.testing.assert_allclose(weights, expected["A"], atol=tol)
    assert planner.load(weights) == pytest.approx(expected["load"], abs=tol)
    plan = planner.Plan(straggle_probs=p, bits=np.array(given["bits"]), shares=shares, weights=weights, variance=q)
    assert plan.residual_bound == pytest.approx(expected["residual_over_CN2"], rel=tol)
    np.testing.assert_allclose(n * plan.coefficients(np.ones(len(p), bool)), expected["d"], rtol=tol)
    rows = [plan.partition_probabilities(k) for k in range(len(p))]
    np.testing.assert_allclose(rows, expected["E"], atol=tol)


@pytest.mark.parametrize("method", ["exact", "dp"])
@of_kind("allocate")
def test_allocation_is_optimal(case: dict[str, Any], method: planner.bits.Method) -> None:
    table, expected = utility_table(case), case["expected"]
    bits = planner.allocate_bits(table, case["inputs"]["B"], method)
    total = table[np.arange(len(bits)), bits].sum()
    assert total == pytest.approx(expected["sum_U"], rel=case["tol"])
    assert 1 / total == pytest.approx(expected["residual_over_CN2"], rel=case["tol"])
    assert bits.tolist() in expected["optimal_bits_any_of"]


@pytest.mark.parametrize("method", ["exact", "dp"])
@of_kind("allocate_drop")
def test_allocation_with_drops_is_optimal(case: dict[str, Any], method: planner.bits.Method) -> None:
    table = utility_table(case)
    table[:, 0] = 0.0
    bits = planner.allocate_bits(table, case["inputs"]["B"], method)
    total = table[np.arange(len(bits)), bits].sum()
    assert total == pytest.approx(case["expected"]["sum_U"], rel=case["tol"])
    assert bits.tolist() == case["expected"]["an_optimal_bits"]


@pytest.mark.parametrize("method", ["exact", "dp"])
@of_kind("allocate_table")
def test_allocation_over_measured_tables_is_optimal(case: dict[str, Any], method: planner.bits.Method) -> None:
    table = utility_table(case)
    bits = planner.allocate_bits(table, case["inputs"]["B"], method)
    total = table[np.arange(len(bits)), bits].sum()
    assert total == pytest.approx(case["expected"]["sum_U"], rel=case["tol"])
    assert bits.tolist() in case["expected"]["optimal_bits_any_of"]


@of_kind("two_track")
def test_second_moment_decoder_of_an_optimal_code_is_a_uniform_shrink(case: dict[str, Any]) -> None:
    given, expected, tol = case["inputs"], case["expected"], case["tol"]
    p, n = np.array(given["p"]), given["N"]
    q = paper_variance(given["bits"], given["D"])
    shares = planner.optimal_shares(p, q)
    encode = np.asarray(planner.segment_weights(shares, n)) / (n * shares)[:, None]
    decoder = planner.second_moment_decoder(encode, p, q, alpha=given["alpha"], model=given["model"])
    np.testing.assert_allclose(decoder, expected["d_tilde"], rtol=tol)
    np.testing.assert_allclose(decoder / (n * shares / (1 - p)), expected["uniform_shrink"], rtol=tol)


@of_kind("two_track_explicit")
def test_second_moment_decoder_of_any_code(case: dict[str, Any]) -> None:
    given, expected, tol = case["inputs"], case["expected"], case["tol"]
    p, q, encode = (np.array(given[name], dtype=float) for name in ("p", "q", "E"))
    d = planner.second_moment_decoder(encode, p, q, alpha=given["alpha"], model=given["model"])
    np.testing.assert_allclose(d, expected["d_tilde"], rtol=tol)
    bias2 = np.sum((((1 - p)[:, None] * encode).T @ d - 1) ** 2)
    variance = np.sum(d**2 * (1 - p) * (p + q) * encode.sum(axis=1) ** 2)
    assert given["alpha"] * bias2 + variance == pytest.approx(expected["objective"], rel=tol)


@of_kind("row_cap")
def test_capped_shares_are_water_filled(case: dict[str, Any]) -> None:
    given, expected, tol = case["inputs"], case["expected"], case["tol"]
    n, p = given["N"], np.array(given["p"])
    q = paper_variance(given["bits"], given["D"])
    shares = planner.optimal_shares(p, q, max_share=given["l_max"] / n)
    np.testing.assert_allclose(n * shares, expected["row_sums"], rtol=tol)
    residual = np.sum((p + q) / (1 - p) * shares**2)
    assert residual == pytest.approx(expected["residual_over_CN2"], rel=tol)


@of_kind("component_load")
def test_components_are_found_and_the_segment_code_attains_their_load(case: dict[str, Any]) -> None:
    given, expected = case["inputs"], case["expected"]
    n = given["N"]
    groups = planner.split_components(given["row_sums"], n)
    assert [[workers.tolist(), count] for workers, count in groups] == expected["components"]
    weights = planner.segment_weights(np.array(given["row_sums"]) / n, n)
    assert np.count_nonzero(weights) == expected["min_edges"]
    assert planner.load(weights) == pytest.approx(expected["load"], abs=case["tol"])


@of_kind("delay")
def test_straggle_probability_of_shifted_exponentials(case: dict[str, Any]) -> None:
    given = case["inputs"]
    p = planner.delays.straggle_probability(
        mu=given["mu"], shift=given["shift"], load=given["load"], deadline=given["T"]
    )
    np.testing.assert_allclose(p, case["expected"]["p"], rtol=case["tol"])


@of_kind("fit_shifted_exp")
def test_censored_fit(case: dict[str, Any]) -> None:
    given, expected, tol = case["inputs"], case["expected"], case["tol"]
    fit = delays.fit_shifted_exponential(given["delays"], given["censored_at"])
    likeliest = delays.fit_shifted_exponential(given["delays"], given["censored_at"], corrected=False)
    np.testing.assert_allclose([fit.mu, fit.shift], [expected["mu"], expected["shift"]], rtol=tol)
    np.testing.assert_allclose([likeliest.mu, likeliest.shift], [expected["mu_mle"], expected["shift_mle"]], rtol=tol)


@of_kind("deadline")
def test_deadline_minimises_time_to_accuracy(case: dict[str, Any]) -> None:
    given, expected, tol = case["inputs"], case["expected"], case["tol"]
    model = delays.ShiftedExponential(mu=np.array(given["mu"]), shift=np.array(given["shift"]))
    choice = deadline.choose_deadline(
        cadence.IndependentRounds(model, closes_early=False),
        lambda p: make_plan(p, bits_per_coordinate=32, noise_ratio=given["q"]),  # v = q
        beta=given["beta"],
        overhead_s=given["t0"],
        search_s=tuple(given["T_range"]),
        slack=0.0,
        grid=240,
    )
    assert choice.objective == pytest.approx(expected["J"], rel=tol)
    assert choice.deadline_s == pytest.approx(expected["T"], rel=1e-4)
    assert choice.residual == pytest.approx(expected["rho"], rel=1e-4)
    np.testing.assert_allclose(choice.straggle_probs, expected["p"], rtol=1e-4)


def test_typical_variance_is_above_the_exact_one_of_no_vector_and_below_the_worst() -> None:
    """The quantizer case: its exact variance is under the supremum of its norm."""
    case = CASES["quant-var-0"]
    v = np.array(case["inputs"]["v"])
    bits = case["inputs"]["bits"]
    y = np.abs(v) * case["expected"]["L"] / np.linalg.norm(v)
    fraction = y - np.floor(y)
    exact = np.sum(fraction * (1 - fraction)) * (np.linalg.norm(v) / case["expected"]["L"]) ** 2
    assert exact == pytest.approx(case["expected"]["variance"], rel=case["tol"])
    assert exact / (v @ v) <= planner.quantization_variance(bits, len(v), norm="l2", bound="tight")
