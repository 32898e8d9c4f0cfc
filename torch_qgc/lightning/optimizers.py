"""Lightning's optimizers, made to know the replica."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from torch_qgc.ddp.optim import CodedAdam, CodedAdamW, CodedSGD
from torch_qgc.errors import ConfigError
from torch_qgc.worker.replica import Replica

__all__ = ["make_coded"]

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
