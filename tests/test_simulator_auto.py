"""Simulated jobs that measure their workers and plan anew: they choose as the real aggregator, and stay unbiased."""

from __future__ import annotations

import dataclasses
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from helpers import simulated
from helpers.simulation import decoded_gradients, partition_gradients
from test_aggregator import assert_mean_is

from torch_qgc.ddp.sampler import CodedSampler, Cut
from torch_qgc.ddp.settings import Limits
from torch_qgc.errors import ConfigError
from torch_qgc.job.courses import Course, Courses
from torch_qgc.job.steering import Steering
from torch_qgc.kernels import decode_sum, derive_key, encode
from torch_qgc.planner import Plan, make_plan, segment_weights
from torch_qgc.planner.batches import apportion
from torch_qgc.planner.variance import NoiseRatio, RunningVariance
from torch_qgc.protocol import messages
from torch_qgc.protocol.contract import ClosingRule
from torch_qgc.simulator import Machines
from torch_qgc.simulator.arrivals import Contribution, JobRounds
from torch_qgc.simulator.coding import SchemeCodec
from torch_qgc.simulator.delays import DelaySource
from torch_qgc.simulator.machines import Change, Demand
from torch_qgc.simulator.work import WorkerWork

AUTO = ClosingRule(deadline_s="auto")
NUMEL, BATCH = 512, 32


def equal_shares(workers: int, bits: int = 32, **options: Any) -> Plan:
    """Every worker has a partition of its own."""
    shares = np.full(workers, 1.0 / workers)
    fields = dict(straggle_probs=np.full(workers, 0.05), bits=np.full(workers, bits), shares=shares)
    return Plan(**fields, weights=segment_weights(shares, workers), **options)


def clock(machines: Machines, plan: Plan, *, every: int = 50, seed: int = 0) -> JobRounds:
    workers = machines.workers
    return JobRounds(
        DelaySource(machines, workers, seed),
        AUTO,
        np.ones(workers, dtype=bool),
        plan,
        demand=Demand((NUMEL,), (NUMEL,), 32, BATCH),
        log_steps=Limits().log_steps,
        steering=Steering(workers, NUMEL, every=every, auto_deadline=True) if every else None,
    )


def closed_at_s(rounds: JobRounds, steps: int, first: int = 0) -> np.ndarray:
    return np.array([rounds.close(step).closed_at_s for step in range(first, first + steps)])


def changes(courses: Any) -> list[Course]:
    return list(courses.changes)


# ------------------------------------------------------------------------------------------ nothing to choose
def test_a_job_whose_plan_never_changes_is_bit_for_bit_that_with_a_fixed_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    choose = Steering.choose

    def noted(self: Steering, step: int, course: Course) -> Any:
        looked.append(step)
        choice = choose(self, step, course)
        assert choice is None
        return choice

    monkeypatch.setattr(Steering, "choose", noted)
    machines = Machines(workers=4, batch_s=1.0, fixed_s=0.1, jitter=0.01)
    plan = make_plan([0.05] * 4, bits_per_coordinate=4, num_partitions=4)
    rule = ClosingRule(deadline_s=1.5)
    options: dict[str, Any] = dict(delays=machines, deadline_s=None, rule=rule, batch_size=4, steps=120)
    expected, fixed = decoded_gradients(plan, replan_every=0, **options)
    assert not looked
    got, watched = decoded_gradients(plan, replan_every=40, **options)
    assert len(looked) == 3
    np.testing.assert_array_equal(got, expected)
    for name in ("loss", "virtual_time_s", "bits_sent", "contributions"):
        np.testing.assert_array_equal(getattr(watched, name), getattr(fixed, name))


def test_equal_workers_on_a_quiet_machine_get_a_deadline_that_nobody_ever_meets() -> None:
    machines = Machines(workers=4, batch_s=1.0, fixed_s=0.1, jitter=0.05)
    plain, watched = (clock(machines, equal_shares(4), every=every) for every in (0, 50))
    np.testing.assert_array_equal(closed_at_s(watched, 400), closed_at_s(plain, 400))
    assert 1 <= len(changes(watched.courses)) <= 2
    for course in changes(watched.courses):
        assert course.deadline_s is not None
        assert course.deadline_s > 2.0
        np.testing.assert_array_equal(course.plan.batches, np.ones(4))


