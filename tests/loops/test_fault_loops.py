"""What goes wrong on one rank: the job goes on and all stay equal, or every rank hears why at once."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.loops import BATCH, Case, Job, check_case, dataset, mlp, mse, run_cases
from torch.nn.parallel import DistributedDataParallel

import torch_qgc as qgc

ODD = 2  # the rank on which it happens


def trained(model: Any, optimizer: Any, x: Any, y: Any) -> None:
    optimizer.zero_grad()
    mse(model(x), y).backward()
    optimizer.step()


def made(job: Job, **options: Any) -> tuple[Any, Any, Any]:
    model, state = job.wrap(mlp(), **options)
    return model, state.loader(dataset(12), batch_size=BATCH), torch.optim.Adam(model.parameters(), lr=1e-2)


# --- batches that make no step ------------------------------------------------------------------------------


def bad_batch_before_forward(rank: int, job: Job) -> Any:
    """`if batch is None: continue` on one rank."""
    model, loader, optimizer = made(job)
    updates = 0
    for _ in range(2):
        for i, (x, y) in enumerate(loader):
            if rank == ODD and i in (1, 6, 7):
                continue
            trained(model, optimizer, x, y)
            updates += 1
    return updates


def bad_batch_at_the_end(rank: int, job: Job) -> Any:
    """The loop's very last batch is the bad one."""
    model, loader, optimizer = made(job)
    updates = 0
    for _ in range(2):
        for i, (x, y) in enumerate(loader):
            if rank == ODD and i == len(loader) - 1:
                continue
            trained(model, optimizer, x, y)
            updates += 1
    return updates


def bad_batches_of_short_loops(rank: int, job: Job) -> Any:
    """The first loop ends while steps still wait for all: the others' last steps need what this rank owes."""
    model, state = job.wrap(mlp())
    loader, optimizer = state.loader(dataset(3), batch_size=BATCH), torch.optim.Adam(model.parameters(), lr=1e-2)
    updates = 0
    for epoch in range(4):
        for i, (x, y) in enumerate(loader):
            bad = rank == ODD and (epoch, i) in ((0, 0), (0, 2), (2, 2))
            if bad and i == 0:
                continue
            loss = mse(model(x), y)
            if bad:
                continue
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            updates += 1
    return updates


def bad_batches_where_all_wait(rank: int, job: Job) -> Any:
    """Without a deadline each step waits for all, and so does the last one of a loop."""
    model, loader, optimizer = made(job, deadline_s=None)
    updates = 0
    for i, (x, y) in enumerate(loader):
        if i in {0: (), 1: (3,), 2: (0, 1, 7)}[rank]:
            continue
        trained(model, optimizer, x, y)
        updates += 1
    return updates


def bad_batch_of_a_loop_of_one(rank: int, job: Job) -> Any:
    """All that one rank's loop does is given up, in a step that waits for all and in one that does not."""
    model, state = job.wrap(mlp())
    loader, optimizer = state.loader(dataset(1), batch_size=BATCH), torch.optim.SGD(model.parameters(), lr=0.05)
    passes = 0
    for _ in range(12):
        for x, y in loader:
            loss = mse(model(x), y)
            passes += 1
            if rank == ODD and passes in (2, 8):
                continue
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return None


def not_a_number(rank: int, job: Job) -> Any:
    """`if not torch.isfinite(loss): continue`, after the forward pass, on one rank."""
    model, loader, optimizer = made(job)
    updates = 0
    for _ in range(2):
        for i, (x, y) in enumerate(loader):
            loss = mse(model(x), y)
            if rank == ODD and i in (5, 9):
                loss = loss * torch.nan
            if not torch.isfinite(loss):
                continue
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            updates += 1
    return updates


def not_a_number_on_any_rank(rank: int, job: Job) -> Any:
    """Each rank skips another number of batches, two of them in a row."""
    model, loader, optimizer = made(job)
    updates = 0
    for i, (x, y) in enumerate(loader):
        loss = mse(model(x), y)
        if i in {0: (8,), 1: (4, 5), 2: ()}[rank]:
            continue
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        updates += 1
    return updates


def skipped_by_name(rank: int, job: Job) -> Any:
    """state.skip_step() in a loop with batches of one's own, which runs until enough steps were made."""
    model, state = job.wrap(mlp())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    x_all, y_all = dataset().tensors
    tried = 0
    while state.step < 12:
        at = torch.randint(len(x_all), (BATCH,))
        x, y = state.thin((x_all[at], y_all[at]))
        loss = mse(model(x), y)
        tried += 1
        if rank == ODD and tried in (5, 6):
            state.skip_step()
            continue
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return None


