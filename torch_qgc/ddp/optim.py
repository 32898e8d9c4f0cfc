"""Coded optimizers: torch's own, which bind themselves to the state so that late workers can replay them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch._compile import _disable_dynamo  # torch.compiler.disable would import the compiler

from torch_qgc.ddp.state import QGCState
from torch_qgc.errors import ConfigError
from torch_qgc.worker.replica import Replica

__all__ = ["CodedAdam", "CodedAdamW", "CodedSGD", "two_track_adam"]


def _unhooked(step: Callable[..., Any]) -> Callable[..., Any]:
    """Return a step without the users' hooks, in which torch wraps the step of every class it has made one of."""
    return cast("Callable[..., Any]", step.__wrapped__) if getattr(step, "hooked", False) else step  # type: ignore[attr-defined]


_adam_step = _unhooked(torch.optim.Adam.step)


class _Coded(torch.optim.Optimizer):
    """Attach the optimizer to the state, and refuse steps on gradients that were not exchanged."""

    _replica: Replica | None = None  # also of copies and of what was unpickled: these are torch's optimizers again

    def __init__(self, params: Any, state: QGCState, *args: Any, **kwargs: Any) -> None:
        replica = _replica_of(type(self).__name__, state)
        super().__init__(params, *args, **kwargs)
        self.adopt(replica)
        replica.update.attach(self)
        self.register_step_pre_hook(_check_exchanged)

    def adopt(self, replica: Replica) -> None:
        """Take what the steps need from this replica; Lightning does so for optimizers that were made without it."""
        self._replica = replica


def _replica_of(name: str, state: Any) -> Replica:
    if isinstance(state, QGCState):
        return state.replica
    raise ConfigError(
        f"{name}: expected the QGCState as second argument, got {state!r}: {name}(model.parameters(), state, lr=...)"
    )


@_disable_dynamo  # a compiled step has nothing to find in there
def _check_exchanged(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    if isinstance(optimizer, _Coded) and optimizer._replica is not None:
        optimizer._replica.check_exchanged()


class CodedSGD(_Coded, torch.optim.SGD):
    """torch.optim.SGD on the decoded gradient. `CodedSGD(model.parameters(), state, lr=0.1, momentum=0.9)`.

    Args:
        params: parameters or groups, as in torch.
        state: QGCState; its `update` becomes this optimizer's step unless one is bound.
        *args, **kwargs: torch.optim.SGD's.
    """


class CodedAdam(_Coded, torch.optim.Adam):
    """torch.optim.Adam with the second track in its denominator (Song & Choi, section V-E).

        m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) (s g)^2

    g is `.grad` as the step finds it: the unbiased decoded gradient, clipped if the loop clips it. s is the number that
    turns the unbiased coefficients of the round into the plan's second ones, which trade a little bias for less
    variance: noise in g would inflate v and shrink the steps. Where everybody is in, and with a plan without a second
    track, s = 1 and this is torch's Adam.

    Args:
        params: parameters or groups, as in torch.
        state: QGCState; its `update` becomes this optimizer's step unless one is bound.
        *args, **kwargs: torch.optim.Adam's; all of them work with two tracks but `differentiable=True` and
            `betas=(0, ...)`, which raise.
    """

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Make one step; the first moment sees the gradient, the second moment the second track."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        seconds = self._second_tracks()
        if seconds:
            two_track_adam(self, seconds)
        else:
            _adam_step(self)
        return loss

    def adopt(self, replica: Replica) -> None:
        """Take what the steps need from this replica."""
        super().adopt(replica)
        if replica.plan.second_track is not None:
            # GradScaler must unscale: a fused step that does so itself would see the second track alone.
            self._step_supports_amp_scaling = False

    @_disable_dynamo
    def _second_tracks(self) -> dict[torch.Tensor, torch.Tensor]:
        """Return what Adam squares, of the parameters where that is not the gradient itself."""
        seconds: dict[torch.Tensor, torch.Tensor] = {}
        if self._replica is None:
            return seconds
        for p in (p for group in self.param_groups for p in group["params"]):
            if p.grad is not None and p in self._replica.layout:
                scale = self._replica.second_scale(p)
                if isinstance(scale, torch.Tensor) or scale != 1.0:
                    seconds[p] = (p.grad * scale).to(p.grad.dtype)
        return seconds


class CodedAdamW(CodedAdam, torch.optim.AdamW):
    """CodedAdam with decoupled weight decay, as torch.optim.AdamW is to Adam."""


def two_track_adam(optimizer: torch.optim.Adam, seconds: Mapping[torch.Tensor, torch.Tensor]) -> None:
    """Make one step of torch's Adam or AdamW whose second moment sees another gradient than `.grad`.

        m = b1 m + (1 - b1) g1,   v = b2 v + (1 - b2) g2^2        (Song & Choi, section V-E)

    It is torch's own step on g2 (foreach, fused, capturable, compiled: whatever the groups ask for), after

        m <- m + (1 - b1) / b1 (g1 - g2)

    which that step's b1 m + (1 - b1) g2 turns into what is wanted. With g1 = g2 nothing changes, not even a bit;
    else rounding adds about 2^-24 / b1 of g1 - g2 to m, nothing where b1 is a power of two.

    Args:
        optimizer: torch.optim.Adam, AdamW or a subclass.
        seconds: parameter -> g2 in the parameter's shape; `.grad` for those that are left out.
    Raises:
        ConfigError: b1 = 0 or differentiable=True.
    """
    firsts = _second_into_grad(optimizer, seconds)
    _adam_step(optimizer)
    _put_back(firsts)


@_disable_dynamo
@torch.no_grad()
def _second_into_grad(
    optimizer: torch.optim.Adam, seconds: Mapping[torch.Tensor, torch.Tensor]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Shift the first moments and put the second track into `.grad`; return what was there."""
    firsts = []
    for group in optimizer.param_groups:
        beta1 = float(group["betas"][0])
        if beta1 == 0.0 or group["differentiable"]:
            raise ConfigError(
                f"Adam with two tracks: expected betas[0] > 0 and differentiable=False, got {beta1} and "
                f"{group['differentiable']}: betas=(2**-20, ...) is as good as 0 in fp32; or use a plan without a "
                "second track, make_plan(..., second_track=None)"
            )
        params: list[torch.Tensor] = []
        first: list[torch.Tensor] = []
        moments: list[torch.Tensor] = []
        optimizer._init_group(group, params, first, moments, [], [], [])  # type: ignore[no-untyped-call]  # makes the moments before the first step
        if not params:
            continue
        second = [seconds.get(p, g) for p, g in zip(params, first)]
        factor = (1.0 - beta1) / beta1
        torch._foreach_add_(moments, torch._foreach_sub(first, second), alpha=-factor if group["maximize"] else factor)
        for p, g1, g2 in zip(params, first, second):
            firsts.append((p, g1))
            p.grad = g2
    return firsts


@_disable_dynamo
def _put_back(gradients: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for p, gradient in gradients:
        p.grad = gradient
