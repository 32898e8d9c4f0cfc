"""Connections that are lost, of processes that are not: whoever comes back is let in, and nothing has been lost."""

from __future__ import annotations

import random
import time
from functools import partial

import pytest
from helpers.stage import Stage
from helpers.training import train

pytestmark = pytest.mark.chaos


@pytest.mark.parametrize("deadline_s", [0.1, pytest.param(None, marks=pytest.mark.slow)])
def test_a_worker_that_was_cut_off_comes_back(stage: Stage, deadline_s: float | None) -> None:
    """Without a deadline the others wait for what was lost with the connection."""
    proxy = stage.proxy(2)
    stage.start(partial(train, deadline_s=deadline_s))
    with stage.after(20, of=2):
        stage.cut(2)
    stage.end()
    stage.assert_equal()
    assert proxy.connections == 2


@pytest.mark.slow
@pytest.mark.parametrize("step", [0, 1, 2])
def test_a_worker_that_was_cut_off_in_warm_up_comes_back(stage: Stage, step: int) -> None:
    stage.proxy(2)
    stage.start(train, gate=step + 1)
    with stage.after(step, of=2):
        stage.cut(2)
    stage.end()
    stage.assert_equal()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("deadline_s", [0.1, None])
def test_some_may_be_cut_off_again_and_again(stage: Stage, deadline_s: float | None, seed: int) -> None:
    rng = random.Random(seed)
    for rank in range(4):
        stage.proxy(rank)
    stage.start(partial(train, deadline_s=deadline_s))
    with stage.after(5, of=0):
        for gate in (15, 25, 35, 45):
            for rank in rng.sample(range(4), rng.randrange(1, 4)):
                time.sleep(rng.random() / 20)
                stage.cut(rank)
            stage.board.gate = gate
            stage.until(lambda gate=gate: stage.board.made_s[:, gate - 1].all(), f"step {gate - 1} of all")
    stage.end()
    stage.assert_equal()


@pytest.mark.slow
@pytest.mark.parametrize("deadline_s", [0.1, None])
def test_all_may_be_cut_off_at_once(stage: Stage, deadline_s: float | None) -> None:
    """As where the aggregator's network is gone for a moment."""
    for rank in range(4):
        stage.proxy(rank)
    stage.start(partial(train, deadline_s=deadline_s, limits={"silence_s": 10.0}))
    with stage.after(20, of=0):
        stage.cut_off(0, 1, 2, 3, for_s=2.0, noticed=True)
    stage.end()
    stage.assert_equal()


@pytest.mark.slow
@pytest.mark.parametrize("deadline_s", [0.1, None])
def test_a_worker_comes_back_whose_network_was_gone_without_a_word(stage: Stage, deadline_s: float | None) -> None:
    """For longer than either end takes to notice."""
    stage.proxy(2)
    stage.start(partial(train, deadline_s=deadline_s))
    with stage.after(20, of=2):
        stage.cut_off(2, for_s=15.0, noticed=False)
    stage.end()
    stage.assert_equal()
