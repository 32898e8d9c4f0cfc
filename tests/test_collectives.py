"""What workers do together outside of steps: it waits for all that are alive, and for nobody else."""

from __future__ import annotations

import logging
import math
import os
import signal
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.keys import passes
from helpers.ranks import PATIENCE_S, aggregators, run_ranks
from helpers.simulated import make_spec, peer_of, push_all, simple_plan, take
from helpers.virtual import World, session_for
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.parallel import DistributedDataParallel

import torch_qgc as qgc
from torch_qgc.aggregator import gathering
from torch_qgc.errors import CollectiveFailed, ConfigError, JobFailed
from torch_qgc.job.courses import Courses
from torch_qgc.logs import logger
from torch_qgc.worker.advice import Advice
from torch_qgc.worker.collectives import Collectives, weighted_mean
from torch_qgc.worker.connection import Connection
from torch_qgc.worker.position import Position
from torch_qgc.worker.session import Session
from torch_qgc.worker.sockets import SocketCarrier

Work = Callable[[World, Connection, int], Any]


def collectives(connection: Connection, computed_steps: int = 1) -> Collectives:
    """The collectives of a replica that has a connection, and nothing else."""
    replica: Any = SimpleNamespace(
        position=Position(),
        joined=lambda: (connection, None),
        made_collective=lambda: None,
        counts=SimpleNamespace(computed_steps=computed_steps),
    )
    return Collectives(replica)


def play(work: Work, workers: int = 3, world: World | None = None, **spec: Any) -> list[Any]:
    """Let every worker join and work under a virtual clock; return what each has returned, or None."""
    plan, world = simple_plan(workers), World() if world is None else world
    returned: list[Any] = [None] * workers
    made = make_spec(plan, **spec)

    def script(worker: int) -> None:
        connection = world.connect(peer_of(worker), session_for(made, plan, worker))
        connection.join(math.inf)
        returned[worker] = work(world, connection, worker)

    for worker in range(workers):
        world.start(lambda worker=worker: script(worker))
    world.run()
    return returned


# --- who is waited for ------------------------------------------------------------------------------------


def test_all_get_everybodys_object_when_the_last_one_calls() -> None:
    def work(world: World, connection: Connection, worker: int) -> Any:
        world.sleep(5.0 * worker)
        return collectives(connection).all_gather({"loss": 0.5 * worker}, 60.0), world.now()

    expected = {k: {"loss": 0.5 * k} for k in range(3)}
    assert play(work) == [(expected, 10.0)] * 3


def test_a_worker_that_dies_while_others_wait_is_not_waited_for_and_not_in_it() -> None:
    """Not even if it had called, or had handed over a part: all get the same, and what is in it was alive."""

    def work(world: World, connection: Connection, worker: int) -> Any:
        if worker == 2:
            world.sleep(3.0)
        if worker in (1, 2):
            connection.session.gather(bytes(100_000) if worker == 2 else b"\x92\xaaall_gather\x07")
            for aggregator, frames in connection.session.drain()[:1]:
                assert aggregator == 0
                world.net.deliver(world.now(), peer_of(worker), frames())
            world.sleep(1.0)
            world.net.disconnect(peer_of(worker))
            return None
        return collectives(connection).all_gather("alive", 60.0), world.now()

    returned = play(work, workers=4, chunk_numel=512)
    assert returned[0] == returned[3]
    result, now = returned[0]
    assert result == {0: "alive", 3: "alive"}
    assert 4.0 <= now < 5.0


def test_a_worker_that_leaves_is_not_waited_for() -> None:
    def work(world: World, connection: Connection, worker: int) -> Any:
        if worker == 1:
            world.sleep(2.0)
            connection.close()
            return None
        return collectives(connection).all_gather(worker, 60.0)

    assert play(work) == [{0: 0, 2: 2}, None, {0: 0, 2: 2}]


