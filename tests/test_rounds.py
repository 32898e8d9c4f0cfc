"""The job's rules: who is in, when a round closes, what is folded; pure, driven by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torch_qgc.errors import ConfigError, ProtocolError
from torch_qgc.job.rounds import Fate, Rounds
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
        ClosingRule(**rule),  # type: ignore[arg-type]
        np.full(K, 1.0 / K),
        np.full(K, 0.9),
        first_step=0,
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
    rounds = rounds_at(frozenset(), frozenset(range(K)), deadline_s=1.0, late=late, max_staleness=8)
    assert rounds.arrive(4, made_for, 0, None, 0.5) is fate


def test_payloads_of_the_future_twice_or_of_others_chunks_are_refused() -> None:
    rounds = rounds_at(frozenset({1}), frozenset(range(K)), deadline_s=1.0)
    for worker, made_for, chunk, word in ((1, 10, 0, "second"), (2, 11, 0, "cannot have begun"), (2, 10, 1, "chunk")):
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


@given(elapsed=st.floats(0, 10), usual=st.floats(0, 10))
def test_a_worker_waits_only_for_a_step_it_cannot_make_and_that_will_close(elapsed: float, usual: float) -> None:
    wait_s = DROP.wait_before_joining_s(5, elapsed, usual)
    if wait_s > 0:
        assert elapsed + usual > 1.0
        assert 0.25 <= elapsed <= 1.0
        assert elapsed + wait_s > 1.0
    assert wait_s < 1.25


@pytest.mark.parametrize(
    ("rule", "step", "elapsed", "usual"),
    [
        (DROP, 2, 0.9, 0.5),  # warm-up needs everybody: to wait here would be to wait for oneself
        (DROP, 5, 1.1, 0.5),  # past the deadline and open: it lacks its quorum
        (DROP, 5, 0.1, 5.0),  # a slow worker must take part now and then
        (DROP, 5, None, 0.5),
        (DROP, 5, 0.9, None),
        (ClosingRule(deadline_s=1.0, late="fold"), 5, 0.9, 0.5),  # a late payload is welcome
        (ClosingRule(deadline_s=None, late="drop"), 5, 0.9, 0.5),
    ],
)
def test_a_worker_joins_whenever_it_is_needed_or_of_use(
    rule: ClosingRule, step: int, elapsed: float | None, usual: float | None
) -> None:
    assert rule.wait_before_joining_s(step, elapsed, usual) == 0


def test_a_worker_back_in_mid_step_waits_for_the_next_one() -> None:
    assert DROP.wait_before_joining_s(5, 0.9, 0.5) == pytest.approx(0.35)


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
