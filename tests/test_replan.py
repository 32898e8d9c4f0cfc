"""New plans while a job runs: the same at the same step everywhere, and what is decoded stays what it should be."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from helpers.match import Match, Member
from helpers.pumped import Pump
from helpers.simulated import Job, make_spec, peer_of, push_all, take
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_qgc.aggregator.aggregator import Aggregator
from torch_qgc.errors import ConfigError, JobFailed
from torch_qgc.job.courses import Course
from torch_qgc.planner import Plan, make_plan
from torch_qgc.protocol import messages
from torch_qgc.worker.connection import Connection

K, NUMEL, CHUNKS = 3, 3 * 512 + 300, 4
PLAN = make_plan([0.1, 0.3, 0.6], bits_per_coordinate=4, noise_ratio=1.0)


def other_plan(rng: np.random.Generator, before: Plan) -> Plan:
    """Other shares, bits, and chances to be late; or other bits and batches alone."""
    if rng.random() < 0.3:
        bits = rng.integers(2, 9, K)
        return dataclasses.replace(before, bits=bits, bit_budget=None, batches=1.0 + rng.random(K))
    return make_plan(rng.uniform(0.0, 0.8, K), bits_per_coordinate=int(rng.integers(3, 8)), noise_ratio=1.0)


class Replanned(Match):
    """A match whose plan changes at set times, whatever the workers do then."""

    def __init__(self, *, rng: np.random.Generator, at_s: Iterable[float], aggregators: int, **options: Any) -> None:
        rule = {"deadline_s": options.pop("deadline_s", 1.0), **options.pop("rule", {})}
        spec = make_spec(PLAN, **{"numel": NUMEL, "chunk_numel": 512, "aggregators": aggregators, **rule})
        super().__init__(PLAN, spec, **options)
        self.rng = rng
        for time_s in at_s:
            self.world.net.at(time_s, self.replan)

    def replan(self) -> None:
        job = self.world.aggregator.job
        if job is None or not job.rounds.roster.alive.any():
            return
        deadline_s = [None, 0.5, 1.0, 2.0][int(self.rng.integers(4))]
        course = job.replan(other_plan(self.rng, job.courses.newest.plan), deadline_s)
        self.oracle.plans.append((course.from_step, course.plan, course.deadline_s))
        self.world.aggregator.tick(self.world.now())  # an aggregator says at once what it has decided

    def check(self, *, gone: Sequence[int] = ()) -> None:
        super().check(gone=gone)
        for member in self.members:
            made = [(c.from_step, c.plan, c.deadline_s) for c in member.courses.changes]
            assert made == self.oracle.plans[1 : 1 + len(made)]
        for aggregator in self.world.aggregators:
            assert aggregator.job is not None
            told = [(c.from_step, c.plan, c.deadline_s) for c in aggregator.job.courses.changes]
            assert told == self.oracle.plans[1 : 1 + len(told)]
            begun = [entry for entry in self.oracle.plans[1:] if entry[0] <= aggregator.job.rounds.newest_begun]
            assert told[: len(begun)] == begun


@dataclasses.dataclass(frozen=True)
class Weather:
    """What happens on the way: latencies, the chance of results to be lost, and how many connections break."""

    latency_s: float
    lost: float
    cuts: int


weathers = st.builds(Weather, st.sampled_from([0.0, 0.1, 0.7]), st.sampled_from([0.0, 0.3]), st.integers(0, 3))
rules = st.fixed_dictionaries(
    {
        "late": st.sampled_from(["fold", "fold", "drop"]),
        "awaits": st.sampled_from(["begun", "alive"]),
        "warmup_steps": st.integers(0, 2),
        "quorum": st.integers(1, K),
        "max_staleness": st.integers(0, 3),
        "away_s": st.sampled_from([0.1, 5.0]),
    }
)


def test_all_apply_the_same_bytes_weighed_by_the_plan_that_each_payload_was_made_for() -> None:
    """Plans change at any moment; messages take any time, results are lost, and connections break and are made anew."""
    seen: Counter[str] = Counter()

    @given(st.integers(0, 6), st.integers(1, 3), rules, weathers, st.integers(0, 2**31))
    @settings(max_examples=40, deadline=None)
    def play(plans: int, aggregators: int, rule: dict[str, Any], weather: Weather, seed: int) -> None:
        rng, steps = np.random.default_rng(seed), 10

        def latency_s() -> float:
            return float(rng.uniform(0, weather.latency_s))

        def down(frames: Sequence[Any]) -> list[float]:
            lost = (
                isinstance(messages.decode_from_aggregator(frames[0]), messages.Result) and rng.random() < weather.lost
            )
            return [] if lost else [0.0]

        way: dict[str, Any] = {"down": down} if weather.lost else {"latency_s": latency_s}
        match = Replanned(rng=rng, at_s=rng.uniform(0.0, 8.0, plans), aggregators=aggregators, rule=rule, **way)

        def cut() -> None:
            job = match.world.aggregator.job
            if job is None or job.courses.warms_up(job.rounds.oldest):
                return  # a loss would be the end
            seen["cut"] += 1
            connection = match.members[int(rng.integers(K))].connection
            match.world.cut(connection, int(rng.integers(aggregators)), after_s=float(rng.choice([0.0, 0.5, 2.0])))

        for time_s in rng.uniform(0.0, 8.0, weather.cuts).tolist():
            match.world.net.at(time_s, cut)

        def work(member: Member) -> None:
            while member.step < steps:
                if member.connection.closed(member.step):
                    seen["replayed"] += 1
                    match.take(member)
                    continue
                late = rng.random() < [0.05, 0.2, 0.5][member.worker]
                match.compute(member, float(rng.uniform(0, 0.8) + late * rng.exponential(2.0)))
            # When some have left, an aggregator does not wait for who was lost.
            match.world.wait_for(lambda: all(other.step == steps for other in match.members))
            member.connection.close()

        for member in match.members:
            match.script(member, work)
        match.run()
        match.check()
        for aggregator in match.world.aggregators:
            seen["folded"] += aggregator.stats["folded"]
            seen["lost"] += aggregator.stats["lost_workers"]
        for member in match.members:
            assert member.connection.session.rejections == []
        seen["plans"] += len(match.members[0].courses.changes)
        seen["several aggregators"] += aggregators > 1 and len(match.members[0].courses.changes) > 1

    play()
    assert all(seen[name] > 2 for name in ("cut", "replayed", "folded", "lost", "plans", "several aggregators")), seen


# --- one law each -----------------------------------------------------------------------------------------


def test_bits_change_at_the_named_step_and_a_payload_made_before_it_is_taken_as_it_was_made() -> None:
    match = Replanned(rng=np.random.default_rng(0), at_s=[], aggregators=1, deadline_s=1.0, rule={"late": "fold"})
    plan = dataclasses.replace(PLAN, bits=np.array([7, 6, 5]), bit_budget=None)

    def replan() -> None:
        job = match.world.aggregator.job
        assert job is not None
        course = job.replan(plan, 3.0)
        assert (course.version, course.from_step) == (1, 1)  # step 0 is open
        match.oracle.plans.append((1, plan, 3.0))

    match.world.net.at(0.5, replan)

    def work(member: Member) -> None:
        match.compute(member, 1.3 if member.worker == 2 else 0.1)
        match.compute(member, 0.5)

    for member in match.members:
        match.script(member, work)
    match.run()
    match.check()
    assert [set(map(tuple, step.values())) for step in match.members[0].counts] == [{(1, 1, 0)}, {(1, 1, 2)}]
    sizes = {k: len(bytes(payload)) for k, payload in match.payloads.items() if k[2] == 0}
    bits = [[round((sizes[k, step, 0] - 4) * 8 / 512) for k in range(K)] for step in range(2)]
    assert bits == [PLAN.bits.tolist(), [7, 6, 5]]


@pytest.mark.parametrize("deadline_s", [None, 1.0])
def test_plans_that_a_job_cannot_train_with_change_nothing(deadline_s: float | None) -> None:
    pump, workers = joined(1, deadline_s=deadline_s)
    job = pump.aggregators[0].job
    assert job is not None
    mute = make_plan([0.1, 0.2, 0.3], bit_budget=5, allow_drop=True)  # too few bits for all three
    for plan, time_s in ((make_plan([0.1, 0.2]), None), (PLAN, 0.0), (PLAN, math.inf), (mute, None)):
        with pytest.raises(ConfigError, match="expected"):
            job.replan(plan, time_s)
    if deadline_s is None:
        with pytest.raises(ConfigError, match="set up to wait for all"):
            job.replan(PLAN, 1.0)
    pump.pump()
    assert job.courses.changes == ()
    assert all(worker.session.courses.changes == () for worker in workers)


def joined(aggregators: int, **rule: Any) -> tuple[Pump, list[Connection]]:
    """Three workers in a job of so many aggregators."""
    spec = make_spec(PLAN, numel=NUMEL, chunk_numel=512, aggregators=aggregators, **{"deadline_s": 1.0, **rule})
    pump = Pump([Aggregator(index, aggregators) for index in range(aggregators)])
    workers = [pump.connect(spec, PLAN, k) for k in range(K)]
    pump.pump()
    return pump, workers


def make_step(workers: Sequence[Connection], step: int) -> list[torch.Tensor]:
    for worker in workers:
        worker.begin(step)
    for worker in workers:
        push_all(worker, worker.session.courses.at(step).plan, step, torch.ones(NUMEL))
    return [take(worker) for worker in workers]


def test_a_worker_that_was_away_when_a_plan_was_made_hears_of_it_on_its_way_back() -> None:
    """From aggregator 0, before the results that it lacks; and it tells the others, though they have heard of it."""
    pump, workers = joined(2)
    make_step(workers, 0)
    away = pump.sessions.pop(peer_of(2))
    for aggregator in pump.aggregators:
        aggregator.lost(peer_of(2), pump.time_s)
    job = pump.aggregators[0].job
    assert job is not None
    course = job.replan(make_plan([0.3, 0.2, 0.1], bits_per_coordinate=6, noise_ratio=1.0), 2.0)
    for step in (1, 2, 3):
        make_step(workers[:2], step)
    assert away.courses.changes == ()
    pump.sessions[peer_of(2, b"again")] = away
    for aggregator in range(2):
        away.connected(aggregator)
    pump.pump()
    assert away.courses.changes == (course,)
    for _ in (1, 2, 3):  # they have come unasked
        take(workers[2])
    first, *others = make_step(workers, 4)
    assert all(torch.equal(first, other) for other in others)


def test_a_plan_that_was_lost_on_its_way_to_another_aggregator_is_told_again_on_the_next_connection() -> None:
    """By everybody: all connections to aggregator 1 break just then, so that nobody else has told it."""
    match = Replanned(rng=np.random.default_rng(2), at_s=[0.5], aggregators=2, latency_s=0.1, deadline_s=2.0)

    def cut() -> None:
        match.world.wait_for(lambda: all(member.courses.changes for member in match.members))
        for member in match.members:  # all have heard, and none has told
            match.world.cut(member.connection, 1)

    match.world.start(cut)

    def work(member: Member) -> None:
        for _ in range(4):
            match.compute(member, 0.9)
        match.world.wait_for(lambda: all(other.step == 4 for other in match.members))
        member.connection.close()

    for member in match.members:
        match.script(member, work)
    match.run()
    match.check()
    assert match.world.aggregators[1].job is not None
    assert len(match.world.aggregators[1].job.courses.changes) == 1


# --- those who mean harm ----------------------------------------------------------------------------------


def tell(pump: Pump, aggregator: int, worker: int, course: Course) -> list[messages.FromAggregator]:
    """Let a worker tell an aggregator of a plan; return what it is answered."""
    pump.aggregators[aggregator].receive(peer_of(worker), course.to_frames(), 0.0)
    answers = [
        (peer, messages.decode_from_aggregator(frames[0])) for peer, frames in pump.aggregators[aggregator].drain()
    ]
    return [message for peer, message in answers if peer == peer_of(worker) and not isinstance(message, messages.Ping)]


def test_aggregator_0_is_told_of_no_plan() -> None:
    pump, _ = joined(2)
    (answer,) = tell(pump, 0, 2, Course(version=1, from_step=1, plan=PLAN, deadline_s=1.0))
    assert isinstance(answer, messages.Rejected)
    assert "worker 2 tells of plan 1 from step 1 on: aggregator 0 makes the plans" in answer.text
    assert pump.aggregators[0].job is not None
    assert pump.aggregators[0].job.courses.changes == ()


@pytest.mark.parametrize(
    ("version", "from_step", "plan", "named"),
    [
        (1, 2, PLAN, "expected plan 1 from a step in 3 .. 4 on"),  # begun: worker 0 is in it
        (1, 0, PLAN, "3 .. 4"),
        (1, 5, PLAN, "3 .. 4"),
        (1, 2**52, PLAN, "3 .. 4"),
        (2, 3, PLAN, "expected plan 1"),
        (2**31 - 1, 3, PLAN, "expected plan 1"),
        (1, 3, make_plan([0.1] * 4), "one for 3 workers"),
    ],
)
def test_a_plan_that_aggregator_0_cannot_have_made_is_refused(
    version: int, from_step: int, plan: Plan, named: str
) -> None:
    pump, workers = joined(2)
    make_step(workers, 0)
    make_step(workers, 1)
    workers[0].begin(2)
    (answer,) = tell(pump, 1, 2, Course(version=version, from_step=from_step, plan=plan, deadline_s=1.0))
    assert isinstance(answer, messages.Rejected)
    assert named in answer.text
    assert pump.aggregators[1].job is not None
    assert pump.aggregators[1].job.courses.changes == ()


def test_a_plan_that_was_made_up_ends_the_job_as_soon_as_others_begin_its_step() -> None:
    """It is told of nowhere else, so that what they send would be weighed by another plan than they follow."""
    pump, workers = joined(2)
    assert tell(pump, 1, 2, Course(version=1, from_step=1, plan=PLAN, deadline_s=1.0)) == []
    make_step(workers, 0)
    with pytest.raises(JobFailed, match=r"worker 0 begins step 1 by plan 0, expected plan 1, which holds from step 1"):
        make_step(workers, 1)


def test_two_plans_of_one_number_end_the_job_by_name() -> None:
    pump, workers = joined(2)
    made_up = make_plan([0.6, 0.3, 0.1], bits_per_coordinate=4, noise_ratio=1.0)
    assert tell(pump, 1, 2, Course(version=1, from_step=1, plan=made_up, deadline_s=1.0)) == []
    job = pump.aggregators[0].job
    assert job is not None
    job.replan(PLAN, 1.0)
    with pytest.raises(JobFailed, match=r"worker \d tells of another plan than others: plan 1: expected the one with"):
        make_step(workers, 0)


# --- unbiased over changes --------------------------------------------------------------------------------

LATE = np.array([0.05, 0.2, 0.35, 0.6])  # at a deadline of one second; half as often at two


def gradients(workers: int) -> torch.Tensor:
    return torch.randn(workers, 512, generator=torch.Generator().manual_seed(0))


def replan_every(job: Job, seconds: float, choose: Callable[[], tuple[Plan, float | None]]) -> None:
    """Let a job change its plan again and again, at moments that have nothing to do with its steps."""

    def replan() -> None:
        running = job.aggregator.job
        if running is not None and running.rounds.roster.alive.any():
            running.replan(*choose())
            job.aggregator.tick(job.net.now())
            job.net.at(job.net.now() + seconds, replan)

    job.net.at(seconds, replan)


def errors(job: Job) -> np.ndarray:
    """Return [steps, n] by how much what is decoded differs from the mean gradient of the step's own shares."""
    g, courses = job.gradients.double().numpy(), job.connections[0].session.courses
    true = np.array([courses.at(step).plan.shares @ g for step in range(len(job.decoded))])
    return torch.stack(job.decoded).double().numpy() - true


