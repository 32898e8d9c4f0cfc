"""The schemes' codes: what they hold, what they recover, what they cost, what they refuse."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_qgc import schemes
from torch_qgc.errors import PlanError
from torch_qgc.planner import Plan, make_plan

LATE = [0.05, 0.1, 0.15, 0.2, 0.3, 0.5]

ALL: dict[str, Callable[..., Any]] = {
    "qgc": schemes.qgc,
    "osgc": schemes.osgc,
    "is_sgd ignore": schemes.is_sgd,
    "is_sgd count": lambda p, **o: schemes.is_sgd(p, decode="count", **o),
    "is_sgd unbiased": lambda p, **o: schemes.is_sgd(p, decode="unbiased", **o),
    "bgc mean": schemes.bgc,
    "bgc count": lambda p, **o: schemes.bgc(p, decode="count", **o),
    "bgc fixed": lambda p, **o: schemes.bgc(p, decode="fixed", **o),
    "sgc": schemes.sgc,
    "sgc heterogeneous": lambda p, **o: schemes.sgc(p, heterogeneous=True, **o),
    "one_bit_sgc": schemes.one_bit_sgc,
    "erasurehead first": schemes.erasurehead,
    "erasurehead average": lambda p, **o: schemes.erasurehead(p, decode="average", **o),
    "optimal_decoding": schemes.optimal_decoding,
    "optimal_decoding bernoulli": lambda p, **o: schemes.optimal_decoding(p, graph="bernoulli", **o),
    "fractional_repetition": schemes.fractional_repetition,
    "fractional_repetition average": lambda p, **o: schemes.fractional_repetition(p, decode="average", **o),
    "cyclic": schemes.cyclic,
    "cyclic_mds": schemes.cyclic_mds,
    "cyclic_mds of three": lambda p, **o: schemes.cyclic_mds(p, stragglers=3, **o),
    "expander": schemes.expander,
    "expander of three": lambda p, **o: schemes.expander(p, degree=3, **o),
    "ye_abbe": schemes.ye_abbe,
    "ye_abbe of three": lambda p, **o: schemes.ye_abbe(p, replicas=4, stragglers=1, parts=3, **o),
}
every_scheme = pytest.mark.parametrize("name", ALL)


def late_patterns(workers: int, most: int) -> list[np.ndarray]:
    """All arrivals with at most so many late."""
    patterns = []
    for count in range(most + 1):
        for late in itertools.combinations(range(workers), count):
            arrived = np.ones(workers, dtype=bool)
            arrived[list(late)] = False
            patterns.append(arrived)
    return patterns


def parts_of(plan: Plan | schemes.PartPlan) -> int:
    return len(plan.plans) if isinstance(plan, schemes.PartPlan) else 1


def target(plan: Plan | schemes.PartPlan) -> np.ndarray:
    """What the gradient (every part of it) is made of: [parts, parts N]."""
    return plan.target if isinstance(plan, schemes.PartPlan) else plan.partition_fractions[None]


def decoded_weights(plan: Plan | schemes.PartPlan, arrived: np.ndarray) -> np.ndarray:
    """What the decoded gradient (every part of it) is made of: [parts, parts N]."""
    rows = np.asarray(plan.weights)
    mass = np.abs(rows).sum(axis=1, keepdims=True)
    sent = np.divide(rows, mass, out=np.zeros_like(rows), where=mass > 0)
    return np.atleast_2d(plan.coefficients(arrived)) @ sent


# ------------------------------------------------------------------------------------------- all of them
@every_scheme
def test_every_plan_survives_json(name: str) -> None:
    plan = ALL[name](LATE, bits_per_coordinate=5, seed=3)
    again = type(plan).from_json(plan.to_json())
    assert again == plan
    for arrived in late_patterns(6, 2):
        np.testing.assert_array_equal(again.coefficients(arrived), plan.coefficients(arrived))
    assert "Plan(6 workers, 6 partitions" in repr(plan)


@every_scheme
def test_every_scheme_keeps_the_budget(name: str) -> None:
    for budget in (24, 27):
        plan = ALL[name](LATE, bit_budget=budget)
        if name == "one_bit_sgc":
            assert plan.bits.tolist() == [1] * 6
        elif name == "qgc":
            assert plan.spent_bits <= budget
        else:
            assert plan.spent_bits == pytest.approx(budget, abs=1 / parts_of(plan))
            assert plan.bits.max() - plan.bits.min() <= 1


@every_scheme
def test_late_workers_weigh_nothing(name: str) -> None:
    plan = ALL[name](LATE)
    for arrived in late_patterns(6, 6):
        coefficients = np.atleast_2d(plan.coefficients(arrived))
        assert np.all(coefficients[:, ~arrived] == 0)
        assert np.all(np.isfinite(coefficients))


@every_scheme
def test_seeds_decide_random_codes_and_nothing_else_does(name: str) -> None:
    assert ALL[name](LATE, seed=5) == ALL[name](LATE, seed=5)


@every_scheme
def test_more_partitions_than_workers(name: str) -> None:
    plan = ALL[name](LATE, num_partitions=12)
    assert plan.num_partitions == 12
    if name.startswith(("fractional", "cyclic", "ye_abbe", "erasurehead", "optimal_decoding")) and "bern" not in name:
        everybody = decoded_weights(plan, np.ones(6, dtype=bool))
        np.testing.assert_allclose(everybody, target(plan), atol=1e-9)


@every_scheme
def test_unquantized_means_no_quantization_noise(name: str) -> None:
    plan = ALL[name](LATE, bits_per_coordinate=32)
    if name != "one_bit_sgc":
        assert plan.bits.tolist() == [32] * 6
        assert not plan.variance.any()


def test_qgc_is_make_plan_for_full_gradients_and_one_track() -> None:
    options: dict[str, Any] = {"bit_budget": 30, "allow_drop": True}
    assert schemes.qgc(LATE, **options) == make_plan(LATE, noise_ratio=0.0, second_track=None, **options)
    assert schemes.qgc(LATE, noise_ratio=1.0, second_track="auto", **options) == make_plan(LATE, **options)


# ---------------------------------------------------------------------------------------------- codes
@pytest.mark.parametrize("seed", range(20))
def test_every_partition_of_sgc_lies_at_two_workers(seed: int) -> None:
    weights = np.asarray(schemes.sgc(LATE, seed=seed).weights)
    assert np.all(np.count_nonzero(weights, axis=0) == 2)
    assert set(np.unique(weights)) == {0.0, 0.5}


def test_bgc_replicates_as_often_as_told() -> None:
    counts = [np.count_nonzero(schemes.bgc(LATE, replicas=3, seed=s).weights) for s in range(300)]
    # 36 Bernoulli(1/2) entries each
    assert np.mean(counts) == pytest.approx(18, abs=4 * 3 / np.sqrt(300))


@pytest.mark.parametrize(("workers", "partitions"), [(6, 6), (10, 10), (12, 8), (5, 10), (7, 3), (1, 2)])
def test_optimal_decoding_places_data_on_an_almost_regular_graph(workers: int, partitions: int) -> None:
    for seed in range(10):
        plan = schemes.optimal_decoding(np.full(workers, 0.1), num_partitions=partitions, seed=seed)
        held = np.asarray(plan.weights) > 0
        assert np.all(held.sum(axis=1) == 2)
        assert held.sum(axis=0).max() - held.sum(axis=0).min() <= 1
        if workers <= partitions * (partitions - 1) / 4:
            assert len(np.unique(held, axis=0)) == workers  # no two workers alike


def test_least_squares_misses_what_the_components_say() -> None:
    """Glasgow & Wootters: a bipartite component with sides x and y misses (x-y)^2/(x+y), any other nothing."""
    import networkx as nx

    for seed in range(5):
        plan = schemes.optimal_decoding(np.full(8, 0.3), num_partitions=9, seed=seed)
        held = np.asarray(plan.weights) > 0
        for arrived in late_patterns(8, 5)[::3]:
            graph = nx.Graph()
            graph.add_nodes_from(range(9))
            graph.add_edges_from(tuple(np.flatnonzero(row)) for row in held[arrived])
            missed = 0.0
            for component in nx.connected_components(graph):
                part = graph.subgraph(component)
                if nx.is_bipartite(part):
                    x, y = map(len, nx.bipartite.sets(part))
                    missed += (x - y) ** 2 / (x + y)
            gap = 9 * (decoded_weights(plan, arrived)[0] - 1 / 9)
            assert np.sum(gap**2) == pytest.approx(missed, abs=1e-9)


@pytest.mark.parametrize(
    ("make", "stragglers"),
    [
        *((lambda p, s=s: schemes.fractional_repetition(p, stragglers=s), s) for s in (0, 1, 2, 5)),
        *((lambda p, s=s: schemes.fractional_repetition(p, stragglers=s, decode="average"), s) for s in (0, 1, 2, 5)),
        *((lambda p, s=s: schemes.cyclic(p, stragglers=s, seed=1), s) for s in range(6)),
        *((lambda p, s=s: schemes.cyclic_mds(p, stragglers=s), s) for s in (1, 3, 5)),
        *(
            (lambda p, a=a: schemes.ye_abbe(p, replicas=a[0], stragglers=a[1], parts=a[2]), a[1])
            for a in ((2, 0, 2), (3, 1, 2), (4, 1, 3), (4, 2, 2), (6, 3, 3), (2, 1, 1), (1, 0, 1))
        ),
    ],
)
def test_exact_codes_recover_the_gradient_from_any_k_minus_s(make: Callable[..., Plan], stragglers: int) -> None:
    plan = make(LATE)
    assert plan.load == pytest.approx(np.count_nonzero(plan.weights) / plan.weights.shape[1])
    for arrived in late_patterns(6, stragglers):
        np.testing.assert_allclose(decoded_weights(plan, arrived), target(plan), atol=1e-6 / 6)


@pytest.mark.parametrize("name", ["fractional_repetition", "cyclic", "cyclic_mds", "ye_abbe"])
def test_exact_codes_decode_to_the_gradient_or_to_zero(name: str) -> None:
    plan = ALL[name](LATE)
    for arrived in late_patterns(6, 6):
        decoded = decoded_weights(plan, arrived)
        assert not decoded.any() or np.abs(decoded - target(plan)).max() < 1e-7


def test_load_of_exact_codes_is_one_more_than_their_stragglers() -> None:
    for s in (1, 3, 5):
        assert schemes.cyclic_mds(LATE, stragglers=s).load == s + 1
        assert schemes.cyclic(LATE, stragglers=s).load == s + 1
    assert schemes.fractional_repetition(LATE, stragglers=2).load == 3
    assert schemes.ye_abbe(LATE, replicas=4, stragglers=2, parts=2).load == 4


@settings(max_examples=25)
@given(st.integers(3, 12), st.integers(1, 5), st.integers(0, 2**31))
def test_expander_error_is_below_the_spectral_bound(k: int, degree: int, seed: int) -> None:
    """(lambda / degree)^2 K s / (K - s) for orthonormal gradients and s stragglers (Raviv et al.)."""
    degree = min(degree, k)
    plan = schemes.expander(np.full(k, 0.2), degree=degree, seed=seed)
    second = np.linalg.svd(np.asarray(plan.weights), compute_uv=False)[1]
    arrived = np.random.default_rng(seed).random(k) < 0.7
    arrived[0] = True
    late = k - int(arrived.sum())
    gap = k * (decoded_weights(plan, arrived)[0] - 1 / k)
    assert np.sum(gap**2) <= second**2 * k * late / (k - late) + 1e-9


def test_an_expander_of_degree_three_beats_the_neighbours_on_a_ring() -> None:
    k = 24
    ring = np.sum([np.roll(np.eye(k), shift, axis=1) for shift in range(3)], axis=0) / 3
    found = np.asarray(schemes.expander(np.full(k, 0.1), degree=3).weights)
    second = [np.linalg.svd(code, compute_uv=False)[1] for code in (ring, found)]
    assert second[1] < second[0] - 0.05


# ----------------------------------------------------------------------------------------------- blocks
def test_slices_finish_together_when_delays_are_at_their_means() -> None:
    """t_(K-n) sum_{i<=n} (i+1) x_i is the same for every slice."""
    from torch_qgc.planner.delays import ShiftedExponential

    mu = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    delays = ShiftedExponential(mu=mu, shift=1.0)
    plan = schemes.block_coordinate(delays=delays, deadline_s=3.0)
    means = np.sort(delays.sample(np.random.default_rng(7), 100_000), axis=1).mean(axis=0)
    against = [round(part.load) - 1 for part in plan.plans]
    assert against == [0, 1, 2, 3, 5]
    done = np.cumsum((np.array(against) + 1) * plan.fractions)
    times = means[5 - np.array(against)] * done
    np.testing.assert_allclose(times, times[0], rtol=0.02)  # both means are sampled
    assert sum(plan.fractions) == pytest.approx(1.0)
    assert plan.load == pytest.approx(done[-1])


def test_a_block_plan_survives_json_and_decodes_slice_by_slice() -> None:
    plan = schemes.block_coordinate(LATE, bits_per_coordinate=6)
    again = schemes.BlockPlan.from_json(plan.to_json())
    assert again == plan
    arrived = np.ones(6, dtype=bool)
    arrived[2] = False
    coefficients = plan.coefficients(arrived)
    assert coefficients.shape == (len(plan.plans), 6)
    assert not coefficients[0].any()  # the first slice needs everybody
    assert all(coefficients[1:].any(axis=1))
    slices = np.tile(arrived, (len(plan.plans), 1))
    slices[0] = True
    assert plan.coefficients(slices)[0].all()
    assert plan.spent_bits == 36


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"fractions": [1.0], "plans": [{}]}', '{"parts": [{}]}'])
@pytest.mark.parametrize("kind", [schemes.BlockPlan, schemes.PartPlan])
def test_slices_and_parts_from_anything_else_are_refused(kind: Any, text: str) -> None:
    with pytest.raises(PlanError, match="expected"):
        kind.from_json(text)


def test_parts_that_do_not_belong_together_are_refused() -> None:
    one, other = schemes.ye_abbe(LATE).plans
    with pytest.raises(PlanError, match="got none"):
        schemes.PartPlan(plans=())
    with pytest.raises(PlanError, match="'exact', got"):
        schemes.PartPlan(plans=(make_plan(LATE),))
    with pytest.raises(PlanError, match="the same workers"):
        schemes.PartPlan(plans=(one, schemes.cyclic(LATE, bits_per_coordinate=3)))
    with pytest.raises(PlanError, match="arrived"):
        schemes.PartPlan(plans=(one, other)).coefficients(np.ones(5, dtype=bool))


# ------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schemes.sgc(LATE, replicas=7), "replicas: expected"),
        (lambda: schemes.bgc(LATE, replicas=0), "replicas: expected"),
        (lambda: schemes.erasurehead(LATE, replicas=4), "divisor of the 6 workers"),
        (lambda: schemes.fractional_repetition(LATE, stragglers=3), "divisor of the 6 workers"),
        (lambda: schemes.cyclic(LATE, stragglers=6), "stragglers: expected"),
        (lambda: schemes.cyclic_mds(LATE, stragglers=2), "K - s odd"),
        (lambda: schemes.ye_abbe(LATE, replicas=2, stragglers=1, parts=2), "stragglers \\+ parts"),
        (lambda: schemes.expander(LATE, degree=7), "degree: expected"),
        (lambda: schemes.optimal_decoding(LATE, num_partitions=13), "vertices"),
        (lambda: schemes.optimal_decoding(LATE, graph="complete"), "graph: expected"),  # type: ignore[arg-type]
        (lambda: schemes.is_sgd(LATE, decode="guess"), "decode: expected"),  # type: ignore[arg-type]
        (lambda: schemes.cyclic(LATE, num_partitions=8), "multiple of 6"),
        (lambda: schemes.sgc(LATE, num_partitions=0), "num_partitions"),
        (lambda: schemes.sgc([0.1, 1.2]), "probabilities in"),
        (lambda: schemes.sgc(LATE, bit_budget=11), "at least 2 bits for each"),
        (lambda: schemes.sgc(LATE, bit_budget=24, bits_per_coordinate=4.0), "got both"),
        (lambda: schemes.sgc(LATE, variance=np.ones((6, 4))), "table of shape"),
        (lambda: schemes.sgc(LATE, variance="best"), "bound: expected"),  # type: ignore[arg-type]
        (lambda: schemes.osgc([1.0, 1.0]), "late"),
        (lambda: schemes.block_coordinate(), "got both or neither"),
        (lambda: schemes.block_coordinate([0.0, 0.1]), "in \\(0, 1\\)"),
        (lambda: schemes.error_feedback(schemes.ye_abbe(LATE)), "expected a Plan, got PartPlan"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make()


def test_codes_that_subtract_gradients_cannot_be_sampled_from() -> None:
    plan = schemes.cyclic(LATE)
    worker = int(np.argmin(np.asarray(plan.weights).min(axis=1)))
    with pytest.raises(PlanError, match="for comparisons"):
        plan.partition_probabilities(worker)


def test_a_measured_table_sets_the_noise_of_equal_bits() -> None:
    table = np.arange(6 * 9, dtype=np.float64).reshape(6, 9)
    np.testing.assert_array_equal(schemes.osgc(LATE, variance=table).variance, table[:, 4])
    np.testing.assert_array_equal(schemes.one_bit_sgc(LATE, variance=table).variance, table[:, 1])


def test_a_hundred_thousand_workers_stay_sparse() -> None:
    p = np.random.default_rng(0).uniform(0.01, 0.5, 100_000)
    for plan in (schemes.osgc(p), schemes.is_sgd(p, decode="unbiased")):
        assert not isinstance(plan.weights, np.ndarray)
        assert schemes.residual(plan) == pytest.approx(plan.residual_bound, rel=1e-9)
        assert schemes.residual(plan, "orthogonal") > 0
