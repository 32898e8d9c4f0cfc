"""Processes that live and do not train: the others wait for them for a time that is known, and say for whom."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import pytest
from helpers.processes import most_memory_bytes
from helpers.script import Member
from helpers.stage import Stage
from helpers.training import mlp, sleeps, train, train_until

pytestmark = pytest.mark.chaos

STALL_S = 2.0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "limits"),
    [({"deadline_s": None}, {}), ({"quorum": 4}, {}), ({}, {"log_steps": 6}), ({}, {})],
    ids=["all wait", "quorum", "leash", "at the end"],
)
def test_who_makes_no_progress_while_others_wait_is_given_up(
    stage: Stage, options: dict[str, Any], limits: dict[str, Any]
) -> None:
    """Its connection lives; its training thread sleeps."""
    stage.limit_s = 15.0
    limits = {**limits, "stall_timeout_s": STALL_S}
    stage.start(partial(train_until, 2, 20, sleeps, limits=limits, **options), gate=99)
    stage.end(but={2})
    stage.kill(2)
    stage.assert_equal()
    assert "worker 2 was lost" in stage.log(0)


@pytest.mark.slow
def test_who_makes_no_progress_in_warm_up_ends_the_job_by_name(stage: Stage) -> None:
    stage.limit_s = 15.0
    stage.start(partial(train_until, 2, 1, sleeps, limits={"stall_timeout_s": STALL_S}), gate=99)
    stage.end(but={2})
    stage.kill(2)
    stage.assert_failed("worker 2")


def test_who_is_asleep_between_deadlines_costs_the_others_no_step(stage: Stage) -> None:
    """As long as the log reaches, nobody waits for it."""
    stage.start(partial(train_until, 2, 20, sleeps), gate=99)
    stage.until(lambda: stage.board.made_s[[0, 1, 3], 59].all(), "the others' last step")
    stage.kill(2)
    stage.end()
    stage.assert_equal()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [2, 0])
def test_who_never_makes_its_first_step_ends_the_job_by_name(stage: Stage, rank: int) -> None:
    stage.limit_s = 20.0
    stage.start(partial(never_begins, rank), gate=99)
    stage.end(but={rank})
    stage.kill(rank)
    stage.assert_failed(f"worker {rank}")


def never_begins(rank: int, member: Member) -> object:
    def prepare() -> None:
        if member.rank == rank:
            member.board.fault()
            sleeps()

    return train(member, before_loop=prepare, limits={"join_timeout_s": 2.0})


# --- a member that does not read --------------------------------------------------------------------------

STEP_BYTES, LOG_STEPS = 4 << 20, 8


def with_large_results(member: Member) -> object:
    limits = {"chunk_numel": 1 << 18, "log_steps": LOG_STEPS}
    return train(member, make_model=partial(mlp, STEP_BYTES // 32), limits=limits, verify_every=0)


@pytest.mark.slow
def test_a_member_that_does_not_read_takes_no_more_memory_than_the_log(stage: Stage) -> None:
    proxy = stage.proxy(2)
    stage.start(with_large_results)
    with stage.after(10, of=0):
        before = most_memory_bytes(stage.pid("aggregator"))
        proxy.clogged = True
        stage.hit.add(2)
        stage.let_go_on()
        time.sleep(5.0)
        grown = most_memory_bytes(stage.pid("aggregator")) - before
        proxy.clogged = False
    stage.end()
    stage.assert_equal()
    assert grown < (2 * LOG_STEPS + 8) * STEP_BYTES


@pytest.mark.slow
def test_a_member_that_never_reads_again_is_given_up(stage: Stage) -> None:
    stage.limit_s = 30.0
    proxy = stage.proxy(2)
    stage.start(partial(train, limits={"log_steps": 6, "stall_timeout_s": STALL_S}))
    with stage.after(20, of=2):
        proxy.clogged = True
    stage.end(but={2})
    stage.kill(2)
    stage.assert_equal()
