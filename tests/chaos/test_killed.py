"""Processes that are killed: the others go on with equal parameters, or all end by the name of who is missing."""

from __future__ import annotations

import random
import signal
import time
from functools import partial

import pytest
import torch
from helpers.stage import Role, Stage
from helpers.training import mlp, train

pytestmark = pytest.mark.chaos

RANK_0_IS_GONE = "rank 0, which had started aggregator 0, has ended"


# --- a worker ---------------------------------------------------------------------------------------------


def test_others_go_on_when_a_worker_is_killed(stage: Stage) -> None:
    stage.start(train)
    with stage.after(20, of=2):
        stage.kill(2)
    stage.end()
    stage.assert_equal()
    assert "worker 2 was lost" in stage.log(0)


@pytest.mark.slow
def test_others_go_on_when_a_worker_is_killed_for_which_they_wait(stage: Stage) -> None:
    stage.start(partial(train, deadline_s=None))
    with stage.after(20, of=2):
        stage.kill(2)
    stage.end()
    stage.assert_equal()


@pytest.mark.slow
def test_the_last_one_goes_on_alone(stage: Stage) -> None:
    """A quorum of those that are dead is no reason to wait."""
    stage.start(partial(train, quorum=3))
    with stage.after(20, of=2):
        for worker in (1, 2, 3):
            stage.kill(worker)
    stage.end()
    stage.assert_equal()


@pytest.mark.slow
def test_others_go_on_when_a_worker_is_ended_by_sigterm(stage: Stage) -> None:
    """It ends a Python process at once, without a word."""
    stage.start(train)
    with stage.after(20, of=2):
        stage.kill(2, signal.SIGTERM)
    stage.end()
    stage.assert_equal()


@pytest.mark.slow
def test_a_loss_in_warm_up_ends_the_job_by_name(stage: Stage) -> None:
    """DDP itself communicates before the second step: nobody can go on without the lost one.

    Whoever waits for it there gets the process group's own error, and the others hear of that.
    """
    stage.limit_s = 15.0
    stage.start(train, gate=1)
    with stage.after(0, of=2):
        stage.kill(2)
    stage.end()
    stage.assert_failed("", but={0, 1, 3})


@pytest.mark.slow
def test_a_loss_at_the_end_of_warm_up_is_one_that_can_be_borne_or_named(stage: Stage) -> None:
    stage.start(train, gate=2)
    with stage.after(1, of=2):
        stage.kill(2)
    stage.end()
    stage.assert_equal_or_failed("worker 2 was lost")


@pytest.mark.slow
def test_buffers_are_averaged_by_those_that_are_left(stage: Stage) -> None:
    """All the work is done by then."""
    stage.start(partial(train, make_model=normalized, after_loop=lambda state: state.sync_buffers()))
    with stage.after(20, of=2):
        stage.kill(2)
    stage.end()
    stage.assert_equal()


def normalized() -> torch.nn.Module:
    return torch.nn.Sequential(*mlp()[:2], torch.nn.BatchNorm1d(128), *mlp()[2:])


# --- rank 0, and the aggregator ---------------------------------------------------------------------------


def test_all_end_by_name_when_rank_0_is_killed(stage: Stage) -> None:
    """Its aggregator ends with it."""
    stage.start(train)
    with stage.after(20, of=2):
        stage.kill(0)
    stage.end()
    stage.assert_failed(RANK_0_IS_GONE)


@pytest.mark.slow
def test_all_end_by_name_when_a_rank_is_killed_that_has_an_aggregator_of_its_own(stage: Stage) -> None:
    stage.start(partial(train, aggregators=2))
    with stage.after(20, of=2):
        stage.kill(1)
    stage.end()
    stage.assert_failed("rank 1")


@pytest.mark.slow
def test_all_end_by_name_when_the_aggregator_is_killed(stage: Stage) -> None:
    stage.start(partial(train, limits={"silence_s": 2.0}))
    with stage.after(20, of=2):
        stage.kill("aggregator")
    stage.end()
    stage.assert_failed("the aggregator at ")


@pytest.mark.slow
def test_a_killed_aggregator_is_not_noticed_by_its_silence_alone(stage: Stage) -> None:
    """Its port is closed at once, and it is a child of rank 0."""
    stage.limit_s = 15.0
    stage.start(partial(train, limits={"silence_s": 3600.0}))
    with stage.after(20, of=2):
        stage.kill("aggregator")
    stage.end()
    stage.assert_failed("aggregator")


@pytest.mark.slow
@pytest.mark.parametrize(
    "step",
    [
        pytest.param(
            0, marks=pytest.mark.xfail(strict=True, reason="gloo's RuntimeError is raised, which names nobody")
        ),
        1,
    ],
)
def test_all_end_by_name_when_rank_0_is_killed_in_warm_up(stage: Stage, step: int) -> None:
    stage.start(train, gate=step + 1)
    with stage.after(step, of=2):
        stage.kill(0)
    stage.end()
    stage.assert_failed(RANK_0_IS_GONE)


# --- whoever, whenever ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("role", [3, 0, "aggregator"], ids=["worker", "rank 0", "aggregator"])
def test_a_process_may_be_killed_at_any_time(stage: Stage, role: Role, seed: int) -> None:
    rng = random.Random(seed)
    stage.start(partial(train, limits={"silence_s": 2.0}))
    with stage.after(rng.randrange(4, 36), of=rng.randrange(4)):
        time.sleep(rng.random() / 50)
        stage.kill(role)
    stage.end()
    if role == 3:
        stage.assert_equal()
    else:
        stage.assert_failed(RANK_0_IS_GONE if role == 0 else "the aggregator at ")
