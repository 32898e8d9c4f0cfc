"""Batches for slow processors and bits for slow links: against brute force, and what each cause is answered with."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_qgc.job.levers import Speeds, UsualRounds, choose_bits, cut_batches
from torch_qgc.job.stopwatch import Stopwatch, Timed
from torch_qgc.kernels import payload_bytes
from torch_qgc.planner import make_plan
from torch_qgc.planner.cadence import JobRounds
from torch_qgc.planner.delays import Empirical
from torch_qgc.planner.variance import quantization_variance
from torch_qgc.protocol.contract import ClosingRule
from torch_qgc.protocol.messages import Begin, Push
from torch_qgc.simulator import Machines
from torch_qgc.simulator.arrivals import JobRounds as Clock
from torch_qgc.simulator.delays import DelaySource
from torch_qgc.simulator.machines import Demand

K, NUMEL, NOISE = 4, 1_000_000, 8.0
EQUAL = np.full(K, 1.0 / K)
NOBODY = np.zeros(K)


def speeds(
    per_batch: list[float], fixed: list[float] | None = None, link: list[float] | None = None, down: float = 0.0
) -> Speeds:
    """Four workers; `link` is the seconds that each takes for a gradient in fp32."""
    per_byte = np.zeros(K) if link is None else np.array(link) / (4 * NUMEL)
    fixed_s = np.full(K, 0.05) if fixed is None else np.array(fixed)
    return Speeds(np.array(per_batch), fixed_s, per_byte, np.zeros(K), np.full(K, down))


# ---------------------------------------------------------------------------------------------- what rounds cost
@settings(max_examples=50, deadline=None)
@given(
    own=st.lists(st.floats(0.1, 10.0), min_size=K, max_size=K),
    up=st.lists(st.floats(0.0, 3.0), min_size=K, max_size=K),
    noise=st.floats(0.0, 20.0),
    limit_s=st.floats(0.5, 20.0) | st.just(math.inf),
)
def test_the_cost_is_the_least_over_all_lengths_of_rounds(
    own: list[float], up: list[float], noise: float, limit_s: float
) -> None:
    times = np.array(own) + up
    least_s, best = float(np.sort(times)[K // 2 - 1]), math.inf
    for round_s in {max(min(t, limit_s), least_s) for t in times if t >= least_s}:
        cost = 1.0
        for k in range(K):
            rate = stale = 1.0
            if times[k] <= round_s:
                stale = 0.0
            else:
                rate = min(round_s / max(own[k], up[k]), 1.0)
                stale = 32.0 if up[k] > max(own[k], round_s) else times[k] / round_s
            cost += stale / K + (1 - rate + noise) / rate / K**2
        best = min(best, round_s * cost)
    rounds = UsualRounds(shares=EQUAL, limit_s=limit_s)
    got = rounds.cost(np.ones(K), np.array(own), np.array([up, NOBODY]), np.full(K, noise))
    assert got == pytest.approx(best)


def test_samples_count_alike_where_data_can_move() -> None:
    """Of two workers with a fifth of the batch each, none has to be heard as loudly as the others."""
    batches, ways = np.array([1.6, 1.6, 0.4, 0.4]), np.zeros((2, K))
    fixed, moved = (
        UsualRounds(shares=EQUAL, moves=moves).cost(batches, np.ones(K), ways, NOISE / batches)
        for moves in (False, True)
    )
    assert moved == pytest.approx(1.0 + NOISE / batches.sum())
    assert moved < fixed


# ------------------------------------------------------------------------------------------------------- batches
def cut(s: Speeds, now: list[float] | None = None, most: float = 2.0) -> np.ndarray:
    at = np.ones(K) if now is None else np.array(now)
    ways = s.ways_s(np.full(K, float(payload_bytes(NUMEL, 4))))
    return cut_batches(s, UsualRounds(shares=EQUAL), ways, NOISE / at, at, 32, most)


@pytest.mark.parametrize("factor", [2.0, 5.0, 8.0])
def test_a_slow_processor_gets_the_batch_with_which_it_makes_the_step(factor: float) -> None:
    s = speeds([1.0, 1.0, 1.0, factor])
    batches = cut(s)
    assert batches.sum() == pytest.approx(K)
    own_s = s.own_s(batches)
    assert own_s.max() < 1.12 * own_s.min()  # but for whole samples


def test_batches_that_are_about_right_stay() -> None:
    for now in ([1.0, 1.0, 1.0, 1.0], [1.0625, 0.9375, 1.0625, 0.9375]):
        np.testing.assert_array_equal(cut(speeds([1.0, 1.03, 0.98, 1.01]), now), now)


def test_a_worker_that_recovers_gets_its_batch_back_in_any_company() -> None:
    batches = cut(speeds([1.0] * K), [1.2, 1.2, 1.2, 0.4])
    np.testing.assert_array_equal(batches, np.ones(K))


def test_a_worker_with_a_long_tail_keeps_its_batch() -> None:
    """A smaller one would not bring it into the step, and only make what it sends noisier."""
    assert cut(speeds([1.0] * K, [0.05, 0.05, 0.05, 5.0]))[3] >= 1.0


# ---------------------------------------------------------------------------------------------------------- bits
VARIANCE = np.tile(quantization_variance(np.arange(17)), (K, 1)) * (1 + NOISE) + NOISE
VARIANCE[:, :2] = np.inf


def bits_for(s: Speeds, now: int, limit_s: float = math.inf) -> np.ndarray:
    rounds = UsualRounds(shares=EQUAL, limit_s=limit_s)
    return choose_bits(s, rounds, np.ones(K), VARIANCE, VARIANCE / K**2, now * K, NUMEL, np.full(K, now))


def test_links_that_take_no_noticeable_time_keep_their_bits() -> None:
    np.testing.assert_array_equal(bits_for(speeds([1.0] * K, link=[0.01] * K), 8), np.full(K, 8))


def test_a_link_too_slow_for_its_payloads_carries_fewer_bits_before_a_deadline_is_chosen() -> None:
    """At eight bits it is busy for twice as long as a step takes the others, and payloads would queue."""
    s = speeds([1.0] * K, link=[0.02, 0.02, 0.02, 8.0])
    bits = bits_for(s, 8)
    assert s.ways_s(np.array([payload_bytes(NUMEL, int(b)) for b in bits], float))[0, 3] < 1.05
    assert bits[3] < 8 <= bits[:3].min()


def test_with_a_given_deadline_links_carry_what_is_in_time() -> None:
    s = speeds([1.0] * K, link=[0.02, 0.02, 0.02, 1.6])
    bits = bits_for(s, 8, limit_s=1.3)
    nbytes = np.array([payload_bytes(NUMEL, int(b)) for b in bits], dtype=float)
    assert np.all(s.own_s(np.ones(K)) + s.ways_s(nbytes).sum(axis=0) <= 1.3)
    # A worker that computes for longer than that is not late because of its link.
    assert bits_for(speeds([1.0, 1.0, 1.0, 3.0]), 8, limit_s=1.3)[3] == 8


# ------------------------------------------------------------------------------------- what slow links are taken for
def clock(machines: Machines, deadline_s: float, bits: int) -> Clock:
    plan = make_plan([0.05] * machines.workers, bits_per_coordinate=bits)
    everybody, source = np.ones(machines.workers, dtype=bool), DelaySource(machines, machines.workers, 0)
    rule = ClosingRule(deadline_s=deadline_s, quorum=2)
    return Clock(source, rule, everybody, plan, demand=Demand((NUMEL,), (NUMEL,), 8), log_steps=256)


@pytest.mark.parametrize(("up_s", "down_s"), [(4.0, 0.0), (4.0, 3.0), (6.4, 1.6)])
def test_a_late_worker_computes_while_its_link_is_busy(up_s: float, down_s: float) -> None:
    """Rates, ages and lengths of rounds as predicted, although payload and result take longer than the rest does."""
    machines = Machines(workers=4, batch_s=1.0, jitter=0.02, up_s=(0, 0, 0, up_s), down_s=(0, 0, 0, down_s))
    rounds, steps = clock(machines, 1.2, 4), 300
    counts, ages = np.zeros((2, 4))
    for step in range(steps):
        outcome = rounds.close(step)
        for worker, made_for, _ in outcome.contributions:
            counts[worker] += 1
            ages[worker] += step - made_for
    ways = np.array([[0, 0, 0, up_s / 8], [0, 0, 0, down_s / 4]])
    own_s = np.array([[machines.times(np.random.default_rng(i), 0, rounds._load(0)).own_s for i in range(64)]])[0]
    cadence = JobRounds(Empirical(delays_s=own_s + ways.sum(axis=0), caution=0.0), ways_s=ways, max_staleness=32)
    predicted = cadence.cadence(1.2)
    assert outcome.closed_at_s / steps == pytest.approx(predicted.round_s, rel=0.03)
    np.testing.assert_allclose(counts / steps, predicted.rates, atol=0.05)
    np.testing.assert_allclose(ages / counts, predicted.staleness, atol=0.7)


def test_payloads_queue_where_a_link_is_busy_for_longer_than_a_round() -> None:
    """They grow as old as they may, and the prediction says so: such a deadline is not chosen."""
    machines = Machines(workers=4, batch_s=1.0, jitter=0.02, up_s=(0, 0, 0, 16.0))
    rounds = clock(machines, 1.2, 4)
    ages = [
        step - made_for
        for step in range(300)
        for worker, made_for, _ in rounds.close(step).contributions
        if worker == 3
    ]
    assert max(ages[-20:]) > 16
    delays = np.tile([1.0, 1.0, 1.0, 3.0], (64, 1))
    ways = np.array([[0, 0, 0, 2.0]])
    cadence = JobRounds(Empirical(delays_s=delays, caution=0.0), ways_s=ways, max_staleness=32).cadence(1.2)
    assert cadence.staleness[3] == 32


def test_a_link_is_timed_although_announcements_queue_behind_payloads() -> None:
    """A worker that computes for 1 s and sends for 1.5 s, while others close a step every 1.1 s."""
    watch, timed, free_s, now = Stopwatch(1), list[Timed](), 0.0, 0.0
    events: list[tuple[float, int, str, int]] = [(1.1 * (step + 1), 1, "close", step) for step in range(40)]
    step = 0
    for _ in range(12):
        begun_s = max(now, free_s)  # behind the payload before
        sent_s = now + 1.0
        free_s = max(sent_s, free_s) + 1.5
        events += [(begun_s, 2, "begin", step), (free_s, 0, "push", step)]
        now, step = sent_s, max(int(sent_s / 1.1 + 1e-9), step + 1)
        now = max(now, 1.1 * step)  # a step that has not begun yet is waited for
    for at_s, _, kind, of in sorted(events):
        if kind == "close":
            watch.close(of, at_s)
        elif kind == "begin":
            watch.begin(0, Begin(of), at_s)
        else:
            told = watch.push(0, Push(of, 0, 4, 0.0, 0.0, spent_s=1.0), at_s)
            timed += [] if told is None else [told]
    assert len(timed) >= 10
    np.testing.assert_allclose([t.link_s for t in timed], 1.5, atol=1e-9)
