"""Processes that stand still for a while, as virtual machines do when they are moved: the job goes on with all."""

from __future__ import annotations

import random
import time
from functools import partial

import pytest
from helpers.stage import GATE, Role, Stage
from helpers.training import train

pytestmark = pytest.mark.chaos


@pytest.mark.parametrize(
    "role",
    [2, pytest.param(0, marks=pytest.mark.slow), "aggregator"],
    ids=["worker", "rank 0", "aggregator"],
)
def test_a_short_pause_costs_nobody_a_step(stage: Stage, role: Role) -> None:
    stage.start(train)
    with stage.after(20, of=2):
        stage.stop(role, for_s=1.0)
    stage.end()
    stage.assert_equal()


@pytest.mark.slow
@pytest.mark.parametrize("deadline_s", [0.1, None])
def test_a_worker_may_pause_for_longer_than_its_connection_lasts(stage: Stage, deadline_s: float | None) -> None:
    stage.start(partial(train, deadline_s=deadline_s))
    with stage.after(20, of=2):
        stage.stop(2, for_s=20.0)
    stage.end()
    stage.assert_equal()


@pytest.mark.slow
def test_a_worker_comes_back_that_was_given_up(stage: Stage) -> None:
    """The others have gone on without it, and hold what it lacks."""
    stage.start(train)
    with stage.after(20, of=2):
        stage.stop(2)
        stage.until(lambda: "worker 2 was lost" in stage.log(0), "word of the loss")
        stage.resume()
    stage.end()
    stage.assert_equal()


@pytest.mark.slow
def test_a_worker_that_was_given_up_need_not_ask_for_what_it_lacks(stage: Stage) -> None:
    stage.start(partial(train, steps=260, deadline_s=None), steps=260, gate=220)
    with stage.after(20, of=2):
        stage.stop(2)
        stage.until(lambda: stage.board.made_s[0, 219] > 0, "the others' last step before the gate")
        stage.limit_s = 60.0
        stage.resume()
    stage.end()
    stage.assert_equal()


@pytest.mark.slow
def test_a_worker_that_comes_back_after_the_log_has_ended_hears_so_by_name(stage: Stage) -> None:
    stage.start(partial(train, limits={"log_steps": 6}))
    with stage.after(20, of=2):
        stage.stop(2)
        stage.until(lambda: stage.board.made_s[0, GATE - 1] > 0, "the others' last step before the gate")
        stage.resume()
        stage.until(lambda: stage.has_ended(2), "end of rank 2")
    stage.end()
    stage.assert_equal([0, 1, 3])
    end = stage.came_to(2)
    assert end is not None
    assert end.error is not None
    assert "QGCError" in end.names
    assert "the log starts at" in end.error


@pytest.mark.slow
def test_a_worker_that_comes_back_after_the_end_hears_so_by_name(stage: Stage) -> None:
    stage.limit_s = 30.0
    stage.start(partial(train, limits={"silence_s": 3600.0}))
    with stage.after(20, of=2):
        stage.stop(2)
        stage.board.gate = 99
        stage.until(lambda: all(stage.has_ended(rank) for rank in (0, 1, 3)), "the others' end")
        stage.resume()
    stage.end()
    stage.assert_equal([0, 1, 3])
    end = stage.came_to(2)
    assert end is not None
    assert end.error is not None
    assert "QGCError" in end.names


@pytest.mark.slow
def test_the_aggregator_may_pause_for_longer_than_connections_last(stage: Stage) -> None:
    stage.start(train)
    with stage.after(20, of=2):
        stage.stop("aggregator", for_s=14.0)
    stage.end()
    stage.assert_equal()


@pytest.mark.slow
def test_a_worker_may_pause_while_others_come_to_the_end(stage: Stage) -> None:
    """Rank 0 has done its work then, but the aggregator that it has started is still needed."""
    stage.start(train, gate=58)
    with stage.after(57, of=2):
        stage.stop(2)
        stage.board.gate = 99
        stage.until(lambda: stage.board.made_s[[0, 1, 3], 59].all(), "the others' last step")
        time.sleep(1.0)
        stage.resume()
    stage.end()
    stage.assert_equal()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("role", [3, 0, "aggregator"], ids=["worker", "rank 0", "aggregator"])
def test_a_process_may_pause_at_any_time(stage: Stage, role: Role, seed: int) -> None:
    rng = random.Random(seed)
    stage.start(train)
    with stage.after(rng.randrange(4, 36), of=rng.randrange(4)):
        time.sleep(rng.random() / 50)
        stage.stop(role, for_s=1.0)
    stage.end()
    stage.assert_equal()
