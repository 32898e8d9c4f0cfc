"""Who is started when: laws of the supervisor under any order of starts, ends and times, and its back-off."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from torch_qgc.cli.supervisor import Patience, Supervisor

PATIENCE = Patience(max_restarts=3, first_delay_s=1.0, longest_delay_s=5.0, steady_s=60.0)


def life(lives: list[tuple[float, int]], patience: Patience = PATIENCE) -> tuple[list[float], Supervisor]:
    """Let one worker live as told, (seconds, status) each; return when it was started, and the supervisor."""
    supervisor, now, starts = Supervisor([7], patience, 0.0), 0.0, []
    for lasted_s, status in lives:
        wait_s = supervisor.wakeup_in(now)
        if wait_s is None:
            break
        now += wait_s
        assert supervisor.due(now) == [7]
        supervisor.started(7, now)
        starts.append(now)
        now += lasted_s
        supervisor.ended(7, status, now)
    return starts, supervisor


@pytest.mark.parametrize(
    ("lives", "starts", "done", "given_up"),
    [
        ([(9.0, 0)], [0.0], True, False),
        ([(0.0, 1), (0.0, -9), (0.0, 1), (0.0, 0)], [0.0, 1.0, 3.0, 7.0], True, False),
        ([(0.0, 1)] * 9, [0.0, 1.0, 3.0, 7.0], False, True),
        ([(0.0, 1), (0.0, 1), (60.0, 1), (0.0, 0)], [0.0, 1.0, 3.0, 64.0], True, False),  # counts anew
        ([(0.0, 1), (59.0, 1), (0.0, 1)], [0.0, 1.0, 62.0], False, False),
    ],
    ids=["in order", "comes back", "in vain", "was steady", "was not steady for long enough"],
)
def test_a_worker_is_started_again_with_growing_delays(
    lives: list[tuple[float, int]], starts: list[float], done: bool, given_up: bool
) -> None:
    found, supervisor = life(lives)
    assert found == starts
    assert (supervisor.standings[7].done, supervisor.standings[7].given_up) == (done, given_up)
    assert supervisor.finished == (done or given_up)


@given(st.floats(0.001, 10.0), st.floats(0.001, 100.0), st.integers(1, 10_000))
def test_delays_double_up_to_the_longest(first_s: float, longest_s: float, failures: int) -> None:
    patience = Patience(first_delay_s=first_s, longest_delay_s=longest_s)
    expected = min(math.ldexp(first_s, min(failures - 1, 900)), longest_s)
    assert patience.delay_s(failures) == pytest.approx(expected)


def test_no_restarts_means_none() -> None:
    starts, supervisor = life([(0.0, 1)] * 2, Patience(max_restarts=0))
    assert (starts, supervisor.finished) == ([0.0], True)


class AnyOrder(RuleBasedStateMachine):
    """Starts, ends and stops in any order, beside a second supervisor that knows of worker 0 alone."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.stopped = 0.0, False
        self.all, self.alone = Supervisor(range(3), PATIENCE, 0.0), Supervisor([0], PATIENCE, 0.0)
        self.ends: dict[int, list[int]] = {k: [] for k in range(3)}

    @rule(seconds=st.floats(0.0, 100.0))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: self.all.due(self.now))
    @rule(data=st.data())
    def start(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(self.all.due(self.now)))
        assert worker not in self.all.running
        assert 0 not in self.ends[worker], "it had done its work"
        assert not self.stopped
        self.all.started(worker, self.now)
        if worker == 0:
            assert self.alone.due(self.now) == [0]
            self.alone.started(0, self.now)

    @precondition(lambda self: self.all.running)
    @rule(data=st.data(), status=st.sampled_from([0, 1, -9]))
    def end(self, data: st.DataObject, status: int) -> None:
        worker = data.draw(st.sampled_from(self.all.running))
        standing = self.all.ended(worker, status, self.now)
        self.ends[worker].append(status)
        assert standing.done == (status == 0)
        assert not (standing.due_at_s is not None and self.stopped)
        if worker == 0:
            self.alone.ended(0, status, self.now)

    @rule()
    def stop(self) -> None:
        self.stopped = True
        self.all.stop()
        self.alone.stop()

    @invariant()
    def each_is_decided_on_by_its_own_ends(self) -> None:
        assert self.all.standings[0] == self.alone.standings[0]

    @invariant()
    def it_is_finished_when_nobody_runs_or_will(self) -> None:
        waits = self.all.wakeup_in(self.now) is not None
        assert self.all.finished == (not self.all.running and not waits)
        assert self.all.finished == all(s.done or s.given_up for s in self.all.standings.values())

    @invariant()
    def whoever_is_to_be_started_is_so_within_the_longest_delay(self) -> None:
        assert (self.all.wakeup_in(self.now) or 0.0) <= PATIENCE.longest_delay_s

    @invariant()
    def nobody_fails_more_often_in_a_row_than_there_is_patience_for(self) -> None:
        assert all(s.failures <= PATIENCE.max_restarts + 1 for s in self.all.standings.values())


TestAnyOrder = AnyOrder.TestCase
