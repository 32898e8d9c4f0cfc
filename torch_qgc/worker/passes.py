"""The forward and backward passes of a step: was it abandoned, did it leave something out, or fail half-way?"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch

__all__ = ["Passes"]


class Passes:
    """The passes of the step at hand.

    Args:
        parameters: whose gradients are exchanged.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        self._parameters = parameters
        self.synced = True  # DDP exchanges gradients in the backward pass of the newest forward pass
        self.running = False  # a backward pass has begun, and has not ended
        self.left_out = False  # a backward pass has ended; if the step goes on, its gradient is not complete
        self._backward_since = False  # a backward pass has begun since the newest forward pass
        self._batch_since = False  # a batch was asked for since the newest forward pass
        self._thread = threading.get_ident()

    @property
    def in_training_thread(self) -> bool:
        """Whoever asks is the thread that makes the steps, none that fetches batches ahead."""
        return self._thread == threading.get_ident()

    @property
    def awaits_backward(self) -> bool:
        """The newest forward pass was to be followed by a backward pass that exchanges gradients, and was not yet."""
        return self.synced and not self._backward_since

    @property
    def given_up(self) -> bool:
        """The loop has gone on to another batch instead of the backward pass: a loss that was NaN, a caught error."""
        return self.awaits_backward and self._batch_since

    def batch(self) -> None:
        """Note that a batch is asked for."""
        self._batch_since |= self.in_training_thread

    def forward(self, *, synced: bool) -> None:
        """Note a forward pass; `synced` is False under no_sync()."""
        self.synced, self._backward_since, self._batch_since, self.left_out = synced, False, False, False
        self._thread = threading.get_ident()

    def backward(self) -> None:
        """Note that a backward pass begins, and find out at its end whether the gradient was exchanged."""
        self._backward_since = True
        if not self.synced:
            return
        self.running = True
        before = self._gradients()

        def ends() -> None:
            self.running = False
            # torch.autograd.grad leaves .grad alone, and is none of the step's backward passes.
            self.left_out = self._gradients() != before

        torch.autograd.Variable._execution_engine.queue_callback(ends)

    def clear(self) -> None:
        """Forget what was wrong with the last backward pass."""
        self.running = self.left_out = False

    def _gradients(self) -> list[tuple[int, int] | None]:
        """Return which gradients there are, and how often each was written."""
        return [None if p.grad is None else (id(p.grad), p.grad._version) for p in self._parameters]
