"""Why workers are slow: estimates against simulated truth, on a virtual clock."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from torch_qgc.errors import PlanError
from torch_qgc.job.line import Interval
from torch_qgc.job.measure import Estimate, Measurements
from torch_qgc.job.pauses import find_pauses, share_of
from torch_qgc.planner.delays import Empirical, LogNormal, ShiftedExponential

Draw = Callable[[np.random.Generator, int], np.ndarray]

LN2 = math.log(2.0)
FIXED_S, PER_BATCH_S, LATENCY_S, PER_BYTE_S = 0.4, 1.2, 0.05, 2e-7

# Noise of a worker's own time with the median of its ordinary steps and its share of pauses.
NOISE: dict[str, tuple[Draw, float, float]] = {
    "shifted exponential": (lambda rng, n: rng.exponential(0.5, n), 0.5 * LN2, 0.0),
    "log-normal": (lambda rng, n: rng.lognormal(-1.0, 0.6, n), math.exp(-1.0), 0.0),
    "bimodal": (lambda rng, n: rng.exponential(0.2, n) + 8.0 * (rng.random(n) < 0.08), 0.2 * LN2, 0.08),
    "half pauses": (lambda rng, n: rng.exponential(0.2, n) + 6.0 * (rng.random(n) < 0.5), 0.2 * LN2, 0.5),
}


def covers(interval: Interval, truth: float) -> bool:
    return interval.low <= truth <= interval.high


def least_share(runs: int, level: float = 0.95) -> float:
    """Return the share that intervals of a level cover at least in so many runs, three standard errors below it."""
    return level - 3.0 * math.sqrt(level * (1.0 - level) / runs)


def train(
    measured: Measurements, own_s: np.ndarray, *, batch: float | np.ndarray = 1.0, link_s: float | np.ndarray = 0.01
) -> list[int]:
    """Note steps of worker 0 with 10^6 bytes per batch; return those that raised an alarm."""
    alarms = []
    for step, (own, size, link) in enumerate(zip(own_s, *np.broadcast_arrays(batch, link_s, own_s)[:2])):
        if measured.note(0, batch=float(size), own_s=float(own), link_s=float(link), nbytes=int(1e6 * size)):
            alarms.append(step)
    return alarms


def own_times(noise: str, batch: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return FIXED_S + PER_BATCH_S * batch + NOISE[noise][0](rng, len(batch))


# ---------------------------------------------------------------------------------- estimates cover the truth
@pytest.mark.parametrize("noise", list(NOISE))
def test_intervals_cover_the_truth_at_their_stated_rate(noise: str) -> None:
    """Over workers whose batch and bytes changed once within the memory, all from the same distribution."""
    runs, covered = 150, np.zeros(5)
    batch = np.repeat([1.0, 0.6], [40, 24])
    _, median, pausing = NOISE[noise]
    for seed in range(runs):
        rng, measured = np.random.default_rng(seed), Measurements(1)
        link = LATENCY_S + PER_BYTE_S * 1e6 * batch + rng.exponential(0.1, 64)
        assert not train(measured, own_times(noise, batch, rng), batch=batch, link_s=link)
        e = measured.estimate(0)
        covered += [
            covers(e.per_batch_s, PER_BATCH_S),
            covers(e.fixed_s, FIXED_S + median),
            covers(e.per_byte_s, PER_BYTE_S),
            covers(e.latency_s, LATENCY_S + 0.1 * LN2),
            covers(e.pauses.share, pausing),
        ]
    assert np.all(covered / runs > least_share(runs)), covered / runs


def test_under_a_slow_drift_intervals_cover_the_median_of_the_memory_and_estimates_lag_by_half_of_it() -> None:
    """A worker whose speed follows a sine over the day, +-30 % in 2,000 steps; batches alternate at random.

    What holds: intervals are for the mean over the steps remembered, and the present is off by less than the drift
    of half of them. (If the batch changes once while times drift, the drift counts as an effect of the batch.)
    """
    runs, covered, asked = 6, 0, 0
    for seed in range(runs):
        rng, measured, steps = np.random.default_rng(seed), Measurements(1), 2000
        level = 1.0 + 0.3 * np.sin(2.0 * np.pi * (np.arange(steps) / steps + rng.random()))
        batch = rng.choice([1.0, 0.6], size=steps)
        own = level * (FIXED_S + PER_BATCH_S * batch) + 0.3 * rng.exponential(size=steps)
        for start in range(0, steps, 125):
            stretch = slice(start, start + 125)
            train(measured, own[stretch], batch=batch[stretch])
            e, remembered = measured.estimate(0), level[start + 125 - measured.steps(0) : start + 125]
            covered += covers(e.per_batch_s, PER_BATCH_S * remembered.mean())
            asked += 1
            now = level[start + 124] * (FIXED_S + PER_BATCH_S) + 0.3 * LN2
            drift = np.ptp(remembered) / 2.0 * (FIXED_S + PER_BATCH_S)
            assert abs(e.usual_s(1.0, 1e6) - 0.01 - now) < drift + 0.25  # five standard errors of the median
    assert covered / asked > least_share(asked)


def test_a_worker_that_degrades_and_recovers_is_followed_at_once() -> None:
    """Five times slower in mid-run and back: seen within 16 steps, and 20 steps later intervals hold the new truth."""
    runs, covered = 100, np.zeros(2)
    for seed in range(runs):
        rng, measured = np.random.default_rng(seed), Measurements(1)
        for phase, factor in enumerate((1.0, 5.0, 1.0)):
            noise = rng.exponential(0.5, 50)
            alarms = train(measured, factor * (FIXED_S + PER_BATCH_S + noise))
            if phase:
                assert alarms
                assert alarms[0] < 16
                e = measured.estimate(0)
                assert e.steps < 50 + 16
                truth = factor * (FIXED_S + PER_BATCH_S + 0.5 * LN2)
                assert e.usual_s(1.0, 1e6) - 0.01 == pytest.approx(truth, rel=0.25)
                covered[phase - 1] += covers(e.per_batch_s, truth) and covers(e.fixed_s, truth / 3.0)
    assert np.all(covered / runs > least_share(runs, 0.975))


# ------------------------------------------------------------------------------------------------- changes
def test_false_alarms_stay_below_the_stated_rate_over_long_series() -> None:
    """Noise of all kinds, batches and bytes that change all the time: at 1e-4 a step, and at 1e-2."""
    for rate, steps in ((1e-4, 4000), (1e-2, 1500)):
        alarms = 0
        for seed, noise in enumerate(NOISE):
            rng = np.random.default_rng(seed)
            batch = np.concatenate([np.ones(steps // 2), rng.choice([0.3, 1.0, 1.7], size=steps // 2)])
            measured = Measurements(1, false_alarm=rate)
            link = LATENCY_S + PER_BYTE_S * 1e6 * batch + rng.exponential(0.1, steps)
            alarms += len(train(measured, own_times(noise, batch, rng), batch=batch, link_s=link))
        total = steps * len(NOISE)
        assert alarms <= total * rate + 3.0 * math.sqrt(total * rate)


@pytest.mark.parametrize(
    ("noise", "factor", "most"),
    [
        ("shifted exponential", 2.0, 16),
        ("shifted exponential", 5.0, 4),
        ("log-normal", 2.0, 16),
        ("log-normal", 5.0, 4),
        ("bimodal", 2.0, 32),
        ("bimodal", 5.0, 32),
    ],
)
def test_a_change_is_seen_within_a_bounded_number_of_steps(noise: str, factor: float, most: int) -> None:
    """In 98 of 100 runs; the worker computes more slowly, its random waits stay."""
    soon = 0
    for seed in range(100):
        rng, measured = np.random.default_rng(seed), Measurements(1)
        draw = NOISE[noise][0]
        train(measured, FIXED_S + PER_BATCH_S + draw(rng, 64))
        alarms = train(measured, factor * (FIXED_S + PER_BATCH_S) + draw(rng, most))
        soon += bool(alarms)
    assert soon >= 98


def test_a_link_that_slows_down_is_seen_although_computing_takes_most_of_the_step() -> None:
    rng, measured = np.random.default_rng(0), Measurements(1)
    train(measured, 10.0 + rng.exponential(size=64), link_s=0.1 + rng.exponential(0.01, 64))
    assert train(measured, 10.0 + rng.exponential(size=8), link_s=0.3 + rng.exponential(0.01, 8))
    assert measured.estimate(0).per_byte_s.value == pytest.approx(0.3e-6, rel=0.1)


def test_a_change_of_batch_is_no_change_of_the_worker_and_separates_what_depends_on_it() -> None:
    rng, measured = np.random.default_rng(1), Measurements(1)
    train(measured, FIXED_S + PER_BATCH_S + rng.exponential(0.02, 64))
    before = measured.estimate(0)
    median = FIXED_S + PER_BATCH_S + 0.02 * LN2
    assert before.per_batch_s.value == pytest.approx(median, rel=0.02)
    assert before.per_batch_s.low == before.fixed_s.low == before.fixed_s.value == 0.0
    assert before.fixed_s.high == pytest.approx(median, rel=0.02)
    assert not train(measured, FIXED_S + 0.25 * PER_BATCH_S + rng.exponential(0.02, 12), batch=0.25)
    after = measured.estimate(0)
    assert after.steps == 64
    assert after.per_batch_s.value == pytest.approx(PER_BATCH_S, rel=0.05)
    assert after.fixed_s.value == pytest.approx(FIXED_S, abs=0.05)
    assert after.fixed_s.high - after.fixed_s.low < 0.2


def test_only_the_newest_steps_count_and_forgetting_starts_anew() -> None:
    measured = Measurements(2, memory=16)
    for step in range(100):
        measured.note(1, batch=1.0, own_s=1.0 + 0.001 * step, link_s=0.0, nbytes=0)
    assert (measured.steps(0), measured.steps(1)) == (0, 16)
    np.testing.assert_allclose(measured.estimate(1).recent[2], 1.0 + 0.001 * np.arange(84, 100))
    measured.forget(1)
    assert measured.steps(1) == 0
    with pytest.raises(PlanError, match="worker 1: expected at least one step"):
        measured.estimate(1)


# ----------------------------------------------------------------------------------------- pauses and tails
@pytest.mark.parametrize("count", [6, 16, 64])
def test_tails_are_rarely_taken_for_pauses(count: int) -> None:
    """One window in twenty at most has a step beyond what is explained, if either model holds."""
    rng, runs = np.random.default_rng(2), 1000
    for draw in (lambda: 1.0 + rng.exponential(size=count), lambda: rng.lognormal(0.0, 0.8, size=count)):
        mistaken = sum(find_pauses(draw()).any() for _ in range(runs))
        assert mistaken / runs < 0.05 + 3.0 * math.sqrt(0.05 * 0.95 / runs)


@pytest.mark.parametrize("share", [0.03, 0.2, 0.5])
def test_pauses_are_told_apart_from_the_tail(share: float) -> None:
    rng, wrong, lengths = np.random.default_rng(3), 0, []
    for _ in range(200):
        paused = rng.random(64) < share
        times = 1.0 + rng.exponential(0.3, 64) + 8.0 * paused
        found = find_pauses(times)
        wrong += int(np.count_nonzero(found != paused))
        if found.any():
            lengths.append(np.median(times[found]) - np.median(times[~found]))
    assert wrong / (200 * 64) < 0.01
    assert np.median(lengths) == pytest.approx(8.0, abs=0.2)


def test_equal_times_have_no_pauses_and_a_single_long_one_among_them_is_one() -> None:
    assert not find_pauses(np.ones(64)).any()
    assert not find_pauses(np.zeros(64)).any()
    times = np.ones(64)
    times[7] = 3.0
    assert np.flatnonzero(find_pauses(times)).tolist() == [7]


def test_the_share_of_pauses_is_never_less_sure_than_stated() -> None:
    """Against the binomial distribution itself, for every share."""
    from scipy import stats

    intervals = [share_of(count, 20) for count in range(21)]
    for share in np.linspace(0.01, 0.99, 50):
        chance = stats.binom.pmf(np.arange(21), 20, share)
        assert sum(p for p, interval in zip(chance, intervals) if covers(interval, share)) >= 0.95
    assert (intervals[0].low, intervals[20].high) == (0.0, 1.0)


@pytest.mark.parametrize("noise", list(NOISE))
def test_the_tail_at_a_batch_never_tried_is_that_of_the_worker(noise: str) -> None:
    """Delays at half of the batch, from steps at 1 and .7: late as often as the worker would be."""
    rng, late = np.random.default_rng(4), []
    truth = FIXED_S + PER_BATCH_S * 0.5 + NOISE[noise][0](rng, 100_000) + 0.01
    deadlines = np.quantile(truth, [0.25, 0.8, 0.97])
    batch = np.repeat([1.0, 0.7], [32, 32])
    for _ in range(60):
        measured = Measurements(1)
        train(measured, own_times(noise, batch, rng), batch=batch)
        late.append(np.asarray(measured.estimate(0).delays(0.5, 5e5).straggle_probability(deadlines)))
    np.testing.assert_allclose(np.mean(late, axis=0), [0.75, 0.2, 0.03], atol=0.06)


@pytest.mark.parametrize(
    ("draw", "kind"),
    [
        (lambda rng: 1.0 + rng.exponential(0.5, 64), ShiftedExponential),
        (lambda rng: rng.lognormal(0.0, 0.4, 64), LogNormal),
        (lambda rng: 1.0 + rng.exponential(0.5, 64) + 8.0 * (np.arange(64) % 12 == 0), Empirical),
        (lambda rng: 1.0 + rng.beta(0.2, 0.2, 64), Empirical),
    ],
    ids=["shifted exponential", "log-normal", "pauses", "neither"],
)
def test_the_model_of_the_tail_is_the_one_that_fits(
    draw: Callable[[np.random.Generator], np.ndarray], kind: type
) -> None:
    rng, chosen = np.random.default_rng(7), []
    for _ in range(30):
        measured = Measurements(1)
        train(measured, draw(rng), link_s=0.0)
        chosen.append(type(measured.estimate(0).delays(1.0, 1e6)))
    assert chosen.count(kind) >= 24  # one window in twenty has a step that looks like a pause


def test_steps_of_the_same_batch_say_most_about_its_tail() -> None:
    """A tail that grows with the batch: as soon as sixteen steps had this batch, the others are left out."""
    rng, measured = np.random.default_rng(5), Measurements(1)
    batch = np.repeat([1.0, 0.25], [44, 20])
    train(measured, batch * (1.0 + 0.5 * rng.exponential(size=64)), batch=batch)
    e = measured.estimate(0)
    assert e.delays(0.25, 25e4).late_fraction(0.25 * 4.0) < 0.05 < e.delays(0.5, 5e5).late_fraction(0.25 * 4.0)


# -------------------------------------------------------------------------------------------------- causes
def steps_of(cause: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return own and link seconds [64] of a worker that is slow for this cause, or of a usual one."""
    own, link = 1.0 + rng.exponential(0.1, 64), 0.05 + rng.exponential(0.02, 64)
    if cause == "compute":
        own *= 5.0
    elif cause == "link":
        link *= 40.0
    elif cause == "tail":
        own += 0.9 + rng.exponential(5.8, 64)
    elif cause == "pauses":
        own += 8.0 * (np.arange(64) % 10 == 3)
    return own, link


