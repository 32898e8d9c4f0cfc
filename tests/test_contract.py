"""One contract: what it accepts can be run, and what it refuses is refused everywhere, at once, with the remedy."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from helpers.pumped import Pump
from helpers.ranks import run_ranks
from helpers.simulated import RULE, make_spec, peer_of, push_all, simple_plan, take
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.parallel import DistributedDataParallel

import torch_qgc as qgc
from torch_qgc.aggregator.aggregator import Aggregator
from torch_qgc.errors import ConfigError, Refused
from torch_qgc.job.courses import Courses
from torch_qgc.planner import Plan, make_plan
from torch_qgc.protocol import messages
from torch_qgc.protocol.contract import ClosingRule, JobSpec
from torch_qgc.worker.connection import Connection
from torch_qgc.worker.session import Session

PLANS = [
    make_plan([0.1], bits_per_coordinate=4),
    make_plan([0.1, 0.4], bits_per_coordinate=32),
    make_plan([0.05, 0.2, 0.6], bits_per_coordinate=3, noise_ratio=1.0, second_track="hajek"),
    make_plan([0.0, 0.9, 0.3], bits_per_coordinate=8, norm="l2", second_track="ridge"),
    make_plan([0.1, 0.1, 1.0], bits_per_coordinate=4),  # the last worker sends nothing
    dataclasses.replace(simple_plan(2), second_track="lmmse"),
]


def fields_of(plan: Plan) -> dict[str, tuple[st.SearchStrategy[Any], st.SearchStrategy[Any]]]:
    """Return what the fields of a job for a plan are likely to be, and what is odd but not always wrong."""
    return {
        "deadline_s": (st.none() | st.floats(1e-6, 1e6), st.sampled_from([5e-324, 1e9])),
        "warmup_steps": (st.integers(0, 3), st.just(2**31 - 1)),
        "quorum": (st.integers(1, plan.num_workers), st.integers(1, 9)),
        "late": (st.sampled_from(["fold", "drop"]), st.just("fold")),
        "max_staleness": (st.integers(0, 8), st.just(200)),
        "on_loss": (st.sampled_from(["continue", "fail"]), st.just("fail")),
        "workers": (st.just(plan.num_workers), st.integers(-1, 9000)),
        "numel": (st.integers(1, 4000), st.sampled_from([0, -1, 2**52, 2.5])),
        "chunk_numel": (st.sampled_from([512, 1024, 1 << 20]), st.sampled_from([0, 1, 500, 1 << 26, 1 << 27])),
        "plan_digest": (st.just(plan.digest()), st.just("another")),
        "layout_digest": (st.text(max_size=8), st.just("x" * 200)),
        "first_step": (st.integers(0, 50), st.sampled_from([-1, 2**52, 2**53])),
        "seed": (st.integers(0, 2**63 - 1), st.sampled_from([-1, 2**63, True, np.int64(3)])),
        "aggregators": (st.integers(1, 2), st.sampled_from([0, 3, 9, 70000])),
        "downlink_bits": (st.integers(2, 16) | st.just(32), st.sampled_from([0, 1, 17, 31, 33])),
        "verify_every": (st.integers(0, 50), st.sampled_from([-1, 2**31])),
        "log_steps": (st.integers(4, 64), st.sampled_from([0, 3, 2**31 - 1, 2**31])),
        "log_bytes": (st.just(1 << 24), st.sampled_from([0, 1, 40_000, 2**52])),
        "join_timeout_s": (st.floats(0, 1e3), st.sampled_from([-1.0, 1e308, math.inf, math.nan])),
    }


@st.composite
def jobs(draw: st.DrawFn) -> tuple[Plan, JobSpec]:
    """A plan and a spec for it, as QGCState would make it from arguments of which up to two are odd."""
    plan = draw(st.sampled_from(PLANS[:-2] * 3 + PLANS[-2:]))
    fields = fields_of(plan)
    odd = draw(st.sets(st.sampled_from(sorted(fields)), max_size=2))
    return plan, make_spec(plan, **{name: draw(likely_odd[name in odd]) for name, likely_odd in fields.items()})


def refused(plan: Plan, spec: JobSpec) -> str | None:
    """Return why a job is refused, None if it is not."""
    try:
        spec.validate(plan)
    except ConfigError as error:
        return str(error)
    return None


def run_one_round(plan: Plan, spec: JobSpec) -> list[torch.Tensor]:
    """Let all workers push, through as many aggregators as the job has; return what each has decoded."""
    pump = Pump([Aggregator(index, spec.aggregators) for index in range(spec.aggregators)])
    workers = [pump.connect(spec, plan, k, first_step=spec.first_step) for k in range(spec.workers)]
    for worker in workers:
        worker.join(1.0) if worker is workers[0] else pump.pump()
    for worker in workers:
        worker.begin(spec.first_step)
    for worker in workers:
        push_all(worker, plan, spec.first_step, torch.ones(spec.numel))
    decoded = [take(worker) for worker in workers]
    assert all(aggregator.failed is None for aggregator in pump.aggregators)
    assert not any(worker.session.rejections for worker in workers)
    return decoded


def test_whatever_is_accepted_can_be_run_and_whatever_is_refused_names_what_was_expected() -> None:
    seen: Counter[str] = Counter()

    @given(jobs())
    @settings(max_examples=150)
    def check(job: tuple[Plan, JobSpec]) -> None:
        plan, spec = job
        refusal = refused(plan, spec)
        seen["accepted" if refusal is None else "refused"] += 1
        if refusal is not None:
            assert "expected" in refusal
            return
        decoded = run_one_round(plan, spec)
        assert all(torch.equal(d, decoded[0]) for d in decoded)
        assert decoded[0].isfinite().all()

    check()
    assert min(seen[name] for name in ("accepted", "refused")) > 20, seen


def test_an_aggregator_refuses_what_a_worker_would_have_refused_to_send() -> None:
    """The same check at the other end, for a program that does not make it: in one word, and the aggregator lives."""
    seen: Counter[str] = Counter()

    @given(jobs())
    @settings(max_examples=100)
    def check(job: tuple[Plan, JobSpec]) -> None:
        plan, spec = job
        aggregator = Aggregator(0, spec.aggregators)
        hello = messages.Hello(version=messages.PROTOCOL_VERSION, worker=0, step=spec.first_step, spec=spec)
        try:
            header = messages.encode_message(hello)
        except (TypeError, OverflowError):  # numpy's numbers, or beyond 64 bits: cannot even be written
            return
        aggregator.receive(peer_of(0), [header, plan.to_json().encode()], 0.0)
        answer = messages.decode_from_aggregator(aggregator.drain()[0][1][0])
        if refused(plan, spec) is None:
            seen["accepted"] += 1
            assert isinstance(answer, messages.Welcome)
        else:
            seen["refused"] += 1
            assert isinstance(answer, messages.Refusal | messages.Rejected)
            assert "expected" in answer.text.lower()
            assert aggregator.job is None

    check()
    assert min(seen[name] for name in ("accepted", "refused")) > 10, seen


@pytest.mark.parametrize(
    "bad",
    [
        {"deadline_s": 0.0},
        {"deadline_s": math.nan},
        {"deadline_s": math.inf},
        {"deadline_s": "1"},
        {"quorum": 2.5},
        {"quorum": "2"},
        {"warmup_steps": None},
        {"max_staleness": 1e3},
    ],
)
def test_a_rule_refuses_values_and_types_that_cannot_work(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(bad))}: expected"):
        ClosingRule(**{**RULE, **bad})


# --- QGCState, on all ranks at once -----------------------------------------------------------------------

BAD: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"seed": -1}, {}, "seed"),
    ({"seed": 2**63}, {}, "seed"),
    ({"seed": np.int64(1)}, {}, "Python's own numbers"),
    ({"aggregators": 9}, {}, "aggregators"),
    ({"deadline_s": 0.0}, {}, "deadline_s"),
    ({"deadline_s": math.inf}, {}, "deadline_s"),
    ({"downlink_bits": 20}, {}, "downlink_bits"),
    ({"quorum": 3}, {}, "quorum"),
    ({"verify_every": -1}, {}, "verify_every"),
    ({}, {"log_steps": 3}, "log_steps"),
    ({}, {"log_bytes": 1000}, "log_bytes"),
    ({}, {"chunk_numel": 500}, "chunk_numel"),
    ({}, {"join_timeout_s": math.inf}, "join_timeout_s"),
]


def refused_states(rank: int, one_rank_alone: bool) -> list[str]:
    """Make states with arguments that cannot work, on both ranks or on rank 1 alone; return what is said here."""
    said = []
    for arguments, limits, _ in BAD:
        model = DistributedDataParallel(torch.nn.Linear(40, 40))
        if one_rank_alone and rank == 0:
            arguments, limits = {}, {}
        try:
            qgc.QGCState(model, limits=qgc.Limits(**limits), **arguments)
        except ConfigError as error:
            said.append(str(error))
    return said


@pytest.mark.parametrize("one_rank_alone", [False, True])
def test_a_state_refuses_what_cannot_work_on_all_ranks_before_anything_is_sent(one_rank_alone: bool) -> None:
    for rank, said in enumerate(run_ranks(refused_states, one_rank_alone, ranks=2)):
        assert len(said) == len(BAD)
        for text, (_, _, named) in zip(said, BAD):
            assert named in text
            assert "expected" in text
            assert text.startswith("rank 1: ") == (one_rank_alone and rank == 0)


# --- joining ----------------------------------------------------------------------------------------------


def test_a_rejection_before_the_welcome_is_final() -> None:
    plan = simple_plan(2)
    session = Session(["a"], make_spec(plan), 1, Courses(make_spec(plan).rule, plan))
    session.receive(0, [messages.encode_message(messages.Rejected("spec.seed: expected `int` >= 0"))], 0.0)
    assert isinstance(session.error, Refused)
    assert "seed" in str(session.error)


def test_a_rejection_after_the_welcome_is_noted_and_no_more() -> None:
    plan = simple_plan(1)
    pump = Pump([Aggregator()])
    worker: Connection = pump.connect(make_spec(plan), plan, 0)
    worker.join(1.0)
    worker.push(0, 7, 4, lambda: (b"", 0.0, 0.0))
    assert worker.session.error is None
    (said,) = worker.session.rejections
    assert "chunk" in said