class Hungry(torch.nn.Module):
    """Runs out of memory on one rank, at some forward passes."""

    def __init__(self, at: tuple[int, ...]) -> None:
        super().__init__()
        self.inner, self.at, self.passes = mlp(), at, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        if self.passes in self.at:
            raise torch.OutOfMemoryError("made up")
        return self.inner(x)


def out_of_memory(rank: int, job: Job) -> Any:
    """fairseq's: caught in the forward pass, the batch is left out."""
    model, state = job.wrap(Hungry((5, 8) if rank == ODD else ()))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(2):
        for x, y in state.loader(dataset(12), batch_size=BATCH):
            try:
                loss = mse(model(x), y)
            except torch.OutOfMemoryError:
                optimizer.zero_grad()
                continue
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return None


def out_of_memory_and_again(rank: int, job: Job) -> Any:
    """Caught, and the same batch tried again in halves."""
    model, state = job.wrap(Hungry((6,) if rank == ODD else ()))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for x, y in state.loader(dataset(12), batch_size=BATCH):
        optimizer.zero_grad()
        try:
            mse(model(x), y).backward()
        except torch.OutOfMemoryError:
            with model.no_sync():
                (mse(model(x[:2]), y[:2]) / 2).backward()
            (mse(model(x[2:]), y[2:]) / 2).backward()
        optimizer.step()
    return None


def accumulated_micro_batch_left_out(rank: int, job: Job) -> Any:
    """A bad batch within an accumulation under no_sync."""
    model, state = job.wrap(mlp())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for i, (x, y) in enumerate(state.loader(dataset(20), batch_size=BATCH)):
        model.require_backward_grad_sync = i % 2 == 1
        loss = mse(model(x), y) / 2
        if rank == ODD and i == 10:
            continue
        loss.backward()
        if i % 2 == 1:
            optimizer.step()
            optimizer.zero_grad()
    return None


def infinite_gradient(rank: int, job: Job) -> Any:
    """A gradient of one rank that is not finite, in a step that all are in, and a guard on the norm."""
    model, loader, optimizer = made(job)
    skipped = 0
    for i, (x, y) in enumerate(loader):
        loss = mse(model(x), y) * (torch.nan if rank == ODD and i == 2 else 1.0)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if torch.isfinite(norm):
            optimizer.step()
        else:
            skipped += 1
    assert skipped == 1
    return skipped


# --- ends -----------------------------------------------------------------------------------------------------


def early_stop_agreed(rank: int, job: Job) -> Any:
    """Rank 0 decides after each epoch, and tells."""
    model, loader, optimizer = made(job)
    for epoch in range(5):
        for x, y in loader:
            trained(model, optimizer, x, y)
        stop = torch.tensor(int(rank == 0 and epoch == 1))
        dist.broadcast(stop, 0)
        if stop:
            break
    return epoch


def early_stop_on_own_loss(rank: int, job: Job) -> Any:
    model, loader, optimizer = made(job)
    for epoch in range(3):
        for i, (x, y) in enumerate(loader):
            trained(model, optimizer, x, y)
            if epoch == 1 and rank == ODD and i == 5:
                break
    return None


def early_end_of_all_on_own_loss(rank: int, job: Job) -> Any:
    """One rank is done for good, and leaves in good order."""
    model, loader, optimizer = made(job)
    for i, (x, y) in enumerate(loader):
        trained(model, optimizer, x, y)
        if rank == ODD and i == 6:
            job.states[0].close()
            break
    return None


# --- what differs -----------------------------------------------------------------------------------------------


def other_learning_rate(rank: int, job: Job) -> Any:
    model, loader, optimizer = made(job)
    for i, (x, y) in enumerate(loader):
        if rank == ODD and i == 6:
            optimizer.param_groups[0]["lr"] = 0.0087
        trained(model, optimizer, x, y)
    return None


def other_average(rank: int, job: Job) -> Any:
    model, loader, optimizer = made(job)
    ema = mlp()
    job.states[0].verify_also(ema=ema)
    for i, (x, y) in enumerate(loader):
        trained(model, optimizer, x, y)
        with torch.no_grad():
            for old, new in zip(ema.parameters(), model.parameters()):
                old.lerp_(new, 0.2 if rank == ODD and i == 5 else 0.1)
    return None


def other_parameters(rank: int, job: Job) -> Any:
    model, loader, optimizer = made(job)
    for i, (x, y) in enumerate(loader):
        trained(model, optimizer, x, y)
        if rank == ODD and i == 7:
            with torch.no_grad():
                next(model.parameters()).add_(1e-6)
    return None


def other_parameters_after_the_last_check(rank: int, job: Job) -> Any:
    """Seen when the state is closed, also without a loader."""
    model, _, optimizer = made(job, verify_every=1000)
    x, y = dataset(3).tensors
    for _ in range(13):
        trained(model, optimizer, *job.states[0].thin((x, y)))
    if rank == ODD:
        with torch.no_grad():
            next(model.parameters()).add_(1e-6)
    return None


