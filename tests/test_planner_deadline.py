"""What a deadline makes of a job, against quadrature and a job on a virtual clock; the choice against brute force."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from helpers.rounds_clock import run_rounds
from scipy import optimize

from torch_qgc.errors import PlanError
from torch_qgc.planner import Plan, make_plan
from torch_qgc.planner.cadence import IndependentRounds, JobRounds, expected_round_time
from torch_qgc.planner.deadline import DeadlineChoice, choose_deadline
from torch_qgc.planner.delays import DelayModel, Empirical, ShiftedExponential

MU = np.array([0.5, 1.0, 4.0])
MODELS: list[DelayModel] = [
    ShiftedExponential(mu=MU, shift=np.array([1.0, 0.5, 1.2]), load=np.array([1.0, 2.0, 0.5])),
    ShiftedExponential(mu=MU, shift=0.0),
    Empirical(delays_s=1 + np.random.default_rng(0).gamma(2.0, 0.5, size=(50, 3)), caution=0.0),
]
UNEQUAL = ShiftedExponential(mu=np.array([8.0, 8.0, 8.0, 0.5]), shift=np.array([1.0, 1.0, 1.0, 3.0]))
EQUAL = ShiftedExponential(mu=np.full(4, 100.0), shift=0.1)


# -------------------------------------------------------------------------------------------------- rounds
@pytest.mark.parametrize("model", MODELS, ids=lambda model: type(model).__name__)
@pytest.mark.parametrize("deadline", [0.2, 1.5, 4.0])
def test_round_time_is_the_mean_of_the_slowest_or_the_deadline(model: DelayModel, deadline: float) -> None:
    samples = np.minimum(model.sample(np.random.default_rng(2), 60_000).max(axis=1), deadline)
    error = max(samples.std() / np.sqrt(len(samples)), 1e-9)
    assert abs(expected_round_time(model, deadline) - samples.mean()) < 4 * error


def by_quadrature(model: ShiftedExponential, deadline_s: float, late: str) -> tuple[float, np.ndarray, np.ndarray]:
    """Solve the equations of JobRounds by root finding, with exact tails on a fine grid."""
    tail = model.late_fraction
    p = tail(deadline_s)
    times = np.linspace(0.0, deadline_s, 40_001)
    tails = tail((times[1:] + times[:-1]) / 2)  # [times, K]
    shift, mu = np.asarray(model.shift), np.asarray(model.mu)
    begins = np.maximum(deadline_s, shift)
    spent_late = (
        deadline_s * p + (begins - deadline_s) + np.exp(-mu * (begins - shift)) / mu
    )  # T S(T) + the integral of S beyond

    def steps(round_s: float) -> np.ndarray:
        return np.asarray(round_s / (round_s * (1 - p) + spent_late + (0.5 * round_s * p if late == "drop" else 0.0)))

    def length(round_s: float) -> float:
        on_time = np.maximum(steps(round_s) * (1 - p if late == "fold" else 1.0), 1e-9)
        area = np.mean(1 - np.prod(1 - on_time * tails, axis=1)) * deadline_s
        return float(area / (1 - np.prod(1 - on_time)))

    longest = expected_round_time(model, deadline_s)
    lengths = np.linspace(longest, 0.01 * longest, 100)
    below = int(np.argmax([length(t) >= t * (1 - 1e-9) for t in lengths]))  # the longest solution is next to it
    bracket = lengths[below], lengths[max(below - 1, 0)]
    round_s = longest if below == 0 else optimize.brentq(lambda t: length(t) - t, *bracket)
    return round_s, steps(round_s) * (1.0 if late == "fold" else 1 - p), spent_late / round_s


@pytest.mark.parametrize("late", ["fold", "drop"])
@pytest.mark.parametrize("deadline_s", [1.1, 1.5, 2.5, 4.0, 12.0])
def test_the_cadence_solves_its_equations(late: Any, deadline_s: float) -> None:
    model = ShiftedExponential(mu=np.array([4.0, 3.0, 2.0, 0.4]), shift=np.array([1.0, 1.05, 0.7, 2.0]))
    cadence = JobRounds(model, late=late, max_staleness=10**6).cadence(deadline_s)
    round_s, rates, staleness = by_quadrature(model, deadline_s, late)
    assert cadence.round_s == pytest.approx(round_s, rel=0.003)
    # Tails are cut off where 1 % is left, which shortens the time of the slowest worker by 1 %.
    np.testing.assert_allclose(cadence.rates, rates, rtol=0.02, atol=1e-9)
    np.testing.assert_allclose(cadence.staleness, staleness if late == "fold" else 0.0, rtol=0.03, atol=0.002)


def worlds() -> dict[str, Callable[[np.random.Generator, int], float]]:
    """Six workers each: seconds of the next step of worker k."""

    def slow(rng: np.random.Generator, k: int) -> float:
        return float((1.0 + rng.exponential(0.05)) * (5.0 if k == 5 else 1.0))

    def pauses(rng: np.random.Generator, k: int) -> float:
        return float(1.0 + rng.exponential(0.05) + (8.0 if rng.random() < 0.05 else 0.0))

    def tails(rng: np.random.Generator, k: int) -> float:
        return float(1.0 + rng.exponential(0.7))

    def mixed(rng: np.random.Generator, k: int) -> float:
        usual = (1.0, 1.0, 1.2, 1.5, 2.0, 4.0)[k] * (1.0 + rng.exponential(0.05)) + rng.exponential(0.1)
        return float(usual + (6.0 if rng.random() < 0.02 else 0.0))

    return {"slow": slow, "pauses": pauses, "tails": tails, "mixed": mixed}


@pytest.mark.parametrize(
    ("world", "late", "deadlines"),
    [
        ("slow", "fold", [1.3, 2.5, 4.0, 12.0]),
        ("slow", "drop", [1.3, 2.5, 4.0, 12.0]),
        ("pauses", "fold", [1.7, 4.0, 12.0]),
        ("pauses", "drop", [4.0, 12.0]),
        ("tails", "fold", [2.5, 7.0]),
        ("tails", "drop", [2.5, 7.0]),
        ("mixed", "fold", [1.7, 4.0, 12.0]),
        ("mixed", "drop", [2.5, 4.0, 12.0]),
    ],
)
def test_a_job_on_a_virtual_clock_goes_on_as_predicted(world: str, late: Any, deadlines: list[float]) -> None:
    """To a tenth: the prediction takes the phase at which a late worker begins its next step for that of the others."""
    draw, rng = worlds()[world], np.random.default_rng(3)
    recorded = np.array([[draw(rng, k) for k in range(6)] for _ in range(2000)])
    job = JobRounds(Empirical(delays_s=recorded, caution=0.0), late=late)
    for deadline_s in deadlines:
        cadence = job.cadence(deadline_s)
        seen = run_rounds(lambda k: draw(rng, k), 6, deadline_s, 1200, late=late)
        assert cadence.round_s == pytest.approx(seen.round_s, rel=0.1)
        np.testing.assert_allclose(cadence.rates, seen.rates, atol=0.12)
        assert cadence.rates.mean() == pytest.approx(seen.rates.mean(), abs=0.06)
        assert cadence.staleness.mean() == pytest.approx(seen.staleness.mean(), abs=0.15)


def test_a_worker_that_is_always_late_contributes_as_fast_as_it_works() -> None:
    delays = np.tile([1.0, 1.0, 1.0, 5.0], (3, 1))
    cadence = JobRounds(Empirical(delays_s=delays, caution=0.0)).cadence(2.0)
    assert cadence.round_s == pytest.approx(1.0, rel=1e-3)
    np.testing.assert_allclose(cadence.rates, [1, 1, 1, 0.2], rtol=2e-3)
    np.testing.assert_allclose(cadence.staleness, [0, 0, 0, 5.0], rtol=2e-3)
    dropped = JobRounds(Empirical(delays_s=delays, caution=0.0), late="drop").cadence(2.0)
    np.testing.assert_allclose(dropped.rates, [1, 1, 1, 0], atol=1e-9)


@pytest.mark.parametrize("model", [*MODELS, EQUAL], ids=lambda model: type(model).__name__)
def test_without_anybody_late_a_job_waits_for_all(model: DelayModel) -> None:
    job = JobRounds(model)
    cadence, waiting = job.cadence(job.search_s[1] * 20.0), job.waiting()
    np.testing.assert_allclose(cadence.rates, 1.0, rtol=0.01)
    assert cadence.round_s == pytest.approx(waiting.round_s, rel=0.01)
    assert waiting.rates.tolist() == [1.0] * len(cadence.rates)
    assert not waiting.staleness.any()


def test_what_never_comes_is_lost() -> None:
    delays = np.ones((4, 3))
    delays[:2, 2] = np.inf
    job = JobRounds(Empirical(delays_s=delays, caution=0.0))
    cadence = job.cadence(1.5)
    np.testing.assert_allclose(cadence.counted, [1.0, 1.0, 0.5])
    assert cadence.rates[2] < 0.5
    assert job.waiting().round_s == np.inf
    exponential = ShiftedExponential(mu=np.array([1.0, 1.0]), shift=1.0)
    assert job.search_s[1] == 2.0
    assert JobRounds(exponential).search_s[1] < 10.0


def test_payloads_that_are_too_old_do_not_count() -> None:
    delays = np.tile([1.0, 1.0, 1.0, 8.5], (3, 1))
    rates = [
        JobRounds(Empirical(delays_s=delays, caution=0.0), max_staleness=most).cadence(2.0).rates[3]
        for most in (7, 8, 9)
    ]
    np.testing.assert_allclose(rates, [0.0, 0.5 / 8.5, 1 / 8.5], atol=0.003)  # 8 or 9 rounds old, by its phase


# -------------------------------------------------------------------------------------------------- choice
def objective(job: JobRounds, plan: Callable[[np.ndarray], Plan], deadline_s: float, t0: float, w: float) -> float:
    """J by its definition, with the variance of each contribution written out."""
    c = job.cadence(deadline_s)
    made = plan(1 - c.rates)
    used = made.shares > 0
    m, r, v = made.shares[used], c.rates[used], made.variance[used]
    return float((c.round_s + t0) * (1 + w * m @ c.staleness[used] + np.sum(m**2 * (1 - r + v) / r)))


@pytest.mark.parametrize("placed", [False, True])
@pytest.mark.parametrize("w", [0.0, 1.0, 2.0])
def test_the_deadline_of_a_job_is_the_best_of_a_fine_grid(placed: bool, w: float) -> None:
    options: dict[str, Any] = {"placement": np.eye(4)} if placed else {}

    def plan(p: np.ndarray) -> Plan:
        return make_plan(p, bit_budget=16, **options)

    job = JobRounds(UNEQUAL)
    tried = [objective(job, plan, t, 0.2, w) for t in np.geomspace(*job.search_s, 150)]
    exact = choose_deadline(job, plan, overhead_s=0.2, staleness_weight=w, slack=0.0)
    assert exact.objective <= min(tried) * (1 + 2e-3)
    assert exact.objective == pytest.approx(objective(job, plan, exact.deadline_s, 0.2, w), rel=1e-9)
    robust = choose_deadline(job, plan, overhead_s=0.2, staleness_weight=w)
    assert robust.objective <= exact.objective * 1.05
    assert robust.objective == pytest.approx(objective(job, plan, robust.deadline_s, 0.2, w), rel=1e-9)
    waiting = job.waiting()
    assert robust.waiting_objective == pytest.approx(
        (waiting.round_s + 0.2) * (1 + plan(np.zeros(4)).residual_bound), rel=1e-9
    )


@pytest.mark.parametrize("closes_early", [False, True])
def test_the_deadline_of_independent_rounds_is_the_best_of_a_fine_grid(closes_early: bool) -> None:
    model = ShiftedExponential(mu=np.array([0.5, 1.0, 3.0, 6.0]), shift=1.0)

    def plan(p: np.ndarray) -> Plan:
        return make_plan(p, bit_budget=14, max_bits=8, noise_ratio=0.0)

    rounds = IndependentRounds(model, closes_early=closes_early)
    choice = choose_deadline(rounds, plan, overhead_s=0.3, search_s=(1.01, 8.0), slack=0.0, grid=240)

    def cost(t: float) -> float:
        tau = expected_round_time(model, t) if closes_early else t
        return float((tau + 0.3) * (1 + plan(model.straggle_probability(t)).residual_bound))

    assert choice.objective <= min(map(cost, np.linspace(1.01, 8.0, 400))) * (1 + 1e-9)
    assert choice.objective == pytest.approx(cost(choice.deadline_s))
    assert not choice.unheard


def test_the_middle_of_a_flat_minimum_is_taken() -> None:
    """One worker takes five seconds, the others one: every deadline between costs the same."""
    delays = np.tile([1.0, 1.0, 1.0, 5.0], (20, 1)) * np.random.default_rng(0).uniform(0.98, 1.02, (20, 4))
    choice = choose_deadline(JobRounds(Empirical(delays_s=delays, caution=0.0)), make_plan)
    assert 1.5 < choice.deadline_s < 3.5
    assert choice.round_time_s == pytest.approx(1.0, rel=0.03)


def test_waiting_is_as_good_for_equal_workers_and_far_worse_with_one_slow_worker() -> None:
    assert choose_deadline(JobRounds(EQUAL), make_plan).speedup == pytest.approx(1.0, abs=0.1)
    assert choose_deadline(JobRounds(UNEQUAL), make_plan).speedup > 1.5
    never = Empirical(delays_s=np.array([[1.0, 1.0, 1.0], [1.1, 1.1, np.inf], [1.05, 1.0, np.inf]]))
    choice = choose_deadline(JobRounds(never), make_plan)
    assert choice.speedup == np.inf
    assert 1.0 <= choice.deadline_s <= 4.0


def test_more_weight_on_staleness_waits_longer() -> None:
    chosen = [choose_deadline(JobRounds(MODELS[0]), make_plan, staleness_weight=w) for w in (0.0, 1.0, 4.0)]
    staleness = [choice.staleness.mean() for choice in chosen]
    assert staleness[0] > staleness[1] > staleness[2]


def test_a_larger_beta_shortens_the_deadline() -> None:
    model = ShiftedExponential(mu=np.full(4, 1.0), shift=1.0)
    rounds = IndependentRounds(model, closes_early=False)
    deadlines = [choose_deadline(rounds, make_plan, beta=beta, slack=0.0).deadline_s for beta in (0.2, 1.0, 5.0)]
    assert deadlines[0] > deadlines[1] > deadlines[2]


# --------------------------------------------------------------------------------------------------- guard
LINK = np.tile([1.0, 1.0, 1.0, 20.0], (20, 1)) * np.random.default_rng(1).uniform(0.98, 1.02, (20, 4))


def choose(max_staleness: int, **options: Any) -> DeadlineChoice:
    job = JobRounds(Empirical(delays_s=LINK, caution=0.0), max_staleness=max_staleness)
    return choose_deadline(job, make_plan, **options)


def test_a_deadline_that_would_ignore_a_slow_link_in_silence_is_not_taken() -> None:
    waits, folds = choose(8), choose(24)
    assert waits.deadline_s > 20.0  # its payloads would be twenty rounds old, and eight are allowed
    assert np.all(waits.straggle_probs < 0.05)
    assert waits.unheard == folds.unheard == ()
    assert folds.deadline_s < 20.0
    assert folds.straggle_probs[3] == pytest.approx(0.95, abs=0.01)
    assert folds.speedup > 2.0


def test_bounds_outrank_the_guard_and_the_choice_says_so() -> None:
    bounded = choose(8, search_s=(0.5, 5.0))
    assert bounded.deadline_s <= 5.0
    assert bounded.unheard == (3,)
    assert bounded.straggle_probs[3] == 1.0
    free = choose(8, must_hear=[True, True, True, False])
    assert free.deadline_s < 5.0
    assert free.unheard == ()
    job = JobRounds(Empirical(delays_s=LINK, caution=0.0))
    with pytest.raises(PlanError, match="partition 3"):  # whose data nobody else has
        choose_deadline(job, lambda p: make_plan(p, placement=np.eye(4)), search_s=(0.5, 5.0))


@pytest.mark.parametrize("late", ["fold", "drop"])
@pytest.mark.parametrize("model", [*MODELS, UNEQUAL, EQUAL], ids=lambda model: type(model).__name__)
def test_everybody_who_comes_is_heard(model: DelayModel, late: Any) -> None:
    job = JobRounds(model, late=late)
    choice = choose_deadline(job, make_plan)
    assert choice.unheard == ()
    assert np.all(job.cadence(choice.deadline_s).counted >= job.least_counted)


def test_bad_input_is_refused() -> None:
    with pytest.raises(PlanError, match="deadline_s"):
        expected_round_time(MODELS[0], np.inf)
    with pytest.raises(PlanError, match="extend it"):
        choose_deadline(IndependentRounds(MODELS[0]), make_plan, search_s=(0.1, 0.2))
    with pytest.raises(PlanError, match="least < largest"):
        choose_deadline(JobRounds(MODELS[0]), make_plan, search_s=(2.0, 1.0))
    with pytest.raises(PlanError, match="'fold' or 'drop'"):
        JobRounds(MODELS[0], late="wait")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="max_staleness >= 0"):
        JobRounds(MODELS[0], max_staleness=-1)
