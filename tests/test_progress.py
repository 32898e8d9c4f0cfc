"""Who keeps the others waiting: named now and then, given up in the end, and let go on when it comes back."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from helpers.pumped import Pump
from helpers.simulated import make_spec, push_all, simple_plan, take

from torch_qgc.aggregator.aggregator import Aggregator
from torch_qgc.errors import JobFailed, Refused
from torch_qgc.job.progress import SAY_EVERY_S, Progress
from torch_qgc.logs import logger
from torch_qgc.worker.connection import Connection

PLAN = simple_plan(3)


def test_who_is_waited_for_is_said_every_ten_seconds_and_found_stuck_after_the_timeout() -> None:
    progress, said, stuck = Progress(25.0), [], {}
    for second in range(60):
        if second == 10:
            progress.note(2)
        open_s, found = progress.look(7, {1, 2}, float(second))
        said += [] if open_s is None else [second]
        for worker in found:
            stuck.setdefault(worker, second)
    assert said == [SAY_EVERY_S * n for n in range(1, 6)]
    assert stuck == {1: 25, 2: 34}  # it was seen at second 9, before the message


def test_another_step_or_nobody_to_wait_for_begins_anew() -> None:
    progress = Progress(5.0)
    for second in range(60):
        workers = set() if second % 5 == 3 else {1}
        assert progress.look(second // 4, workers, float(second)) == (None, [])


def test_time_in_which_nobody_looked_blames_nobody() -> None:
    progress = Progress(5.0)
    for time_s in (0.0, 1000.0, 2000.0, 3000.0, 4000.0):
        assert progress.look(0, {1}, time_s) == (None, [])
    assert progress.look(0, {1}, 5000.0)[1] == [1]


class Stuck(Pump):
    """Three workers, of which the last one's training thread does nothing from step 1 on."""

    def __init__(self, **spec: Any) -> None:
        super().__init__([Aggregator()])
        made = make_spec(PLAN, **{"deadline_s": None, "stall_timeout_s": 30.0, **spec})
        self.workers: list[Connection] = [self.connect(made, PLAN, k) for k in range(3)]
        for worker in self.workers:
            worker.join(1.0)
        self.step(0, self.workers)
        self.step(1, self.workers[:2], finish=False)

    def step(self, step: int, workers: list[Connection], *, finish: bool = True) -> None:
        for worker in workers:
            worker.begin(step)
        for worker in workers:
            push_all(worker, PLAN, step, torch.ones(512))
        for worker in workers if finish else ():
            take(worker)

    def wait(self, seconds: int) -> None:
        for _ in range(seconds):
            self.time_s += 1.0
            self.pump()


def test_a_worker_that_is_stuck_is_lost_although_its_connection_stands_and_may_come_back(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logger, "filters", [])
    caplog.set_level(logging.WARNING, "torch_qgc")
    job = Stuck()
    job.wait(29)
    assert job.workers[0].session.gone == {}
    assert sum("waits for workers [2]" in record.getMessage() for record in caplog.records) == 2
    job.wait(2)
    assert job.workers[0].session.gone == {2: "lost"}
    assert next(iter(job.workers[0].results())).counts.tolist() == [1, 1, 0]
    take(job.workers[0])
    take(job.workers[1])
    job.step(1, job.workers[2:])  # it wakes up
    assert job.workers[0].session.gone == {}
    job.step(2, job.workers)


def test_a_stuck_worker_ends_a_job_that_may_lose_nobody() -> None:
    job = Stuck(on_loss="fail")
    job.wait(31)
    with pytest.raises(JobFailed, match=r"worker 2 was lost in step 1: the others have waited for it for 30 s"):
        job.workers[0].closed(1)


def test_a_quorum_that_cannot_be_had_does_not_stop_the_job_for_ever() -> None:
    job = Stuck(deadline_s=1.0, quorum=3)
    job.wait(29)
    assert not job.workers[0].closed(1)
    job.wait(2)
    assert job.workers[0].closed(1)


def test_who_wakes_up_too_late_is_told_that_it_cannot_go_on() -> None:
    job = Stuck(log_steps=4)
    job.wait(31)
    for step in (1, 2, 3, 4, 5, 6):
        if step > 1:
            job.step(step, job.workers[:2], finish=False)
        for worker in job.workers[:2]:
            take(worker)
    session = job.workers[2].session
    job.workers[2].begin(1)
    assert isinstance(session.error, Refused)
    assert "the log starts at" in str(session.error)
    assert job.workers[0].session.gone == {2: "lost"}
    assert job.aggregators[0].failed is None


@pytest.mark.parametrize("how", ["lost", "never came"])
def test_a_loss_in_the_warm_up_is_an_error_on_all(how: str) -> None:
    job = Pump([Aggregator()])
    spec = make_spec(PLAN, deadline_s=None, warmup_steps=2, join_timeout_s=20.0)
    workers = [job.connect(spec, PLAN, k) for k in range(2 if how == "never came" else 3)]
    for worker in workers:
        worker.join(1.0)
    if how == "lost":
        (peer,) = [peer for peer, session in job.sessions.items() if session.worker == 2]
        job.aggregators[0].lost(peer, 0.0)
    job.time_s = 21.0
    job.pump()
    with pytest.raises(JobFailed, match=r"worker 2 was lost in step 0.*In the first 2 steps all must take part"):
        workers[0].closed(0)


def test_nobody_is_stuck_while_all_compute() -> None:
    """A first step in which everybody compiles for an hour."""
    job = Pump([Aggregator()])
    spec = make_spec(PLAN, deadline_s=None, warmup_steps=2, stall_timeout_s=30.0)
    workers = [job.connect(spec, PLAN, k) for k in range(3)]
    for worker in workers:
        worker.join(1.0)
        worker.begin(0)
    for _ in range(100):
        job.time_s += 1.0
        job.pump()
    for worker in workers:
        push_all(worker, PLAN, 0, torch.ones(512))
    assert take(workers[0]).shape == (512,)