def assert_no_bias(runs: np.ndarray, slack: float) -> None:
    """runs [R, n]: their mean is 0 within 4 standard errors and a slack, along directions in which g is about 1."""
    signs = np.random.default_rng(99).choice([-1.0, 1.0], size=(8, runs.shape[1])) / np.sqrt(runs.shape[1])
    for direction in signs:
        projected = runs @ direction
        assert abs(projected.mean()) < 4 * projected.std(ddof=1) / np.sqrt(len(projected)) + slack


@pytest.mark.parametrize("variates", [False, True])
def test_what_is_decoded_is_unbiased_over_changes_of_shares_bits_and_deadlines(variates: bool) -> None:
    """Monte Carlo over rounds: late by chance, and less often where the deadline is later, as the plans say."""
    rng, g = np.random.default_rng(0), gradients(4)

    def choose() -> tuple[Plan, float | None]:
        deadline_s = float(rng.choice([1.0, 2.0]))
        bits, noise = int(rng.integers(3, 7)), float(rng.choice([0.1, 1.0, 10.0]))
        return make_plan(LATE / deadline_s, bits_per_coordinate=bits, noise_ratio=noise), deadline_s

    def delay(worker: int, step: int) -> float:
        u = rng.random()
        return 0.5 if u > LATE[worker] else 1.5 if u > LATE[worker] / 2 else 3.0

    plan = make_plan(LATE, bits_per_coordinate=4, noise_ratio=1.0)
    job = Job(plan, make_spec(plan, control_variates=variates), g, delay, abandon=True)
    replan_every(job, 50.0, choose)
    job.run(700)
    assert len(job.connections[0].session.courses.changes) > 10
    # A change costs less than half a round of a worker that is late (see test_rates.py).
    assert_no_bias(errors(job), slack=0.5 / 50)


