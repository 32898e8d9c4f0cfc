"""Coded optimizers: torch's own, which bind themselves to the state so that late workers can replay them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch

if TYPE_CHECKING:
    from torch_qgc.hook import QGCState

__all__ = ["CodedAdam", "CodedAdamW", "CodedSGD"]


class _Coded(torch.optim.Optimizer):
    """Bind the optimizer to the state, unless something else is bound already."""

    def _bind(self, state: QGCState) -> None:
        self._state = state
        if not state.has_update:
            state.bind(self)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in super().__getstate__().items() if key != "_state"}


class CodedSGD(torch.optim.SGD, _Coded):
    """torch.optim.SGD on the decoded gradient. `CodedSGD(model.parameters(), state, lr=0.1, momentum=0.9)`.

    Args:
        params: parameters or groups, as in torch.
        state: QGCState; its `update` becomes this optimizer's step unless one is bound.
        **kwargs: torch.optim.SGD's.
    """

    def __init__(self, params: Any, state: QGCState, **kwargs: Any) -> None:
        super().__init__(params, **kwargs)
        self._bind(state)


class CodedAdam(torch.optim.Adam, _Coded):
    """torch.optim.Adam with the second track in its denominator (Song & Choi, section V-E).

        m = b1 m + (1 - b1) g1,   v = b2 v + (1 - b2) g2^2

    g1 is the unbiased decoded gradient, g2 the same payloads decoded with the plan's second coefficients, which
    trade a little bias for less variance: noise in g1 would inflate v and shrink the steps. Without a second
    track (no deadline, or a plan without one) g2 = g1 and this is torch's Adam.

    Args:
        params: parameters or groups, as in torch.
        state: QGCState; its `update` becomes this optimizer's step unless one is bound.
        **kwargs: torch.optim.Adam's.
    """

    def __init__(self, params: Any, state: QGCState, **kwargs: Any) -> None:
        super().__init__(params, **kwargs)
        self._bind(state)
        state.request_second_track()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Make one step; with two tracks the first moment sees the first, the second moment the second."""
        state: QGCState | None = getattr(self, "_state", None)
        if state is None or state.second_track(self.param_groups[0]["params"][0]) is None:
            return cast("float | None", super().step(closure))
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            _two_track_adam(self, group, state)
        return loss


class CodedAdamW(CodedAdam):
    """CodedAdam with decoupled weight decay, as torch.optim.AdamW is to Adam."""

    def __init__(self, params: Any, state: QGCState, *, weight_decay: float = 1e-2, **kwargs: Any) -> None:
        super().__init__(params, state, weight_decay=weight_decay, decoupled_weight_decay=True, **kwargs)


def _two_track_adam(optimizer: torch.optim.Adam, group: dict[str, Any], state: QGCState) -> None:
    """Step one parameter group; state keys and meaning are torch.optim.Adam's."""
    params = [p for p in group["params"] if p.grad is not None]
    if not params:
        return
    beta1, beta2 = group["betas"]
    sign = -1.0 if group["maximize"] else 1.0
    lr, decay = float(group["lr"]), group["weight_decay"]
    for p in params:
        if not optimizer.state[p]:
            optimizer.state[p]["step"] = torch.zeros((), dtype=torch.float32)
            optimizer.state[p]["exp_avg"] = torch.zeros_like(p)
            optimizer.state[p]["exp_avg_sq"] = torch.zeros_like(p)
            if group["amsgrad"]:
                optimizer.state[p]["max_exp_avg_sq"] = torch.zeros_like(p)
    states = [optimizer.state[p] for p in params]
    first = torch._foreach_mul([p.grad for p in params], sign)
    second = torch._foreach_mul([_second(state, p) for p in params], sign)
    if decay and group.get("decoupled_weight_decay", False):
        torch._foreach_mul_(params, 1.0 - lr * decay)
    elif decay:
        torch._foreach_add_(first, params, alpha=decay)
        torch._foreach_add_(second, params, alpha=decay)
    averages, squares = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
    torch._foreach_lerp_(averages, first, 1.0 - beta1)
    torch._foreach_mul_(squares, beta2)
    torch._foreach_addcmul_(squares, second, second, 1.0 - beta2)
    torch._foreach_add_([s["step"] for s in states], 1.0)
    if group["amsgrad"]:
        largest = [s["max_exp_avg_sq"] for s in states]
        torch._foreach_maximum_(largest, squares)
        squares = largest
    steps = [float(s["step"]) for s in states]
    denominators = torch._foreach_sqrt(squares)
    torch._foreach_div_(denominators, [(1.0 - beta2**t) ** 0.5 for t in steps])
    torch._foreach_add_(denominators, group["eps"])
    torch._foreach_addcdiv_(params, averages, denominators, [-lr / (1.0 - beta1**t) for t in steps])


def _second(state: QGCState, parameter: torch.Tensor) -> torch.Tensor:
    second = state.second_track(parameter)
    assert second is not None
    return torch.empty_like(parameter).copy_(second)  # in its memory format, which foreach is fast for
