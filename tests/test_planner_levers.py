"""Batches, bits, shares and deadline planned again and again from what was measured: they settle, from any start."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
from helpers.rounds_clock import run_rounds
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_qgc.kernels import payload_bytes
from torch_qgc.planner import Plan, bits_within, choose_batches, make_plan
from torch_qgc.planner.cadence import JobRounds
from torch_qgc.planner.deadline import choose_deadline
from torch_qgc.planner.delays import Empirical

NUMEL, MAX_STALENESS, ETA = 1_000_000, 16, 1.0


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 12), st.floats(0.05, 20.0), st.integers(0, 2**32 - 1))
def test_shares_stay_within_bounds_of_the_samples_that_arrive(k: int, eta: float, seed: int) -> None:
    """r_k / (1 + v_k) <= U_k <= r_k / v_k with v_k >= eta / B_k: no worker can draw all the data to itself."""
    rng = np.random.default_rng(seed)
    rates = rng.uniform(0.02, 1.0, k)
    batches = rng.uniform(0.1, 5.0, k)
    batches /= batches.mean()
    plan = make_plan(1 - rates, noise_ratio=eta, batches=batches)
    v = plan.variance
    assert np.all(v >= eta / batches)
    low, high = rates / (1 + v), rates / v
    assert np.all(plan.shares >= low / high.sum() * (1 - 1e-9))
    assert np.all(plan.shares <= high / low.sum() * (1 + 1e-9))
    wide = (1 + v.max()) / v.min()  # so far from proportional to rates at most
    fair = rates / rates.sum()
    assert np.all((plan.shares >= fair / wide * (1 - 1e-9)) & (plan.shares <= fair * wide * (1 + 1e-9)))


@dataclass
class World:
    """Five workers: seconds per batch size, seconds beside that (drawn), and seconds per byte of the link."""

    per_batch_s: np.ndarray
    rest_s: Callable[[np.random.Generator, int], float]
    per_byte_s: np.ndarray = field(default_factory=lambda: np.full(5, 1e-9))


def short(rng: np.random.Generator, k: int) -> float:
    return float(0.1 + rng.exponential(0.02))


def far_away(rng: np.random.Generator, k: int) -> float:
    return float(0.9 + rng.exponential(5.8)) if k == 4 else short(rng, k)


def pausing(rng: np.random.Generator, k: int) -> float:
    return short(rng, k) + (8.0 if rng.random() < 0.05 else 0.0)


ONE = np.ones(5)
WORLDS = {
    "equal": World(ONE, short),
    "one computes five times slower": World(np.array([1, 1, 1, 1, 5.0]), short),
    "one is far away": World(ONE, far_away),
    "anybody pauses": World(ONE, pausing),
    "one has a slow link": World(ONE, short, np.array([1e-9, 1e-9, 1e-9, 1e-9, 1e-6])),
}


@dataclass
class Measured:
    """What was timed of one worker's steps."""

    work_s: list[float]
    rest_s: list[float]
    sent_s: list[float]


@dataclass
class Job:
    """A job on a virtual clock that plans anew every 400 rounds from what it has timed since.

    The i-th step of a worker has the same noise after every plan, so that nothing but the plan moves what is measured.
    """

    world: World
    deadline_s: float
    plan: Plan

    def replan(self) -> None:
        timed = self._play()
        sizes = np.array([payload_bytes(NUMEL, int(b)) for b in self.plan.bits])
        s = np.array([np.median(t.work_s) for t in timed]) / self.plan.batches
        rest = np.array([np.median(t.rest_s) for t in timed])
        link = np.array([np.median(t.sent_s) for t in timed]) / sizes
        batches = choose_batches(s, rest).batches
        spent = s * batches + link * sizes
        shortest = min(len(t.rest_s) for t in timed)
        delays = np.stack([np.resize(t.rest_s, max(shortest, 100)) for t in timed], axis=1) + spent
        caps = bits_within(self.deadline_s - rest - s * batches, link, NUMEL)

        def plan(p: np.ndarray) -> Plan:
            return make_plan(p, noise_ratio=ETA, batches=batches, most_bits=caps)

        job = JobRounds(Empirical(delays_s=delays), max_staleness=MAX_STALENESS)
        choice = choose_deadline(job, plan, grid=32)
        assert choice.unheard == ()
        self.deadline_s, self.plan = choice.deadline_s, plan(choice.straggle_probs)

    def _play(self) -> list[Measured]:
        timed = [Measured([], [], []) for _ in range(5)]
        rngs = [np.random.default_rng([7, k]) for k in range(5)]

        def step_s(k: int) -> float:
            jitter = float(np.exp(0.05 * rngs[k].standard_normal()))
            work = float(self.world.per_batch_s[k] * self.plan.batches[k]) * jitter
            rest = self.world.rest_s(rngs[k], k)
            sent = float(self.world.per_byte_s[k] * payload_bytes(NUMEL, int(self.plan.bits[k])))
            for list_, seconds in zip((timed[k].work_s, timed[k].rest_s, timed[k].sent_s), (work, rest, sent)):
                list_.append(seconds)
            return work + rest + sent

        run_rounds(step_s, 5, self.deadline_s, 400, max_staleness=MAX_STALENESS)
        return timed


def starts() -> dict[str, tuple[float, Plan]]:
    greedy = make_plan([0.0, 0.9, 0.9, 0.9, 0.9], noise_ratio=0.0, bits_per_coordinate=6)
    assert greedy.shares[0] > 0.95
    return {
        "a deadline nobody makes": (0.05, make_plan([0.5] * 5)),
        "no deadline, sixteen bits": (1000.0, make_plan([0.0] * 5, bits_per_coordinate=16)),
        "one worker has all the data": (0.6, greedy),
        "the wrong batches": (2.0, make_plan([0.1] * 5, batches=[0.2, 0.2, 0.2, 0.2, 4.2])),
    }


@pytest.mark.parametrize("name", WORLDS)
def test_planning_again_settles_on_the_same_plan_from_every_start(name: str) -> None:
    """The deadline and the shares change no delay, so nothing drives them on; caps of bits and delays fall together."""
    ends = []
    for deadline_s, plan in starts().values():
        job = Job(WORLDS[name], deadline_s, plan)
        deadlines, shares = [], []
        for _ in range(6):
            job.replan()
            deadlines.append(job.deadline_s)
            shares.append(job.plan.shares)
            rates, v = 1 - job.plan.straggle_probs, job.plan.variance
            assert np.all(job.plan.shares >= rates / (1 + v) / np.sum(rates / v) * (1 - 1e-9))
        assert np.ptp(np.log(deadlines[2:])) < 0.1
        assert np.ptp(shares[2:], axis=0).max() < 0.02
        ends.append((np.log(deadlines[-1]), shares[-1]))
    logs, last = zip(*ends)
    assert np.ptp(logs) < 0.1
    assert np.ptp(last, axis=0).max() < 0.02
