"""Forward passes that are not run: the outputs of an earlier one, before a backward pass that needs no module.

A thin step is there for its result alone, and its forward pass on a few samples may still cost a slow worker more than
a step of the job. A ghost hands out what the module has returned for inputs of the same shapes, so that the loop body
goes on with tensors of the right shapes, and gives every parameter a gradient of zeros, so that DDP fills its buckets,
into which the hook puts the result.

What a loop computes from such outputs (a loss that is printed, an accuracy) is of another batch. Side effects of the
module's forward pass do not happen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

__all__ = ["Ghost"]

_MOST_SHAPES = 16


class Ghost:
    """Stand in for a module's forward pass.

    Memory: the outputs for two samples, for up to 16 shapes of inputs.

    Args:
        module: whose forward pass is left out.
        parameters: that get a gradient.
    """

    def __init__(self, module: torch.nn.Module, parameters: Sequence[torch.nn.Parameter]) -> None:
        self._module, self._parameters = module, list(parameters)
        self._recorded: dict[Hashable, Any] = {}

    @contextlib.contextmanager
    def instead_of_forward(self) -> Iterator[None]:
        """Within this, calls of the module return recorded outputs; what was not recorded yet is run and recorded."""
        self.begin()
        try:
            yield
        finally:
            self.end()

    def begin(self) -> None:
        """Take the place of the module's forward pass, until `end`."""
        forward = self._module.forward

        def ghost(*args: Any, **kwargs: Any) -> Any:
            key = _shapes((args, kwargs))
            if key not in self._recorded:
                output = forward(*args, **kwargs)
                if len(self._recorded) < _MOST_SHAPES:
                    self._recorded[key] = tree_map(_recorded, output)
                return output
            return self._outputs(self._recorded[key])

        self._module.forward = ghost

    def end(self) -> None:
        """Let the module run again."""
        vars(self._module).pop("forward", None)

    def _outputs(self, recorded: Any) -> Any:
        """Return recorded outputs as if they depended on all parameters."""
        leaves, structure = tree_flatten(recorded)
        differentiable = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
        made = _Ghost.apply(len(differentiable), *(leaves[i] for i in differentiable), *self._parameters)
        for i, tensor in zip(differentiable, made):
            leaves[i] = tensor
        return tree_unflatten(leaves, structure)


class _Ghost(torch.autograd.Function):
    """Return tensors; in the backward pass give every parameter a gradient of zeros."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.outputs = count
        ctx.zeros = [torch.zeros((), dtype=p.dtype, device=p.device).expand(p.shape) for p in tensors[count:]]
        return tuple(tensor.detach().clone() for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return (None, *[None] * ctx.outputs, *ctx.zeros)


def _recorded(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.detach().clone().requires_grad_(value.requires_grad)


def _shapes(inputs: Any) -> Hashable:
    """Return what must be the same for outputs to have the same shapes."""
    leaves, structure = tree_flatten(inputs)
    described = tuple(
        (tuple(leaf.shape), leaf.dtype, leaf.device) if isinstance(leaf, torch.Tensor) else repr(leaf)
        for leaf in leaves
    )
    return str(structure), described
