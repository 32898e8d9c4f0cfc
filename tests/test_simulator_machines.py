"""Machines by cause: what a step takes them, and what follows for a job's rounds and batches."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from helpers.simulation import decoded_gradients, partition_gradients, task
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from test_aggregator import assert_mean_is

from torch_qgc.errors import ConfigError
from torch_qgc.kernels import payload_bytes
from torch_qgc.planner import Plan, make_plan
from torch_qgc.protocol.contract import ClosingRule
from torch_qgc.simulator import IDEAL, Change, Machines, simulate
from torch_qgc.simulator.arrivals import JobRounds, RoundOutcome
from torch_qgc.simulator.delays import DelaySource
from torch_qgc.simulator.machines import Demand, Load, Times

ALL_CAUSES = Machines(
    workers=3,
    batch_s=(1.0, 1.0, 5.0),
    fixed_s=0.1,
    tail_s=(0.0, 0.7, 0.0),
    pause_chance=0.3,
    pause_s=6.0,
    up_s=(0.1, 0.1, 4.0),
    down_s=2.0,
    jitter=0.1,
    changes=(Change(of="batch_s", factor=5.0, workers=(0,), start=3, stop=6),),
)


def load(workers: int, batches: Any = 1.0, up: Any = 1.0, down: float = 1.0) -> Load:
    return Load(np.broadcast_to(batches, workers), np.broadcast_to(up, workers), down)


def draws(machines: Machines, steps: int, what: Load | None = None, seed: int = 0) -> Times:
    """The times of many steps, [steps, K] each."""
    source = DelaySource(machines, machines.workers, seed)
    drawn = [source.draw(step, what or load(machines.workers)) for step in range(steps)]
    return Times(*(np.stack(values) for values in zip(*drawn)))


# --------------------------------------------------------------------------------------------- a step's time
@given(
    step=st.integers(0, 10),
    batch=st.floats(0.01, 16.0),
    size=st.floats(0.0, 1.0),
    seed=st.integers(0, 2**32),
)
def test_computing_grows_with_the_batch_and_links_with_the_size(
    step: int, batch: float, size: float, seed: int
) -> None:
    """Under the same random numbers: everything else of a step stays what it is."""
    source = DelaySource(ALL_CAUSES, 3, seed)
    none, one, some = (source.draw(step, load(3, b, s, s)) for b, s in ((0.0, 0.0), (1.0, 1.0), (batch, size)))
    np.testing.assert_allclose(some.own_s, none.own_s + batch * (one.own_s - none.own_s))
    np.testing.assert_allclose(some.up_s, size * np.array([0.1, 0.1, 4.0]))
    np.testing.assert_allclose(some.down_s, size * 2.0)


def test_a_step_takes_what_its_causes_say() -> None:
    """Against scipy's distributions, each cause by itself; the mean computing time does not depend on the jitter."""
    n = 3000
    computing = draws(Machines(workers=2, batch_s=(2.0, 3.0), jitter=0.4), n).own_s
    for k, seconds in enumerate((2.0, 3.0)):
        lognormal = stats.lognorm(0.4, scale=seconds * np.exp(-(0.4**2) / 2))
        assert lognormal.mean() == pytest.approx(seconds)
        assert stats.kstest(computing[:, k], lognormal.cdf).pvalue > 1e-3
    tail = draws(Machines(workers=1, fixed_s=0.9, batch_s=0.0, tail_s=5.8), n).own_s[:, 0]
    assert stats.kstest(tail, stats.expon(0.9, 5.8).cdf).pvalue > 1e-3
    pauses = draws(Machines(workers=2, batch_s=1.0, pause_chance=(0.05, 0.5), pause_s=6.0), n).own_s
    assert set(np.unique(pauses)) == {1.0, 7.0}
    for k, chance in enumerate((0.05, 0.5)):
        assert stats.binomtest(int((pauses[:, k] > 1).sum()), n, chance).pvalue > 1e-3
    assert abs(np.corrcoef(computing.T)[0, 1]) < 4 / np.sqrt(n)


def test_draws_depend_on_seed_and_step_alone() -> None:
    once, again = draws(ALL_CAUSES, 8), draws(pickle.loads(pickle.dumps(ALL_CAUSES)), 8)
    for values, same in zip(once, again):
        np.testing.assert_array_equal(values, same)
    assert not np.array_equal(once.own_s, draws(ALL_CAUSES, 8, seed=1).own_s)
    assert len(np.unique(once.own_s[:, 1])) == 8


