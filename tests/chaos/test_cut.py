"""Connections that are lost, of processes that are not: whoever comes back is let in, and nothing has been lost."""

from __future__ import annotations

from functools import partial

import pytest
from helpers.script import train
from helpers.stage import Stage

pytestmark = pytest.mark.chaos


def test_a_worker_that_was_cut_off_comes_back(stage: Stage) -> None:
    proxy = stage.proxy(2)
    stage.start(train)
    with stage.after(20, of=2):
        proxy.cut()
    stage.end()
    assert proxy.connections == 2
    stage.assert_equal()


def test_what_was_lost_with_a_connection_is_sent_again_where_all_wait_for_it(stage: Stage) -> None:
    proxy = stage.proxy(2)
    stage.start(partial(train, deadline_s=None))
    with stage.after(20, of=2):
        proxy.cut()
    stage.end()
    stage.assert_equal()
