"""Workers that were killed and started again: they come back to the running job with its newest checkpoint."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from helpers.match import Match, Member
from helpers.pumped import Pump
from helpers.simulated import make_spec, peer_of, push_all, simple_plan, take
from helpers.virtual import session_for
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_qgc.aggregator.aggregator import Aggregator
from torch_qgc.errors import ConfigError, JobFailed, Refused
from torch_qgc.job.courses import KEPT, Course, Courses
from torch_qgc.job.rates import ArrivalRates
from torch_qgc.planner import Plan, make_plan
from torch_qgc.protocol import messages
from torch_qgc.protocol.contract import JobSpec
from torch_qgc.worker.connection import Connection

PLAN = simple_plan(2)


def informed(plan: Plan, late: float = 0.3) -> Plan:
    """The plan as a later checkpoint makes it: it knows more about who is late."""
    return dataclasses.replace(plan, straggle_probs=np.full(plan.num_workers, late))


def at_step(spec: JobSpec, plan: Plan, step: int) -> JobSpec:
    """What a worker takes for the job when it has loaded a checkpoint of a step."""
    return msgspec.structs.replace(spec, first_step=step, plan_digest=plan.digest())


class Running(Pump):
    """A job of two workers without deadline, which has begun at step 7."""

    def __init__(self, aggregators: int = 1, **spec: Any) -> None:
        super().__init__([Aggregator(index, aggregators) for index in range(aggregators)])
        options = {"deadline_s": None, "numel": 512 * aggregators, "aggregators": aggregators, "first_step": 7}
        self.spec = make_spec(PLAN, **{**options, "one_group": False, **spec})
        self.workers = [self.connect(self.spec, PLAN, k, first_step=self.spec.first_step) for k in range(2)]
        for worker in self.workers:
            worker.join(1.0)

    def step(self, *workers: int) -> None:
        for k in workers:
            step = self.workers[k].session.inbox.step
            self.workers[k].begin(step)
            plan = self.workers[k].session.courses.at(step).plan
            push_all(self.workers[k], plan, step, torch.ones(self.spec.numel))
        results = [take(self.workers[k]) for k in workers]
        assert all(torch.equal(result, results[0]) for result in results)

    def kill(self, worker: int) -> None:
        self.sessions.pop(peer_of(worker), None)
        for aggregator in self.aggregators:
            aggregator.lost(peer_of(worker), self.time_s)
        self.pump()

    def start_again(self, spec: JobSpec, plan: Plan, step: int, worker: int = 1) -> Connection:
        self.workers[worker] = self.connect(spec, plan, worker, first_step=step)
        return self.workers[worker]

    def come_back(self, step: int, worker: int = 1) -> Connection:
        plan = informed(PLAN)
        back = self.start_again(at_step(self.spec, plan, step), plan, step, worker)
        back.join(1.0)
        return back


@pytest.mark.parametrize("aggregators", [1, 2])
@pytest.mark.parametrize("worker", [0, 1])
def test_a_worker_comes_back_with_a_later_checkpoint_and_goes_on_from_the_log(aggregators: int, worker: int) -> None:
    job, other = Running(aggregators), 1 - worker
    for _ in range(3):
        job.step(0, 1)
    job.kill(worker)
    for _ in range(3):
        job.step(other)
    back = job.come_back(9, worker)
    assert back.spec == job.spec
    courses = back.session.courses
    assert (courses.first_step, courses.first.plan) == (7, PLAN)
    for step in (9, 10, 11, 12):
        assert back.closed(step)
        assert take(back).shape == (job.spec.numel,)
    assert not back.closed(13)
    job.step(0, 1)
    assert back.session.inbox.step == 14
    assert all(each.failed is None and not each.stats["bad_messages"] for each in job.aggregators)


def test_it_is_in_when_it_knows_the_plans_that_were_made_before() -> None:
    """It may begin a step at once, without a result before it: what it sends must follow the newest plan."""
    job = Running(2, deadline_s=1.0, log_steps=80)
    leader = job.aggregators[0].job
    assert leader is not None
    job.step(0, 1)
    job.kill(1)
    for number in range(KEPT + 10):  # more than are kept
        leader.replan(dataclasses.replace(PLAN, bits=np.array([2 + number % 5, 5]), bit_budget=None), 1.0)
        job.pump()
        job.step(0)
    courses = job.workers[0].session.courses
    begin = courses.newest.from_step
    spec, plan = at_step(job.spec, informed(PLAN), begin), informed(PLAN)
    back = job.start_again(spec, plan, begin)
    session, here = back.session, peer_of(1)
    told = []
    for aggregator, frames in session.drain():
        job.aggregators[aggregator].receive(here, frames(), 0.0)
        told += [(aggregator, answer) for peer, answer in job.aggregators[aggregator].drain() if peer == here]
    waited = 0
    for aggregator, answer in sorted(told, key=lambda each: -each[0]):  # as if aggregator 0 were the slower one
        knows = session.courses.newest == courses.newest
        assert session.is_in == (len(session.welcomed) == 2 and knows)
        waited += len(session.welcomed) == 2 and not knows
        session.receive(aggregator, list(answer), 0.0)
    assert session.is_in
    assert waited > 60
    assert [c.version for c in session.courses.changes] == [c.version for c in leader.courses.changes]
    for step in range(begin - 20, begin + 1):
        assert session.courses.at(step) == leader.courses.at(step)
    job.step(0, 1)
    assert all(each.failed is None and not each.stats["bad_messages"] for each in job.aggregators)


def test_a_welcome_that_is_passed_over_still_says_what_the_job_is() -> None:
    """The plans that follow it are not passed over."""
    job = Running()
    for _ in range(3):
        job.step(0, 1)
    job.kill(1)
    plan = informed(PLAN)
    back = job.start_again(at_step(job.spec, plan, 9), plan, 9).session
    back.connected(0)  # the connection broke before the answer came
    welcome = [messages.encode_message(messages.Welcome(7, attempt=1, first_step=7, plan=1)), PLAN.to_json().encode()]
    back.receive(0, list(welcome), 0.0)
    assert back.spec == job.spec
    assert not back.is_in
    for _ in range(2):
        back.receive(0, list(Course(version=1, from_step=8, plan=plan, deadline_s=None).to_frames()), 0.0)
    back.receive(0, [messages.encode_message(messages.Welcome(7, attempt=2, first_step=7, plan=1))], 0.0)
    assert back.is_in
    assert back.courses.at(8).plan == plan
    back.receive(0, [messages.encode_message(messages.Welcome(7, attempt=2, first_step=6, plan=1))], 0.0)
    assert isinstance(back.error, JobFailed)


# --- who is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("changes", "named"), [({"first_step": 9}, "first_step=7"), ({"plan_digest": ""}, "plan_dig")])
def test_workers_of_a_job_that_begins_must_load_the_same_checkpoint(changes: dict[str, Any], named: str) -> None:
    """As long as no step has closed, nobody can have a later one."""
    job = Running()
    job.kill(1)
    plan = PLAN if "first_step" in changes else informed(PLAN)
    spec = msgspec.structs.replace(job.spec, **{**changes, "plan_digest": plan.digest()})
    other = job.start_again(spec, plan, spec.first_step)
    with pytest.raises(Refused, match=rf"worker 1: expected {named}.* on every rank|to every rank"):
        other.join(1.0)
    assert "the same" in str(other.session.error)
    job.step(0)
    assert job.aggregators[0].failed is None


@pytest.mark.parametrize(
    ("changes", "step", "named"),
    [
        ({"layout_digest": "another"}, 9, "layout_digest='layout' as worker 0, got 'another': build the same model"),
        ({"seed": 5}, 9, "seed=0 as worker 0, got 5: .* load a checkpoint of this job"),
        ({"verify_every": 3}, 9, "verify_every"),
        ({}, 200, "step 13 has not closed yet: is it a worker of another job"),
        ({}, 3, "the log starts at 9: load a checkpoint"),
    ],
)
def test_a_checkpoint_of_another_job_is_refused_by_what_differs_and_the_job_goes_on(
    changes: dict[str, Any], step: int, named: str
) -> None:
    job = Running(log_steps=4)
    for _ in range(6):
        job.step(0, 1)
    job.kill(1)
    plan = informed(PLAN)
    stranger = job.start_again(msgspec.structs.replace(at_step(job.spec, plan, step), **changes), plan, step)
    with pytest.raises(Refused, match=named):
        stranger.join(1.0)
    job.step(0)
    assert job.aggregators[0].failed is None
    job.kill(1)
    job.come_back(10)


def test_a_worker_that_divides_the_data_otherwise_does_not_come_back() -> None:
    """Its loader was made of its own plan."""
    job = Running()
    job.step(0, 1)
    job.kill(1)
    plan = make_plan([0.1, 0.6], bits_per_coordinate=4, noise_ratio=1.0)
    other = job.start_again(at_step(job.spec, plan, 8), plan, 8)
    with pytest.raises(Refused, match=r"worker 1 cannot come back to the job: plan: expected .* the same arguments"):
        other.join(1.0)
    job.kill(1)
    job.step(0)
    assert job.aggregators[0].failed is None


# --- the first steps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("one_group", [True, False])
def test_a_loss_in_the_first_steps_ends_the_job_only_where_they_need_all(one_group: bool) -> None:
    job = Running(warmup_steps=3, one_group=one_group)
    job.kill(1)
    assert (job.aggregators[0].failed is not None) == one_group
    if not one_group:
        job.step(0)
        job.come_back(8)
        job.step(0, 1)


def test_a_worker_that_never_comes_is_not_waited_for_and_may_come_later() -> None:
    job = Pump([Aggregator()])
    spec = make_spec(PLAN, deadline_s=1.0, warmup_steps=3, one_group=False, join_timeout_s=60.0)
    first = job.connect(spec, PLAN, 0)
    first.join(1.0)
    for step in range(4):
        first.begin(step)
        push_all(first, PLAN, step, torch.ones(512))
        if step == 0:
            job.pump()
            assert not first.closed(0)
            job.time_s = 61.0
        take(first)
    late = job.connect(spec, PLAN, 1)
    late.join(1.0)
    for _ in range(4):
        take(late)
    assert first.session.gone == {}


# --- under a virtual clock ----------------------------------------------------------------------------------

THREE = make_plan([0.1, 0.3, 0.6], bits_per_coordinate=4, noise_ratio=1.0)
rules = st.fixed_dictionaries(
    {
        "deadline_s": st.sampled_from([None, 0.5, 1.0]),
        "late": st.sampled_from(["fold", "drop"]),
        "warmup_steps": st.integers(0, 2),
        "max_staleness": st.integers(0, 3),
        "away_s": st.sampled_from([0.0, 1.0]),
    }
)


def test_all_apply_the_same_bytes_whoever_dies_and_comes_back_from_whatever_checkpoint() -> None:
    """They are the sums of what was sent, and what was sent twice for a step counts once."""
    seen: Counter[str] = Counter()

    @given(rules, st.integers(1, 2), st.integers(0, 2), st.integers(0, 2**31))
    @settings(max_examples=40, deadline=None)
    def play(rule: dict[str, Any], aggregators: int, victim: int, seed: int) -> None:
        rng, steps = np.random.default_rng(seed), 14
        spec = make_spec(THREE, numel=812, chunk_numel=512, one_group=False, aggregators=aggregators, **rule)
        match = Match(THREE, spec, latency_s=lambda: float(rng.uniform(0.0, 0.1)))
        dies_at, saved = int(rng.integers(2, 9)), int(rng.integers(1, 3))
        saved = dies_at - saved  # before the death, or the very beginning

        def work(member: Member, until: int) -> None:
            while member.step < until:
                if member.connection.closed(member.step):
                    seen["replayed"] += 1
                    match.take(member)
                    continue
                late = rng.random() < [0.05, 0.2, 0.5][member.worker]
                match.compute(member, float(rng.uniform(0, 0.4) + late * rng.exponential(1.0)))

        def together(member: Member) -> None:
            work(member, steps)
            match.world.wait_for(lambda: all(other.step == steps for other in match.members))

        def die_and_come_back(member: Member) -> None:
            work(member, dies_at)
            match.begin(member)
            if rng.random() < 0.5:  # a part of the step is out
                match.push(member, 0)
                match.world.sleep(0.2)
            for index in range(aggregators):
                match.world.cut(member.connection, index, after_s=math.inf)
            match.world.sleep(float(rng.choice([0.5, 3.0, 10.0])))
            plan = informed(THREE, float(rng.uniform(0.0, 0.9)))
            session = session_for(
                at_step(spec, plan, saved),
                plan,
                victim,
                endpoints=member.connection.session.endpoints,
                first_step=saved,
            )
            peer = peer_of(victim, b"second")
            back = Member(match.world.connect(peer, session), ArrivalRates(1.0 - THREE.straggle_probs, spec.chunks))
            back.applied, back.counts = member.applied[:saved], member.counts[:saved]
            match.members[victim] = back
            back.connection.join(math.inf)
            seen["came back to a step that others wait in"] += not back.connection.closed(saved)
            assert back.connection.spec == spec
            together(back)

        for member in list(match.members):
            match.script(member, die_and_come_back if member.worker == victim else together)
        match.run()
        applied = match.members[victim].applied
        match.check(gone=[victim])  # whose rates began with the checkpoint's
        assert applied == match.members[victim - 1].applied

    play()
    assert seen["replayed"] > 50, seen


# --- courses ------------------------------------------------------------------------------------------------

RULE = make_spec(PLAN).rule


@given(
    job_at=st.integers(0, 50),
    gaps=st.lists(st.integers(1, 4), max_size=2 * KEPT),
    own=st.integers(0, 500),
    asked=st.integers(0, 600),
)
@settings(max_examples=100, deadline=None)
def test_who_comes_back_has_the_courses_that_the_job_keeps(job_at: int, gaps: list[int], own: int, asked: int) -> None:
    there, here = Courses(RULE, PLAN, job_at), Courses(RULE, informed(PLAN), own)
    step = job_at
    for version, gap in enumerate(gaps, start=1):
        step += gap
        there.add(Course(version=version, from_step=step, plan=informed(PLAN, version / 1000), deadline_s=1.0))
    here.come_back(PLAN, job_at)
    for change in there.changes:
        assert here.add(change)
    assert (here.at(asked), here.deadline_s(asked)) == (there.at(asked), there.deadline_s(asked))
    assert (here.first, here.changes) == (there.first, there.changes)


def test_a_plan_for_other_shares_or_bits_is_none_to_come_back_to() -> None:
    courses = Courses(RULE, PLAN, 9)
    unequal = make_plan([0.1, 0.6], bits_per_coordinate=4, noise_ratio=1.0)
    for other in (unequal, simple_plan(2, bits_per_coordinate=8)):
        with pytest.raises(ConfigError, match="differs in more than how often workers are late"):
            courses.come_back(other, 7)
    assert courses.first.plan == PLAN
