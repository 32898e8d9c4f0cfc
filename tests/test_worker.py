"""The worker's end and the aggregator's process over real sockets."""

from __future__ import annotations

import socket

import pytest
import torch
from helpers.keys import door
from helpers.ranks import PATIENCE_S
from helpers.served import connect, job
from helpers.simulated import make_spec, push_all, simple_plan, take

from torch_qgc.aggregator.process import AggregatorProcess, Serving
from torch_qgc.errors import JobFailed, Refused

SERVING = Serving(door=door(), bind="tcp://127.0.0.31:*")  # where no other program picks its ports


@pytest.mark.parametrize(("count", "downlink_bits"), [(1, 32), (3, 8)])
def test_every_worker_gets_the_same_bytes_from_any_number_of_aggregators(count: int, downlink_bits: int) -> None:
    g = torch.randn(3, 512 * 5 + 17, generator=torch.Generator().manual_seed(0))
    spec = dict(numel=g.shape[1], chunk_numel=512, downlink_bits=downlink_bits, deadline_s=None)
    with job(3, count, **spec) as (_, workers, plan):
        for step in range(3):
            for worker in workers:
                worker.begin(step)
                push_all(worker, plan, step, g[worker.session.worker])
            taken = [take(worker) for worker in workers]
            assert all(torch.equal(t, taken[0]) for t in taken)
            # 4 bits per worker, and on the way down: close to the mean, not equal to it
            assert 0 < (taken[0] - g.mean(0)).norm() < 0.5 * g.mean(0).norm()


def test_a_late_worker_finds_missed_results_in_its_inbox_or_asks_again() -> None:
    """With an inbox of two steps, the results of the others were dropped on arrival and are fetched from the log."""
    g = torch.randn(2, 1024, generator=torch.Generator().manual_seed(1))
    with job(2, inbox_bytes=2 * 4096, numel=1024, deadline_s=0.02, late="drop") as (_, workers, plan):
        fast, slow = workers
        expected = []
        slow.begin(0)
        for step in range(6):
            fast.begin(step)
            push_all(fast, plan, step, g[0])
            expected.append(take(fast))
        assert slow.wait_closed(4, PATIENCE_S)
        assert slow.session.inbox.held_bytes == 2 * 4096  # of steps 1 and 2; later ones were dropped
        for step in range(6):
            assert torch.equal(take(slow), expected[step])
        assert not slow.closed(6)


def test_only_counts_of_the_worker_that_was_in_are_reported() -> None:
    with job(2, deadline_s=0.02) as (_, workers, plan):
        workers[0].begin(0)
        push_all(workers[0], plan, 0, torch.ones(512))
        (result,) = list(workers[1].results())
        assert result.counts.tolist() == [1, 0]


def test_a_worker_whose_connection_is_closed_is_no_longer_waited_for() -> None:
    with job(2, deadline_s=None) as (served, workers, plan):
        workers[0].begin(0)
        push_all(workers[0], plan, 0, torch.ones(512))
        workers[1]._carrier.close()  # without a goodbye, as a killed process
        (result,) = list(workers[0].results())
        assert result.counts.tolist() == [1, 0]
        assert served.aggregators[0].stats["lost_workers"] == 1


def test_a_refused_worker_says_why() -> None:
    with job(2) as (served, _, plan):
        stranger = connect(served.endpoints, make_spec(plan, layout_digest="another"), 1, plan)
        with pytest.raises(Refused, match="same model"):
            stranger.join(PATIENCE_S)
        stranger.close()


def test_a_silent_aggregator_is_noticed() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        nobody.listen()
        plan = simple_plan(2)
        endpoint = f"tcp://127.0.0.1:{nobody.getsockname()[1]}"
        worker = connect([endpoint], make_spec(plan), 0, plan, silence_s=0.5)
        with pytest.raises(JobFailed, match="nothing heard from the aggregator"):
            worker.join(PATIENCE_S)
        worker.close()


# --- the process ------------------------------------------------------------------------------------------


def test_the_aggregator_process_ends_with_the_job_and_frees_its_port() -> None:
    process = AggregatorProcess(SERVING)
    plan = simple_plan(1)
    spec = make_spec(plan, deadline_s=None)
    worker = connect([process.endpoint], spec, 0, plan)
    process.announce(spec, plan)
    worker.join(PATIENCE_S)
    worker.begin(0)
    push_all(worker, plan, 0, torch.ones(512))
    assert torch.allclose(take(worker), torch.ones(512))
    worker.close()
    process.stop(PATIENCE_S)
    assert process.poll() == 0
    port = int(process.endpoint.rsplit(":", 1)[1])
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.31", port))


def test_the_aggregator_process_stops_and_tells_when_its_parent_lets_go() -> None:
    process = AggregatorProcess(SERVING)
    plan = simple_plan(1)
    process.announce(make_spec(plan), plan)
    worker = connect([process.endpoint], make_spec(plan), 0, plan)
    worker.join(PATIENCE_S)
    process._process.stdin.close()  # as the end of rank 0 would
    with pytest.raises(JobFailed, match="rank 0"):
        list(worker.results())
    worker.close()
    assert process._process.wait() == 1
    process.stop()


def test_results_account_for_their_bytes() -> None:
    with job(2, deadline_s=None, bits_per_coordinate=2, numel=1 << 16, chunk_numel=1 << 14) as (_, workers, plan):
        for worker in workers:
            worker.begin(0)
            push_all(worker, plan, 0, torch.ones(1 << 16))
        for worker in workers:
            take(worker)
        assert all(w.session.inbox.held_bytes == 0 for w in workers)
        payload = (1 << 16) * 2 / 8 + 4 * 128  # 2 bits per coordinate and a scale per block
        assert workers[0].session.bytes_received > 4 << 16
        # A push's header, a Hello, a Begin and a Bye; a worker does not answer pings.
        assert payload <= workers[1].session.bytes_sent <= 1.1 * payload
