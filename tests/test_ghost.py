"""Ghost forward passes: right shapes, a gradient for every parameter, and the module is not run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.loops import BATCH, LATE, STEPS, Late, Witness, closing, coded, dataset, mlp, mse, run

from torch_qgc.worker.ghost import Ghost


class Counting(torch.nn.Module):
    """Returns what many models do: a mapping with tensors that need a gradient and others, and a number."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(3, 4)
        self.calls = 0

    def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> dict[str, Any]:
        self.calls += 1
        y = scale * self.layer(x)
        return {"y": y, "ids": y.detach().argmax(1), "calls": self.calls, "nested": [(y.sum(1), None)]}


def test_outputs_of_the_same_shapes_are_handed_out_without_running_the_module() -> None:
    model = Counting()
    ghost = Ghost(model, list(model.parameters()))
    with ghost.instead_of_forward():
        first = model(torch.ones(2, 3))
        second = model(torch.zeros(2, 3))
        third = model(torch.zeros(1, 3))
        model(torch.zeros(2, 3), scale=2.0)
    assert model.calls == 3  # the other inputs have shapes, or options, of their own
    assert torch.equal(first["y"], second["y"])
    assert second["ids"].dtype == torch.int64
    assert second["calls"] == 1
    assert third["y"].shape == (1, 4)
    model(torch.ones(2, 3))
    assert model.calls == 4


def test_every_parameter_gets_a_gradient_of_zeros() -> None:
    model = Counting()
    ghost = Ghost(model, list(model.parameters()))
    with ghost.instead_of_forward():
        model(torch.ones(2, 3))
        output = model(torch.ones(2, 3))
        (output["y"].square().sum() + output["nested"][0][0].sum()).backward()
    for p in model.parameters():
        assert p.grad is not None
        assert p.grad.shape == p.shape
        assert not p.grad.any()


def test_an_error_in_the_module_leaves_it_as_it_was() -> None:
    model = torch.nn.Linear(3, 2)
    ghost = Ghost(model, list(model.parameters()))
    with pytest.raises(RuntimeError), ghost.instead_of_forward():
        model(torch.ones(2, 5))
    assert "forward" not in vars(model)
    assert model(torch.ones(2, 3)).shape == (2, 2)


def haunted(rank: int, endpoint: str) -> dict[str, Any]:
    calls: list[int] = []
    model = mlp()
    model[0].register_forward_hook(lambda *_: calls.append(1))
    ddp, state = coded(model, endpoint, ghost=True)
    if rank == LATE:
        Late(ddp, state, {4})
    loader = state.loader(dataset(), batch_size=BATCH)
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=1e-2)
    witness = Witness(ddp, state)
    with closing(state):
        for x, y in loader:
            optimizer.zero_grad()
            mse(ddp(x), y).backward()
            torch.nn.utils.clip_grad_norm_(ddp.parameters(), 0.5)
            optimizer.step()
        return witness.seen(calls=len(calls))


def test_a_late_worker_with_ghosts_ends_equal() -> None:
    ranks = run(haunted)
    assert all(rank["digests"] == ranks[0]["digests"] for rank in ranks)
    late = ranks[LATE]
    assert late["report"].thin_steps >= 1
    assert late["calls"] <= late["report"].computed_steps + 1  # the first thin batch is recorded
    assert ranks[0]["report"].steps == STEPS
