"""The exact allocator against exhaustive search and the dynamic program; what the heuristics keep to."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike

from torch_qgc.errors import PlanError
from torch_qgc.planner import allocate_bits, quantization_variance
from torch_qgc.planner import bits as bits_module
from torch_qgc.planner.bits import Method

METHODS: tuple[Method, ...] = ("exact", "dp", "low_complexity", "greedy", "relaxation", "equal")


def total(table: np.ndarray, bits: np.ndarray) -> float:
    return float(table[np.arange(len(table)), bits].sum())


def paper_table(p: np.ndarray, max_bits: int, *, allow_drop: bool = False) -> np.ndarray:
    q = quantization_variance(np.arange(2, max_bits + 1), 512, bound="paper")
    closed = np.full((len(p), 2), -np.inf)
    if allow_drop:
        closed[:, 0] = 0.0
    return np.concatenate([closed, (1 - p[:, None]) / (p[:, None] + q)], axis=1)


def brute_force(table: np.ndarray, budget: int, most_bits: np.ndarray | None = None) -> float:
    caps = np.full(len(table), table.shape[1]) if most_bits is None else most_bits
    choices = itertools.product(*(range(min(table.shape[1], int(cap) + 1)) for cap in caps))
    return max(total(table, np.array(bits)) for bits in choices if sum(bits) <= budget)


@st.composite
def tables(draw: st.DrawFn, max_workers: int, max_columns: int) -> tuple[np.ndarray, int]:
    """Random tables of every kind the planner makes, and worse: ties, holes, falling and convex rows."""
    k, columns = draw(st.integers(1, max_workers)), draw(st.integers(1, max_columns))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["noise", "ties", "steps", "twins", "sigmoid", "convex"]))
    if kind == "noise":
        table = rng.normal(size=(k, columns))
    elif kind == "ties":
        table = rng.integers(0, 4, size=(k, columns)).astype(float)
    elif kind == "steps":
        table = np.cumsum(rng.integers(0, 3, size=(k, columns)), axis=1).astype(float)
    elif kind == "twins":
        table = np.repeat(np.cumsum(rng.random((1, columns)), axis=1), k, axis=0)
    elif kind == "convex":
        table = np.cumsum(np.sort(rng.random((k, columns)), axis=1), axis=1)
    else:
        table = paper_table(rng.uniform(0, 0.9, k), columns + 1, allow_drop=bool(rng.integers(2)))
    if draw(st.booleans()):
        table = np.where(rng.random(table.shape) < 0.2, -np.inf, table)
    shut = np.isneginf(table).all(axis=1)
    table[shut, rng.integers(table.shape[1])] = 0.0
    least = int(np.argmax(table > -np.inf, axis=1).sum())
    budget = draw(st.integers(least, max(least, k * table.shape[1] + 1)))
    return table, budget


@settings(max_examples=150)
@given(tables(max_workers=4, max_columns=5))
def test_exact_and_dp_equal_exhaustive_search(case: tuple[np.ndarray, int]) -> None:
    table, budget = case
    best = brute_force(table, budget)
    for method in ("exact", "dp"):
        bits = allocate_bits(table, budget, method)
        assert bits.sum() <= budget
        assert total(table, bits) == pytest.approx(best, rel=1e-12, abs=1e-12)


@settings(max_examples=150)
@given(tables(max_workers=4, max_columns=5), st.integers(0, 2**32 - 1))
def test_exact_and_dp_equal_exhaustive_search_under_caps(case: tuple[np.ndarray, int], seed: int) -> None:
    table, budget = case
    least = np.argmax(table > -np.inf, axis=1)
    caps = least + np.random.default_rng(seed).integers(0, 5, len(table))
    best = brute_force(table, budget, caps)
    for method in METHODS:
        bits = allocate_bits(table, budget, method, most_bits=caps)
        assert bits.sum() <= budget
        assert np.all(bits <= caps)
        if method in ("exact", "dp"):
            assert total(table, bits) == pytest.approx(best, rel=1e-12, abs=1e-12)


def test_what_caps_leave_of_the_budget_is_not_spent() -> None:
    table = paper_table(np.array([0.1, 0.2, 0.3]), 8)
    assert allocate_bits(table, 24, most_bits=[8, 3, 2]).tolist() == [8, 3, 2]
    assert allocate_bits(table, 12, most_bits=4).tolist() == [4, 4, 4]
    np.testing.assert_array_equal(allocate_bits(table, 12, most_bits=np.inf), allocate_bits(table, 12))


@settings(max_examples=600)
@given(tables(max_workers=24, max_columns=12))
def test_exact_equals_the_dynamic_program(case: tuple[np.ndarray, int]) -> None:
    table, budget = case
    exact, dp = (allocate_bits(table, budget, method) for method in ("exact", "dp"))
    assert exact.sum() <= budget
    assert total(table, exact) == pytest.approx(total(table, dp), rel=1e-11, abs=1e-12)


@settings(max_examples=60)
@given(tables(max_workers=8, max_columns=8))
def test_no_heuristic_beats_the_optimum_or_breaks_the_budget(case: tuple[np.ndarray, int]) -> None:
    table, budget = case
    best = total(table, allocate_bits(table, budget))
    for method in METHODS:
        bits = allocate_bits(table, budget, method)
        assert bits.dtype == np.int64
        assert bits.sum() <= budget
        assert np.isfinite(total(table, bits))
        assert total(table, bits) <= best + 1e-9 * max(1.0, abs(best))


def test_low_complexity_is_near_the_optimum_where_the_other_heuristics_are_not() -> None:
    """The paper's Fig. 1: shifted-exponential workers, the quantizer of eq. (5)."""
    rng = np.random.default_rng(1)
    worst = dict.fromkeys(METHODS, 1.0)
    for _ in range(10):
        table = paper_table(np.exp(-rng.uniform(0.5, 3.0, 20)), 16)
        for budget in (50, 80, 120):
            best = total(table, allocate_bits(table, budget))
            for method in METHODS:
                ratio = total(table, allocate_bits(table, budget, method)) / best
                worst[method] = min(worst[method], ratio)
    assert worst["low_complexity"] > 0.99
    assert worst["greedy"] < 0.9
    assert worst["equal"] < 0.9


