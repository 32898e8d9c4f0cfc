"""Real processes, real gloo, real sockets: a DDP job through the hook."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist
from helpers.loops import Late, Witness, closing
from helpers.ranks import run_ranks
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

import torch_qgc as qgc

SAMPLES = 480


def dataset(seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(SAMPLES, 10, generator=generator)
    return TensorDataset(x, torch.sin(x).sum(1, keepdim=True))


def mlp(*, width: int = 64, seed: int = 0, batch_norm: bool = False) -> torch.nn.Module:
    torch.manual_seed(seed)
    middle = [torch.nn.BatchNorm1d(width)] if batch_norm else []
    return torch.nn.Sequential(torch.nn.Linear(10, width), *middle, torch.nn.ReLU(), torch.nn.Linear(width, 1))


def coded(model: torch.nn.Module, **options: Any) -> tuple[DistributedDataParallel, qgc.QGCState]:
    ddp = DistributedDataParallel(model, broadcast_buffers=False)
    state = qgc.QGCState(ddp, **{"limits": qgc.Limits(chunk_numel=512), "deadline_s": None, **options})
    ddp.register_comm_hook(state, qgc.qgc_hook)
    return ddp, state


# --- 1. a late worker -----------------------------------------------------------------------------------


def convolutions() -> torch.nn.Module:
    """As `mlp`, through convolutions whose weights lie channels last."""
    torch.manual_seed(0)
    layers = [torch.nn.Unflatten(1, (10, 1, 1)), torch.nn.Conv2d(10, 24, 3, padding=1), torch.nn.ReLU()]
    layers += [torch.nn.Conv2d(24, 16, 3, padding=1), torch.nn.Flatten(), torch.nn.Linear(16, 1)]
    return torch.nn.Sequential(*layers).to(memory_format=torch.channels_last)


def late_job(rank: int, late: str, optimizer: str, downlink_bits: int, aggregators: int) -> dict[str, Any]:
    ddp, state = coded(
        mlp() if optimizer == "sgd" else convolutions(),
        deadline_s=0.15,
        late=late,
        verify_every=5,
        downlink_bits=downlink_bits,
        aggregators=aggregators,
    )
    loader = state.loader(dataset(), batch_size=6)
    if optimizer == "adam":
        opt: torch.optim.Optimizer = qgc.CodedAdam(ddp.parameters(), state, lr=1e-2)

        def update() -> None:
            opt.step()
            opt.zero_grad()

    else:
        opt = qgc.CodedSGD(ddp.parameters(), state, lr=1e-2, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.95)
        state.bind(opt, scheduler=scheduler, max_grad_norm=1.0)
        update = state.update
    witness = Witness(ddp, state)
    if rank == 3:
        Late(ddp, state, {3, 8, 13})
    with closing(state):
        for x, y in loader:
            torch.nn.functional.mse_loss(ddp(x), y).backward()
            update()
            if rank == 2 and state.step == 1:
                time.sleep(0.4)  # longer than the deadline, in a warm-up step that everybody is needed for
    return witness.seen(lr=opt.param_groups[0]["lr"])


@pytest.mark.parametrize(
    ("late", "optimizer", "downlink_bits", "aggregators"),
    [("fold", "adam", 32, 1), ("drop", "sgd", 8, 2)],
)
def test_a_late_worker_goes_through_thin_steps_or_replays_and_stays_bit_identical_after_every_step(
    late: str, optimizer: str, downlink_bits: int, aggregators: int
) -> None:
    ranks = run_ranks(late_job, late, optimizer, downlink_bits, aggregators)
    steps = SAMPLES // 24
    for rank in ranks:
        common = rank["digests"].keys() & ranks[0]["digests"].keys()
        assert {s: rank["digests"][s] for s in common} == {s: ranks[0]["digests"][s] for s in common}
        assert steps in common
        assert rank["optimizers"] == ranks[0]["optimizers"]
        assert rank["report"].steps == steps
        assert rank["lr"] == ranks[0]["lr"]
        assert not rank["report"].rejections
    assert len(set(ranks[0]["digests"].values())) == steps + 1  # it did learn, in every step
    slow, fast = ranks[3]["report"], ranks[0]["report"]
    bound = optimizer == "sgd"
    assert (slow.replayed_steps if bound else slow.thin_steps) >= 3
    assert (slow.thin_steps if bound else slow.replayed_steps) == 0
    # The others did not wait for it: a waiting job would see it in every round.
    assert fast.computed_steps > slow.computed_steps
    assert slow.contributions[3] < min(0.95, slow.contributions[0])


# --- 3. nobody late -------------------------------------------------------------------------------------


class OwnBatches:
    """The batches of one rank in a fixed order, for jobs that must see the same data."""

    def __init__(self, rank: int, ranks: int, batch: int = 6) -> None:
        x, y = dataset().tensors
        self.batches = [(x[i : i + batch], y[i : i + batch]) for i in range(rank * batch, SAMPLES, ranks * batch)]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def plain_and_coded(rank: int) -> float:
    finals = []
    for code in (False, True):
        if code:
            ddp, state = coded(mlp(), bits_per_coordinate=32)
        else:
            ddp = DistributedDataParallel(mlp())
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05, momentum=0.9)
        for _ in range(3):
            for x, y in OwnBatches(rank, dist.get_world_size()):
                optimizer.zero_grad()
                torch.nn.functional.mse_loss(ddp(x), y).backward()
                optimizer.step()
        finals.append(torch.cat([p.detach().flatten() for p in ddp.parameters()]))
        if code:
            dist.barrier()
            state.close()
    return float((finals[0] - finals[1]).abs().max() / finals[0].abs().max())


def test_without_quantization_and_stragglers_training_equals_ddp_up_to_summation_order() -> None:
    # 60 steps of fp32 sums in another order; the training is not chaotic at this size.
    assert max(run_ranks(plain_and_coded)) < 1e-4


def loss_curve(rank: int, code: bool, seed: int) -> np.ndarray:
    ddp = DistributedDataParallel(mlp(seed=seed))
    state = None
    if code:
        state = qgc.QGCState(ddp, bits_per_coordinate=4, seed=seed, deadline_s=None)
        ddp.register_comm_hook(state, qgc.qgc_hook)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05, momentum=0.9)
    x, y = dataset().tensors
    order = torch.Generator().manual_seed(1000 * seed + rank)
    losses = []
    for _ in range(80):
        batch = torch.randint(SAMPLES, (6,), generator=order)
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(ddp(x[batch]), y[batch]).backward()
        optimizer.step()
        with torch.no_grad():
            losses.append(float(torch.nn.functional.mse_loss(ddp.module(x), y)))
    if state is not None:
        dist.barrier()
        state.close()
    return np.array(losses)


def loss_curves(rank: int) -> dict[str, np.ndarray]:
    return {
        "ddp": np.array([loss_curve(rank, False, seed) for seed in range(6)]),
        "coded": np.array([loss_curve(rank, True, seed) for seed in range(3)]),
    }


def test_with_quantization_the_loss_stays_within_the_spread_of_ddp_seeds() -> None:
    curves = run_ranks(loss_curves)[0]
    tail = {name: values[:, -25:].mean(axis=1) for name, values in curves.items()}
    mean, spread = tail["ddp"].mean(), tail["ddp"].std(ddof=1)
    assert np.all(np.abs(tail["coded"] - mean) < 4 * spread), tail
    assert tail["coded"].mean() < 0.5 * curves["coded"][:, 0].mean()  # it learns


def adam_job(rank: int, downlink_bits: int) -> list[float]:
    ddp, state = coded(mlp(), deadline_s=0.5, downlink_bits=downlink_bits)
    optimizer = qgc.CodedAdam(ddp.parameters(), state, lr=1e-2)
    x, y = dataset().tensors
    losses = []
    with closing(state):
        for _ in range(20):
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(ddp(x), y)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("bits", [32, 4])
def test_adam_learns_with_two_tracks_whatever_the_bits_on_the_way_down(bits: int) -> None:
    """The second track is the first times a number, so rounding cannot put a gradient over a denominator of zero."""
    for losses in run_ranks(adam_job, bits, ranks=2):
        assert max(losses) < 1.2 * losses[0]


# --- 4. what follows the loop lines up --------------------------------------------------------------------


def epochs_job(rank: int) -> list[Any]:
    ddp, state = coded(mlp(batch_norm=True), deadline_s=0.1)
    loader = state.loader(dataset(), batch_size=12, num_workers=0)
    optimizer = qgc.CodedSGD(ddp.parameters(), state, lr=0.01)
    if rank == 2:
        Late(ddp, state, {11, 16, 21, 25})
    seen = []
    with closing(state):
        for epoch in range(3):
            batches = 0
            for x, y in loader:
                batches += 1
                torch.nn.functional.mse_loss(ddp(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
            state.sync_buffers()
            ddp.eval()
            with torch.no_grad():
                loss = torch.nn.functional.mse_loss(ddp.module(dataset().tensors[0]), dataset().tensors[1])
            dist.all_reduce(loss)  # a collective of the user's own
            ddp.train()
            buffers = [b.tolist() for b in ddp.module.buffers()]
            saved = state.state_dict()
            assert saved["step"] == state.step
            seen.append(
                (epoch, batches, saved["loaders"], float(loss), state.replica.layout.parameter_digest(), buffers)
            )
            dist.barrier()
    return [seen, state.report().thin_steps]


def test_epoch_ends_evaluation_and_checkpoints_line_up_although_one_rank_was_late() -> None:
    ranks = run_ranks(epochs_job)
    for seen, _ in ranks:
        assert seen == ranks[0][0]
    assert [batches for _, batches, *_ in ranks[0][0]] == [10, 10, 10]
    assert ranks[2][1] > 0


# --- 5. DDP's own habits ----------------------------------------------------------------------------------


def rebuilt_buckets(rank: int, static_graph: bool) -> tuple[list[int], str]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[torch.nn.Linear(200, 200) for _ in range(6)])
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.3, static_graph=static_graph)
    state = qgc.QGCState(ddp, bits_per_coordinate=32, deadline_s=None)
    buckets: list[int] = []

    def hook(state: qgc.QGCState, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        buckets.append(len(bucket.parameters()))
        return qgc.qgc_hook(state, bucket)

    hook.__annotations__.update(bucket=dist.GradBucket, **{"return": torch.futures.Future[torch.Tensor]})
    ddp.register_comm_hook(state, hook)
    generator = torch.Generator().manual_seed(rank)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.01)
    for _ in range(4):
        ddp(torch.randn(3, 200, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    dist.barrier()
    state.close()
    return buckets, state.replica.layout.parameter_digest()


@pytest.mark.parametrize("static_graph", [False, True])
def test_rebuilt_buckets_change_nothing(static_graph: bool) -> None:
    ranks = run_ranks(rebuilt_buckets, static_graph, ranks=2)
    assert ranks[0] == ranks[1]
    buckets = ranks[0][0]
    assert sum(buckets) == 4 * 12
    assert buckets[:2] != buckets[-2:]  # the first step's buckets were others


def buffers_job(rank: int) -> tuple[list[str], list[float], bool]:
    ddp = DistributedDataParallel(mlp(batch_norm=True))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        state = qgc.QGCState(ddp, deadline_s=None)
    statistics = ddp.module[1].running_mean
    statistics.fill_(float(rank))
    state.sync_buffers()
    state.close()
    return [str(w.message) for w in caught], statistics.unique().tolist(), ddp.will_sync_module_buffers()


def test_broadcast_buffers_is_switched_off_with_a_notice_and_sync_buffers_averages() -> None:
    for notices, mean, syncs in run_ranks(buffers_job, ranks=2):
        assert any("broadcast_buffers" in notice and "sync_buffers()" in notice for notice in notices)
        assert mean == [0.5]
        assert not syncs


def weighed_buffers_job(rank: int) -> list[float]:
    ddp = DistributedDataParallel(mlp(batch_norm=True), broadcast_buffers=False)
    state = qgc.QGCState(ddp, deadline_s=None)
    statistics, means = ddp.module[1].running_mean, []
    for computed in ((0, 0), (30, 10), (5000, 300)):
        state.replica.counts.computed_steps = computed[rank]
        statistics.fill_(float(rank))
        state.sync_buffers()
        means += statistics.unique().tolist()
    state.close()
    return means


def test_buffers_weigh_by_the_steps_they_rest_on_until_there_are_enough_of_them() -> None:
    assert run_ranks(weighed_buffers_job, ranks=2) == [[0.5, 0.25, 0.5]] * 2


def refusals(rank: int) -> dict[str, str]:
    said = {}

    def attempt(name: str, make: Any) -> None:
        try:
            make()
        except qgc.ConfigError as error:
            said[name] = str(error)

    ddp = DistributedDataParallel(mlp())
    attempt("unused", lambda: qgc.QGCState(DistributedDataParallel(mlp(), find_unused_parameters=True)))
    attempt("module", lambda: qgc.QGCState(mlp()))
    attempt("deadline", lambda: qgc.QGCState(ddp, deadline_s=-1))
    attempt("workers", lambda: qgc.QGCState(ddp, plan=qgc.make_plan([0.1] * 3)))
    attempt("both", lambda: qgc.QGCState(ddp, plan=qgc.make_plan([0.1] * 2), straggle_probs=[0.1] * 2))
    attempt("host", lambda: qgc.QGCState(ddp, network=qgc.Network(host="")))
    nowhere = ("tcp://127.0.0.1:1",)
    attempt("key", lambda: qgc.QGCState(ddp, network=qgc.Network(endpoints=nowhere, key_file="/no/file")))
    attempt("aggregators", lambda: qgc.QGCState(ddp, aggregators=9))
    return said


def test_what_cannot_work_is_refused_with_the_remedy() -> None:
    remedies = {
        "unused": "find_unused_parameters=False",
        "module": "QGCState(DDP(model)",
        "deadline": "None to wait for all",
        "workers": "one straggle probability per rank",
        "both": "already holds them",
        "host": "tcp://host:port",
        "key": "qgc keygen FILE",
        "aggregators": "at most one per chunk",
    }
    for said in run_ranks(refusals, ranks=2):
        assert {name: remedies[name] in text for name, text in said.items()} == dict.fromkeys(remedies, True), said


def failing_job(rank: int, where: str) -> str:
    ddp, state = coded(mlp(), deadline_s=0.5 if where == "divergence" else None, verify_every=4)
    if where == "hook" and rank == 1:
        gather = state.replica.layout.slot

        def broken(parameter: torch.Tensor) -> Any:
            if state.step == 4:
                raise ValueError("broken on purpose")
            return gather(parameter)

        state.replica.layout.slot = broken  # type: ignore[method-assign]
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.01)
    try:
        for x, y in list(OwnBatches(rank, 3)) * 2:
            torch.nn.functional.mse_loss(ddp(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            if where == "divergence" and rank == 1 and state.step == 6:
                with torch.no_grad():
                    next(ddp.parameters()).add_(1e-6)
    except qgc.QGCError as error:
        return f"{type(error).__name__} at {state.step}: {error}"
    return "nothing happened"


def test_an_error_in_the_hook_of_one_rank_reaches_all_ranks() -> None:
    texts = run_ranks(failing_job, "hook", ranks=3)
    assert all("broken on purpose" in text for text in texts), texts
    assert re.match(r"JobFailed at [34]: worker 1 failed at step 4", texts[0])  # it may not have read the last result
    assert texts[1].startswith("QGCError at 4")


def test_replicas_that_differ_stop_the_job_by_name() -> None:
    texts = run_ranks(failing_job, "divergence", ranks=3)
    assert all("replicas differ before step 8" in text and "workers [1]" in text for text in texts), texts


# --- leaving ----------------------------------------------------------------------------------------------


def crashing_job(rank: int, how: str) -> Any:
    ddp, state = coded(mlp(), deadline_s=0.3)
    loader = state.loader(dataset(), batch_size=6)
    optimizer = qgc.CodedSGD(ddp.parameters(), state, lr=0.01)
    for x, y in loader:
        if rank == 1 and state.step == 5:
            if how == "exception":
                raise RuntimeError("the user's own")
            os.kill(os.getpid(), signal.SIGKILL)
        torch.nn.functional.mse_loss(ddp(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    report = state.report()
    pids = [child.pid for child in state._stop_children.peek()[2][0]]
    state.close()
    return report.steps, report.contributions, pids


@pytest.mark.parametrize("how", ["exception", "kill"])
def test_the_others_go_on_when_a_rank_dies_and_no_process_is_left(how: str) -> None:
    outcomes = run_ranks(crashing_job, how, ranks=3, check=False)
    assert outcomes[1].value is None
    for rank in (0, 2):
        assert outcomes[rank].error is None, outcomes[rank].error
        steps, contributions, pids = outcomes[rank].value
        assert steps == -(-SAMPLES // 18)
        assert contributions[1] < 0.5
        assert not any(psutil.pid_exists(pid) for pid in pids)
    assert len(outcomes[0].value[2]) == 1


SCRIPT = """
import os, sys, time, torch, torch.distributed as dist
import torch_qgc as qgc
from torch.nn.parallel import DistributedDataParallel as DDP
torch.set_num_threads(1)
dist.init_process_group("gloo")
model = DDP(torch.nn.Linear(10, 1))
state = qgc.QGCState(model, deadline_s=None)
model.register_comm_hook(state, qgc.qgc_hook)
os.write(1, f"children {[c.pid for c in state._stop_children.peek()[2][0]]} {os.getpid()}\\n".encode())
for step in range(100000):
    model(torch.randn(4, 10)).sum().backward()
    if step == 3:
        os.write(1, b"running\\n")
    time.sleep(0.01)
"""


def test_ctrl_c_leaves_no_process_behind(tmp_path: Any) -> None:
    script = tmp_path / "job.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    job = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        env=dict(os.environ, OMP_NUM_THREADS="1"),
    )
    try:
        pids, running = [], 0
        assert job.stdout is not None
        while running < 2:
            line = job.stdout.readline()
            assert line, "the job ended early"
            running += line.startswith("running")
            if line.startswith("children"):
                pids += [int(word) for word in line.replace("[", " ").replace("]", " ").split() if word.isdigit()]
        assert len(pids) == 3  # two ranks, one aggregator
        os.killpg(job.pid, signal.SIGINT)
        job.wait(30)
        until = time.monotonic() + 20
        while any(psutil.pid_exists(pid) for pid in pids) and time.monotonic() < until:
            time.sleep(0.1)
        assert not [pid for pid in pids if psutil.pid_exists(pid)]
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in [*psutil.Process(job.pid).children(recursive=True), psutil.Process(job.pid)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        job.wait()
