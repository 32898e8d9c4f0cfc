"""What a training loop must not contain is refused on every rank, with the remedy."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.loops import coded, dataset, mlp, mse, run

import torch_qgc as qgc


class Partly(torch.nn.Module):
    """An MLP with a layer that takes part in the loss for some calls only."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.layer, self.rest, self.calls = torch.nn.Linear(6, 6), mlp(), calls

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls -= 1
        return self.rest(self.layer(x) if self.calls >= 0 else x)


def attempt(loop: Callable[[], Any]) -> str:
    try:
        loop()
    except (qgc.QGCError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing happened"


def one_step(ddp: Any, update: Callable[[], Any]) -> None:
    x, y = dataset().tensors
    mse(ddp(x), y).backward()
    update()


def left_out(rank: int, endpoint: str, calls: int, coded_optimizer: bool, on: tuple[int, ...] = (0, 1, 2)) -> str:
    ddp, state = coded(Partly(calls if rank in on else 99), endpoint, ddp={"bucket_cap_mb": 1e-4}, deadline_s=None)
    optimizer = qgc.CodedSGD(ddp.parameters(), state, lr=0.1)
    if not coded_optimizer:
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)  # type: ignore[assignment]

    def loop() -> None:
        for _ in range(6):
            one_step(ddp, optimizer.step)
            optimizer.zero_grad()

    return attempt(loop)


def joined(rank: int, endpoint: str) -> str:
    ddp, state = coded(mlp(), endpoint, deadline_s=None)
    optimizer = qgc.CodedSGD(ddp.parameters(), state, lr=0.1)
    with contextlib.suppress(qgc.ConfigError), torch.distributed.algorithms.join.Join([ddp]):
        text = attempt(lambda: one_step(ddp, optimizer.step))
        raise qgc.ConfigError  # leave Join as an error does: without waiting for the others
    return text


def unfrozen(rank: int, endpoint: str) -> str:
    model = mlp()
    model[0].requires_grad_(False)
    ddp, state = coded(model, endpoint, deadline_s=None)
    optimizer = qgc.CodedSGD(ddp.parameters(), state, lr=0.1)

    def loop() -> None:
        one_step(ddp, optimizer.step)
        model[0].requires_grad_(True)
        one_step(ddp, optimizer.step)

    return attempt(loop)


def hook_forgotten(rank: int, endpoint: str) -> str:
    ddp = torch.nn.parallel.DistributedDataParallel(mlp())
    state = qgc.QGCState(ddp, network=qgc.Network(endpoints=(endpoint,)))
    state.bind(torch.optim.SGD(ddp.parameters(), lr=0.1))
    return attempt(lambda: one_step(ddp, state.update))


def optimizer_of_another_model(rank: int, endpoint: str) -> str:
    _, state = coded(mlp(), endpoint)
    return attempt(lambda: state.bind(torch.optim.SGD(mlp().parameters(), lr=0.1)))


ERRORS: dict[str, tuple[Callable[..., str], tuple[Any, ...], str]] = {
    "parameters left out": (left_out, (0, True), "got none of layer.bias, layer.weight: freeze it"),
    "parameters left out later": (left_out, (3, True), "step 3: expected a gradient of every parameter, got none of"),
    "and a plain optimizer": (left_out, (3, False), "got none of layer.bias, layer.weight: freeze it"),
    "on one rank": (left_out, (3, True, (1,)), "step 3: expected a gradient of every parameter, got none of"),
    "Join": (joined, (), "state.loader(...) gives every rank's loop the same number of steps"),
    "unfrozen": (unfrozen, (), "make DDP and QGCState again"),
    "no hook": (hook_forgotten, (), "model.register_comm_hook(state, qgc.qgc_hook)"),
    "another model's": (optimizer_of_another_model, (), "its own optimizer and its own state"),
}


def errors(rank: int, *endpoints: str) -> dict[str, str]:
    free = list(endpoints)
    return {name: function(rank, free.pop(), *args) for name, (function, args, _) in ERRORS.items()}


@pytest.fixture(scope="module")
def raised() -> list[dict[str, str]]:
    return run(errors, jobs=len(ERRORS))


@pytest.mark.parametrize("name", ERRORS)
def test_what_cannot_work_is_refused_alike_on_every_rank_with_the_remedy(
    raised: list[dict[str, str]], name: str
) -> None:
    texts = [rank[name] for rank in raised]
    # Whoever comes second may learn it from the first.
    assert all(text.startswith(("ConfigError", "JobFailed")) and ERRORS[name][2] in text for text in texts), texts
    assert any(text.startswith("ConfigError") for text in texts)
