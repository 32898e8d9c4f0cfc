"""The update: unscale, clip, step, schedule, clear, in this order, on all that was bound."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from torch_qgc.errors import ConfigError
from torch_qgc.worker.layout import Layout
from torch_qgc.worker.update import Update


class Case:
    """A model with an update, and what the update has told the state."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Linear(3, 2)
        self.refuses = False
        layout = Layout(self.model.named_parameters(), chunk_numel=512)
        self.update = Update(layout, self.check)

    def check(self) -> None:
        if self.refuses:
            raise ConfigError("no gradient was exchanged")

    def fill(self, value: float) -> None:
        for p in self.model.parameters():
            p.grad = torch.full_like(p, value)


def sgd(parameters: Any) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, lr=1.0)


def test_clipping_bounds_the_norm_and_gradients_are_cleared() -> None:
    case = Case()
    case.update.bind(sgd(case.model.parameters()), max_grad_norm=0.5)
    before = [p.detach().clone() for p in case.model.parameters()]
    case.fill(2.0)
    case.update.call()
    norm = 2.0 * 8**0.5  # of 8 coordinates
    for p, old in zip(case.model.parameters(), before):
        torch.testing.assert_close(old - p, torch.full_like(p, 2.0 * 0.5 / norm), rtol=1e-5, atol=0.0)
    assert all(p.grad is None for p in case.model.parameters())


def test_several_optimizers_are_clipped_by_one_norm_and_all_stepped_and_scheduled() -> None:
    case = Case()
    optimizers = [sgd([p]) for p in case.model.parameters()]
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, gamma) for o, gamma in zip(optimizers, (0.5, 0.1))]
    case.update.bind(optimizers, scheduler=schedulers, max_grad_norm=0.5)
    before = [p.detach().clone() for p in case.model.parameters()]
    case.fill(2.0)
    case.update.call()
    for p, old in zip(case.model.parameters(), before):
        torch.testing.assert_close(old - p, torch.full_like(p, 0.5 / 8**0.5), rtol=1e-5, atol=0.0)
    assert [o.param_groups[0]["lr"] for o in optimizers] == [0.5, 0.1]


def test_the_scaler_unscales_before_clipping_and_skips_what_is_not_finite() -> None:
    case = Case()
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    case.update.bind(sgd(case.model.parameters()), scaler=scaler, max_grad_norm=100.0)
    scale = case.update.loss_scale()
    assert scale is not None
    assert float(scale) == 64.0
    before = [p.detach().clone() for p in case.model.parameters()]
    case.fill(64.0)
    case.update.call()
    for p, old in zip(case.model.parameters(), before):
        torch.testing.assert_close(old - p, torch.ones_like(p))
    case.fill(torch.inf)
    case.update.call()
    assert scaler.get_scale() == 32.0
    disabled = Case()
    disabled.update.bind(sgd(disabled.model.parameters()), scaler=torch.amp.GradScaler("cpu", enabled=False))
    assert disabled.update.loss_scale() is None
    disabled.fill(1.0)
    disabled.update.call()


def test_nothing_is_the_update_until_the_user_says_so() -> None:
    case = Case()
    assert not case.update.known
    with pytest.raises(ConfigError, match=r"got none: state\.bind\(optimizer"):
        _ = case.update.call
    calls: list[int] = []
    case.update.set(lambda: calls.append(1))
    assert case.update.known
    case.update.call()
    assert calls == [1]


def test_calls_before_and_after_are_told_the_step() -> None:
    case = Case()
    seen: list[Any] = []
    weight = case.model.weight
    case.update.bind(
        sgd(case.model.parameters()),
        before=lambda step: seen.append(("before", step, float(weight[0, 0].detach()))),
        after=lambda step: seen.append(("after", step, float(weight[0, 0].detach()))),
        step=lambda: 7,
    )
    case.fill(1.0)
    case.update.call()
    assert [(name, step) for name, step, _ in seen] == [("before", 7), ("after", 7)]
    assert seen[0][2] == pytest.approx(seen[1][2] + 1.0, abs=1e-6)


@pytest.mark.parametrize(
    ("optimizer", "options", "word"),
    [
        ([], {}, "got none"),
        (None, {}, "got none"),
        ("own", {"max_grad_norm": 0.0}, "positive norm"),
        ("foreign", {}, "its own state"),
    ],
)
def test_bad_arguments_are_refused(optimizer: Any, options: dict[str, Any], word: str) -> None:
    case = Case()
    made = {"own": sgd(case.model.parameters()), "foreign": sgd(torch.nn.Linear(3, 2).parameters())}
    with pytest.raises(ConfigError, match=word):
        case.update.bind(made.get(optimizer) if isinstance(optimizer, str) else optimizer, **options)


def test_no_step_is_made_on_a_gradient_that_was_not_exchanged() -> None:
    case = Case()
    case.update.bind(sgd(case.model.parameters()))
    before = [p.detach().clone() for p in case.model.parameters()]
    case.fill(1.0)
    case.refuses = True
    with pytest.raises(ConfigError):
        case.update.call()
    assert all(torch.equal(p, old) for p, old in zip(case.model.parameters(), before))
