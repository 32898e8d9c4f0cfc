"""A job can be watched: events, profiler ranges, the log, and what objects say of themselves."""

from __future__ import annotations

import logging
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ranks import run_ranks
from helpers.replayed import read_events
from helpers.simulated import Job, make_spec, peer_of, simple_plan
from torch.nn.parallel import DistributedDataParallel

import torch_qgc as qgc
from torch_qgc.aggregator.aggregator import Aggregator
from torch_qgc.job.courses import Courses
from torch_qgc.job.events import Event
from torch_qgc.logs import Sparing
from torch_qgc.worker.connection import Connection
from torch_qgc.worker.session import Session

STEPS, CHUNKS = 4, 3


def watched_job(rank: int, path: str) -> tuple[list[tuple[Any, ...]], set[str], list[str]]:
    """Train and watch; return the events of this worker, the profiler's names, and repr(state) at several points."""
    events: list[Event] = []
    torch.manual_seed(rank)
    model = DistributedDataParallel(torch.nn.Linear(32, 40))  # 1320 coordinates, 3 chunks
    limits = qgc.Limits(chunk_numel=512)
    state = qgc.QGCState(model, limits=limits, trace=events.append, network=qgc.Network(trace=path))
    model.register_comm_hook(state, qgc.qgc_hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    said = [repr(state)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(STEPS):
            loss = model(torch.ones(2, 32)).sum()
            said.append(repr(state))
            loss.backward()
            said.append(repr(state))
            optimizer.step()
            optimizer.zero_grad()
    state.close()
    said.append(repr(state))
    told = [(e.time_s, e.name, e.step, e.chunk, e.worker, e.detail.get("duration_s")) for e in events]
    return told, {average.key for average in profile.key_averages()}, said


def test_a_job_of_two_processes_is_seen_step_by_step_at_both_ends(tmp_path: Path) -> None:
    path = tmp_path / "events-{}.jsonl"
    ranks = run_ranks(watched_job, str(path), ranks=2)
    for rank, (events, names, said) in enumerate(ranks):
        assert_worker_is_seen(rank, events)
        assert {"qgc.gather", "qgc.encode", "qgc.wait", "qgc.put"} <= names
        assert all("\n" not in text and f"worker {rank} of 2" in text for text in said)
        for step in range(STEPS):
            begun, exchanged = said[1 + 2 * step], said[2 + 2 * step]
            assert f"step {step}, begun" in begun
            assert f"step {step + 1}, exchanged" in exchanged
        assert "idle" in said[0]
        assert "left" in said[-1]
    assert_aggregator_is_seen(read_events(tmp_path / "events-0.jsonl"))


def assert_worker_is_seen(rank: int, events: list[tuple[Any, ...]]) -> None:
    heard = [e for e in events if e[1] in ("joined", "result", "gone")]
    done = [e for e in events if e not in heard]
    for of_one_thread in (heard, done):
        assert [e[0] for e in of_one_thread] == sorted(e[0] for e in of_one_thread)
    assert heard[0][1] == "joined"
    assert all(e[4] == rank for e in events if e[1] != "gone")
    for step in range(STEPS):
        mine = [e for e in done if e[2] == step]
        assert re.fullmatch(r"begin (gather (encode push )*)+wait put ", "".join(f"{e[1]} " for e in mine)), mine
        for name in ("encode", "push"):
            assert sorted(e[3] for e in mine if e[1] == name) == list(range(CHUNKS))
        assert all(e[5] >= 0 for e in mine if e[1] in ("gather", "encode", "wait", "put"))
        results = [e for e in heard if e[1] == "result" and e[2] == step]
        assert sorted(e[3] for e in results) == list(range(CHUNKS))
        (begun,) = (e[0] for e in mine if e[1] == "begin")
        (waited,) = (e[0] for e in mine if e[1] == "wait")
        assert all(begun <= e[0] <= waited for e in results)


def assert_aggregator_is_seen(events: list[Event]) -> None:
    assert [e.time_s for e in events] == sorted(e.time_s for e in events)
    assert [e.name for e in events[:2]].count("join") >= 1
    assert sorted((e.worker, e.name) for e in events if e.name in ("left", "lost")) == [(0, "left"), (1, "left")]
    for step in range(STEPS):
        names = [e.name for e in events if e.step == step]
        assert names.count("begin") == 2
        for chunk in range(CHUNKS):
            mine = [e for e in events if e.step == step and e.chunk == chunk]
            assert [e.name for e in mine] == ["arrive", "arrive", "close"]
            assert sorted(e.worker for e in mine[:2]) == [0, 1]  # type: ignore[type-var]
            assert mine[2].detail["counts"] == [1, 1]
            begun_s = [e.time_s for e in events if e.step == step and e.name == "begin"]
            assert min(begun_s) <= mine[0].time_s


def test_rejections_and_failures_are_events_too() -> None:
    events: list[Event] = []
    aggregator = Aggregator(trace=events.append)
    aggregator.receive(peer_of(1), [b"\xc1"], 3.0)
    aggregator.fail("no job, nothing to end", 4.0)
    (event,) = events
    assert (event.time_s, event.name, event.worker) == (3.0, "reject", None)
    assert "expected a torch_qgc header" in event.detail["text"]


# --- what objects say of themselves -----------------------------------------------------------------------


def test_both_ends_say_in_one_line_where_they_are() -> None:
    plan = simple_plan(2)
    aggregator = Aggregator()
    assert repr(aggregator) == "Aggregator(0 of 1, waits to hear what the job is, Lobby(0 workers in, 0 waiting), None)"
    session = Session(["a", "b"], make_spec(plan), 1, Courses(make_spec(plan).rule, plan), first_step=7)
    assert repr(Connection(session, None)) == (  # type: ignore[arg-type]
        "Connection(Session(worker 1, joining, let in by 0 of 2 aggregators, Inbox(step 7, 0 steps held, 0 bytes "
        "ahead)))"
    )
    job = Job(plan, make_spec(plan, deadline_s=None), torch.ones(2, 512), lambda k, step: 1.0)
    seen: list[str] = []
    job.net.at(2.5, lambda: seen.extend((repr(job.aggregator), repr(job.connections[0]))))
    job.run(4)
    assert seen == [
        "Aggregator(0 of 1, serves, Lobby(2 workers in, 0 waiting), Job(Rounds(step 2 open, 1 chunks, 2 of 2 workers "
        "alive), 2 rounds closed, 0 payloads late))",
        "Connection(Session(worker 0, in the job, let in by 1 of 1 aggregators, Inbox(step 2, 0 steps held, 0 bytes "
        "ahead)))",
    ]
    job.aggregator.fail("because\nof this", 5.0)
    job.connections[0].session.end(qgc.errors.JobFailed("because\nof this"))
    for end in (job.aggregator, job.connections[0]):
        assert "because\\nof this" in repr(end)
        assert "\n" not in repr(end)


# --- the log ----------------------------------------------------------------------------------------------


class Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@pytest.fixture
def spared() -> Any:
    """A logger of its own with a limit of 3 in 10 seconds, its clock, and what it has shown."""
    clock = [0.0]
    log, kept = logging.Logger("spared", logging.INFO), Kept()
    log.addFilter(Sparing(every_s=10.0, burst=3, now=lambda: clock[0]))
    log.addHandler(kept)
    return log, clock, kept.texts


def test_a_message_that_repeats_is_shown_a_few_times_and_then_summed_up(spared: Any) -> None:
    log, clock, texts = spared
    for n in range(1000):
        clock[0] = n / 200  # in five seconds
        log.warning("worker %d was lost", n)
    assert texts == [f"worker {n} was lost" for n in range(3)]
    clock[0] = 12.0
    log.warning("worker %d was lost", 7)
    assert texts[3:] == ["worker 7 was lost (and 997 more like it in 12 s)"]
    clock[0] = 30.0
    log.warning("worker %d was lost", 8)
    assert texts[4:] == ["worker 8 was lost"]  # none was left out since


def test_one_message_does_not_silence_another(spared: Any) -> None:
    log, _, texts = spared
    for _ in range(10):
        log.info("100 % of this")
        log.info("that %s", "too")
    assert texts == ["100 % of this", "that too"] * 3


def test_the_package_logs_who_comes_and_goes(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("torch_qgc"), "filters", [])
    caplog.set_level(logging.INFO, "torch_qgc")
    plan = simple_plan(2)
    spec = make_spec(plan, deadline_s=1.0, quorum=2)
    job = Job(plan, spec, torch.ones(2, 512), lambda k, step: math.inf if k == 1 and step == 2 else 0.5 + k * step)
    job.net.at(9.0, lambda: job.net.disconnect(peer_of(1)))
    job.run(4, stop=lambda: job.steps[0] >= 4)
    said = " | ".join(record.getMessage() for record in caplog.records)
    for words in ("worker 0 joined at step 0", "worker 1 joined", "waited for its quorum of 2", "worker 1 was lost"):
        assert words in said