def test_changes_hold_while_they_last_and_multiply() -> None:
    changes = (
        Change(of="batch_s", factor=5.0, workers=(1,), start=2, stop=4),
        Change(of="batch_s", factor=2.0, start=3),
        Change(of="up_s", factor=3.0, period=8),
    )
    times = draws(Machines(workers=2, up_s=1.0, changes=changes), 9)
    np.testing.assert_allclose(times.own_s[:, 0], [1, 1, 1, 2, 2, 2, 2, 2, 2])
    np.testing.assert_allclose(times.own_s[:, 1], [1, 1, 5, 10, 2, 2, 2, 2, 2])
    np.testing.assert_allclose(times.up_s[[0, 2, 4, 6, 8], 0], [1, 2, 3, 2, 1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "at least 1 worker"),
        ({"batch_s": (1.0, 2.0)}, r"batch_s: expected a scalar or one value per worker, shape \[3\]"),
        ({"tail_s": -1.0}, "tail_s: expected values >= 0"),
        ({"up_s": float("inf")}, "up_s: expected finite"),
        ({"pause_chance": 1.5}, "pause_chance"),
        ({"changes": (Change(of="up_s", factor=2.0, workers=(3,)),)}, "changes of workers 0..2"),
    ],
)
def test_machines_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Machines(**{"workers": 3, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"of": "jitter"}, "expected of = one of batch_s"),
        ({"factor": -1.0}, "finite factor"),
        ({"start": 5, "stop": 5}, "start < stop"),
        ({"period": 0}, "period"),
    ],
)
def test_changes_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Change(**{"of": "batch_s", "factor": 2.0, **options})


# --------------------------------------------------------------------------------------------------- rounds
class Given(Demand):
    """A load that is given as it is."""

    def load(self, plan: Plan) -> Load:
        return self.given


def demand(given: Load) -> Demand:
    made = Given((1,), (1,), 32)
    made.given = given
    return made


def rounds(machines: Machines, what: Load | None = None, **rule: Any) -> JobRounds:
    count = machines.workers
    return JobRounds(
        DelaySource(machines, count, 0),
        ClosingRule(**{"warmup_steps": 0, "max_staleness": 100, **rule}),
        np.ones(count, dtype=bool),
        make_plan([0.1] * count),
        demand=demand(what or load(count)),
        log_steps=10_000,
    )


def closed(clock: JobRounds, steps: int, first: int = 0) -> list[RoundOutcome]:
    return [clock.close(step) for step in range(first, first + steps)]


@given(st.lists(st.floats(0.2, 8.0), min_size=2, max_size=6))
def test_batches_by_speed_let_everybody_finish_together(batch_s: list[float]) -> None:
    """A round then takes the harmonic mean of the speeds, and with equal batches the slowest machine's time."""
    machines = Machines(workers=len(batch_s), batch_s=tuple(batch_s))
    batches = 1.0 / np.array(batch_s)
    batches /= batches.mean()
    together_s = len(batch_s) / np.sum(1.0 / np.array(batch_s))
    by_speed = closed(rounds(machines, load(len(batch_s), batches), deadline_s=together_s * (1 + 1e-9)), 5)
    for step, outcome in enumerate(by_speed, 1):
        assert [c.worker for c in outcome.contributions] == list(range(len(batch_s)))
        assert outcome.closed_at_s == pytest.approx(step * together_s)
    assert closed(rounds(machines), 5)[-1].closed_at_s == pytest.approx(5 * max(batch_s))


@pytest.mark.parametrize("bits", [2, 4, 8, 16, 32])
def test_a_round_takes_computing_and_the_links_time_for_the_bits(bits: int) -> None:
    machines = Machines(workers=2, batch_s=1.0, up_s=(0.1, 4.0), down_s=(0.1, 2.0))
    model = torch.nn.Linear(23, 1)
    plain = 24 * 4
    trace = simulate(
        model,
        lambda m, batch: m(batch[0]).mean(),
        task()[2],
        make_plan([0.1] * 2, bits_per_coordinate=bits, num_partitions=2),
        delays=machines,
        rule=ClosingRule(),
        downlink_bits=bits,
        steps=4,
        lr=0.1,
    )
    size = payload_bytes(24, bits) / plain
    # The slow link's worker is last up and last down.
    expected = np.arange(1, 5) * (1.0 + 4.0 * size) + np.arange(4) * 2.0 * size
    np.testing.assert_allclose(trace.virtual_time_s[0], expected)