def test_without_a_job_there_is_nothing_to_plan_anew() -> None:
    with pytest.raises(ConfigError, match="expected a rule"):
        decoded_gradients(make_plan([0.1] * 2), replan_every=10, steps=1)


# --------------------------------------------------------------------------------- as the real aggregator does
# In milliseconds: a real worker asks again for a result that takes a second.
PAUSING = Machines(
    workers=4,
    batch_s=(0.001, 0.00107, 0.00103, 0.0041),
    fixed_s=0.0001,
    jitter=0.1,
    pause_chance=0.06,
    pause_s=0.012,
    changes=(Change(of="batch_s", factor=4.0, workers=(1,), start=70, stop=130),),
)
LINKED = Machines(
    workers=4,
    batch_s=(0.001, 0.0011, 0.0009, 0.001),
    fixed_s=0.0001,
    tail_s=0.0007,
    jitter=0.1,
    up_s=(0.00013, 0.00017, 0.00019, 0.0091),
    down_s=(0.00011, 0.00007, 0.00023, 0.00029),
)


class Measured(simulated.Job):
    """A real job whose workers say how large their batches are, and follow its plans."""

    def __init__(self, source: DelaySource, demand: Demand, plan: Plan, spec: Any, gradients: torch.Tensor) -> None:
        self.source, self.demand = source, demand
        super().__init__(plan, spec, gradients, lambda k, step: 0.0, link=self._link)

    def _plan(self, step: int) -> Plan:
        return self.aggregator.job.courses.at(step).plan

    def _link(self, way: str, peer: bytes, frames: Any) -> float:
        worker = [simulated.peer_of(k) for k in range(self.plan.num_workers)].index(peer)
        decode = messages.decode_from_worker if way == "up" else messages.decode_from_aggregator
        message = decode(frames[0])
        if not isinstance(message, messages.Push | messages.Result):
            return 0.0
        times = self.source.draw(message.step, self.demand.load(self._plan(message.step)))
        return float((times.up_s if way == "up" else times.down_s)[worker])

    def _work(self, worker: int, steps: int) -> None:
        connection = self.connections[worker]
        connection.join(math.inf)
        while (step := self.steps[worker]) < steps:
            if not connection.closed(step):
                plan = connection.session.courses.at(step).plan
                load = self.demand.load(plan)
                samples = round(float(load.batches[worker]) * BATCH)
                connection.begin(step, samples=samples, batch_size=BATCH)
                self.world.sleep(float(self.source.draw(step, load).own_s[worker]))
                simulated.push_all(connection, plan, step, self.gradients[worker])
            self._apply(worker)