def other_parameters_after_the_loop(rank: int, job: Job) -> Any:
    """Rank 0 alone loads its best checkpoint to evaluate it: its own business."""
    model, loader, optimizer = made(job)
    for x, y in loader:
        trained(model, optimizer, x, y)
    job.witnesses[0].note()
    if rank == 0:
        best = {name: value.clone() for name, value in model.module.state_dict().items()}
        model.module.load_state_dict({name: 2 * value for name, value in best.items()})
        job.states[0].close()
        model.module.load_state_dict(best)
    return None


def random_update(rank: int, job: Job) -> Any:
    """Noise on the parameters from each rank's own random numbers."""
    model, loader, optimizer = made(job)
    torch.manual_seed(rank)
    for x, y in loader:
        trained(model, optimizer, x, y)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p), alpha=1e-3)
    return None


# --- errors -------------------------------------------------------------------------------------------------------


def error_in_forward(rank: int, job: Job) -> Any:
    """Nobody catches it: Python's own way of telling is what tells the others."""
    model, loader, optimizer = made(job)
    for i, (x, y) in enumerate(loader):
        if rank == ODD and i == 6:
            try:
                model(x[:, :3])
            except RuntimeError:
                with open(os.devnull, "w") as nowhere:
                    stderr, sys.stderr = sys.stderr, nowhere
                    sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
                    sys.stderr = stderr
                raise
        trained(model, optimizer, x, y)
    return None


class Partly(torch.nn.Module):
    """A layer of it takes part in the loss for some calls only."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.layer, self.rest, self.calls = torch.nn.Linear(6, 6), mlp(), calls

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls -= 1
        return self.rest(self.layer(x) if self.calls >= 0 else x)


def parameters_without_gradient(rank: int, job: Job) -> Any:
    model, state = job.wrap(Partly(5 if rank == ODD else 99))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for x, y in state.loader(dataset(12), batch_size=BATCH):
        trained(model, optimizer, x, y)
    return None


def stepped_without_backward(rank: int, job: Job) -> Any:
    """The update of a step whose gradient was not exchanged."""
    model, loader, optimizer = made(job)
    for i, (x, y) in enumerate(loader):
        loss = mse(model(x), y)
        if not (rank == ODD and i == 5):
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
    return None


def zero_redundancy(rank: int, job: Job) -> Any:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model, state = job.wrap(mlp())
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.05)
    for x, y in state.loader(dataset(12), batch_size=BATCH):
        trained(model, optimizer, x, y)
    return None


def unused_parameters(rank: int, job: Job) -> Any:
    return job.wrap(mlp(), ddp={"find_unused_parameters": True})


def delayed_all_reduce(rank: int, job: Job) -> Any:
    module = mlp()
    options = {
        "delay_all_reduce_named_params": [("0.bias", module[0].bias)],
        "param_to_hook_all_reduce": module[2].weight,
    }
    return job.wrap(module, ddp=options)


def synchronized_batch_norm(rank: int, job: Job) -> Any:
    model = DistributedDataParallel(mlp())  # which itself refuses SyncBatchNorm on CPU
    model.module.append(torch.nn.SyncBatchNorm(1))
    return qgc.QGCState(model, deadline_s=0.1)


def two_models_of_one_optimizer(rank: int, job: Job) -> Any:
    model, state = job.wrap(mlp())
    return qgc.CodedAdam([*model.parameters(), *mlp().parameters()], state)


# --- what makes a deadline useless ------------------------------------------------------------------------------


class Heard(logging.Handler):
    """What the package has logged."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def warned(job: Job, word: str, *, in_forward: bool) -> Any:
    heard = Heard()
    logging.getLogger("torch_qgc").addHandler(heard)
    model, loader, optimizer = made(job)
    if in_forward:
        model.module[0].register_forward_hook(lambda *_: dist.all_reduce(torch.zeros(())))
    for x, y in loader:
        trained(model, optimizer, x, y)
        if not in_forward:
            dist.all_reduce(torch.zeros(()))
    logging.getLogger("torch_qgc").removeHandler(heard)
    assert [word in text and "deadline does nothing" in text for text in heard.texts] == [True], heard.texts


def collective_in_the_loop(rank: int, job: Job) -> Any:
    return warned(job, "loop body makes a collective", in_forward=False)


def collective_in_forward(rank: int, job: Job) -> Any:
    return warned(job, "forward pass makes a collective", in_forward=True)


def collective_every_fifth_step(rank: int, job: Job) -> Any:
    """Nothing to warn of."""
    heard = Heard()
    logging.getLogger("torch_qgc").addHandler(heard)
    model, loader, optimizer = made(job)
    for i, (x, y) in enumerate(loader):
        trained(model, optimizer, x, y)
        if i % 5 == 4:
            dist.all_reduce(torch.zeros(()))
    logging.getLogger("torch_qgc").removeHandler(heard)
    assert not heard.texts