def test_the_ideal_takes_a_ring_all_reduce() -> None:
    """2 (K - 1) / K of the fp32 gradient through the slowest link."""
    machines = Machines(workers=4, batch_s=(1.0, 1.0, 1.0, 2.0), up_s=(0.1, 0.1, 0.1, 3.0), down_s=(0.1, 0.1, 0.1, 3.0))
    model, loss, dataset = task()
    trace = simulate(model, loss, dataset, IDEAL, delays=machines, downlink_bits=4, steps=3, lr=0.1)
    np.testing.assert_allclose(trace.virtual_time_s[0], np.arange(1, 4) * (2.0 + 2 * 0.75 * 3.0))


def test_a_link_carries_one_payload_after_the_other() -> None:
    """Worker 1 computes in time, but its link takes three steps per payload: one contribution every three seconds."""
    machines = Machines(workers=2, batch_s=(1.0, 0.5), up_s=(0.0, 3.0))
    outcomes = closed(rounds(machines, deadline_s=1.0), 31)
    came = [step for step, outcome in enumerate(outcomes) for c in outcome.contributions if c.worker == 1]
    assert came == list(range(3, 31, 3))  # at .5 + 3, .5 + 6, ...: in the steps that are open then
    staleness = [step - c.made_for for step, o in enumerate(outcomes) for c in o.contributions if c.worker == 1]
    assert staleness == [3 + 2 * n for n in range(10)]  # and the queue grows: its link is slower than the steps


def test_whoever_lags_behind_a_link_sends_what_belongs_to_the_step_it_is_at() -> None:
    """Results reach worker 2 late: it begins steps that have closed already, and all it sends has been asked for."""
    machines = Machines(workers=3, batch_s=(1.0, 1.0, 0.3), down_s=(0.0, 0.0, 0.7), tail_s=0.2)
    outcomes = closed(rounds(machines, deadline_s=0.9), 200)
    late = [(step, c) for step, o in enumerate(outcomes) for c in o.contributions if c.made_for < step]
    assert any(c.worker == 2 for _, c in late)
    for outcome in outcomes:
        for contribution in outcome.contributions:
            assert contribution.worker in outcomes[contribution.made_for].wanted
    assert sum(o.began.count(2) for o in outcomes) > 150  # it keeps up: about one step in 1.0 s


def test_a_clock_goes_on_from_where_it_was_kept() -> None:
    machines = Machines(workers=3, batch_s=(1.0, 1.0, 2.0), tail_s=0.5, up_s=0.3, down_s=0.2)
    whole, cut = rounds(machines, deadline_s=1.5), rounds(machines, deadline_s=1.5)
    expected = closed(whole, 30)
    got = closed(cut, 12)
    got += closed(pickle.loads(pickle.dumps(cut)), 18, first=12)
    for a, b in zip(expected, got):
        assert (a.began, a.wanted, a.contributions, a.closed_at_s) == (
            b.began,
            b.wanted,
            b.contributions,
            b.closed_at_s,
        )


# -------------------------------------------------------------------------------------------------- batches
def test_workers_draw_the_batches_they_are_given_and_stay_unbiased() -> None:
    """Sizes differ, shares do not: each worker's mean still weighs what its share says."""
    plan = make_plan([0.1] * 3, bits_per_coordinate=32, num_partitions=3, batches=[1.5, 1.25, 0.25])
    model, loss, dataset = task()
    sizes: set[int] = set()

    def noted(m: torch.nn.Module, batch: Any) -> torch.Tensor:
        sizes.add(len(batch[0]))
        return loss(m, batch)

    options: dict[str, Any] = dict(delays=Machines(workers=3), deadline_s=None, batch_size=4, steps=250)
    decoded, trace = decoded_gradients(plan, of=(model, noted, dataset), **options)
    assert sizes == {6, 5, 1}
    assert_mean_is(decoded, partition_gradients(3).mean(axis=0))
    np.testing.assert_allclose(trace.virtual_time_s[0], 1.5 * np.arange(1, 251))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"downlink_bits": 20}, "downlink_bits: expected 2..16, or 32"),
        ({"delays": Machines(workers=2)}, "expected 3 machines"),
    ],
)
def test_machines_and_downlinks_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    model, loss, dataset = task()
    common: dict[str, Any] = dict(delays=Machines(workers=3), steps=2, lr=0.1, batch_size=4)
    with pytest.raises(ConfigError, match=message):
        simulate(model, loss, dataset, make_plan([0.1] * 3), **{**common, **options})
