"""Shares, segment weights, components and placements against general solvers and optimality conditions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, sparse

from torch_qgc.errors import PlanError
from torch_qgc.planner import (
    load,
    optimal_shares,
    placed_weights,
    segment_weights,
    split_components,
)
from torch_qgc.planner.shares import error_factors


@st.composite
def workers(draw: st.DrawFn, most: int = 12) -> tuple[np.ndarray, np.ndarray]:
    k = draw(st.integers(1, most))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return rng.uniform(0.01, 0.9, k), rng.choice([0.0, 0.1, 1.0, 20.0], k) * rng.random(k)


def quadratic_optimum(delta: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
    """Minimise sum delta m^2 over lower <= m <= upper, sum m = 1, by bisection on the multiplier."""

    def excess(level: float) -> float:
        return float(np.clip(level / delta, lower, upper).sum()) - 1.0

    level = optimize.brentq(excess, 0.0, 2.0 * delta.max(), xtol=1e-16, rtol=1e-15)
    return np.clip(level / delta, lower, upper)


@given(workers())
@settings(max_examples=60)
def test_shares_are_the_optimum_of_a_general_solver(case: tuple[np.ndarray, np.ndarray]) -> None:
    p, v = case
    delta = error_factors(p, v)
    shares = optimal_shares(p, v)
    error = float(np.sum(delta * shares**2))
    found = optimize.minimize(
        lambda m: np.sum(delta * m**2) / error,
        np.full(len(p), 1 / len(p)),
        jac=lambda m: 2 * delta * m / error,
        bounds=[(0, 1)] * len(p),
        constraints={"type": "eq", "fun": lambda m: m.sum() - 1, "jac": lambda m: np.ones_like(m)},
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 500},
    )
    assert shares.sum() == pytest.approx(1.0, abs=1e-12)
    assert error <= found.fun * error * (1 + 1e-9)  # at least as good as what the solver reached
    np.testing.assert_allclose(delta * shares, error, rtol=1e-9)  # KKT: equal marginal cost, which is 1/S
    assert error == pytest.approx(1 / np.sum(1 / delta), rel=1e-12)


@given(workers(), st.floats(1.0, 3.0))
@settings(max_examples=100)
def test_capped_shares_are_the_optimum(case: tuple[np.ndarray, np.ndarray], room: float) -> None:
    p, v = case
    caps = np.random.default_rng(len(p)).uniform(0.5, 1.5, len(p))
    caps *= room / caps.sum()
    shares = optimal_shares(p, v, max_share=caps)
    best = quadratic_optimum(error_factors(p, v), np.zeros(len(p)), caps * (1 + 1e-13))
    np.testing.assert_allclose(shares, best, atol=1e-9)
    assert np.all(shares <= caps * (1 + 1e-9))


def test_workers_that_never_arrive_or_send_nothing_get_no_data() -> None:
    shares = optimal_shares([0.1, 1.0, 0.2, 0.3], [0.5, 0.0, np.inf, 0.5])
    assert shares[1] == shares[2] == 0.0
    assert shares.sum() == pytest.approx(1.0)
    perfect = optimal_shares([0.0, 0.0, 0.5], 0.0)
    np.testing.assert_allclose(perfect, [0.5, 0.5, 0.0], atol=1e-8)


@pytest.mark.parametrize(
    ("p", "v", "options", "message"),
    [
        ([0.1, 1.2], 0.0, {}, "got 1.2 for worker 1"),
        ([0.1, -0.1], 0.0, {}, "got -0.1 for worker 1"),
        ([0.1, np.nan], 0.0, {}, "got nan for worker 1"),
        ([], 0.0, {}, "shape"),
        ([[0.1]], 0.0, {}, "shape"),
        (["a"], 0.0, {}, "expected numbers"),
        ([1.0, 1.0], 0.0, {}, "certain to be late"),
        ([0.1, 0.2], [0.1], {}, r"shape \[2\]"),
        ([0.1, 0.2], [0.1, -1.0], {}, "got -1.0 for worker 1"),
        ([0.1, 0.2], 0.1, {"max_share": 0.4}, "raise max_share"),
    ],
)
def test_bad_probabilities_variances_and_caps_are_refused(
    p: object, v: object, options: dict[str, float], message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        optimal_shares(p, v, **options)  # type: ignore[arg-type]


@given(workers(most=30), st.integers(1, 40), st.booleans())
@settings(max_examples=150)
def test_segment_weights_have_the_sums_that_make_decoding_unbiased(
    case: tuple[np.ndarray, np.ndarray], n: int, unequal: bool
) -> None:
    p, v = case
    shares = optimal_shares(p, v)
    sizes = np.random.default_rng(n).uniform(0.1, 5.0, n) if unequal else np.ones(n)
    weights = np.asarray(segment_weights(shares, n, partition_sizes=sizes))
    assert np.all(weights >= 0)
    np.testing.assert_allclose(weights.sum(axis=1), n * shares, atol=1e-11 * n)
    np.testing.assert_allclose(weights.sum(axis=0), n * sizes / sizes.sum(), atol=1e-11 * n)
    assert np.count_nonzero(weights) <= n + len(p) - 1
    assert load(weights) * n <= n + len(p) - 1 + 1e-9


def test_segment_weights_of_many_workers_are_sparse() -> None:
    rng = np.random.default_rng(0)
    shares = rng.random(20_000)
    shares /= shares.sum()
    weights = segment_weights(shares, 20_000)
    assert isinstance(weights, sparse.csr_array)
    assert weights.nnz <= 2 * 20_000 - 1
    np.testing.assert_allclose(weights.sum(axis=0), 1.0, atol=1e-9)
    np.testing.assert_allclose(weights.sum(axis=1), 20_000 * shares, atol=1e-9)


def test_equal_shares_hold_one_partition_each() -> None:
    weights = np.asarray(segment_weights(np.full(7, 1 / 7), 7))
    np.testing.assert_array_equal(weights > 0, np.eye(7, dtype=bool))  # no slivers from rounding
    np.testing.assert_allclose(weights, np.eye(7), atol=1e-14)


@pytest.mark.parametrize("size", [5, 12, 40])
def test_components_pay_the_stated_price_and_save_the_stated_load(size: int) -> None:
    rng = np.random.default_rng(size)
    n = 3 * size
    utility = rng.uniform(0.2, 5.0, size)
    least = 1 / utility.sum()
    loads = []
    for tolerance in (0.0, 0.05, 0.3):
        groups = split_components(utility, n, tolerance=tolerance)
        together = np.sort(np.concatenate([group for group, _ in groups]))
        np.testing.assert_array_equal(together, np.arange(size))
        assert sum(count for _, count in groups) == n
        assert all(count >= 1 for _, count in groups)
        price = sum((count / n) ** 2 / utility[group].sum() for group, count in groups)
        shares = np.zeros(size)
        for group, count in groups:
            shares[group] = count / n * utility[group] / utility[group].sum()
        assert np.sum(shares**2 / utility) == pytest.approx(price, rel=1e-12)
        assert price >= least * (1 - 1e-12)
        if tolerance == 0.0:
            assert price == pytest.approx(least, rel=1e-8)
        loads.append((size + n - len(groups)) / n)
    assert loads[2] < loads[0]


@given(st.integers(2, 9), st.integers(1, 9), st.floats(0.15, 1.0), st.integers(0, 2**32 - 1), st.booleans())
@settings(max_examples=150)
def test_placed_weights_satisfy_the_optimality_conditions(
    k: int, n: int, density: float, seed: int, unequal: bool
) -> None:
    """The problem is convex: KKT conditions prove the optimum. Data lies with cheapest holders only."""
    rng = np.random.default_rng(seed)
    holds = rng.random((k, n)) < density
    holds[rng.integers(k, size=n), np.arange(n)] = True
    p, v = rng.uniform(0.01, 0.8, k), rng.uniform(0, 2, k)
    sizes = rng.uniform(0.2, 3.0, n) if unequal else np.ones(n)
    weights = placed_weights(p, v, holds, partition_sizes=sizes)
    np.testing.assert_allclose(weights.sum(axis=0), n * sizes / sizes.sum(), rtol=1e-12)
    assert np.all(weights >= 0)
    assert not weights[~holds].any()
    marginal = error_factors(p, v) * weights.sum(axis=1) / n
    cheapest = np.where(holds, marginal[:, None], np.inf).min(axis=0)
    worker, part = np.nonzero(weights > 1e-9)
    assert np.all(marginal[worker] <= cheapest[part] + 1e-9 * marginal.max())


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("capped", [False, True])
def test_placed_weights_are_as_good_as_a_general_convex_solver(seed: int, capped: bool) -> None:
    rng = np.random.default_rng(seed)
    k, n = 4, 6
    holds = rng.random((k, n)) < 0.5
    holds[rng.integers(k, size=n), np.arange(n)] = True
    p, v, sizes = rng.uniform(0.05, 0.6, k), rng.uniform(0, 1, k), rng.uniform(0.5, 2.0, n)
    delta, fractions = error_factors(p, v), sizes / sizes.sum()
    free = np.asarray(placed_weights(p, v, holds, partition_sizes=sizes))
    caps = np.full(k, np.inf)
    if capped:  # below what the busiest worker would take, if others can take over
        caps = 0.5 * (holds @ fractions + free.sum(axis=1) / n)
        busiest = int(np.argmax(free.sum(axis=1)))
        alone = fractions[(holds.sum(axis=0) == 1) & holds[busiest]].sum()
        caps[:] = 1.0
        caps[busiest] = 0.5 * (free[busiest].sum() / n + alone)
        if not caps[busiest] > 0:
            pytest.skip("nothing to cap")
    worker, part = np.nonzero(holds)

    def shares(a: np.ndarray) -> np.ndarray:
        return np.bincount(worker, weights=a, minlength=k)

    def gradient(a: np.ndarray) -> np.ndarray:
        return 2 * (delta * shares(a))[worker]

    columns = sparse.csr_array((np.ones(len(part)), (part, np.arange(len(part))))).toarray()
    rows = sparse.csr_array((np.ones(len(part)), (worker, np.arange(len(part)))), shape=(k, len(part)))
    constraints = [optimize.LinearConstraint(columns, fractions, fractions)]
    if capped:
        constraints.append(optimize.LinearConstraint(rows.toarray(), -np.inf, caps))
    found = optimize.minimize(
        lambda a: float(np.sum(delta * shares(a) ** 2)),
        fractions[part] / holds.sum(axis=0)[part],
        jac=gradient,
        bounds=optimize.Bounds(0.0, 1.0),
        constraints=constraints,
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 1000},
    )
    weights = placed_weights(p, v, holds, partition_sizes=sizes, max_share=np.minimum(caps, 1.0) if capped else None)
    m = weights.sum(axis=1) / n
    assert np.all(m <= caps + 1e-9)
    np.testing.assert_allclose(weights.sum(axis=0), n * fractions, rtol=1e-12)
    assert np.sum(delta * m**2) == pytest.approx(found.fun, rel=1e-9, abs=1e-12)


def test_a_free_placement_is_theorem_1() -> None:
    p, v = np.array([0.1, 0.2, 0.4]), np.array([0.3, 0.3, 0.1])
    everywhere = placed_weights(p, v, np.ones((3, 5), dtype=bool))
    np.testing.assert_allclose(everywhere, segment_weights(optimal_shares(p, v), 5), atol=1e-12)


@pytest.mark.parametrize("p", [[0.1, 1.0], [0.1, 0.3]])
def test_a_partition_without_a_worker_is_named(p: list[float]) -> None:
    holds = np.array([[1, 0, 1, 0], [0, int(p[1] == 1.0), 0, 0]], dtype=bool)
    with pytest.raises(PlanError, match="partition 1, 3; copy it"):
        placed_weights(p, 0.1, holds)


@pytest.mark.parametrize(("shares", "n"), [([0.5, 0.6], 2), ([1.5, -0.5], 2), ([[1.0]], 1), ([1.0], 0)])
def test_bad_shares_and_partition_counts_are_refused(shares: object, n: int) -> None:
    with pytest.raises(PlanError, match="expected"):
        segment_weights(shares, n)  # type: ignore[arg-type]


@pytest.mark.parametrize("sizes", [[1.0], [1.0, 0.0], [1.0, -1.0], [1.0, np.inf]])
def test_bad_partition_sizes_are_refused(sizes: list[float]) -> None:
    with pytest.raises(PlanError, match="partition_sizes"):
        segment_weights([1.0], 2, partition_sizes=sizes)