CASES = {
    f.__name__: Case(f, **options)
    for f, options in [
        (bad_batch_before_forward, {"steps": 24}),
        (bad_batch_at_the_end, {"steps": 24}),
        (bad_batches_of_short_loops, {"steps": 12}),
        (bad_batches_where_all_wait, {"steps": 12, "late": False}),
        (bad_batch_of_a_loop_of_one, {"steps": 12}),
        (not_a_number, {"steps": 24}),
        (not_a_number_on_any_rank, {"steps": 11}),
        (skipped_by_name, {"steps": 12}),
        (out_of_memory, {"steps": 24}),
        (out_of_memory_and_again, {"steps": 12}),
        (accumulated_micro_batch_left_out, {"steps": 10}),
        (infinite_gradient, {"steps": 12}),
        (early_stop_agreed, {"steps": 24, "every": 12}),
        (
            early_stop_on_own_loss,
            {"error": "loops have ended at different steps: workers [2] at step 18, workers [0, 1]"},
        ),
        (early_end_of_all_on_own_loss, {"error": "worker 2 has left its loop at step 7"}),
        (other_learning_rate, {"error": "Adam.lr: workers [2] 0.0087, workers [0, 1] 0.01"}),
        (other_average, {"error": "ema: workers [2]"}),
        (other_parameters, {"error": "replicas differ before step 8"}),
        (other_parameters_after_the_last_check, {"error": "replicas differ before step 13"}),
        (other_parameters_after_the_loop, {"steps": 12}),
        (random_update, {"error": "replicas differ before step"}),
        (error_in_forward, {"error": "mat1 and mat2 shapes cannot be multiplied"}),
        (parameters_without_gradient, {"error": "got none of layer.bias, layer.weight: freeze it", "late": False}),
        (stepped_without_backward, {"error": "its gradient was not exchanged before the update"}),
        (zero_redundancy, {"error": "use the optimizer that it wraps", "late": False}),
        (unused_parameters, {"error": "find_unused_parameters=False"}),
        (delayed_all_reduce, {"error": "past the communication hook"}),
        (synchronized_batch_norm, {"error": "state.sync_buffers() averages"}),
        (collective_in_the_loop, {"steps": 12, "late": False}),
        (collective_in_forward, {"steps": 12, "late": False}),
        (collective_every_fifth_step, {"steps": 12, "late": False}),
        (two_models_of_one_optimizer, {"error": "its own optimizer and its own state"}),
    ]
}


@pytest.fixture(scope="module")
def played() -> Any:
    return run_cases(CASES)


@pytest.mark.parametrize("name", CASES)
def test_all_ranks_stay_equal_or_all_hear_what_is_wrong_at_once(played: Any, name: str) -> None:
    ranks = [rank[name] for rank in played]
    check_case(ranks, CASES[name])
    assert max(rank["took_s"] for rank in ranks) < 10.0


# --- the end of a process -----------------------------------------------------------------------------------------

SCRIPT = """
import os, sys, torch, torch.distributed as dist
import torch_qgc as qgc
from torch.nn.parallel import DistributedDataParallel as DDP
torch.set_num_threads(1)
dist.init_process_group("gloo")
torch.manual_seed(0)
model = DDP(torch.nn.Linear(6, 1))
state = qgc.QGCState(model, deadline_s=0.1)
model.register_comm_hook(state, qgc.qgc_hook)
loader = state.loader([torch.ones(6)] * 120, batch_size=4)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
for i, x in enumerate(loader):
    if dist.get_rank() == 2 and i == 6 and sys.argv[1] != "end":
        if sys.argv[1] == "exit":
            sys.exit()
        raise ValueError("the user's own")
    optimizer.zero_grad()
    model(x).sum().backward()
    optimizer.step()
print("trained to the end", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "text", "codes"),
    [
        ("end", "", [0, 0, 0]),
        ("exit", "worker 2 has left its loop at step 6", [1, 1, 1]),
        ("raise", "ValueError: the user's own", [1, 1, 1]),
    ],
)
def test_a_script_that_ends_early_on_one_rank_ends_on_all_with_the_reason(
    tmp_path: Path, how: str, text: str, codes: list[int]
) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    begun_s = time.monotonic()
    shared = dict(os.environ, OMP_NUM_THREADS="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29631", WORLD_SIZE="3")
    processes = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "script.py"), how],
            env=dict(shared, RANK=str(rank), LOCAL_RANK=str(rank)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(3)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert all(text in output for output in outputs), outputs
    assert [process.returncode for process in processes] == codes, outputs
    assert all(("trained to the end" in output) is (how == "end") for output in outputs)
    assert time.monotonic() - begun_s < 60
