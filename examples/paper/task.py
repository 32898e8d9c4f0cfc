"""What a workload trains: a network, its data, its loss, and how it is judged on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset


@dataclass(frozen=True, kw_only=True)
class Task:
    """A learning problem.

    Fields:
        build: returns a new network; call it under a seed.
        loss: (network, batch) -> scalar, the mean over the batch's samples.
        train: map-style data set.
        collate: from samples to a batch; None: torch's.
        judge: network -> loss over a fixed part of the training data.
        examine: trained network -> what Fig. 4 reports of it; None: not a detector.
    """

    build: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Any], Tensor]
    train: Dataset[Any]
    judge: Callable[[nn.Module], float]
    collate: Callable[[list[Any]], Any] | None = None
    examine: Callable[[nn.Module], Mapping[str, float]] | None = None


def device_of(network: nn.Module) -> torch.device:
    """Return where a network's parameters lie."""
    return next(network.parameters()).device


@contextmanager
def judging(network: nn.Module) -> Iterator[None]:
    """Put a network into evaluation mode without gradients, and back."""
    was_training = network.training
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        network.train(was_training)
