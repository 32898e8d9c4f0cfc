"""The update: from a decoded gradient to new parameters, with the optimizers of training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, TypeAlias

import torch

from torch_qgc.ddp.optim import two_track_adam
from torch_qgc.errors import ConfigError
from torch_qgc.worker.layout import Layout

__all__ = ["Descent", "OptimizerLike", "make_optimizer"]

#: A name, or a function from parameters to a torch optimizer.
OptimizerLike: TypeAlias = Literal["sgd", "adam"] | Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer]


def make_optimizer(
    optimizer: OptimizerLike, parameters: Iterable[torch.nn.Parameter], *, lr: float, momentum: float
) -> torch.optim.Optimizer:
    """Return the optimizer that a name or a function stands for.

    Raises:
        ConfigError: an unknown name, or momentum for another optimizer than "sgd".
    """
    if callable(optimizer):
        return optimizer(parameters)
    if optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=lr, momentum=momentum)
    if optimizer == "adam" and not momentum:
        return torch.optim.Adam(parameters, lr=lr)
    raise ConfigError(
        f"optimizer: expected 'sgd', 'adam' without momentum, or a function of the parameters, got {optimizer!r} with "
        f"momentum {momentum}: for another optimizer pass lambda parameters: torch.optim.AdamW(parameters, ...)"
    )


class Descent:
    """Put a decoded gradient into .grad and step the optimizer. Adam and its subclasses square the second track.

    Args:
        layout: where parameters lie in the flat gradient.
        optimizer: a torch optimizer.
        lr: step -> learning rate; None leaves that of the optimizer.
        max_grad_norm: the gradient is clipped to this norm, and the second track by the same factor; None does not
            clip.
    """

    def __init__(
        self,
        layout: Layout,
        optimizer: torch.optim.Optimizer,
        *,
        lr: Callable[[int], float] | None = None,
        max_grad_norm: float | None = None,
    ) -> None:
        self.optimizer = optimizer
        self._layout, self._lr, self._max_grad_norm = layout, lr, max_grad_norm

    @torch.no_grad()
    def __call__(self, step: int, tracks: Sequence[torch.Tensor]) -> None:
        """Make a step.

        Args:
            step: its number, for the learning rate.
            tracks: one or two of [P] fp32: the decoded gradient, and what Adam squares.
        """
        for p, slot in zip(self._layout.parameters, self._layout.slots):
            p.grad = torch.empty_like(p).copy_(tracks[0][slot.span].view(slot.shape))
        if self._lr is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = self._lr(step)
        if self._max_grad_norm is not None:
            norm = torch.nn.utils.clip_grad_norm_(self._layout.parameters, self._max_grad_norm)
            for second in tracks[1:]:
                second.mul_(torch.clamp(self._max_grad_norm / (norm + 1e-6), max=1.0))  # as torch scales
        if len(tracks) == 2 and isinstance(self.optimizer, torch.optim.Adam):
            two_track_adam(self.optimizer, {p: self._view(p, tracks[1]) for p in self._layout.parameters})
        else:
            self.optimizer.step()
        self.optimizer.zero_grad()

    def _view(self, parameter: torch.Tensor, track: torch.Tensor) -> torch.Tensor:
        slot = self._layout.slot(parameter)
        return torch.empty_like(parameter).copy_(track[slot.span].view(slot.shape))
