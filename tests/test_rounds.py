"""The pure rule: who is in, when does a round close."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torch_qgc.errors import ConfigError
from torch_qgc.job.rounds import ClosingRule, Round

WORKERS = st.frozensets(st.integers(0, 7))


def make_round(present: frozenset[int], step: int = 10, **rule: object) -> Round[None]:
    made: Round[None] = Round(step, 0, ClosingRule(**rule))  # type: ignore[arg-type]
    for worker in present:
        made.add(worker, step, None)
    return made


@given(present=WORKERS, extra=WORKERS, now=st.floats(0, 100))
def test_it_closes_at_once_when_all_awaited_are_in(present: frozenset[int], extra: frozenset[int], now: float) -> None:
    if present:
        current = make_round(present | extra, deadline_s=1e6, warmup_steps=0)
        assert current.is_due(now, 0.0, present)


@given(present=WORKERS, awaited=WORKERS, now=st.floats(0, 1e9))
def test_without_deadline_it_never_closes_before_all_are_in(
    present: frozenset[int], awaited: frozenset[int], now: float
) -> None:
    current = make_round(present, deadline_s=None)
    assert current.is_due(now, 0.0, awaited) == bool(awaited and awaited <= present)


@given(present=WORKERS, awaited=WORKERS, now=st.floats(0, 1e9))
def test_warm_up_waits_for_all(present: frozenset[int], awaited: frozenset[int], now: float) -> None:
    current = make_round(present, deadline_s=0.1, warmup_steps=11)
    assert current.is_due(now, 0.0, awaited) == bool(awaited and awaited <= present)


@given(present=WORKERS, late=st.integers(8, 9), quorum=st.integers(1, 8), now=st.floats(0, 10))
def test_after_the_deadline_it_closes_on_a_quorum(present: frozenset[int], late: int, quorum: int, now: float) -> None:
    awaited = present | {late}
    current = make_round(present, deadline_s=2.0, warmup_steps=0, quorum=quorum)
    expected = now >= 1.0 + 2.0 and len(present) >= min(quorum, len(awaited))
    assert current.is_due(now, 1.0, awaited) == expected


def test_a_round_nobody_has_begun_has_no_deadline() -> None:
    current = make_round(frozenset({1}), deadline_s=1.0, warmup_steps=0)
    assert not current.is_due(1e9, None, {1, 2})


def test_a_leashed_worker_is_waited_for() -> None:
    current = make_round(frozenset({1, 2}), deadline_s=1.0, warmup_steps=0)
    assert not current.is_due(5.0, 0.0, {1, 2, 3}, leashed={3})
    assert current.is_due(5.0, 0.0, {1, 2, 3}, leashed={2})


def test_a_folded_payload_is_no_arrival() -> None:
    current = make_round(frozenset({1}), deadline_s=1.0, warmup_steps=0, quorum=2)
    current.add(2, 9, None)
    assert current.present == {1}
    assert not current.is_due(5.0, 0.0, {1, 2, 3})


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
        {"warmup_steps": -1},
    ],
)
def test_bad_rules_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        ClosingRule(**bad)  # type: ignore[arg-type]