@pytest.mark.parametrize(("machines", "bits", "downlink_bits"), [(PAUSING, 4, 8), (LINKED, 4, 32), (LINKED, 8, 8)])
def test_a_simulated_job_chooses_as_the_real_aggregator(
    machines: Machines, bits: int, downlink_bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the same delays: the same plans, from the same steps on, with the same batches, bits and deadlines."""
    # The virtual clock does not know what payloads have lost.
    monkeypatch.setattr(RunningVariance, "update", lambda *args: None)
    monkeypatch.setattr(NoiseRatio, "update", lambda *args: None)
    # Workers join every open step, as those of tests/helpers/simulated.py do.
    monkeypatch.setattr(Courses, "wait_before_joining_s", lambda *args: 0.0)
    steps, every, plan = 150, 30, equal_shares(4, bits)
    demand, source = Demand((NUMEL,), (NUMEL,), downlink_bits, BATCH), DelaySource(machines, 4, 3)
    limits = Limits()
    rule = dict(deadline_s="auto", warmup_steps=3, quorum=2, late="fold", max_staleness=32)
    spec = simulated.make_spec(
        plan, replan_every=every, downlink_bits=downlink_bits, log_steps=limits.log_steps, **rule
    )
    real = Measured(source, demand, plan, spec, torch.ones(4, NUMEL))
    real.run(steps)

    steering = Steering(4, NUMEL, every=every, auto_deadline=True, norm=plan.norm, most_batch=limits.most_batch)
    virtual = JobRounds(
        source,
        ClosingRule(**rule),
        np.ones(4, dtype=bool),
        plan,
        demand=demand,
        log_steps=limits.log_steps,
        steering=steering,
    )
    counts = []
    for step in range(steps):
        outcome = virtual.close(step)
        counts.append(np.bincount([c.worker for c in outcome.contributions], minlength=4))
    expected, got = changes(real.aggregator.job.courses), changes(virtual.courses)
    assert len(expected) >= 2
    assert [(c.version, c.from_step, c.plan.bits.tolist()) for c in got] == [
        (c.version, c.from_step, c.plan.bits.tolist()) for c in expected
    ]
    for mine, its in zip(got, expected):
        assert mine.deadline_s == (None if its.deadline_s is None else pytest.approx(its.deadline_s, rel=1e-6))
        np.testing.assert_allclose(mine.plan.batches, its.plan.batches, rtol=1e-6)
        np.testing.assert_allclose(mine.plan.straggle_probs, its.plan.straggle_probs, rtol=1e-5, atol=1e-9)
    np.testing.assert_array_equal(counts, np.array(real.contributions[:steps]))


# ------------------------------------------------------------------------------------- a worker becomes slower
@pytest.mark.parametrize("seed", range(2))
def test_step_time_is_back_soon_when_a_processor_becomes_slow_and_when_it_recovers(seed: int) -> None:
    """Eight workers, one 5x slower from step 200 to 400. What the others can do for it costs a ninth of a step."""
    slow = Change(of="batch_s", factor=5.0, workers=(2,), start=200, stop=400)
    machines = Machines(workers=8, batch_s=1.0, fixed_s=0.1, jitter=0.05, changes=(slow,))
    rounds = clock(machines, equal_shares(8, 4), seed=seed)
    took_s = np.diff(closed_at_s(rounds, 600), prepend=0.0)
    usual_s = took_s[20:200].mean()
    assert took_s[200:205].max() > 2.0 * usual_s  # as long as the deadline lets it
    for first in (200, 400):
        for settled in range(first + 30, first + 200, 20):
            assert took_s[settled : min(settled + 20, first + 200)].mean() < 1.2 * usual_s
    batch_at = [float(rounds.courses.at(step).plan.batches[2]) for step in (199, 230, 399, 470)]
    assert batch_at[0] == pytest.approx(1.0, abs=0.15)
    assert max(batch_at[1:3]) < 0.35
    assert batch_at[3] == pytest.approx(1.0, abs=0.15)
    assert rounds.courses.newest.version <= 8  # it does not oscillate


# ----------------------------------------------------------------------------------------------------- training
CHANGING = Machines(
    workers=3,
    batch_s=(1.0, 1.0, 2.5),
    fixed_s=0.1,
    pause_chance=(0.05, 0.05, 0.2),
    pause_s=6.0,
    up_s=(0.1, 0.1, 0.6),
    changes=(Change(of="batch_s", factor=4.0, workers=(0,), period=300),),
)


def test_every_worker_s_payloads_stand_for_all_rounds_of_a_run_with_new_plans() -> None:
    """One worker's speed comes and goes, all pause: plans expect what does not come true, and nothing is lost."""
    steps, stood_for = 1000, np.zeros(3)
    rounds = clock(CHANGING, equal_shares(3, 4, bit_budget=12), every=20)
    for step in range(steps):
        outcome = rounds.close(step)
        assert outcome.rates is not None
        for contribution in outcome.contributions:
            stood_for[contribution.worker] += 1.0 / outcome.rates[contribution.worker]
    # At the end some rounds are owed, or were paid for in advance: less than thirty of a worker that is slow just then.
    assert stood_for / steps == pytest.approx(np.ones(3), abs=0.03)
    assert len({(c.deadline_s, tuple(c.plan.batches), tuple(c.plan.bits)) for c in changes(rounds.courses)}) > 20


def test_decoding_is_unbiased_over_a_run_with_new_plans() -> None:
    """Batches, bits and deadlines change all the time, payloads come late, and each keeps the share it was made for."""
    options: dict[str, Any] = dict(delays=CHANGING, deadline_s=None, rule=AUTO, replan_every=20, batch_size=4)
    decoded, trace = decoded_gradients(equal_shares(3, 4, bit_budget=12), steps=400, **options)
    assert (trace.contributions > 1).any()
    # A worker that is late in one round comes twice in another: rounds are independent in blocks only.
    runs = decoded.reshape(-1, 20, decoded.shape[1]).mean(axis=1)
    assert_mean_is(runs, truth(0), slack=20 / 400)


def test_a_payload_is_coded_and_weighed_by_the_plan_of_its_step() -> None:
    """As in `RoundDecoder`; other shares than those of the step at hand would be a bias."""
    plans = [make_plan([0.1, 0.4, 0.4], bits_per_coordinate=bits) for bits in (3, 6)]
    plans[1] = dataclasses.replace(plans[1], shares=plans[1].shares[::-1], weights=plans[1].weights[::-1])
    codec = SchemeCodec(plans[0], NUMEL, 0, plan_at=lambda step: plans[step])
    rows = torch.randn(3, NUMEL, generator=torch.Generator().manual_seed(1))
    contributions = [Contribution(0, 0, 1), Contribution(0, 1, 1), Contribution(2, 1, 1)]
    payloads = {c[:2]: codec.encode(c.worker, c.made_for, rows[c.worker], delivered=True) for c in contributions}
    rates, out = np.array([0.9, 0.5, 0.5]), torch.empty(NUMEL)
    codec.decode(contributions, payloads, rates, [out], step=1)
    expected = torch.zeros(NUMEL)
    for worker, step, _ in contributions:
        bits, share = int(plans[step].bits[worker]), float(plans[step].shares[worker])
        encoded = encode(rows[worker], bits, key=derive_key(0, step, worker))
        decode_sum([encoded], [share / rates[worker]], expected, accumulate=True)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)  # sums in another order


