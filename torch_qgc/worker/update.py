"""The update: everything a loop does between the backward pass and the next step, if the user has said what that is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from torch_qgc.errors import ConfigError
from torch_qgc.worker.layout import Layout

__all__ = ["Update"]

T = TypeVar("T")


class Update:
    """Everything between the backward pass and the next step, as one call without arguments: the same on every rank.

    Only where the user has said that something is all of it may late steps be replayed without running the loop body.

    Args:
        layout: of the model whose parameters are updated.
        check_exchanged: raises if there is no new gradient to make a step with.
    """

    def __init__(self, layout: Layout, check_exchanged: Callable[[], None]) -> None:
        self.scaler: Any = None
        self._layout = layout
        self._check_exchanged = check_exchanged
        self._bound: Callable[[], Any] | None = None

    def set(self, call: Callable[[], Any]) -> None:
        """Let a call of the user's own be the update."""
        self._bound = call

    @property
    def known(self) -> bool:
        """The user has said what the update is."""
        return self._bound is not None

    @property
    def call(self) -> Callable[[], Any]:
        """The update.

        Raises:
            ConfigError: nothing was bound.
        """
        if self._bound is None:
            raise ConfigError(
                "state.update: expected an update, got none: state.bind(optimizer, scheduler=..., max_grad_norm=..., "
                "scaler=...) with one optimizer or a list, or state.update = a function of no arguments. A loop that "
                "calls its optimizer itself needs neither"
            )
        return self._bound

    def bind(
        self,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        *,
        scheduler: Any = None,
        max_grad_norm: float | None = None,
        scaler: Any = None,
        before: Callable[[int], Any] | None = None,
        after: Callable[[int], Any] | None = None,
        step: Callable[[], int] = lambda: 0,
    ) -> None:
        """Make the update of what most loops do; see `QGCState.bind`. `step` tells which step was exchanged last."""
        optimizers, schedulers = _listed(optimizer), _listed(scheduler)
        if not optimizers:
            raise ConfigError("state.bind: expected an optimizer or a list of them, got none")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ConfigError(f"max_grad_norm: expected a positive norm, or None not to clip, got {max_grad_norm}")
        for one in optimizers:
            self._check_parameters(one)
        parameters = [p for one in optimizers for group in one.param_groups for p in group["params"]]

        def update() -> None:
            self._check_exchanged()
            made = step()
            if before is not None:
                before(made)
            for one in optimizers if scaler is not None else ():
                scaler.unscale_(one)
            if max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
            for one in optimizers:
                if scaler is not None:
                    scaler.step(one)  # or not, if the decoded gradient is not finite: the same on every rank
                else:
                    one.step()
            for each in schedulers:
                each.step()
            if scaler is not None:
                scaler.update()
            for one in optimizers:
                one.zero_grad()
            if after is not None:
                after(made)

        self._bound, self.scaler = update, scaler

    def loss_scale(self) -> torch.Tensor | None:
        """Return what GradScaler multiplies the loss of this step with, None without one."""
        if self.scaler is None or not self.scaler.is_enabled():
            return None
        scale: torch.Tensor = self.scaler.scale(torch.ones((), device=self._layout.parameters[0].device))
        return scale

    def _check_parameters(self, optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.requires_grad and p not in self._layout:
                    raise ConfigError(
                        f"{type(optimizer).__name__}: expected parameters of the model that QGCState was made for, got "
                        f"one of shape {tuple(p.shape)} that is none: give each of several models its own optimizer "
                        "and its own state; parameters must not be replaced or unfrozen after QGCState(model)"
                    )


def _listed(value: T | Sequence[T] | None) -> list[T]:
    """Return one, several or none as a list."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]  # type: ignore[list-item]
