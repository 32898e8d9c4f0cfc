"""Workers without a common process group: their numbers are given, and the group is each one's own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.loops import mlp
from helpers.ranks import PATIENCE_S, aggregators, run_ranks
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import torch_qgc as qgc
from torch_qgc.ddp.numbers import check_framework, find_numbers
from torch_qgc.protocol import environment

WORKERS = 3
LIMITS = qgc.Limits(chunk_numel=512, join_timeout_s=PATIENCE_S, silence_s=PATIENCE_S)


def leave_group() -> None:
    """Leave the process group of all ranks, when all are connected: those that still connect would fail."""
    dist.barrier()
    dist.destroy_process_group()


def alone() -> None:
    """Leave the process group of all ranks for one of this worker alone."""
    leave_group()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def train(state: qgc.QGCState, steps: int = 6) -> tuple[str, int, float]:
    """Return the parameters' digest, the step, and the mean of the samples that were drawn."""
    ddp = state._model
    ddp.register_comm_hook(state, qgc.qgc_hook)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.01)
    x = torch.arange(WORKERS * steps * 4, dtype=torch.float32)[:, None].expand(-1, 20)
    drawn = 0.0
    for (batch,) in state.loader(TensorDataset(x), batch_size=4):
        drawn += batch.mean().item()
        ddp(batch / len(x)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    state.close()
    return state.replica.layout.parameter_digest(), state.step, drawn


def by_arguments(rank: int, endpoints: tuple[str, ...]) -> tuple[str, int, float]:
    alone()
    return train(
        qgc.QGCState(
            DistributedDataParallel(mlp(20)),
            deadline_s=None,
            worker=rank,
            workers=WORKERS,
            network=qgc.Network(endpoints=endpoints),
            limits=LIMITS,
        )
    )


def by_environment(rank: int, endpoints: tuple[str, ...]) -> tuple[str, int, float]:
    """As a script that knows nothing about `qgc run`."""
    os.environ |= environment.variables(rank, WORKERS, endpoints, restarts=0)
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    leave_group()
    dist.init_process_group("gloo")
    return train(qgc.QGCState(DistributedDataParallel(mlp(20)), deadline_s=None, limits=LIMITS))


@pytest.mark.parametrize("script", [by_arguments, by_environment])
def test_workers_with_groups_of_their_own_train_as_one_job(script: Any) -> None:
    count = 1 if script is by_arguments else 2
    with aggregators(count, of=count) as endpoints:
        found = run_ranks(script, endpoints, ranks=WORKERS)
    assert len({digest for digest, _, _ in found}) == 1
    assert [step for _, step, _ in found] == [6] * WORKERS
    assert len({drawn for _, _, drawn in found}) == WORKERS  # each has drawn samples of its own


def unequal(rank: int, endpoints: tuple[str, ...], step: int) -> str:
    alone()
    model = mlp(20)
    torch.nn.init.constant_(model[0].bias, float(rank))
    network = qgc.Network(endpoints=endpoints)
    state = qgc.QGCState(
        DistributedDataParallel(model), deadline_s=None, worker=rank, workers=2, network=network, limits=LIMITS
    )
    state.load_state_dict({**state.state_dict(), "step": step})
    with pytest.raises(qgc.JobFailed) as caught:
        train(state)
    return str(caught.value)


@pytest.mark.parametrize("step", [0, 7])
def test_models_that_no_group_has_made_equal_are_compared_before_the_first_step(step: int) -> None:
    with aggregators() as endpoints:
        for text in run_ranks(unequal, endpoints, step, ranks=2):
            assert f"replicas differ before step {step}" in text


ENDING = """
import sys
from torch_qgc.worker.ending import at_the_end
class Member:
    def tell_all(self, problem): print("told", problem)
    def close(self): print("left")
member = Member()
at_the_end(member, alone=sys.argv[1] == "alone")
print("in step 8")
raise ValueError("its own")
"""


@pytest.mark.parametrize(("how", "said"), [("alone", []), ("with all", ["told ValueError: its own", "left"])])
def test_whoever_may_leave_alone_says_nothing_of_an_error(how: str, said: list[str]) -> None:
    """A goodbye would tell that its loop has ended, and end the others' job."""
    ended = subprocess.run([sys.executable, "-c", ENDING, how], capture_output=True, text=True, check=False)
    assert ended.stdout.splitlines() == ["in step 8", *said]
    assert ended.stderr.splitlines()[-1] == "ValueError: its own"
    assert ended.returncode == 1


# --- what cannot be -----------------------------------------------------------------------------------------


def refusal(**options: Any) -> str:
    with pytest.raises(qgc.ConfigError) as caught:
        qgc.QGCState(DistributedDataParallel(mlp(20)), **options)
    return str(caught.value)


def refusals(rank: int) -> list[str]:
    together = refusal(worker=rank, workers=2)
    alone()
    os.environ[environment.WORKER] = "first"
    no_number = refusal()
    del os.environ[environment.WORKER]
    with pytest.raises(qgc.ConfigError) as norm:  # which DDP takes on GPUs alone
        find_numbers(torch.nn.SyncBatchNorm(2), dist.group.WORLD, 0, 2)
    return [
        together,
        no_number,
        refusal(worker=0),
        refusal(workers=2),
        refusal(worker=2, workers=2),
        refusal(worker=0, workers=2),
        str(norm.value),
    ]


def test_what_cannot_be_is_refused_with_the_remedy() -> None:
    remedies = [
        "leave out worker and workers",
        "QGC_WORKER: expected a number",
        "workers=None: QGCState(model, worker=k, workers=K)",
        "worker=None and workers=2",
        "count workers from 0",
        "or start the script with `qgc run`",
        "use BatchNorm",
    ]
    for texts in run_ranks(refusals, ranks=2):
        for text, remedy in zip(texts, remedies):
            assert remedy in text, text


def divided_by_the_group(rank: int) -> tuple[list[str], int]:
    alone()
    network = qgc.Network(endpoints=("tcp://127.0.0.1:1",))
    state = qgc.QGCState(DistributedDataParallel(mlp(20)), worker=1, workers=2, network=network)
    data = TensorDataset(torch.zeros(8, 20))
    theirs = type("DataLoaderShard", (DataLoader,), {"__module__": "accelerate.data_loader"})(data)
    refused: list[Callable[[], Any]] = [
        lambda: state.follow(DataLoader(data, sampler=DistributedSampler(data))),
        lambda: state.follow(theirs),
        lambda: check_framework("QGCStrategy", state.workers),
    ]
    texts = []
    for call in refused:
        with pytest.raises(qgc.ConfigError) as caught:
            call()
        texts.append(str(caught.value))
    own = DistributedSampler(data, rank=state.rank, num_replicas=state.workers)
    return texts, len(state.follow(DataLoader(data, sampler=own)))


def test_what_would_let_every_worker_draw_all_the_data_is_refused() -> None:
    [(texts, length)] = run_ranks(divided_by_the_group, ranks=1)
    for text, remedy in zip(texts, ["rank=state.rank", "state.loader(dataset)", "torchrun instead of `qgc run`"]):
        assert remedy in text
    assert length == 4


# --- the environment ----------------------------------------------------------------------------------------


@given(st.integers(0, 9999), st.integers(0, 9999), st.lists(st.from_regex(r"tcp://[a-z0-9.]+:[0-9]+", fullmatch=True)))
def test_a_worker_reads_what_the_launcher_has_written(worker: int, workers: int, endpoints: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.variables(worker, workers, endpoints, restarts=0).items():
            patch.setenv(name, value)
        assert environment.number(environment.WORKER) == worker
        assert environment.number(environment.WORKERS) == workers
        assert environment.endpoints() == tuple(endpoints)
        assert qgc.Network(endpoints=("tcp://given:1",)).completed().endpoints == ("tcp://given:1",)
        if endpoints:
            assert qgc.Network().completed().endpoints == tuple(endpoints)
