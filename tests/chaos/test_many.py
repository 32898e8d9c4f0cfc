"""Jobs of many ranks, of which several are killed, stopped and cut off at once."""

from __future__ import annotations

from functools import partial

import pytest
from helpers.stage import Stage
from helpers.training import breaks, train, train_until

pytestmark = [pytest.mark.chaos, pytest.mark.slow]


@pytest.mark.parametrize("ranks", [16, 32])
def test_many_ranks_of_which_several_are_hit(stage: Stage, ranks: int) -> None:
    steps = 30
    for rank in (5, 6):
        stage.proxy(rank)
    stage.start(partial(train, steps=steps, deadline_s=0.5), ranks=ranks, steps=steps, gate=20)
    with stage.after(10, of=0):
        for rank in (1, 2, ranks - 1):
            stage.kill(rank)
        stage.cut(5, 6)
        stage.stop(7, for_s=2.0)
    stage.end()
    stage.assert_equal()


@pytest.mark.parametrize("ranks", [16, 32])
def test_many_ranks_hear_of_an_error_on_one(stage: Stage, ranks: int) -> None:
    stage.start(partial(train_until, ranks - 1, 5, breaks, deadline_s=0.5), ranks=ranks, gate=99)
    stage.end()
    stage.assert_failed(f"worker {ranks - 1} failed at step 5: ValueError: broken on purpose", but={ranks - 1})
