"""Data that can move: shares follow what workers deliver, so that each sample counts alike."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torch_qgc.ddp.sampler import CodedSampler, Cut
from torch_qgc.errors import PlanError
from torch_qgc.job.courses import Course
from torch_qgc.job.steering import Steering
from torch_qgc.job.stopwatch import Timed
from torch_qgc.planner import Plan, make_plan
from torch_qgc.planner.batches import apportion

EVERYBODY = frozenset(range(4))


def plan_of(workers: int) -> Plan:
    return make_plan([0.1] * workers, bits_per_coordinate=4)


def parts(least: int, most: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(least, most), min_size=1, max_size=12)


@given(sizes=parts(1, 1000))
def test_a_plan_is_cut_anew_without_loss(sizes: list[int]) -> None:
    shares = np.array(sizes) / sum(sizes)
    plan = plan_of(len(sizes)).shared_out(shares)
    assert plan.one_part_each
    assert np.allclose(plan.partition_fractions, shares, rtol=1e-12)
    for worker in range(len(sizes)):
        assert plan.partition_probabilities(worker).tolist() == [float(n == worker) for n in range(len(sizes))]
    delivered = np.random.default_rng(0).random((200, len(sizes))) < 1.0 - plan.straggle_probs
    expected = [plan.coefficients(row, rates=np.ones(len(sizes))) for row in delivered]
    assert np.allclose(expected, delivered * shares)


def test_a_plan_that_codes_is_not_cut_anew() -> None:
    plan = make_plan([0.05, 0.4, 0.4], bits_per_coordinate=4)
    assert not plan.one_part_each
    with pytest.raises(PlanError, match="one that codes"):
        plan.shared_out(np.full(3, 1 / 3))


@given(data=st.data(), workers=st.integers(1, 5), batch_size=st.integers(2, 9), steps=st.integers(1, 6))
def test_when_all_deliver_an_epoch_of_any_batches_decodes_to_the_mean_over_the_data(
    data: st.DataObject, workers: int, batch_size: int, steps: int
) -> None:
    """Exactly: each sample comes once, and counts as much as any other."""
    raw = np.array(data.draw(st.lists(st.floats(0.2, 3.0), min_size=workers, max_size=workers)))
    sizes = apportion(raw / raw.mean(), batch_size)
    samples = steps * workers * batch_size
    values = np.random.default_rng(1).normal(size=samples)
    plan = plan_of(workers).shared_out(sizes / sizes.sum())

    def drawn(worker: int) -> list[list[int]]:
        return list(
            CodedSampler(
                np.ones(1),
                [np.arange(samples)],
                batch_size=batch_size,
                batches=steps,
                cut=lambda: Cut.of(sizes, worker),
                worker=None,
            )
        )

    gradients = np.array([[values[batch].mean() for batch in drawn(worker)] for worker in range(workers)])
    weights = plan.coefficients(np.ones(workers, dtype=bool), rates=np.ones(workers))
    assert np.isclose((weights @ gradients).mean(), values.mean(), atol=1e-12)


def steering_after(steps: int, *, moves: list[bool], slow: int | None = None) -> tuple[Steering, Course]:
    """A job of four workers that take .1 s for a mean batch, one of them four times as long, and 10 ms besides."""
    course = Course(version=0, from_step=0, plan=plan_of(4), deadline_s=None)
    steering = Steering(4, 10_000, every=10, auto_deadline=True)
    rng = np.random.default_rng(0)
    for step in range(steps):
        for worker in range(4):
            own_s = 0.01 + (0.4 if worker == slow else 0.1) * rng.uniform(0.98, 1.02)
            steering.note(worker, Timed(step, 32, 32, moves[worker], own_s, 0.001, None), 4)
    assert steering.is_due(steps, EVERYBODY)
    return steering, course


def test_shares_follow_batches_where_everybody_can_draw_everything() -> None:
    steering, course = steering_after(20, moves=[True] * 4, slow=2)
    choice = steering.choose(20, course)
    assert choice is not None
    plan = choice.plan
    assert plan.batches.argmin() == 2
    assert plan.batches[2] < 0.5
    delivered = plan.batches * np.clip(1.0 - plan.straggle_probs, 0.01, 1.0)
    assert np.allclose(plan.shares, delivered / delivered.sum())


@pytest.mark.parametrize("moves", [[False] * 4, [True, True, True, False]])
def test_shares_stay_where_somebody_has_data_of_its_own(moves: list[bool]) -> None:
    steering, course = steering_after(20, moves=moves, slow=2)
    choice = steering.choose(20, course)
    assert choice is not None
    assert choice.plan.batches[2] < 0.5
    assert np.array_equal(choice.plan.shares, course.plan.shares)


def test_a_worker_that_is_gone_keeps_next_to_nothing() -> None:
    steering, course = steering_after(20, moves=[True] * 4)
    steering.choose(20, course)
    for step in range(20, 40):
        for worker in range(3):
            steering.note(worker, Timed(step, 32, 32, True, 0.11 if worker else 0.2, 0.001, None), 4)
    assert steering.is_due(40, EVERYBODY - {3})
    choice = steering.choose(40, course)
    assert choice is not None
    assert choice.plan.shares[3] < 0.01
