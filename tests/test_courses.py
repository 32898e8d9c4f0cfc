"""What holds from which step on: in order, the same at both ends, and nothing but what a job can train with."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from helpers.simulated import make_spec, simple_plan
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_qgc.errors import ConfigError, PlanError, ProtocolError
from torch_qgc.job.courses import KEPT, Course, Courses
from torch_qgc.planner import Plan, make_plan
from torch_qgc.protocol import messages
from torch_qgc.protocol.contract import ClosingRule

PLANS = [make_plan([0.1, p], bits_per_coordinate=4, noise_ratio=1.0) for p in (0.1, 0.3, 0.6)]
RULE = ClosingRule(deadline_s=1.0, warmup_steps=2)
SPEC = make_spec(PLANS[0])
deadlines = st.none() | st.floats(1e-6, 1e9)


def course(version: int, from_step: int, plan: Plan = PLANS[1], deadline_s: float | None = 2.0) -> Course:
    return Course(version=version, from_step=from_step, plan=plan, deadline_s=deadline_s)


@given(
    first_step=st.integers(0, 1000),
    gaps=st.lists(st.tuples(st.integers(1, 5), st.integers(0, 2), deadlines), max_size=KEPT),
    asked=st.integers(-3, 400),
)
@settings(max_examples=200, deadline=None)
def test_a_course_holds_from_its_step_until_the_next_one_does(first_step: int, gaps: list[Any], asked: int) -> None:
    courses = Courses(RULE, PLANS[0], first_step)
    made, step = [courses.newest], first_step
    for version, (gap, plan, deadline_s) in enumerate(gaps, start=1):
        step += gap
        made.append(course(version, step, PLANS[plan], deadline_s))
        assert courses.add(made[-1])
    asked += first_step
    expected = [c for c in made if c.from_step <= asked or c.version == 0][-1]  # by brute force
    assert courses.at(asked) is expected
    assert courses.changes_at(asked) == (asked in [c.from_step for c in made[1:]])
    assert courses.newest is made[-1]
    assert courses.changes == tuple(made[1:])
    warming_up = asked < first_step + RULE.warmup_steps
    assert courses.deadline_s(asked) == (None if warming_up else expected.deadline_s)
    assert courses.waits_for_all(asked) == (warming_up or expected.deadline_s is None)


def test_the_job_begins_with_the_deadline_of_its_rule_and_waits_for_all_until_one_is_chosen() -> None:
    given_ = Courses(RULE, PLANS[0], 5)
    assert [given_.deadline_s(step) for step in (5, 6, 7, 100)] == [None, None, 1.0, 1.0]
    chosen = Courses(ClosingRule(deadline_s="auto", warmup_steps=0), PLANS[0])
    assert chosen.waits_for_all(0)
    assert chosen.add(course(1, 10))
    assert [chosen.deadline_s(step) for step in (9, 10)] == [None, 2.0]


def test_what_is_told_twice_is_taken_once_and_another_one_of_its_version_is_refused() -> None:
    courses = Courses(RULE, PLANS[0])
    assert courses.add(course(1, 3))
    assert courses.add(course(2, 4))
    assert not courses.add(course(1, 3))
    assert not courses.add(course(2, 4))
    for other in (course(1, 4), course(1, 3, PLANS[2]), course(2, 4, deadline_s=3.0), course(2, 4, deadline_s=None)):
        with pytest.raises(ProtocolError, match=rf"plan {other.version}: expected the one with digest \w+ from step"):
            courses.add(other)
    assert [c.version for c in courses.changes] == [1, 2]


@pytest.mark.parametrize(("version", "from_step"), [(2, 9), (3, 9), (1, 0), (1, -1), (7, 100)])
def test_what_is_out_of_order_is_refused_and_changes_nothing(version: int, from_step: int) -> None:
    courses = Courses(RULE, PLANS[0])
    with pytest.raises(ProtocolError, match="expected number 1, for a step after 0"):
        courses.add(course(version, from_step))
    assert courses.changes == ()
    courses.add(course(1, 5))
    with pytest.raises(ProtocolError, match="expected number 2, for a step after 5"):
        courses.add(course(2, 5))
    assert courses.newest.version == 1


def test_the_newest_courses_are_kept_and_the_one_that_the_job_has_begun_with() -> None:
    courses = Courses(RULE, PLANS[0])
    begun = courses.newest
    for version in range(1, KEPT + 11):
        courses.add(course(version, 2 * version))
        assert len(courses.changes) == min(version, KEPT)
        assert courses.at(0) is begun
    assert [c.version for c in courses.changes] == list(range(11, KEPT + 11))
    assert courses.at(2 * (KEPT + 10)).version == KEPT + 10
    assert courses.at(23).version == 11  # from step 22 on
    assert not courses.add(course(3, 6))  # long forgotten, and told again by somebody who is behind
    assert len(courses.changes) == KEPT


@given(st.integers(1, 2**31 - 1), st.integers(0, 2**53 - 1), st.integers(0, 2), deadlines)
@settings(max_examples=60, deadline=None)
def test_the_message_that_tells_of_a_course_says_all_of_it(version: int, step: int, plan: int, deadline_s: Any) -> None:
    said = course(version, step, PLANS[plan], deadline_s)
    header, rest = said.to_frames()
    for decode in (messages.decode_from_aggregator, messages.decode_from_worker):
        replan = decode(header)
        assert isinstance(replan, messages.Replan)
        heard = Course.from_frames(replan, [memoryview(rest)], SPEC)
        assert heard == said
        np.testing.assert_array_equal(heard.plan.shares, said.plan.shares)


@pytest.mark.parametrize(
    ("rest", "named"),
    [
        ([], "plan 3 from step 7 on: expected one plan frame"),
        ([b"{}", b"{}"], "expected one plan frame"),
        ([b"\xff\xfe"], "its plan cannot be read"),
        ([b"{}"], "expected"),
        ([simple_plan(3).to_json().encode()], "one for 2 workers .* got one for 3"),
        (
            [make_plan([0.1, 0.2], bit_budget=4, allow_drop=True, noise_ratio=9.0).to_json().encode()],
            "got 0 for worker 1",
        ),
    ],
)
def test_frames_that_are_no_course_of_this_job_are_refused(rest: list[bytes], named: str) -> None:
    with pytest.raises((ProtocolError, PlanError, ConfigError), match=named):
        Course.from_frames(messages.Replan(3, 7, 1.0), rest, SPEC)


@pytest.mark.parametrize("deadline_s", [0.0, -1.0, math.nan, math.inf, 1e10])
def test_deadlines_that_cannot_be_are_refused_at_both_ends(deadline_s: float) -> None:
    with pytest.raises(ConfigError, match="deadline_s: expected more than 0"):
        course(1, 3, deadline_s=deadline_s)
    with pytest.raises(ProtocolError, match="expected a torch_qgc header"):
        messages.decode_from_worker(messages.encode_message(messages.Replan(1, 3, deadline_s)))


def test_who_is_told_how_long_to_wait_before_joining_follows_the_deadline_of_the_step() -> None:
    courses = Courses(ClosingRule(deadline_s=1.0, late="drop", warmup_steps=0), PLANS[0])
    courses.add(course(1, 10, deadline_s=8.0))
    assert courses.wait_before_joining_s(9, elapsed_s=0.5, usual_s=0.9) == pytest.approx(0.75)
    assert courses.wait_before_joining_s(10, elapsed_s=0.5, usual_s=0.9) == pytest.approx(0.625)
    assert courses.wait_before_joining_s(10, elapsed_s=4.0, usual_s=5.0) == pytest.approx(6.0)
