"""What is trained: the part of an experiment that a configuration file can only name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch

from torch_qgc.simulator.gradients import Collate, Loss, Samples

__all__ = ["Evaluate", "Task"]

#: model -> name -> number.
Evaluate: TypeAlias = Callable[[torch.nn.Module], Mapping[str, float]]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A model, its loss and its data. `Experiment` has fields of the same names, which say more about each.

    A function that returns one is what `task = "module:function"` names in a file for `qgc simulate`.
    """

    model: torch.nn.Module
    loss: Loss
    dataset: Samples
    evaluate: Evaluate | None = None
    collate: Collate | None = None
