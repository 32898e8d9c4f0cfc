"""The job's rules: who is in, when a round closes, what is folded; pure, driven by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torch_qgc.errors import ConfigError, ProtocolError
from torch_qgc.job.courses import Courses
from torch_qgc.job.rounds import Fate, Rounds
from torch_qgc.planner import make_plan
from torch_qgc.protocol.contract import ClosingRule

K = 10
WORKERS = st.frozensets(st.integers(0, 7))


def rounds_at(
    present: frozenset[int],
    awaited: frozenset[int],
    *,
    step: int = 10,
    began_at_s: float | None = 0.0,
    log_steps: int = 256,
    **rule: object,
) -> Rounds[None]:
    """The open round of a step, with the workers alive that are awaited, and the payloads of some that are in."""
    made: Rounds[None] = Rounds(
        Courses(ClosingRule(**rule), make_plan([0.1] * K)),  # type: ignore[arg-type]
        log_steps=log_steps,
    )
    made._open[0].step = step  # as if ten steps had closed
    if began_at_s is not None:
        assert made.begin(0, step, began_at_s)
    for worker in range(K):
        made.join(worker, step, 0.0)
    for worker in present:
        assert made.arrive(worker, step, 0, None, 0.0) is Fate.IN_TIME
    for worker in set(range(K)) - awaited:
        made.leave(worker, 0.0)
    return made


@given(present=WORKERS, extra=WORKERS, now=st.floats(0, 100))
def test_it_closes_at_once_when_all_awaited_are_in(present: frozenset[int], extra: frozenset[int], now: float) -> None:
    if present:
        assert rounds_at(present | extra, present, deadline_s=1e6, warmup_steps=0).close_due(now)


@given(present=WORKERS, awaited=WORKERS, now=st.floats(0, 1e9))
def test_without_deadline_it_never_closes_before_all_are_in(
    present: frozenset[int], awaited: frozenset[int], now: float
) -> None:
    closed = rounds_at(present, awaited, deadline_s=None).close_due(now)
    assert bool(closed) == bool(awaited and awaited <= present)


@given(present=WORKERS, awaited=WORKERS, now=st.floats(0, 1e9))
def test_warm_up_waits_for_all(present: frozenset[int], awaited: frozenset[int], now: float) -> None:
    closed = rounds_at(present, awaited, deadline_s=0.1, warmup_steps=11).close_due(now)
    assert bool(closed) == bool(awaited and awaited <= present)


@given(present=WORKERS, late=st.integers(8, 9), quorum=st.integers(1, 8), now=st.floats(0, 10))
def test_after_the_deadline_it_closes_on_a_quorum(present: frozenset[int], late: int, quorum: int, now: float) -> None:
    awaited = present | {late}
    rounds = rounds_at(present, awaited, began_at_s=1.0, deadline_s=2.0, warmup_steps=0, quorum=quorum)
    expected = now >= 1.0 + 2.0 and len(present) >= min(quorum, len(awaited))
    assert bool(rounds.close_due(now)) == expected


def test_a_round_nobody_has_begun_has_no_deadline() -> None:
    rounds = rounds_at(frozenset({1}), frozenset({1, 2}), began_at_s=None, deadline_s=1.0, warmup_steps=0)
    assert not rounds.close_due(1e9)
    assert rounds.next_deadline_s(0.0) == float("inf")


def test_a_worker_about_to_fall_off_the_log_is_waited_for() -> None:
    rounds = rounds_at(frozenset({1, 2}), frozenset({1, 2, 3}), log_steps=4, deadline_s=1.0, warmup_steps=0)
    rounds.roster._position[3] = 5  # with a log of 4 steps, step 10 must not close without it
    assert not rounds.close_due(5.0)
    rounds.arrive(3, 10, 0, None, 6.0)
    assert rounds.close_due(6.0)


def test_a_folded_payload_is_no_arrival() -> None:
    rounds = rounds_at(frozenset({1}), frozenset({1, 2, 3}), deadline_s=1.0, warmup_steps=0, quorum=2)
    assert rounds.arrive(2, 9, 0, None, 0.5) is Fate.FOLDED
    assert rounds.present(0) == {1}
    assert not rounds.close_due(5.0)
    rounds.arrive(3, 10, 0, None, 6.0)
    (closing,) = rounds.close_due(6.0)
    assert [(w, s) for w, s, _ in closing.payloads] == [(1, 10), (2, 9), (3, 10)]
    assert closing.extended_s == pytest.approx(5.0)


@pytest.mark.parametrize(
    ("late", "made_for", "fate"),
    [("fold", 9, Fate.FOLDED), ("fold", 2, Fate.FOLDED), ("fold", 1, Fate.DROPPED), ("drop", 9, Fate.DROPPED)],
)
def test_what_is_late_is_folded_up_to_the_staleness_allowed(late: str, made_for: int, fate: Fate) -> None:
    rule: dict[str, Any] = dict(deadline_s=1.0, late=late, max_staleness=8)
    rounds = rounds_at(frozenset(), frozenset(range(K)), warmup_steps=0, **rule)
    assert rounds.arrive(4, made_for, 0, None, 0.5) is fate


@pytest.mark.parametrize("rule", [{"deadline_s": None}, {"deadline_s": 1.0, "warmup_steps": 10}])
def test_what_is_late_for_a_step_that_has_waited_for_all_is_dropped(rule: dict[str, Any]) -> None:
    """The worker counted as lost when that step closed, and the others have stood in for it."""
    rounds = rounds_at(frozenset(), frozenset(range(K)), **rule)
    assert rounds.arrive(4, 9, 0, None, 0.5) is Fate.DROPPED


def test_a_payload_that_is_said_again_counts_once() -> None:
    rounds = rounds_at(frozenset(), frozenset(range(K)), deadline_s=1.0)
    assert rounds.arrive(1, 10, 0, None, 0.5) is Fate.IN_TIME
    assert rounds.arrive(1, 10, 0, None, 0.5) is Fate.REPEATED
    assert rounds.arrive(1, 9, 0, None, 0.5) is Fate.REPEATED
    (closing,) = rounds.close_due(1.5)
    assert closing.counts.tolist() == [int(k == 1) for k in range(K)]


def test_payloads_of_the_future_or_of_others_chunks_are_refused() -> None:
    rounds = rounds_at(frozenset({1}), frozenset(range(K)), deadline_s=1.0)
    for worker, made_for, chunk, word in ((2, 11, 0, "cannot have begun"), (2, 10, 1, "chunk")):
        with pytest.raises(ProtocolError, match=word):
            rounds.arrive(worker, made_for, chunk, None, 0.5)
    with pytest.raises(ProtocolError, match="has not closed yet"):
        rounds.begin(1, 11, 0.5)


@given(gone=st.sets(st.integers(0, K - 1), max_size=K - 1))
def test_the_shares_of_the_dead_are_spread_over_the_living(gone: set[int]) -> None:
    rounds = rounds_at(frozenset(range(K)) - gone, frozenset(range(K)) - gone, deadline_s=None)
    (closing,) = rounds.close_due(1.0)
    shares = np.full(K, 1.0 / K)
    weights = shares / closing.rates
    assert weights[closing.alive].sum() == pytest.approx(1.0)
    assert set(np.flatnonzero(~closing.alive)) == gone


@given(sent=st.sets(st.integers(0, K - 1), min_size=1), gone=st.sets(st.integers(0, K - 1)))
def test_the_weights_of_a_round_sum_to_one_when_workers_die_after_they_have_sent(
    sent: set[int], gone: set[int]
) -> None:
    """What a worker had sent stays in the round, so its share must not be spread over the others as well."""
    rounds = rounds_at(frozenset(sent), frozenset(range(K)) - gone, deadline_s=1.0, warmup_steps=0)
    (closing,) = rounds.close_due(1.0)
    assert closing.counts.tolist() == [int(k in sent) for k in range(K)]
    assert set(np.flatnonzero(closing.alive)) == set(range(K)) - (gone - sent)
    expected = np.full(K, 1.0 / K) / closing.rates * 0.9  # times r_k: the mean over arrivals
    assert expected[closing.alive].sum() == pytest.approx(1.0)


DROP = ClosingRule(deadline_s=1.0, late="drop", warmup_steps=3)


def courses_of(rule: ClosingRule) -> Courses:
    return Courses(rule, make_plan([0.1] * K))


@given(elapsed=st.floats(0, 10), usual=st.floats(1e-3, 10))
def test_a_worker_waits_only_for_a_step_that_is_half_done_and_is_about_to_close(elapsed: float, usual: float) -> None:
    wait_s = courses_of(DROP).wait_before_joining_s(5, elapsed, usual)
    closes_s = usual if elapsed + usual <= 1.0 else 1.0
    if wait_s > 0:
        assert closes_s / 4 <= elapsed <= closes_s
        assert elapsed + wait_s == pytest.approx(1.25 * closes_s)
    else:
        assert not closes_s / 4 <= elapsed <= closes_s
    assert wait_s < 1.25


@pytest.mark.parametrize(
    ("rule", "step", "elapsed", "usual"),
    [
        (DROP, 2, 0.9, 0.5),  # warm-up needs everybody: to wait here would be to wait for oneself
        (DROP, 5, 1.1, 0.5),  # past the deadline and open: it lacks its quorum
        (DROP, 5, 0.1, 5.0),  # a slow worker must take part now and then
        (DROP, 5, 0.1, 0.5),  # it has just begun
        (DROP, 5, 0.55, 0.4),  # it waits for somebody else
        (DROP, 5, None, 0.5),
        (DROP, 5, 0.9, None),
        (ClosingRule(deadline_s=1.0, late="fold"), 5, 0.9, 1.5),  # it makes no step: its late payloads are welcome
        (ClosingRule(deadline_s=None, late="drop"), 5, 0.9, 0.5),
    ],
)
def test_a_worker_joins_whenever_it_is_needed_or_of_use(
    rule: ClosingRule, step: int, elapsed: float | None, usual: float | None
) -> None:
    assert courses_of(rule).wait_before_joining_s(step, elapsed, usual) == 0


def test_a_worker_back_in_mid_step_waits_for_the_next_one() -> None:
    for late in ("fold", "drop"):
        courses = courses_of(ClosingRule(deadline_s=1.0, late=late, warmup_steps=3))  # type: ignore[arg-type]
        assert courses.wait_before_joining_s(5, 0.9, 0.5) == pytest.approx(0.35)
        assert courses.wait_before_joining_s(5, 0.3, 0.5) == pytest.approx(0.325)  # else all would wait for it


@pytest.mark.parametrize(
    "bad",
    [
        {"deadline_s": 0.0},
        {"deadline_s": float("nan")},
        {"deadline_s": -1.0},
        {"quorum": 0},
        {"late": "keep"},
        {"deadline_s": float("inf")},
        {"warmup_steps": -1},
        {"max_staleness": 1000},
        {"on_loss": "panic"},
    ],
)
def test_bad_rules_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        ClosingRule(**bad)  # type: ignore[arg-type]


def job_of(workers: int, **rule: object) -> Rounds[None]:
    """A job whose first step all have begun at 0 and made, each in 1 s."""
    made: Rounds[None] = Rounds(
        Courses(ClosingRule(**{"deadline_s": 2.0, "warmup_steps": 0, **rule}), make_plan([0.1] * workers)),  # type: ignore[arg-type]
        log_steps=256,
    )
    for worker in range(workers):
        made.join(worker, 0, 0.0)
        made.begin(worker, 0, 0.0)
    for worker in range(workers):
        made.arrive(worker, 0, 0, None, 1.0)
    assert made.close_due(1.0)
    return made


def make(rounds: Rounds[None], workers: tuple[int, ...], step: int, began_s: float, now: float) -> bool:
    """Let workers make a step; tell whether it closes with them."""
    for worker in workers:
        rounds.begin(worker, step, began_s)
    for worker in workers:
        rounds.arrive(worker, step, 0, None, now)
    return bool(rounds.close_due(now))


def test_a_worker_that_was_in_the_step_before_is_awaited_until_the_deadline() -> None:
    rounds = job_of(3)
    assert not make(rounds, (0, 1), 1, 1.0, 2.0)
    assert not rounds.close_due(2.99)
    assert rounds.close_due(3.0)


def test_a_worker_that_is_busy_with_an_older_step_costs_no_time() -> None:
    rounds = job_of(3)
    rounds.begin(2, 1, 1.0)
    assert not make(rounds, (0, 1), 1, 1.0, 2.0)
    assert rounds.close_due(3.0)  # at the deadline
    assert make(rounds, (0, 1), 2, 3.0, 4.0)  # worker 2 still computes step 1
    assert rounds.arrive(2, 1, 0, None, 4.5) is Fate.FOLDED


@pytest.mark.parametrize(("began_s", "awaited"), [(3.9, True), (4.1, False)])
def test_who_comes_to_an_open_step_is_awaited_if_it_can_make_the_deadline(began_s: float, awaited: bool) -> None:
    """The step's clock starts at 3 s, its deadline is at 5 s, and worker 2 needs a second."""
    rounds = job_of(3)
    assert not make(rounds, (0, 1), 1, 1.0, 2.0)
    assert rounds.close_due(3.0)
    for worker in (0, 1):
        rounds.begin(worker, 2, 3.0)
    rounds.take(2, 1, began_s)
    rounds.begin(2, 2, began_s)
    for worker in (0, 1):
        rounds.arrive(worker, 2, 0, None, 4.2)
    assert bool(rounds.close_due(4.2)) != awaited
    if awaited:
        assert rounds.arrive(2, 2, 0, None, 4.9) is Fate.IN_TIME
        assert rounds.close_due(4.9)


