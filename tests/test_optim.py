"""Coded optimizers are torch's own, with a second track in Adam's denominator."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from torch_qgc.optim import CodedAdam, CodedAdamW, CodedSGD


class State:
    """A QGCState as far as optimizers can see; the second track is made by `second` from the gradient."""

    def __init__(self, second: Callable[[torch.Tensor], torch.Tensor] | None = None) -> None:
        self.second = second
        self.bound: Any = None
        self.requested = False

    @property
    def has_update(self) -> bool:
        return self.bound is not None

    def bind(self, optimizer: Any) -> None:
        self.bound = optimizer

    def request_second_track(self) -> bool:
        self.requested = True
        return self.second is not None

    def second_track(self, parameter: torch.Tensor) -> torch.Tensor | None:
        return None if self.second is None else self.second(parameter.grad)


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(n, generator=generator)) for n in (3, 1, 700)]


def train(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter], steps: int = 20) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator) + 0.1 * p.detach()
        optimizer.step()
    return torch.cat([p.detach() for p in params])


ADAM_OPTIONS = [
    {},
    {"weight_decay": 0.1},
    {"amsgrad": True, "betas": (0.8, 0.95), "eps": 1e-3},
    {"maximize": True, "lr": 0.1},
]


@pytest.mark.parametrize("options", ADAM_OPTIONS, ids=str)
@pytest.mark.parametrize(("ours", "theirs"), [(CodedAdam, torch.optim.Adam), (CodedAdamW, torch.optim.AdamW)])
def test_with_equal_tracks_coded_adam_is_torchs(ours: Any, theirs: Any, options: dict[str, Any]) -> None:
    mine, reference = parameters(), parameters()
    result = train(ours(mine, State(lambda g: g.clone()), **options), mine)
    expected = train(theirs(reference, **options), reference)
    # Same formula, other order of roundings: 20 steps in fp32.
    torch.testing.assert_close(result, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("options", ADAM_OPTIONS, ids=str)
def test_without_a_second_track_coded_adam_is_torchs_bit_for_bit(options: dict[str, Any]) -> None:
    mine, reference = parameters(), parameters()
    result = train(CodedAdam(mine, State(), **options), mine)  # type: ignore[arg-type]
    assert torch.equal(result, train(torch.optim.Adam(reference, **options), reference))


def test_coded_sgd_is_torchs_bit_for_bit() -> None:
    mine, reference = parameters(), parameters()
    options = dict(lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True)
    result = train(CodedSGD(mine, State(), **options), mine)  # type: ignore[arg-type]
    assert torch.equal(result, train(torch.optim.SGD(reference, **options), reference))


def test_a_uniformly_shrunk_second_track_is_a_larger_learning_rate() -> None:
    """g2 = c g1 scales v by c^2: Adam with lr / c and eps / c, bias correction included (docs/planner.md)."""
    mine, reference, c = parameters(), parameters(), 0.5
    result = train(CodedAdam(mine, State(lambda g: c * g), lr=1e-3, eps=1e-4), mine)  # type: ignore[arg-type]
    expected = train(torch.optim.Adam(reference, lr=1e-3 / c, eps=1e-4 / c), reference)
    torch.testing.assert_close(result, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("make", [CodedSGD, CodedAdam, CodedAdamW])
def test_they_are_real_optimizers(make: Any) -> None:
    params, state = parameters(), State(lambda g: g)
    optimizer = make([{"params": params[:1], "lr": 0.5}, {"params": params[1:]}], state, lr=0.1)
    assert state.bound is optimizer
    assert isinstance(optimizer, torch.optim.Optimizer)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    train(optimizer, params, steps=2)
    scheduler.step()
    assert [g["lr"] for g in optimizer.param_groups] == [0.25, 0.05]
    assert len(calls) == 2
    other = make(parameters(), State(lambda g: g), lr=0.1)
    assert other._state.bound is other
    assert copy.deepcopy(optimizer).param_groups[0]["lr"] == 0.25


def test_state_dicts_are_interchangeable_with_torchs() -> None:
    params = parameters()
    mine = CodedAdam(params, State(lambda g: g), lr=0.01)  # type: ignore[arg-type]
    train(mine, params, steps=3)
    theirs_params = [torch.nn.Parameter(p.detach().clone()) for p in params]
    theirs = torch.optim.Adam(theirs_params, lr=0.01)
    theirs.load_state_dict(copy.deepcopy(mine.state_dict()))  # torch itself would share the tensors
    torch.testing.assert_close(train(mine, params, 3), train(theirs, theirs_params, 3), rtol=2e-5, atol=2e-6)
    mine.load_state_dict(theirs.state_dict())


def test_a_second_optimizer_does_not_steal_the_update() -> None:
    state = State()
    first = CodedSGD(parameters(), state, lr=0.1)  # type: ignore[arg-type]
    CodedSGD(parameters(), state, lr=0.1)  # type: ignore[arg-type]
    assert state.bound is first
