"""DDP's forward pass, as far as a job must know of it: a step begins, and its backward pass."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import torch
from torch._compile import _disable_dynamo  # torch.compiler.disable would import the compiler
from torch.utils._pytree import tree_leaves

from torch_qgc.worker.replica import Replica

__all__ = ["Forward"]


class Listener(Protocol):
    """QGCState, as far as a forward pass is concerned."""

    replica: Replica

    def begin(self) -> None:
        """Begin a step."""

    def forward_ended(self) -> None:
        """Note the end of a forward pass."""


class Forward:
    """What DDP's forward pass tells the state. Copies of the model (deepcopy, pickle, AveragedModel) tell nobody."""

    def __init__(self, state: Listener | None) -> None:
        self._state = None if state is None else weakref.ref(state)

    def __reduce__(self) -> tuple[Any, ...]:
        return Forward, (None,)

    def _listening(self) -> Listener | None:
        return self._state() if self._state is not None and torch.is_grad_enabled() else None

    @_disable_dynamo  # torch.compile(ddp) has nothing to find in here
    def before(self, module: torch.nn.Module, args: Any) -> None:
        """Begin a step; in eval mode only its backward pass does, if there is one."""
        state = self._listening()
        if state is not None and module.training:
            state.begin()

    @_disable_dynamo
    def after(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        """Notice when the backward pass begins."""
        state = self._listening()
        if state is None:
            return
        state.forward_ended()
        reference, training = weakref.ref(state), module.training

        def backward_begins(gradient: torch.Tensor) -> None:
            alive = reference()
            if alive is not None:
                if not training:
                    alive.begin()
                alive.replica.backward_begins()

        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad and tensor.grad_fn is not None:
                tensor.register_hook(backward_begins)  # type: ignore[no-untyped-call]