def test_a_payload_about_to_grow_too_old_is_awaited_until_the_deadline() -> None:
    rounds = job_of(3, max_staleness=2)
    rounds.begin(2, 1, 1.0)
    assert not make(rounds, (0, 1), 1, 1.0, 2.0)
    assert rounds.close_due(3.0)
    assert make(rounds, (0, 1), 2, 3.0, 4.0)
    assert not make(rounds, (0, 1), 3, 4.0, 5.0)  # closing it would drop what worker 2 computes
    assert rounds.arrive(2, 1, 0, None, 5.5) is Fate.FOLDED
    assert rounds.close_due(5.5)


@given(slow=st.floats(1.0, 40.0), seed=st.integers(0, 9))
def test_one_worker_of_any_speed_never_makes_the_others_wait_more_than_once_in_a_while(slow: float, seed: int) -> None:
    """In virtual time: K equal workers and a slower one; what steps cost beyond the workers' own second is bounded."""
    rng = np.random.default_rng(seed)
    workers, staleness, steps = 4, 32, 100
    rounds = job_of(workers, max_staleness=staleness)
    now, busy_until, made_for = 1.0, math.inf, None
    for step in range(1, steps):
        began = now
        for worker in range(workers - 1):
            rounds.begin(worker, step, began)
        if made_for is None:
            rounds.begin(workers - 1, step, began)
            busy_until, made_for = began + slow * rng.uniform(0.95, 1.05), step
        if busy_until < began + 1.0:
            rounds.arrive(workers - 1, made_for, 0, None, busy_until)
            made_for = None
        for worker in range(workers - 1):
            rounds.arrive(worker, step, 0, None, began + 1.0)
        now = began + 1.0
        while not rounds.close_due(now):
            now = min(busy_until if made_for is not None else math.inf, rounds.next_deadline_s(now))
            if made_for is not None and now == busy_until:
                rounds.arrive(workers - 1, made_for, 0, None, now)
                made_for = None
    contributions = (now - 1.0) / max(slow, 1.0)
    waits = steps / staleness if slow > staleness else contributions  # at most one a contribution, of a second each
    assert now <= 1.0 + (steps - 1) * 1.0 + 1.2 * waits + 3.0
