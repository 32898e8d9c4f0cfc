"""Scripts that end otherwise than they should: all ranks hear of it by name."""

from __future__ import annotations

from functools import partial

import pytest
from helpers.script import Member, train
from helpers.stage import Stage

pytestmark = pytest.mark.chaos


def raises(rank: int, at: int, member: Member) -> object:
    """Train, and raise in the forward pass of one step on one rank."""

    def in_forward(step: int) -> None:
        if member.rank == rank and step == at:
            raise ValueError("broken on purpose")

    return train(member, in_forward=in_forward)


def test_an_exception_in_the_forward_pass_is_heard_by_all(stage: Stage) -> None:
    stage.start(partial(raises, 2, 20), gate=99)
    stage.end()
    stage.assert_failed("worker 2 failed at step 20: ValueError: broken on purpose", but={2})