def test_a_late_worker_comes_to_it_after_the_steps_that_it_has_missed() -> None:
    """It is not lost: its thin steps bring it there, while the others wait."""

    def work(world: World, connection: Connection, worker: int) -> Any:
        plan = simple_plan(3)
        for step in range(6):
            if connection.closed(step):
                connection.begin(step, thin=True)
            else:
                connection.begin(step)
                world.sleep(10.0 if worker == 2 and step == 1 else 0.1)
                push_all(connection, plan, step, torch.ones(512))
            take(connection)
        return collectives(connection).all_gather(step, 60.0), world.now()

    returned = play(work, deadline_s=1.0)
    assert [result for result, _ in returned] == [dict.fromkeys(range(3), 5)] * 3
    assert all(now > 10.0 for _, now in returned)


def test_after_a_fault_nobody_waits() -> None:
    def work(world: World, connection: Connection, worker: int) -> Any:
        if worker == 2:
            world.sleep(1.0)
            connection.send_fault(0, "broken on purpose")
            return None
        with pytest.raises(JobFailed, match="broken on purpose"):
            collectives(connection).barrier(60.0)
        return world.now()

    assert all(now < 2.0 for now in play(work)[:2])


# --- timeouts, order ---------------------------------------------------------------------------------------


def test_who_has_not_come_in_time_is_named_and_the_next_calls_still_pair(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "torch_qgc")
    logger.filters.clear()

    def work(world: World, connection: Connection, worker: int) -> Any:
        meet = collectives(connection)
        if worker == 2:
            world.sleep(30.0)
            assert meet.all_gather("first", 60.0) == dict.fromkeys(range(3), "first")
        else:
            with pytest.raises(CollectiveFailed, match=r"workers \[2\] have not made call 1 .*within 12 s: every rank"):
                meet.all_gather("first", 12.0)
        return meet.all_gather("second", 60.0)

    assert play(work) == [dict.fromkeys(range(3), "second")] * 3
    assert "waits for workers [2] in a collective" in caplog.text


def test_different_calls_are_an_error_on_all_that_says_who_has_called_what() -> None:
    def work(world: World, connection: Connection, worker: int) -> Any:
        meet = collectives(connection)
        with pytest.raises(CollectiveFailed, match=r"\{0: 'all_gather', 1: 'barrier'\}: make them in the same order"):
            meet.barrier(60.0) if worker else meet.all_gather(1, 60.0)
        return meet.all_gather(worker, 60.0)

    assert play(work, workers=2) == [{0: 0, 1: 1}] * 2


def test_an_object_that_cannot_travel_is_refused_before_anything_is_said() -> None:
    def work(world: World, connection: Connection, worker: int) -> Any:
        meet = collectives(connection)
        if worker == 0:
            with pytest.raises(ConfigError, match="expected None, bool, int"):
                meet.all_gather(object(), 60.0)
            with pytest.raises(ConfigError, match=r"at most 500,000 bytes .*Limits\(log_bytes"):
                meet.all_gather(bytes(500_001), 60.0)
        return meet.all_gather(worker, 60.0)

    assert play(work, workers=2, log_bytes=1_000_000) == [{0: 0, 1: 1}] * 2


def test_it_must_be_called_before_the_job_is_left() -> None:
    meet = collectives(SimpleNamespace())  # type: ignore[arg-type]
    meet._replica.position.go("leave")
    with pytest.raises(ConfigError, match=r"barrier: .*call it before close\(\)"):
        meet.barrier(1.0)


