"""What a replica states about itself, so that all can be compared: parameters, hyperparameters, and what users add."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import torch

from torch_qgc.protocol.contract import JobSpec
from torch_qgc.worker.layout import Layout

__all__ = ["Statement", "Verifiable"]

#: What can be verified in addition: tensors, modules, mappings or lists of them, or a call that returns these.
Verifiable: TypeAlias = "torch.Tensor | torch.nn.Module | Mapping[Any, Any] | Iterable[Any] | Callable[[], Any]"

_MOST_CHARACTERS = 200
_EARLY = (0, 4, 8, 16, 32)  # steps of the job, beside every `verify_every`


class Statement:
    """Make the parts of a Hash message.

    Args:
        layout: whose parameters are stated.
        step: the first step; nothing is stated before it.
    """

    def __init__(self, layout: Layout, step: int = 0) -> None:
        self._layout = layout
        self.stated_step = step  # the newest step before which something was stated
        self._optimizers: dict[str, torch.optim.Optimizer] = {}  # kept: at the end all are still to be compared
        self._extra: dict[str, Verifiable] = {}

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """State an optimizer's hyperparameters from now on."""
        if all(optimizer is not known for known in self._optimizers.values()):
            self._optimizers[f"{type(optimizer).__name__}{len(self._optimizers) or ''}"] = optimizer

    def learning_rate(self) -> tuple[float, bool]:
        """Return the optimizers' highest learning rate, and whether a scheduler of torch's is set to change one."""
        groups = [group for optimizer in self._optimizers.values() for group in optimizer.param_groups]
        return max((float(g["lr"]) for g in groups if "lr" in g), default=0.0), any("initial_lr" in g for g in groups)

    def add(self, name: str, what: Verifiable) -> None:
        """State something else, too."""
        self._extra[name] = what

    def is_due(self, step: int, spec: JobSpec, *, asked: bool) -> bool:
        """Tell whether all replicas are compared before a step; `asked`: an aggregator wants them to be."""
        if not spec.verify_every or step <= self.stated_step:
            return False
        return asked or step - spec.first_step in _EARLY or step % spec.verify_every == 0

    def parts(self, step: int | None = None) -> dict[str, str]:
        """Return what must be equal on all replicas now, by name; it is stated before `step`."""
        self.stated_step = self.stated_step if step is None else step
        stated = {"parameters": self._layout.parameter_digest()}
        for name, optimizer in self._optimizers.items():
            for key, value in _hyperparameters(optimizer).items():
                stated[f"{name}.{key}"] = value
        for name, what in self._extra.items():
            stated[name] = _digest(_tensors(what))
        return dict(list(stated.items())[:64])


def _hyperparameters(optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """Return the numbers of the parameter groups, once if all groups have the same."""
    found: dict[str, list[str]] = {}
    for group in optimizer.param_groups:
        for key, value in group.items():
            if key != "params" and (isinstance(value, (int, float, str)) or _is_numbers(value)):
                found.setdefault(key, []).append(_shown(value))
    return {key: _short(values[0] if len(set(values)) == 1 else ", ".join(values)) for key, values in found.items()}


def _is_numbers(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.numel() == 1
    return isinstance(value, (tuple, list)) and all(_is_numbers(v) or isinstance(v, (int, float)) for v in value)


def _shown(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return repr(value.item())
    return f"({', '.join(map(_shown, value))})" if isinstance(value, (tuple, list)) else repr(value)


def _short(text: str) -> str:
    if len(text) <= _MOST_CHARACTERS:
        return text
    return f"{text[: _MOST_CHARACTERS - 40]}... {hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}"


def _tensors(what: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in whatever it is, in an order that is the same on every rank."""
    if isinstance(what, torch.Tensor):
        yield what
    elif isinstance(what, torch.nn.Module):
        # Parameters only: buffers such as BatchNorm's statistics differ between ranks.
        yield from what.parameters()
    elif isinstance(what, Mapping):
        for key in what:
            yield from _tensors(what[key])
    elif isinstance(what, (list, tuple)):
        for item in what:
            yield from _tensors(item)
    elif isinstance(what, (int, float)):
        yield torch.tensor(float(what), dtype=torch.float64)
    elif callable(what):
        yield from _tensors(what())
    elif isinstance(what, Iterable) and not isinstance(what, str):
        yield from _tensors(list(what))


def _digest(tensors: Iterable[torch.Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