@pytest.mark.parametrize("cause", ["none", "compute", "link", "tail", "pauses"])
def test_the_cause_is_what_makes_the_worker_slower_than_others(cause: str) -> None:
    right = 0
    for seed in range(20):
        rng, measured = np.random.default_rng(seed), Measurements(5)
        for worker in range(4):  # worker 4 has not begun yet
            for own, link in zip(*steps_of(cause if worker == 2 else "none", rng)):
                measured.note(worker, batch=1.0, own_s=own, link_s=link, nbytes=10**6)
        expected = ["none"] * 5
        expected[2] = cause
        right += measured.causes() == expected
        assert measured.cause(2) == measured.causes()[2]
    assert right >= 18


def test_a_smaller_batch_does_not_hide_that_a_worker_computes_slowly() -> None:
    measured = Measurements(3)
    for worker, (batch, per_batch) in enumerate([(1.4, 1.0), (1.4, 1.0), (0.2, 7.0)]):
        for _ in range(20):
            measured.note(worker, batch=batch, own_s=per_batch * batch, link_s=0.1, nbytes=1000)
    assert measured.causes() == ["none", "none", "compute"]


def test_the_parts_of_a_step_add_up_to_its_mean() -> None:
    rng, measured = np.random.default_rng(6), Measurements(1)
    own = own_times("bimodal", np.ones(64), rng)
    train(measured, own, link_s=rng.random(64))
    e: Estimate = measured.estimate(0)
    assert e.parts_s(1.0, 1e6).sum() == pytest.approx(e.recent[2:].sum(axis=0).mean())
    assert np.all(e.parts_s(1.0, 1e6) > 0)


# ------------------------------------------------------------------------------------------------ bad input
@pytest.mark.parametrize(
    "bad",
    [
        {"batch": 0.0},
        {"batch": math.inf},
        {"own_s": -1.0},
        {"own_s": math.nan},
        {"link_s": math.nan},
        {"link_s": math.inf},
        {"nbytes": -1},
        {"worker": 2},
        {"worker": -1},
    ],
)
def test_what_cannot_be_a_step_is_refused_and_not_entered(bad: dict[str, float]) -> None:
    measured = Measurements(2)
    step = {"worker": 0, "batch": 1.0, "own_s": 1.0, "link_s": 0.1, "nbytes": 10} | bad
    with pytest.raises(PlanError, match="expected batch > 0"):
        measured.note(**step)  # type: ignore[arg-type]
    assert (measured.steps(0), measured.steps(1)) == (0, 0)


@pytest.mark.parametrize("bad", [{"workers": 0}, {"memory": 8}, {"false_alarm": 0.0}, {"false_alarm": 1.0}])
def test_settings_that_cannot_work_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(PlanError, match="memory >= 16"):
        Measurements(**({"workers": 1} | bad))  # type: ignore[arg-type]
