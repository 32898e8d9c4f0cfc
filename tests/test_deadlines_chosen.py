"""A job that measures its workers sets a deadline about as good as the best that could have been given to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from torch_qgc.job.courses import Course
from torch_qgc.job.steering import Steering
from torch_qgc.planner import make_plan
from torch_qgc.protocol.contract import ClosingRule
from torch_qgc.simulator import Machines
from torch_qgc.simulator.arrivals import JobRounds
from torch_qgc.simulator.delays import DelaySource
from torch_qgc.simulator.machines import Demand

NUMEL, STEPS, SEED = 100_000, 200, 7


def five(**causes: Any) -> Machines:
    return Machines(**{"workers": 5, "batch_s": 0.9, "fixed_s": 0.1, "jitter": 0.05, **causes})


def last(value: float, others: float) -> tuple[float, ...]:
    return (others,) * 4 + (value,)


SETTINGS = {
    "shifted exponential": five(tail_s=0.7, jitter=0.0),
    "log-normal": five(jitter=0.5, fixed_s=0.0, batch_s=1.0),
    "bimodal": five(pause_chance=0.2, pause_s=1.5),
    "pauses": five(pause_chance=0.05, pause_s=8.0),
    "slow link": five(up_s=last(12.0, 0.3)),
    "slow compute": five(batch_s=last(4.5, 0.9)),
    "mixed": five(batch_s=(0.9, 0.9, 1.2, 1.5, 2.5), tail_s=(0.1, 0.1, 0.3, 0.1, 0.3), pause_chance=0.03, pause_s=5.0),
    "equal": five(),
}


def job(machines: Machines, rule: ClosingRule, plan: Any, steering: Steering | None) -> JobRounds:
    return JobRounds(
        DelaySource(machines, machines.workers, SEED),
        rule,
        np.ones(machines.workers, dtype=bool),
        plan,
        demand=Demand((NUMEL,), (NUMEL,), 8),
        log_steps=256,
        steering=steering,
    )


def chosen(machines: Machines) -> Course:
    """Return what a job has settled on after a hundred steps."""
    rule = ClosingRule(deadline_s="auto", quorum=2)
    plan = make_plan([0.05] * machines.workers, bits_per_coordinate=4)
    steering = Steering(machines.workers, NUMEL, every=50, auto_deadline=True)
    rounds = job(machines, rule, plan, steering)
    for step in range(100):
        rounds.close(step)
    return rounds.courses.newest


def cost(machines: Machines, course: Course, deadline_s: float | None) -> float:
    """Return what the time to a loss is proportional to, from what is seen of a job with this deadline.

    tau (1 + sum_k m_k s_k + sum_k m_k^2 (1 - r_k + v_k) / r_k), as `choose_deadline` predicts it.
    """
    rounds = job(machines, ClosingRule(deadline_s=deadline_s, quorum=2), course.plan, None)
    counts, ages = np.zeros((2, machines.workers))
    for step in range(STEPS):
        outcome = rounds.close(step)
        for worker, made_for, _ in outcome.contributions:
            counts[worker] += 1
            ages[worker] += step - made_for
    rates, shares = counts / STEPS, course.plan.shares
    stale = float(shares @ (ages / counts))
    error = float(shares**2 @ ((np.maximum(1.0 - rates, 0.0) + course.plan.variance) / rates))
    return outcome.closed_at_s / STEPS * (1.0 + stale + error)


def deadlines(machines: Machines) -> Sequence[float]:
    """Return deadlines from the time of a quick step to one within which everybody has come."""
    return np.geomspace(0.9, 14.0, 9).tolist()


@pytest.mark.parametrize("name", SETTINGS)
def test_the_deadline_costs_at_most_a_tenth_more_than_the_best_of_all(name: str) -> None:
    machines = SETTINGS[name]
    course = chosen(machines)
    assert course.deadline_s is not None
    best = min(cost(machines, course, deadline_s) for deadline_s in [*deadlines(machines), None])
    assert cost(machines, course, course.deadline_s) <= 1.1 * best