@pytest.mark.parametrize(("every", "warned"), [(1, True), (5, False)])
def test_a_collective_in_each_step_is_noticed_as_torchs_own_are(
    every: int, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Every rank waits for the slowest, whatever way the collective goes."""
    caplog.set_level(logging.WARNING, "torch_qgc")
    spec, plan = make_spec(simple_plan(2)), simple_plan(2)
    advice = Advice(spec, Courses(spec.rule, plan, 0), 0, lambda: 17)
    for step in range(12):
        advice.before_forward(step)
        advice.before_backward()
        advice.after_backward()
        advice.own_collectives += step % every == 0
    assert ("the loop body makes a collective in each step" in caplog.text) is warned


# --- messages on their way --------------------------------------------------------------------------------


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_large_content_comes_whole_over_a_network_that_repeats_and_reorders(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    sizes = [data.draw(st.sampled_from([0, 30_000, 70_000, 250_000])) for _ in range(3)]

    def down(frames: Any) -> list[float]:
        return rng.uniform(0.0, 3.0, rng.integers(1, 3)).tolist()

    def work(world: World, connection: Connection, worker: int) -> Any:
        meet = collectives(connection)
        return [meet.all_gather(bytes([worker + 3 * n]) * sizes[worker], 600.0) for n in range(2)]

    expected = [{k: bytes([k + 3 * n]) * sizes[k] for k in range(3)} for n in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gathering, "AT_ONCE_BYTES", 100_000)
        assert play(work, world=World(down=down)) == [expected] * 3


@pytest.mark.parametrize("noticed", [True, False])
@pytest.mark.parametrize("at_s", [1.05, 2.95, 3.05, 3.15])
def test_a_connection_that_is_cut_in_the_middle_loses_nothing(at_s: float, noticed: bool) -> None:
    """On the way up, while it waits, and on the way down; whether the aggregator takes it for lost or not."""

    def work(world: World, connection: Connection, worker: int) -> Any:
        if worker == 1:

            def cut() -> None:
                if noticed:
                    world.aggregator.lost(peer_of(1), world.now())
                world.cut(connection, 0)
                for _ in range(2):
                    connection.session.connected(0)
                connection._carrier.flush()

            world.net.at(at_s, cut)
        world.sleep(1.0 if worker else 3.0)
        meet = collectives(connection)
        return [meet.all_gather([worker, n], 60.0) for n in range(2)]

    expected = [{k: [k, n] for k in range(3)} for n in range(2)]
    returned = play(work, world=World(latency_s=0.1))
    assert returned == [expected] * 3


# --- buffers ----------------------------------------------------------------------------------------------


def oracle(values: list[np.ndarray], weights: list[float]) -> np.ndarray:
    """The weighted mean in the longest numbers there are."""
    total = np.sum(np.asarray(weights, dtype=np.longdouble))
    if total == 0:
        weights, total = [1.0] * len(values), np.longdouble(len(values))
    return np.asarray(sum(np.longdouble(w) * v.astype(np.longdouble) for w, v in zip(weights, values)) / total)


@given(
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    weights=st.lists(st.integers(0, 200).map(float), min_size=1, max_size=9),
    shape=st.sampled_from([(), (0,), (5,), (3, 4)]),
    seed=st.integers(0, 999),
)
@settings(deadline=None)
def test_the_mean_of_buffers_is_the_weighted_one_rounded_once(
    dtype: torch.dtype, weights: list[float], shape: tuple[int, ...], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = [(10 * torch.randn(shape, generator=generator)).to(dtype) for _ in weights]
    got = weighted_mean(values, weights)
    assert got.dtype is dtype
    expected = oracle([value.double().numpy() for value in values], weights)
    largest = max((float(v.abs().max()) for v in values if v.numel()), default=1.0)
    # Half a unit in the last place for the one rounding, and float64's own over the K terms of the sum.
    allowed = torch.finfo(dtype).eps * np.abs(expected) + 4 * len(weights) * 2.0**-52 * largest
    assert np.all(np.abs(got.double().numpy() - expected) <= allowed)


def test_what_has_no_weight_has_no_say() -> None:
    values = [torch.tensor([math.inf, 1.0]), torch.tensor([2.0, 3.0])]
    assert weighted_mean(values, [0.0, 5.0]).tolist() == [2.0, 3.0]
    assert weighted_mean(values[1:] * 2, [0.0, 0.0]).tolist() == [2.0, 3.0]


class Statistics(torch.nn.Module):
    """Buffers that differ between workers, and one that does not."""

    def __init__(self, worker: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(worker)
        self.register_buffer("mean", torch.randn(40, generator=generator))
        self.register_buffer("low", torch.randn(2, 3, generator=generator).to(torch.bfloat16))
        self.register_buffer("counter", torch.tensor(7 + worker))
        self.register_buffer("mask", torch.full((1 << 17,), -math.inf), persistent=False)


def test_buffers_are_the_mean_by_steps_up_to_two_hundred_and_counters_the_lowest_workers() -> None:
    """Bit for bit on all; and a mask that all have alike does not travel: it would not fit."""
    computed = [30, 4000, 0]

    def work(world: World, connection: Connection, worker: int) -> Any:
        module = Statistics(worker)
        collectives(connection, computed[worker]).sync_buffers(module, 60.0)
        digest = [buffer.flatten().view(torch.uint8).tolist() for _, buffer in list(module.named_buffers())[:3]]
        return module, digest

    first, *others = play(work, log_bytes=300_000)
    assert all(digest == first[1] for _, digest in others)
    before = [Statistics(k) for k in range(3)]
    for name in ("mean", "low"):
        values = [getattr(module, name).double().numpy() for module in before]
        expected = oracle(values, [30.0, 200.0, 0.0])
        eps = torch.finfo(getattr(first[0], name).dtype).eps
        np.testing.assert_allclose(getattr(first[0], name).double().numpy(), expected.astype(float), rtol=eps)
    assert first[0].counter == 7


def test_a_worker_that_dies_between_the_two_parts_of_averaging_is_left_out() -> None:
    def work(world: World, connection: Connection, worker: int) -> Any:
        module = Statistics(worker)
        if worker == 0:
            meet = collectives(connection)
            meet.all_gather({name: b"own" for name, _ in module.named_buffers()}, 60.0, call="sync_buffers")
            world.sleep(1.0)
            world.net.disconnect(peer_of(0))
            return None
        collectives(connection).sync_buffers(module, 60.0)
        return module.mean.tolist(), int(module.counter)

    _, first, second = play(work)
    assert first == second
    assert first[1] == 8  # that of worker 1, the lowest that is alive
    np.testing.assert_allclose(first[0], (Statistics(1).mean + Statistics(2).mean).numpy() / 2, rtol=1e-6)


# --- real processes ---------------------------------------------------------------------------------------


def test_over_sockets_as_much_as_the_log_allows_comes_whole() -> None:
    """More than travels at once, and more than a worker's queue takes."""
    plan, size = simple_plan(2), 24 << 20
    spec = make_spec(plan, deadline_s=None, chunk_numel=1 << 20, numel=1 << 20, log_bytes=64 << 20)

    def meet(endpoints: tuple[str, ...], worker: int) -> bool:
        session = Session(endpoints, spec, worker, Courses(spec.rule, plan, 0))
        connection = Connection(session, SocketCarrier(session, passes(worker, 1)))
        connection.join(PATIENCE_S)
        heard = [collectives(connection).all_gather(bytes([worker]) * size, PATIENCE_S) for _ in range(2)]
        connection.close()
        return heard == [{k: bytes([k]) * size for k in range(2)}] * 2

    with aggregators() as endpoints:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                status = 0 if meet(endpoints, 1) else 2
            finally:
                os._exit(status)
        assert meet(endpoints, 0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def end_of_a_job(rank: int) -> Any:
    torch.manual_seed(rank)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))
    ddp = DistributedDataParallel(model, broadcast_buffers=False)
    state = qgc.QGCState(ddp, deadline_s=0.5)
    ddp.register_comm_hook(state, qgc.qgc_hook)
    state.barrier()  # before the first step: it joins the job
    optimizer = qgc.CodedSGD(ddp.parameters(), state, lr=0.1)
    for _ in range(6):
        ddp(torch.randn(5, 6)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    began_s = time.monotonic()
    state.sync_buffers()
    losses = state.all_gather({"rank": rank, "steps": state.step, "mean": model[1].running_mean})
    state.barrier()
    waited_s = time.monotonic() - began_s
    state.close()
    assert all(torch.equal(each["mean"], model[1].running_mean) for each in losses.values())
    with pytest.raises(ConfigError, match=r"call it before close\(\)"):
        state.barrier()
    return {k: each["steps"] for k, each in losses.items()}, model[1].running_mean.tolist(), state.report(), waited_s


def test_the_end_of_a_job_works_without_a_rank_that_was_killed_before_it() -> None:
    outcomes = run_ranks(end_of_a_job, ranks=3, check=False)
    killed = outcomes.pop(1)
    assert killed.value is None
    for outcome in outcomes:
        assert outcome.error is None, outcome.error
        assert outcome.exitcode in (0, -signal.SIGABRT)  # gloo's own farewell may fail: a rank is missing
    (steps, mean, report, _), (other_steps, other_mean, _, _) = (outcome.value for outcome in outcomes)
    assert steps == other_steps == {0: 6, 2: 6}
    assert mean == other_mean
    assert report.gone[1] == "lost"
