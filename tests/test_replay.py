"""One implementation of the rules: a simulated and a real job decide alike from the same recorded arrivals."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import simulated
from helpers.ranks import run_ranks
from helpers.replayed import Replay, read_events
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

import torch_qgc as qgc
from torch_qgc.job.events import Event
from torch_qgc.planner import make_plan
from torch_qgc.protocol.contract import ClosingRule

PLAN = make_plan([0.05, 0.05, 0.1, 0.5], bits_per_coordinate=4, noise_ratio=1.0)
STEPS, LOG_STEPS = 24, 16


def rule_of(late: Any) -> ClosingRule:
    return ClosingRule(deadline_s=0.1, warmup_steps=2, quorum=2, late=late, max_staleness=3)


def late_job(rank: int, late: Any, path: str) -> int:
    """Train; rank 3 is late in every third step, however fast the machine is: it sleeps until the step has closed."""
    torch.manual_seed(0)
    model = DistributedDataParallel(torch.nn.Linear(30, 40))
    rule = rule_of(late)
    state = qgc.QGCState(
        model,
        plan=PLAN,
        deadline_s=rule.deadline_s,
        warmup_steps=rule.warmup_steps,
        quorum=rule.quorum,
        late=late,
        limits=qgc.Limits(chunk_numel=512, log_steps=LOG_STEPS, max_staleness=rule.max_staleness),
        network=qgc.Network(trace=path),
    )
    model.register_comm_hook(state, qgc.qgc_hook)
    data = TensorDataset(torch.randn(4 * 4 * STEPS, 30))
    optimizer = qgc.CodedSGD(model.parameters(), state, lr=0.01)
    loader = state.loader(data, batch_size=4)
    for n, (inputs,) in enumerate(loader):
        loss = model(inputs).square().mean()
        while rank == 3 and n % 3 == 2 and not has_closed(state.step, path):
            time.sleep(0.02)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    state.close()
    return -(-(30 * 40 + 40) // 512)


def has_closed(step: int, path: str) -> bool:
    closed = [event for event in read_events(Path(path)) if event.name == "close"]
    return any(event.step == step for event in closed)


def assert_told_something(events: list[Event], late: str) -> None:
    """The record is of a job in which the rules had something to decide."""
    fates = {event.detail["fate"] for event in events if event.name == "arrive"}
    assert "in time" in fates
    assert "folded" in fates if late == "fold" else "dropped" in fates
    assert late == "fold" or "folded" not in fates


@pytest.mark.parametrize("late", ["fold", "drop"])
def test_a_real_job_has_decided_as_its_recorded_arrivals_say(late: Any, tmp_path: Path) -> None:
    """Four processes over sockets. How fast they were is on record; what follows from it must not depend on it."""
    path = tmp_path / "events.jsonl"
    chunks = run_ranks(late_job, late, str(path), ranks=4)[0]
    events = read_events(path)
    assert_told_something(events, late)
    replay = Replay(PLAN, rule_of(late), chunks=range(chunks), log_steps=LOG_STEPS)
    closings = replay(events)
    steps = sorted({closing.step for closing in closings})
    assert steps == list(range(len(steps)))
    assert len(closings) == chunks * len(steps) >= chunks * 4
    assert [c.counts.tolist() for c in closings if c.step < 2] == [[1, 1, 1, 1]] * (2 * chunks)


@pytest.mark.parametrize("late", ["fold", "drop"])
def test_a_simulated_job_has_decided_as_its_recorded_arrivals_say(late: Any) -> None:
    events: list[Event] = []
    rng = np.random.default_rng(0)
    delays = np.where(rng.random((STEPS, 4)) < [0.0, 0.1, 0.2, 0.5], 0.25, 0.02) + rng.uniform(0, 0.05, (STEPS, 4))
    rule = {name: getattr(rule_of(late), name) for name in ClosingRule.__struct_fields__}
    spec = simulated.make_spec(PLAN, numel=1300, log_steps=LOG_STEPS, **rule)
    gradients = torch.randn(4, 1300, generator=torch.Generator().manual_seed(0))
    job = simulated.Job(PLAN, spec, gradients, lambda k, step: float(delays[step, k]), trace=events.append)
    job.run(STEPS)
    assert_told_something(events, late)
    closings = Replay(PLAN, rule_of(late), chunks=range(spec.chunks), log_steps=LOG_STEPS)(events)
    assert len(closings) == STEPS * spec.chunks
    assert [c.counts.tolist() for c in closings if c.chunk == 0] == [counts.tolist() for counts in job.contributions]


@pytest.mark.parametrize("change", ["a payload is missing", "a payload is there twice", "a round closed too early"])
def test_a_record_that_does_not_follow_from_the_rules_is_noticed(change: str) -> None:
    """The test of the test: one event more or less, and the decisions differ."""
    events: list[Event] = []
    spec = simulated.make_spec(PLAN, deadline_s=1.0, log_steps=LOG_STEPS)
    gradients = torch.ones(4, 512)
    job = simulated.Job(PLAN, spec, gradients, lambda k, step: 0.1 + (k == 3), trace=events.append)
    job.run(5)
    arrivals = [n for n, event in enumerate(events) if event.name == "arrive"]
    closed = next(n for n, event in enumerate(events) if event.name == "close")
    if change == "a payload is missing":
        del events[arrivals[1]]
    elif change == "a payload is there twice":
        events.insert(arrivals[1], events[arrivals[1]])
    else:
        events.insert(arrivals[0], events.pop(closed))
    with pytest.raises((AssertionError, qgc.errors.ProtocolError)):
        Replay(PLAN, spec.rule, log_steps=LOG_STEPS)(events)
