"""Coded optimizers: torch's own, with the second track in Adam's denominator; and a watch over all optimizers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, Protocol, cast
from weakref import WeakSet

import torch
from torch._compile import _disable_dynamo  # torch.compiler.disable would import the compiler
from torch.optim.optimizer import register_optimizer_step_pre_hook

from torch_qgc.errors import ConfigError
from torch_qgc.worker.position import Phase
from torch_qgc.worker.replica import Replica

__all__ = ["CodedAdam", "CodedAdamW", "CodedSGD", "make_coded", "two_track_adam", "watch_optimizers"]


class HasReplica(Protocol):
    """QGCState, as far as optimizers are concerned."""

    replica: Replica


def _unhooked(step: Callable[..., Any]) -> Callable[..., Any]:
    """Return a step without the users' hooks, in which torch wraps the step of every class it has made one of."""
    return cast("Callable[..., Any]", step.__wrapped__) if getattr(step, "hooked", False) else step  # type: ignore[attr-defined]


_adam_step = _unhooked(torch.optim.Adam.step)


class _Coded(torch.optim.Optimizer):
    """An optimizer that knows the replica whose gradients it takes."""

    _replica: Replica | None = None  # also of copies and of what was unpickled: these are torch's optimizers again

    def __init__(self, params: Any, state: HasReplica, *args: Any, **kwargs: Any) -> None:
        replica = getattr(state, "replica", None)
        name = type(self).__name__
        if replica is None:
            raise ConfigError(
                f"{name}: expected the QGCState as second argument, got {state!r}: "
                f"{name}(model.parameters(), state, lr=...)"
            )
        super().__init__(params, *args, **kwargs)
        self.adopt(replica)

    def adopt(self, replica: Replica) -> None:
        """Take what the steps need from this replica."""
        for p in (p for group in self.param_groups for p in group["params"]):
            if p.requires_grad and p not in replica.layout:
                raise ConfigError(
                    f"{type(self).__name__}: expected parameters of the model that QGCState was made for, got one of "
                    f"shape {tuple(p.shape)} that is none: give each of several models its own optimizer and its own "
                    "state; parameters must not be replaced or unfrozen after QGCState(model)"
                )
        self._replica = replica
        replica.statement.watch(self)


class CodedSGD(_Coded, torch.optim.SGD):
    """torch.optim.SGD on the decoded gradient. `CodedSGD(model.parameters(), state, lr=0.1, momentum=0.9)`.

    Args:
        params: parameters or groups, as in torch.
        state: QGCState.
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
        state: QGCState.
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


# --- optimizers that were made by others --------------------------------------------------------------------
_CODED: dict[type[torch.optim.Optimizer], type[torch.optim.Optimizer]] = {
    torch.optim.SGD: CodedSGD,
    torch.optim.Adam: CodedAdam,
    torch.optim.AdamW: CodedAdamW,
}


def make_coded(optimizer: torch.optim.Optimizer, replica: Replica) -> torch.optim.Optimizer:
    """Turn torch's SGD, Adam or AdamW into the coded one, in place; leave any other optimizer as it is.

    In place, because learning rate schedulers made before hold on to the object: its parameter groups, state and hooks
    stay. Subclasses of the three are the user's own and left alone.

    Raises:
        ConfigError: an optimizer that makes several passes per step.
    """
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ConfigError(
            "LBFGS makes as many passes per step as its rank's own losses ask for, so ranks would disagree about "
            "steps: use SGD, Adam or another optimizer that makes one"
        )
    coded = _CODED.get(type(optimizer))
    if coded is None:
        return optimizer
    tracked = vars(optimizer).pop("step", None)  # a scheduler's wrapper of torch's own `step`
    optimizer.__class__ = coded
    optimizer._patch_step_function()  # so that step hooks work, as after __init__
    if tracked is not None:
        optimizer.step = _tracked(optimizer)  # type: ignore[method-assign]
    optimizer.adopt(replica)  # type: ignore[attr-defined]
    return optimizer


def _tracked(optimizer: torch.optim.Optimizer) -> Callable[..., Any]:
    """Return the optimizer's step as a scheduler wraps it, to see that it was called before the scheduler's."""
    step = type(optimizer).step

    @wraps(step)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        optimizer._opt_called = True  # type: ignore[attr-defined]
        return step(optimizer, *args, **kwargs)

    wrapper._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    return wrapper


_watching: WeakSet[Replica] = WeakSet()


def watch_optimizers(replica: Replica) -> None:
    """Check and remember every optimizer of this process that makes steps with the replica's parameters."""
    if not _watching:
        register_optimizer_step_pre_hook(_before_step)
    _watching.add(replica)


@_disable_dynamo  # a compiled step has nothing to find in there
def _before_step(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    first = next((p for group in optimizer.param_groups for p in group["params"] if p.requires_grad), None)
    for replica in _watching:
        if first is not None and first in replica.layout and replica.position.phase is not Phase.LEFT:
            # A closure exchanges the step's gradient only now, inside of the optimizer's step, as in Lightning.
            replica.check_stepped(optimizer, exchanged=not any(callable(a) for a in (*args[1:], *kwargs.values())))
