"""A training script as users write it, with places at which cases make something happen."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

from helpers.script import Member
from torch_qgc import CodedSGD, Limits, QGCState, qgc_hook  # here, and not in each process

STEPS = 60
BATCH = 4


def mlp(width: int = 128) -> torch.nn.Sequential:
    """Return a model of 8 parameters for each unit of width: with 128, of three chunks."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, width), torch.nn.Tanh(), torch.nn.Linear(width, 1))


def dataset(ranks: int, steps: int = STEPS) -> TensorDataset:
    """Return samples for that many steps."""
    x = torch.randn(steps * BATCH * ranks, 6, generator=torch.Generator().manual_seed(5))
    return TensorDataset(x, torch.sin(x).sum(1, keepdim=True))


def coded(
    member: Member, model: torch.nn.Module | None = None, *, limits: dict[str, Any] | None = None, **options: Any
) -> tuple[DistributedDataParallel, QGCState]:
    """Wrap a model in DDP with the hook."""
    wrapped = DistributedDataParallel(mlp() if model is None else model)
    bounds = Limits(**{"chunk_numel": 512, **(limits or {})})
    options = {"network": member.network(), "deadline_s": 0.1, "verify_every": 10, **options}
    state = QGCState(wrapped, limits=bounds, **options)
    wrapped.register_comm_hook(state, qgc_hook)
    return wrapped, state


def seen(state: QGCState) -> dict[str, Any]:
    """Return what a rank has at the end: what must be equal on all, and what it says of itself."""
    report = state.report()
    return {
        "step": state.step,
        "parameters": state.replica.layout.parameter_digest(),
        "missed": report.thin_steps + report.replayed_steps,
        "rejections": list(report.rejections),
    }


def train(
    member: Member,
    *,
    steps: int = STEPS,
    make_model: Callable[[], torch.nn.Module] = mlp,
    before_loop: Callable[[], None] = lambda: None,
    in_forward: Callable[[int], None] = lambda step: None,
    after_step: Callable[..., bool | None] = lambda step, *parts: None,
    after_loop: Callable[[QGCState], None] = lambda state: None,
    num_workers: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """Train as a script does, and leave in good order.

    Args:
        make_model: makes it, of layers of which the second is called once in a forward pass.
        before_loop: is called when all has been made.
        in_forward: is called in the middle of each forward pass, with the step.
        after_step: is called with each step that was made, and with the DDP model, the optimizer and the state; True
            leaves the loop.
        after_loop: is called before the job is left.
        options: `coded`'s.
    """
    ddp, state = coded(member, make_model(), **options)
    ddp.module[1].register_forward_pre_hook(lambda *_: in_forward(state.step))  # type: ignore[operator, index]
    optimizer = CodedSGD(ddp.parameters(), state, lr=0.05)
    samples = dataset(member.ranks, steps)
    before_loop()
    for x, y in state.loader(samples, batch_size=BATCH, num_workers=num_workers):
        step = state.step
        member.may_begin(step)
        torch.nn.functional.mse_loss(ddp(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        member.made(step)
        if after_step(step, ddp, optimizer, state):
            break
    after_loop(state)
    found = seen(state)
    state.close()
    return found


def train_until(rank: int, at: int, happens: Callable[[], object], member: Member, **options: Any) -> dict[str, Any]:
    """Train until something happens on one rank: in the middle of the forward pass of a step.

    Args:
        rank, at: on which, in which step.
        options: `train`'s.
    """

    def in_forward(step: int) -> None:
        if (member.rank, step) == (rank, at):
            member.board.fault()
            happens()

    return train(member, in_forward=in_forward, **options)


def breaks() -> None:
    """Raise what has nothing to do with torch_qgc."""
    raise ValueError("broken on purpose")


def sleeps() -> None:
    """Sleep until somebody kills this process."""
    time.sleep(1e6)
