"""Scripts that end otherwise than they should: all ranks hear of it by name."""

from __future__ import annotations

import signal
import sys
from functools import partial

import pytest
from helpers.script import Member
from helpers.stage import Stage
from helpers.training import breaks, sleeps, train, train_until

pytestmark = pytest.mark.chaos

STEP = 20


@pytest.mark.parametrize("rank", [2, pytest.param(0, marks=pytest.mark.slow)])
def test_an_exception_in_the_forward_pass_is_heard_by_all(stage: Stage, rank: int) -> None:
    stage.start(partial(train_until, rank, STEP, breaks), gate=99)
    stage.end()
    stage.assert_failed(f"worker {rank} failed at step {STEP}: ValueError: broken on purpose", but={rank})


@pytest.mark.slow
def test_an_exit_in_the_middle_of_a_loop_is_heard_by_all(stage: Stage) -> None:
    stage.start(partial(train_until, 2, STEP, lambda: sys.exit(3)), gate=99)
    stage.end()
    stage.assert_failed("worker 2", but={2})


@pytest.mark.slow
@pytest.mark.parametrize("rank", [2, 0])
def test_an_interrupt_of_one_rank_is_heard_by_all(stage: Stage, rank: int) -> None:
    stage.start(train)
    with stage.after(STEP, of=rank):
        stage.kill(rank, signal.SIGINT)
    stage.end()
    stage.assert_failed(f"worker {rank} failed", but={rank})
    assert "KeyboardInterrupt" in stage.log(rank)


@pytest.mark.parametrize("rank", [2, pytest.param(0, marks=pytest.mark.slow)])
def test_a_loop_that_is_left_early_is_named_on_all_ranks(stage: Stage, rank: int) -> None:
    stage.start(partial(leaves, rank), gate=99)
    stage.end()
    stage.assert_failed(f"worker {rank} has left its loop at step {STEP + 1}")


def leaves(rank: int, member: Member) -> object:
    def after_step(step: int, *_: object) -> bool:
        if (member.rank, step) != (rank, STEP):
            return False
        member.board.fault()
        return True

    return train(member, after_step=after_step)


@pytest.mark.slow
def test_rank_0_ends_with_its_error_although_somebody_is_asleep(stage: Stage) -> None:
    """A launcher must not wait for the error that it is to show."""
    stage.limit_s = 15.0
    stage.start(breaks_while_another_sleeps, gate=99)
    stage.end(but={3})
    stage.kill(3)
    stage.assert_failed("worker 0 failed", but={0})


def breaks_while_another_sleeps(member: Member) -> object:
    if member.rank == 3:
        return train_until(3, STEP, sleeps, member)
    return train_until(0, STEP + 10, breaks, member)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [2, 0])
def test_an_exception_before_the_first_step_is_heard_by_all(stage: Stage, rank: int) -> None:
    """The others are in their first step, and wait for it."""
    stage.limit_s = 10.0
    stage.start(partial(breaks_before_the_first_step, rank), gate=99)
    stage.end()
    stage.assert_failed("broken on purpose", but={rank})


def breaks_before_the_first_step(rank: int, member: Member) -> object:
    def prepare() -> None:
        if member.rank == rank:
            member.board.fault()
            breaks()

    return train(member, before_loop=prepare)