def truth(seed: int) -> np.ndarray:
    """The gradient of all data; partitions are as large as each other."""
    return partition_gradients(3, seed=seed).mean(axis=0)


def test_a_clock_that_plans_anew_goes_on_from_where_it_was_kept() -> None:
    plan = equal_shares(3, 4)
    whole, cut = (clock(CHANGING, plan, every=20) for _ in range(2))
    expected = closed_at_s(whole, 120)
    got = closed_at_s(cut, 70)
    kept = pickle.loads(pickle.dumps(cut))
    np.testing.assert_array_equal(np.concatenate([got, closed_at_s(kept, 50, first=70)]), expected)
    assert changes(kept.courses) == changes(whole.courses) != []


class Noted:
    """In place of `Gradients`: which samples each worker's gradient is the mean of."""

    scratch = torch.zeros(1)

    def __init__(self) -> None:
        self.samples: dict[tuple[int, int], list[int]] = {}

    def mean(self, indices: list[int], step: int, worker: int) -> float:
        self.samples[step, worker] = indices
        return 0.0


def test_workers_draw_the_batches_that_a_loader_cuts_while_plans_change() -> None:
    """Whoever misses steps leaves their batches out; a run that is resumed draws the same."""
    plans = [equal_shares(3, batches=batches) for batches in ([1.0, 1.0, 1.0], [1.5, 1.25, 0.25], [0.5, 0.5, 2.0])]

    def plan_at(step: int) -> Plan:
        return plans[step // 7 % 3]

    blocks, size, steps = np.split(np.arange(240), 3), 8, 40  # four epochs of ten steps
    expected = {}
    for worker in range(3):
        at = [0]
        sampler = CodedSampler(
            plans[0].partition_probabilities(worker),
            blocks,
            batch_size=size,
            batches=10,
            cut=lambda at=at, worker=worker: Cut(0, int(apportion(plan_at(at[0]).batches, size)[worker]), 0),
            worker=worker,
        )
        for epoch in range(steps // 10):
            sampler.set_epoch(epoch)
            for batch in sampler:
                expected[at[0], worker] = batch
                at[0] += 1
    rng, noted = np.random.default_rng(0), Noted()
    for begun in (0, 13):
        work = WorkerWork(noted, plans[0], blocks, batch_size=size, plan_at=plan_at)  # type: ignore[arg-type]
        for step in range(begun, steps):
            work.compute(step, set(np.flatnonzero(rng.random(3) < 0.7).tolist()), lambda *args: None)
    assert len(noted.samples) > 90
    assert noted.samples == {key: expected[key] for key in noted.samples}
