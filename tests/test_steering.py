"""The right lever for each cause, soon after it shows, and none for chance: from workers' times to plans, on paper."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_qgc.job.courses import Course, Courses
from torch_qgc.job.steering import LEAST_STEPS, Choice, Steering
from torch_qgc.job.stopwatch import Stopwatch
from torch_qgc.kernels import payload_bytes
from torch_qgc.planner import Plan, make_plan
from torch_qgc.planner.batches import apportion
from torch_qgc.protocol.contract import ClosingRule
from torch_qgc.protocol.messages import Begin, Push

NUMEL, BATCH, EVERY = 100_000, 16, 50


class Fleet:
    """Workers that deliver every step, in the times they are said to take, and the plans that follow from these.

    Args:
        workers: K.
        deadline_s: fixed, or "auto".
        jitter: of what everybody computes: the standard deviation of its logarithm.
    Attributes:
        batch_s, link_s: [K] seconds of a mean batch, and in which a link carries the fp32 gradient; may be changed.
        more_s: what a worker's step takes on top.
        alive: who delivers.
        chosen: (step, choice) of every new plan.
    """

    def __init__(
        self,
        workers: int = 4,
        *,
        deadline_s: Any = "auto",
        jitter: float = 0.05,
        seed: int = 0,
        plan: Plan | None = None,
        batch_size: int = BATCH,
    ) -> None:
        self.rng, self.jitter, self.mean = np.random.default_rng(seed), jitter, batch_size
        self.batch_s, self.link_s = np.ones(workers), np.full(workers, 0.01)
        self.more_s: Callable[[int], float] = lambda worker: 0.0
        self.alive = frozenset(range(workers))
        plan = plan or make_plan([0.05] * workers, bits_per_coordinate=4)
        self.courses = Courses(ClosingRule(deadline_s=deadline_s), plan)
        self.steering = Steering(workers, NUMEL, every=EVERY, auto_deadline=deadline_s == "auto")
        self.watch, self.now, self.step = Stopwatch(1), 0.0, 0
        self.chosen: list[tuple[int, Choice]] = []
        self.took_s: list[float] = []  # the longest time of each step

    @property
    def course(self) -> Course:
        return self.courses.newest

    def samples(self) -> np.ndarray:
        """Return [K] samples of the batches, as a loader cuts them."""
        return apportion(self.course.plan.batches, self.mean or BATCH, 2)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self._make_step()

    def _make_step(self) -> None:
        bits, samples, times = self.course.plan.bits, self.samples(), {}
        for worker in sorted(self.alive):
            batch = samples[worker] / BATCH if self.mean else 1.0
            own_s = 0.05 + self.batch_s[worker] * batch * np.exp(self.jitter * self.rng.standard_normal())
            own_s += self.more_s(worker)
            nbytes = payload_bytes(NUMEL, int(bits[worker]))
            link_s = self.link_s[worker] * nbytes / (4 * NUMEL)
            outside_s = 0.1 * own_s  # of which a part lies before the step
            begin = Begin(self.step, samples=int(samples[worker]), batch_size=self.mean, outside_s=outside_s)
            self.watch.begin(worker, begin, self.now)
            push = Push(self.step, 0, int(bits[worker]), 0.0, 0.0, spent_s=own_s - outside_s)
            timed = self.watch.push(worker, push, self.now + own_s - outside_s + link_s)
            assert timed is not None
            self.steering.note(worker, timed, int(bits[worker]))
            times[worker] = own_s + link_s
        self.took_s.append(max(times.values()))
        self.now += self.took_s[-1]
        if self.steering.is_due(self.step, self.alive):
            choice = self.steering.choose(self.step, self.courses.at(self.step))
            if choice is not None:
                self.chosen.append((self.step, choice))
                self.courses.add(self.courses.following(choice.plan, choice.deadline_s, open_step=self.step))
        self.step += 1


# --- compute ----------------------------------------------------------------------------------------------


@given(st.integers(3, 6), st.floats(2.0, 8.0), st.integers(0, 2**31), st.sampled_from(["auto", None]))
@settings(max_examples=6, deadline=None)
def test_batches_fall_for_a_worker_that_computes_slowly_and_rise_again_when_it_recovers(
    workers: int, factor: float, seed: int, deadline_s: Any
) -> None:
    fleet = Fleet(workers, seed=seed, deadline_s=deadline_s)
    slow = seed % workers
    fleet.run(100)
    usual_s = float(np.median(fleet.took_s[20:]))
    fleet.batch_s[slow] *= factor
    fleet.run(100)
    batches = fleet.course.plan.batches
    assert np.all(batches[slow] < 0.8 * np.delete(batches, slow))
    assert batches.mean() == pytest.approx(1.0)  # the global batch is what the user said
    # The step is much shorter than if everybody kept its batch, and no longer than it need be by much.
    assert np.median(fleet.took_s[-20:]) < 0.5 * (usual_s + factor * usual_s)
    assert np.median(fleet.took_s[-20:]) < 1.5 * usual_s * workers / (workers - 1)
    fleet.batch_s[slow] /= factor
    fleet.run(150)
    assert fleet.course.plan.batches == pytest.approx(np.ones(workers), abs=0.25)
    assert np.median(fleet.took_s[-20:]) < 1.3 * usual_s


def test_batches_stay_where_no_loader_cuts_them() -> None:
    fleet = Fleet(batch_size=0)
    fleet.batch_s[1] = 4.0
    fleet.run(150)
    np.testing.assert_array_equal(fleet.course.plan.batches, np.ones(4))


@pytest.mark.parametrize("factor", [0.3, 2.0, 5.0])
def test_a_worker_that_changes_is_answered_within_few_steps(factor: float) -> None:
    """The change shows in a few of its steps, and is measured in six more: long before a plan is due anyway."""
    for seed in range(5):
        fleet = Fleet(seed=seed)
        fleet.run(EVERY + LEAST_STEPS + 10)
        at = fleet.step
        fleet.batch_s[2] *= factor
        fleet.run(EVERY - 10)
        assert min(step for step, _ in fleet.chosen if step >= at) <= at + 4 + 2 * LEAST_STEPS
        others = np.delete(fleet.course.plan.batches, 2)
        assert (fleet.course.plan.batches[2] < others.min()) == (factor > 1.0)


# --- links ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("link_s", [1.6, 2.5, 6.0])
def test_bits_fall_for_a_slow_link_to_what_it_carries_within_the_deadline(link_s: float) -> None:
    """Eight bits are a quarter of the fp32 gradient: with them all payloads of the slow link would come too late."""
    plan = make_plan([0.05] * 4, bits_per_coordinate=8)
    fleet = Fleet(deadline_s=1.4, plan=plan, batch_size=0)
    fleet.link_s[2] = link_s
    fleet.run(100)
    bits = fleet.course.plan.bits
    assert 2 <= bits[2] < np.delete(bits, 2).min()
    arrives_s = 0.05 + 1.0 + link_s * payload_bytes(NUMEL, int(bits[2])) / (4 * NUMEL)
    assert arrives_s < 1.02 * 1.4 or bits[2] == 2
    assert bits.sum() <= plan.bits.sum()  # within the budget


def test_fp32_stays_fp32() -> None:
    fleet = Fleet(plan=make_plan([0.05] * 4, bits_per_coordinate=32), deadline_s=1.5)
    fleet.link_s[1] = 3.0
    fleet.run(100)
    np.testing.assert_array_equal(fleet.course.plan.bits, np.full(4, 32))


# --- tails and pauses -------------------------------------------------------------------------------------


def test_pauses_of_anybody_get_a_deadline_that_does_not_last_as_long_as_they_do() -> None:
    fleet = Fleet(8)
    pauses_s = 20.0
    fleet.more_s = lambda worker: pauses_s * (fleet.rng.random() < 0.1)
    fleet.run(200)
    deadline_s, plan = fleet.course.deadline_s, fleet.course.plan
    assert deadline_s is not None
    assert 1.0 < deadline_s < pauses_s / 2.0
    assert fleet.chosen[-1][1].speedup > 1.2
    assert plan.straggle_probs.max() > 0.05  # whose payloads are weighed accordingly


def test_equal_fast_workers_get_nothing_but_a_deadline_for_what_was_never_seen() -> None:
    for seed in range(2):
        fleet = Fleet(seed=seed, jitter=0.02)
        start = fleet.course
        fleet.run(400)
        assert 1 <= len(fleet.chosen) <= 2
        np.testing.assert_array_equal(fleet.course.plan.batches, start.plan.batches)
        np.testing.assert_array_equal(fleet.course.plan.bits, start.plan.bits)
        assert fleet.course.deadline_s is not None
        assert fleet.course.deadline_s > 1.5 * max(fleet.took_s)  # nobody is ever late
        assert fleet.chosen[-1][1].speedup < 1.1
        assert set(fleet.chosen[-1][1].causes) == {"none"}


def test_a_job_that_waits_for_all_is_never_given_a_deadline() -> None:
    fleet = Fleet(deadline_s=None)
    fleet.more_s = lambda worker: 20.0 * (fleet.rng.random() < 0.1)
    fleet.batch_s[3] = 4.0
    fleet.run(200)
    assert fleet.chosen
    assert {choice.deadline_s for _, choice in fleet.chosen} == {None}


# --- no more than that ------------------------------------------------------------------------------------


def noisy(fleet: Fleet, kind: str) -> None:
    """Make workers unequal, perhaps with tails, or let them pause."""
    fleet.jitter = 0.2
    if kind.startswith("unequal"):
        fleet.batch_s[:] = np.geomspace(0.5, 2.0, len(fleet.batch_s))
    if kind.endswith("tails"):
        fleet.more_s = lambda worker: fleet.rng.exponential(0.7)
    if kind == "pauses":
        fleet.more_s = lambda worker: 8.0 * (fleet.rng.random() < 0.1)


@pytest.mark.parametrize(
    "kind",
    [
        "unequal",
        "pauses",
        "unequal, with tails",
    ],
)
def test_workers_that_stay_as_they_are_are_planned_for_a_few_times_only(kind: str) -> None:
    """In 2,000 steps of noisy but stationary workers: 40 looks, of which few make a plan, and none turns it round."""
    fleet = Fleet(3, seed=3)
    noisy(fleet, kind)
    fleet.run(2000)
    assert len(fleet.chosen) <= 20
    settled = np.array([choice.plan.batches for step, choice in fleet.chosen if step > 500] or [np.ones(3)])
    assert np.all(settled.max(axis=0) < 1.6 * settled.min(axis=0))


def test_nobody_s_first_steps_make_a_plan() -> None:
    fleet = Fleet()
    fleet.batch_s[0] = 5.0
    fleet.run(LEAST_STEPS)
    assert fleet.chosen == []
    fleet.run(3 * LEAST_STEPS)
    assert fleet.chosen


# --- come and gone ----------------------------------------------------------------------------------------


def test_a_worker_that_is_lost_or_comes_back_is_planned_for_at_once_and_the_global_batch_is_kept() -> None:
    fleet = Fleet(batch_size=30)
    fleet.batch_s[1] = 3.0
    fleet.run(EVERY + LEAST_STEPS + 8)
    at, looks = fleet.step, noted_looks(fleet)
    fleet.alive -= {1}
    fleet.run(LEAST_STEPS + 1)
    assert min(looks) <= at + LEAST_STEPS
    assert fleet.course.plan.batches[[0, 2, 3]] == pytest.approx(np.ones(3), abs=0.15)  # nobody spares it any more
    at, looks[:] = fleet.step, []
    fleet.alive |= {1}  # another machine, as quick as the others
    fleet.batch_s[1] = 1.0
    fleet.run(2 * LEAST_STEPS + 2)
    assert at + LEAST_STEPS - 1 <= min(looks) <= at + LEAST_STEPS  # as soon as it has made six steps
    assert fleet.course.plan.batches == pytest.approx(np.ones(4), abs=0.25)


def noted_looks(fleet: Fleet) -> list[int]:
    """Return the steps at which a plan will have been thought about, from now on."""
    looks: list[int] = []
    choose = fleet.steering.choose

    def noted(step: int, *args: Any) -> Choice | None:
        looks.append(step)
        return choose(step, *args)

    fleet.steering.choose = noted  # type: ignore[method-assign]
    return looks


def test_what_a_lost_worker_did_says_nothing_about_the_others() -> None:
    """A worker that is gone has no part in batches, deadlines and causes of those that are left."""
    fleets = [Fleet(seed=5), Fleet(seed=5)]
    fleets[1].batch_s[3] = 6.0
    for fleet in fleets:
        fleet.run(30)
        fleet.alive -= {3}
        fleet.run(150)
    lives = [0, 1, 2]
    one, other = (fleet.course for fleet in fleets)
    assert other.plan.batches[lives] / other.plan.batches[lives].mean() == pytest.approx(
        one.plan.batches[lives] / one.plan.batches[lives].mean(), rel=0.2
    )
    assert other.deadline_s == pytest.approx(one.deadline_s, rel=0.3)