def test_more_budget_never_hurts_and_unused_bits_stay_unused() -> None:
    table = paper_table(np.array([0.05, 0.2, 0.5]), 8)
    values = [total(table, allocate_bits(table, budget)) for budget in range(6, 40)]
    assert np.all(np.diff(values) >= 0)
    assert allocate_bits(table, 1000).tolist() == [8, 8, 8]
    flat = np.array([[0.0, 1.0, 1.0, 1.0]])
    assert allocate_bits(flat, 3).tolist() == [1]


def dual_bound(table: np.ndarray, budget: int) -> tuple[float, float]:
    """Return the least of sum_k max_b (U_k(b) - price b) + price * budget, which no way to spend the budget exceeds.

    And its price. The bound is convex in it, and its slope there is the budget less the bits that are asked for.
    """
    columns = np.arange(table.shape[1])
    low, high = 0.0, float(np.diff(table[:, np.isfinite(table).all(axis=0)], axis=1).max())
    for _ in range(40):
        price = (low + high) / 2
        reduced = table - price * columns
        low, high = (price, high) if reduced.argmax(axis=1).sum() > budget else (low, price)
    return float((table - high * columns).max(axis=1).sum() + high * budget), high


@pytest.mark.parametrize("shape", ["paper", "twins", "rough"])
def test_exact_settles_only_the_last_bits_of_100_000_workers(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work on what is left does not grow with the workers, and its worth is all that the dual bound is above."""
    rng = np.random.default_rng(0)
    k, m = 100_000, 32
    if shape == "paper":
        table = paper_table(rng.uniform(0.01, 0.6, k), m)
    elif shape == "twins":
        table = np.repeat(paper_table(np.array([0.2]), m), k, axis=0)
    else:
        table = np.cumsum(rng.random((k, m + 1)) ** 8, axis=1)
    moves = [0]
    settle = bits_module._cheapest_moves
    monkeypatch.setattr(
        bits_module, "_cheapest_moves", lambda worker, *rest: moves.append(len(worker)) or settle(worker, *rest)
    )
    budget = 4 * k + 7
    bits = allocate_bits(table, budget)
    assert bits.sum() == budget
    assert max(moves) <= 2 * m * (2 * m - 1)  # at most 2 m - 1 workers for every number of bits to give or take
    bound, price = dual_bound(table, budget)
    rounding = 1e-12 * bound
    assert bound - m * price - rounding <= total(table, bits) <= bound + rounding


def test_exact_settles_the_last_bits_among_many_workers() -> None:
    """Convex rows: the relaxation leaves a remainder for one worker, and it must be the right one."""
    rng = np.random.default_rng(3)
    table = np.cumsum(np.sort(rng.random((300, 9)), axis=1), axis=1)
    for budget in range(800, 812):
        exact, dp = (allocate_bits(table, budget, method) for method in ("exact", "dp"))
        assert total(table, exact) == pytest.approx(total(table, dp), rel=1e-12)


@pytest.mark.parametrize(
    ("table", "budget", "message"),
    [
        ([[-np.inf, -np.inf, 1.0]] * 3, 5, "at least 6"),
        ([[0.0, np.nan]], 1, "worker 0 at 1 bits"),
        ([[0.0, 1.0], [0.0, np.inf]], 1, "worker 1 at 1 bits"),
        ([[0.0, 1.0], [-np.inf, -np.inf]], 1, "worker 1 has none"),
        ([0.0, 1.0], 1, "shape"),
        ([[0.0, 1.0]], -1, "at least 0"),
    ],
)
def test_bad_tables_and_budgets_are_refused(table: list[list[float]], budget: int, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        allocate_bits(np.array(table), budget)


@pytest.mark.parametrize(
    ("most_bits", "message"), [([3, 1], "worker 1 has none; .*raise most_bits"), ([3, 3, 3], "shape"), (np.nan, "nan")]
)
def test_caps_that_leave_nothing_are_refused(most_bits: ArrayLike, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        allocate_bits(paper_table(np.array([0.1, 0.2]), 8), 12, most_bits=most_bits)


def test_an_unknown_method_is_refused_by_name() -> None:
    with pytest.raises(PlanError, match="expected one of exact, dp"):
        allocate_bits(np.zeros((2, 3)), 2, "magic")  # type: ignore[arg-type]
