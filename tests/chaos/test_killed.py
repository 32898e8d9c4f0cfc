"""Processes that are killed: the others go on with equal parameters, or all end by the name of who is missing."""

from __future__ import annotations

import pytest
from helpers.script import train
from helpers.stage import Stage

pytestmark = pytest.mark.chaos


def test_others_go_on_when_a_worker_is_killed(stage: Stage) -> None:
    stage.start(train)
    with stage.after(20, of=2):
        stage.kill(2)
    stage.end()
    stage.assert_equal()
    assert "worker 2 was lost" in stage.log(0)
