"""A small task for the simulator, and what its steps decode to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from test_schemes_codes import LATE
from torch.utils.data import TensorDataset

from torch_qgc.ddp.sampler import random_partitions
from torch_qgc.planner.delays import ShiftedExponential
from torch_qgc.simulator import Trace, simulate

DEADLINE_S = 2.0
SAMPLES, FEATURES = 60, 23


def delays_for(late: Any) -> ShiftedExponential:
    """At least one second, and past the deadline with the given probabilities (Song & Choi eq. (37))."""
    return ShiftedExponential(mu=-np.log(np.asarray(late)) / (DEADLINE_S - 1.0))


def task(outputs: int = 1, seed: int = 0) -> tuple[torch.nn.Module, Callable[..., torch.Tensor], TensorDataset]:
    """Least squares on data of which every partition is different."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(SAMPLES, FEATURES, generator=generator) * torch.linspace(0.5, 2.0, SAMPLES)[:, None]
    targets = inputs @ torch.randn(FEATURES, outputs, generator=generator) + 1.0
    model = torch.nn.Linear(FEATURES, outputs)
    torch.nn.init.zeros_(model.weight)
    torch.nn.init.zeros_(model.bias)
    return model, lambda m, batch: torch.nn.functional.mse_loss(m(batch[0]), batch[1]), TensorDataset(inputs, targets)


class Recorder(torch.optim.Optimizer):
    """Keeps gradients and moves nothing: all steps are made at the same parameters."""

    def __init__(self, parameters: Any, kept: list[torch.Tensor]) -> None:
        super().__init__(parameters, {})
        self.kept = kept

    def step(self, closure: Any = None) -> None:
        self.kept.append(torch.cat([p.grad.reshape(-1) for p in self.param_groups[0]["params"]]))


def decoded_gradients(schemes_: Any, *, of: Any = None, **options: Any) -> tuple[np.ndarray, Trace]:
    """Return what every step decodes to, [steps, P], in the order of the flat gradient."""
    kept: list[torch.Tensor] = []
    model, loss, dataset = task() if of is None else of
    options = {"delays": delays_for(LATE), "deadline_s": DEADLINE_S, **options}
    trace = simulate(model, loss, dataset, schemes_, optimizer=lambda ps: Recorder(ps, kept), **options)
    return torch.stack(kept).double().numpy(), trace


def partition_gradients(partitions: int, of: Any = None, seed: int = 0) -> np.ndarray:
    """Every partition's mean gradient at the model's parameters by autograd alone, [N, P], as `Layout` orders it."""
    model, loss, dataset = task() if of is None else of
    gradients = []
    for block in random_partitions(len(dataset), partitions, seed):
        found = torch.autograd.grad(loss(model, [t[block] for t in dataset.tensors]), list(model.parameters())[::-1])
        gradients.append(torch.cat([g.reshape(-1) for g in found]))
    return torch.stack(gradients).double().numpy()
