"""What a job can train with: every plan of make_plan, one number for the second track, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_qgc import schemes
from torch_qgc.errors import CodecError, PlanError
from torch_qgc.kernels import format as codec
from torch_qgc.planner import Plan, make_plan, variance

LATE = [0.05, 0.1, 0.15, 0.2, 0.3, 0.5]
FIRST, SECOND = ["unbiased", "annealed", "hajek", "ridge"], ["hajek", "ridge"]


def seeds() -> st.SearchStrategy[np.random.Generator]:
    return st.integers(0, 2**32 - 1).map(np.random.default_rng)


def _mean_one(batches: np.ndarray) -> np.ndarray:
    return np.asarray(batches / batches.mean())


@st.composite
def requests(draw: st.DrawFn) -> tuple[np.ndarray, dict[str, Any]]:
    """Straggle probabilities and options of make_plan, each in its documented range, in any combination."""
    k, n, rng = draw(st.integers(1, 8)), draw(st.integers(1, 10)), draw(seeds())
    p = draw(st.sampled_from([rng.uniform(0, 0.95, k), rng.choice([0.0, 0.3, 1 - 1e-12, 1.0], k)]))
    low = draw(st.integers(2, 16))
    high = draw(st.integers(low, 16))
    table = rng.uniform(0, 10, (k, high + 1)) * rng.choice([0.0, 1.0, np.inf], (k, high + 1), p=[0.1, 0.8, 0.1])
    optional: dict[str, st.SearchStrategy[Any]] = {
        "norm": st.sampled_from(["max", "l2"]),
        "variance": st.sampled_from(["typical", "tight", "paper", table]),
        "noise_ratio": st.sampled_from([0.0, 1.0, 1e6, np.inf, rng.uniform(0, 10, k)]),
        "batches": st.sampled_from([None, np.ones(k), _mean_one(rng.uniform(0.05, 8, k))]),
        "gamma": st.floats(0, 1e3),
        "most_bits": st.sampled_from([None, np.inf, 4, rng.integers(low, 33, k)]),
        "allow_drop": st.booleans(),
        "allocator": st.sampled_from(["exact", "dp", "low_complexity", "greedy", "relaxation", "equal"]),
        "max_share": st.sampled_from([None, 1.0, np.inf, 2.0 / k, rng.uniform(0.1, 1.0, k)]),
        "tolerance": st.sampled_from([0.0, 0.1, 1.0, np.inf]),
        "placement": st.sampled_from([None, rng.random((k, n)) < 0.7]),
        "partition_sizes": st.sampled_from([None, rng.uniform(0.1, 5, n)]),
        "decoder": st.sampled_from([*FIRST, "uncorrected"]),
        "second_track": st.sampled_from([None, "auto", *SECOND, "lmmse"]),
        "burst": st.floats(1, 10),
        "second_track_alpha": st.sampled_from([1e-300, 0.1, 1.0, 1e300]),
        "gradient_correlation": st.floats(0, 1),
    }
    options = draw(st.fixed_dictionaries({}, optional=optional))
    budget: dict[str, Any] = draw(
        st.one_of(
            st.fixed_dictionaries({"bits_per_coordinate": st.floats(0.5, 32) | st.just(32)}),
            st.fixed_dictionaries({"bit_budget": st.integers(0, 40 * k)}),
        )
    )
    return p, {"min_bits": low, "max_bits": high, "num_partitions": n, **budget, **options}


@pytest.mark.filterwarnings("error::RuntimeWarning")
@settings(max_examples=400)
@given(requests())
def test_every_plan_option_is_trainable_or_refused(request: tuple[np.ndarray, dict[str, Any]]) -> None:
    """make_plan refuses, or a job can train; second tracks that are no multiple of the first are named."""
    p, options = request
    try:
        plan = make_plan(p, **options)
    except PlanError:
        return
    second = options.get("second_track")
    if second in (None, "auto") or (second != "lmmse" and options.get("decoder") != "uncorrected"):
        plan.check_trainable()
    else:
        with pytest.raises(PlanError, match=f"got '{second}' beside"):
            plan.check_trainable()
    assert Plan.from_json(plan.to_json()) == plan
    for k in range(plan.num_workers):
        assert plan.partition_probabilities(k).sum() == pytest.approx(float(plan.shares[k] > 0))


@settings(max_examples=200)
@given(
    seeds(),
    st.integers(1, 9),
    st.sampled_from(FIRST),
    st.sampled_from(SECOND),
    st.floats(0.01, 100),
    st.booleans(),
    st.floats(1e-6, 1),
)
def test_the_second_track_is_the_first_times_one_number(
    rng: np.random.Generator, k: int, first: str, second: str, alpha: float, measured: bool, temperature: float
) -> None:
    late = rng.uniform(0, 0.9, k)
    plan = make_plan(late, decoder=first, second_track=second, second_track_alpha=alpha)
    counts = rng.integers(0, 3, k)
    rates = rng.uniform(0.05, 2.0, k) * (rng.random(k) < 0.9) if measured else None
    told: dict[str, Any] = {"rates": rates, "temperature": temperature}
    coefficients = plan.second_coefficients(counts, **told)
    assert coefficients is not None
    scale = plan.second_scale(counts, **told)
    np.testing.assert_allclose(coefficients, scale * plan.coefficients(counts, **told), rtol=1e-12, atol=0.0)


def test_the_number_is_one_without_a_second_track_or_without_arrivals() -> None:
    nobody = np.zeros(6, dtype=bool)
    assert make_plan(LATE, decoder="uncorrected").second_scale(~nobody) == 1.0
    for first in FIRST:
        for second in SECOND:
            plan = make_plan(LATE, decoder=first, second_track=second)
            assert plan.second_scale(nobody) == 1.0
            assert plan.second_scale(~nobody, rates=np.zeros(6)) == 1.0
            assert plan.second_scale(~nobody) > 0.0


@pytest.mark.parametrize(
    ("first", "second"),
    [*((first, "lmmse") for first in FIRST), ("uncorrected", "hajek"), ("uncorrected", "ridge")],
)
def test_tracks_that_are_no_multiples_are_refused_by_name(first: str, second: str) -> None:
    plan = make_plan(LATE, decoder=first, second_track=second)
    for use in (plan.check_trainable, lambda: plan.second_scale(np.ones(6))):
        with pytest.raises(PlanError, match=f"got '{second}' beside '{first}'"):
            use()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schemes.one_bit_sgc(LATE), "got 1 for worker 0: stochastic signs"),
        (lambda: schemes.cyclic(LATE, stragglers=2), "codes that subtract gradients"),
        (lambda: dataclasses.replace(schemes.is_sgd(LATE), bits=np.array([4, 4, 0, 4, 4, 4])), "got 0 for worker 2"),
        (
            lambda: Plan(
                straggle_probs=np.array([0.999]),
                bits=np.array([4]),
                shares=np.array([1e307]),
                weights=np.array([[1e307]]),
                decoder="homogeneous",
            ),
            "got inf for worker 0",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow")
def test_plans_that_no_job_can_train_with_are_refused(make: Callable[[], Plan], message: str) -> None:
    plan = make()
    with pytest.raises(PlanError, match=message):
        plan.check_trainable()


@pytest.mark.parametrize("bits", range(-1, 40))
def test_planner_and_codec_agree_on_bits_and_blocks(bits: int) -> None:
    """The planner imports no kernels, so it states the codec's numbers itself."""
    assert variance.BLOCK == codec.BLOCK
    assert variance.PASS_THROUGH_BITS == codec.PASS_THROUGH
    plan = make_plan([0.1, 0.1])
    try:
        codec.check_bits(bits)
    except CodecError:
        if bits != 0:
            with pytest.raises(PlanError, match=f"got {bits} for worker 1"):
                dataclasses.replace(plan, bits=np.array([2, bits]), bit_budget=None)
    else:
        dataclasses.replace(plan, bits=np.array([2, bits]), bit_budget=None, variance=np.ones(2))


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["exact", "ridge"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=6,
)
NAMES = sorted(json.loads(make_plan([0.1, 0.2]).to_json()))


@settings(max_examples=400)
@given(st.dictionaries(st.sampled_from(NAMES), ANY_JSON, min_size=1, max_size=2))
def test_a_plan_with_any_field_replaced_is_refused_or_works(change: dict[str, Any]) -> None:
    """Plans come over the network: what is let in has an identity and decodes, whatever its fields hold."""
    values = json.loads(make_plan([0.1, 0.2], second_track="hajek").to_json())
    try:
        plan = Plan.from_json(json.dumps({**values, **change}))
    except PlanError:
        return
    assert Plan.from_json(plan.to_json()) == plan
    assert repr(plan)
    plan.coefficients(np.ones(plan.num_workers, dtype=bool))
    try:
        plan.check_trainable()
    except PlanError:
        return
    assert np.isfinite(plan.second_scale(np.ones(plan.num_workers, dtype=bool)))