def test_the_time_average_is_unbiased_over_changes_of_shares_while_a_worker_sleeps_through_rounds() -> None:
    """Payloads that come rounds later weigh what their own step's plan says, at the rate that was measured."""
    rng, g, means = np.random.default_rng(1), gradients(4), []
    probs = [0.03, 0.03, 0.03, 0.5]

    def choose() -> tuple[Plan, float | None]:
        noise, bits = float(rng.choice([0.3, 1.0, 10.0])), int(rng.integers(3, 7))
        return make_plan(probs, bits_per_coordinate=bits, noise_ratio=noise), 1.0

    def delay(worker: int, step: int) -> float:
        usual = rng.uniform(0.5, 0.9)
        return usual + (6.0 * (rng.random() < 0.5) if worker == 3 else 0.6 * (rng.random() < 0.03))

    for seed in range(2):
        plan = make_plan(probs, bits_per_coordinate=4, noise_ratio=1.0)
        job = Job(plan, make_spec(plan, late="fold", seed=seed, max_staleness=64), g, delay)
        replan_every(job, 60.0, choose)
        job.run(900)
        learned = errors(job)[100:]  # the first plan's p = .5 is unlearned by then
        means += [stretch.mean(axis=0) for stretch in np.array_split(learned, 4)]
        assert len({tuple(c.plan.shares) for c in job.connections[0].session.courses.changes}) > 2
    # At either end of a stretch up to one gap of the sleeper, some 7 rounds of 200, is paid in the other one.
    assert_no_bias(np.array(means), slack=8 / 200)
    assert job.aggregator.stats["folded"] > 60
