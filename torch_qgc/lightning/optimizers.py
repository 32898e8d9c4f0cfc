"""What Lightning's optimizers and gradient clipping need to know of the two tracks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from lightning.pytorch.plugins.precision import Precision

from torch_qgc.ddp.optim import CodedAdam, CodedAdamW, CodedSGD
from torch_qgc.ddp.state import QGCState
from torch_qgc.errors import ConfigError

__all__ = ["clip_both_tracks", "make_coded"]

_CODED: dict[type[torch.optim.Optimizer], type[torch.optim.Optimizer]] = {
    torch.optim.SGD: CodedSGD,
    torch.optim.Adam: CodedAdam,
    torch.optim.AdamW: CodedAdamW,
}


def make_coded(optimizer: torch.optim.Optimizer, state: QGCState) -> torch.optim.Optimizer:
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
    optimizer._state = state  # type: ignore[attr-defined]
    if isinstance(optimizer, CodedAdam) and state.request_second_track():
        optimizer._step_supports_amp_scaling = False  # as CodedAdam's own constructor
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


def clip_both_tracks(plugin: Precision, state: QGCState) -> None:
    """Make Lightning's gradient clipping treat the second track as it treats the gradient."""

    def second_tracks(parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [track for p in parameters if (track := state.second_track(p)) is not None]

    def clip_grad_by_norm(optimizer: torch.optim.Optimizer, clip_val: float) -> None:
        parameters = list(plugin.main_params(optimizer))
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip_val)
        factor = torch.clamp(clip_val / (norm + 1e-6), max=1.0)  # as torch scales
        for track in second_tracks(parameters):
            track.mul_(factor)

    def clip_grad_by_value(optimizer: torch.optim.Optimizer, clip_val: float) -> None:
        parameters = list(plugin.main_params(optimizer))
        torch.nn.utils.clip_grad_value_(parameters, clip_val)
        for track in second_tracks(parameters):
            track.clamp_(-clip_val, clip_val)

    plugin.clip_grad_by_norm = clip_grad_by_norm  # type: ignore[method-assign]
    plugin.clip_grad_by_value = clip_grad_by_value  # type: ignore[method-assign]
