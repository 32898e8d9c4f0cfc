"""Coded optimizers: torch's own, which bind themselves to the state so that late workers can replay them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch._compile import _disable_dynamo  # torch.compiler.disable would import the compiler

from torch_qgc.errors import ConfigError

if TYPE_CHECKING:
    from torch_qgc.ddp.state import QGCState

__all__ = ["CodedAdam", "CodedAdamW", "CodedSGD", "two_track_adam"]

SecondTrack = Callable[[torch.Tensor], torch.Tensor]


def _unhooked(step: Callable[..., Any]) -> Callable[..., Any]:
    """Return a step without the users' hooks, in which torch wraps the step of every class it has made one of."""
    return cast("Callable[..., Any]", step.__wrapped__) if getattr(step, "hooked", False) else step  # type: ignore[attr-defined]


_adam_step = _unhooked(torch.optim.Adam.step)


class _Coded(torch.optim.Optimizer):
    """Attach the optimizer to the state, and refuse steps on gradients that were not exchanged."""

    _state: QGCState | None = None  # also of copies and of what was unpickled: these are torch's optimizers again

    def __init__(self, params: Any, state: QGCState, *args: Any, **kwargs: Any) -> None:
        super().__init__(params, *args, **kwargs)
        self._state = state
        state.attach(self)
        self.register_step_pre_hook(_check_exchanged)


@_disable_dynamo  # a compiled step has nothing to find in there
def _check_exchanged(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    if isinstance(optimizer, _Coded) and optimizer._state is not None:
        optimizer._state.check_exchanged()


class CodedSGD(_Coded, torch.optim.SGD):
    """torch.optim.SGD on the decoded gradient. `CodedSGD(model.parameters(), state, lr=0.1, momentum=0.9)`.

    Args:
        params: parameters or groups, as in torch.
        state: QGCState; its `update` becomes this optimizer's step unless one is bound.
        *args, **kwargs: torch.optim.SGD's.
    """


class CodedAdam(_Coded, torch.optim.Adam):
    """torch.optim.Adam with the second track in its denominator (Song & Choi, section V-E).

        m = b1 m + (1 - b1) g1,   v = b2 v + (1 - b2) g2^2

    g1 is the unbiased decoded gradient, g2 the same payloads decoded with the plan's second coefficients, which
    trade a little bias for less variance: noise in g1 would inflate v and shrink the steps. Without a second
    track (no deadline, or a plan without one) g2 = g1 and this is torch's Adam.

    Args:
        params: parameters or groups, as in torch.
        state: QGCState; its `update` becomes this optimizer's step unless one is bound.
        *args, **kwargs: torch.optim.Adam's; all of them work with two tracks but `differentiable=True` and
            `betas=(0, ...)`, which raise.
    """

    def __init__(self, params: Any, state: QGCState, *args: Any, **kwargs: Any) -> None:
        super().__init__(params, state, *args, **kwargs)
        if state.request_second_track():
            # GradScaler must unscale: a fused step that does so itself would see the second track alone.
            self._step_supports_amp_scaling = False

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Make one step; with two tracks the first moment sees the first, the second moment the second."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._has_second_track():
            two_track_adam(self, self._second_track)
        else:
            _adam_step(self)
        return loss

    @_disable_dynamo
    def _has_second_track(self) -> bool:
        return self._state is not None and self._state.second_track(self.param_groups[0]["params"][0]) is not None

    def _second_track(self, parameter: torch.Tensor) -> torch.Tensor:
        assert self._state is not None
        second = self._state.second_track(parameter)
        assert second is not None
        return second


class CodedAdamW(CodedAdam, torch.optim.AdamW):
    """CodedAdam with decoupled weight decay, as torch.optim.AdamW is to Adam."""


def two_track_adam(optimizer: torch.optim.Adam, second_track: SecondTrack) -> None:
    """Make one step of torch's Adam or AdamW whose first moment sees `.grad` and whose second moment another gradient.

        m = b1 m + (1 - b1) g1,   v = b2 v + (1 - b2) g2^2        (Song & Choi, section V-E)

    It is torch's own step on g2 (foreach, fused, capturable, compiled: whatever the groups ask for), after

        m <- m + (1 - b1) / b1 (g1 - g2)

    which that step's b1 m + (1 - b1) g2 turns into what is wanted. With g1 = g2 nothing changes, not even a bit;
    else rounding adds about 2^-24 / b1 of g1 - g2 to m, nothing where b1 is a power of two.

    Args:
        optimizer: torch.optim.Adam, AdamW or a subclass.
        second_track: parameter -> g2 in the parameter's shape, any strides and dtype; not written to.
    Raises:
        ConfigError: b1 = 0 or differentiable=True.
    """
    firsts = _second_into_grad(optimizer, second_track)
    _adam_step(optimizer)
    _put_back(firsts)


@_disable_dynamo
@torch.no_grad()
def _second_into_grad(
    optimizer: torch.optim.Adam, second_track: SecondTrack
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
        second = [_laid_out_as(p, second_track(p)) for p in params]
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


def _laid_out_as(parameter: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return the second track in the parameter's dtype and memory format, which torch's kernels are fast for."""
    if second.dtype == parameter.dtype and second.stride() == parameter.stride():
        return second
    return torch.empty_like(parameter).copy_(second)
