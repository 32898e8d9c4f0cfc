"""The noise of mini-batch gradients, which `make_plan(noise_ratio=...)` takes."""

from __future__ import annotations

import copy

import numpy as np
import torch

from torch_qgc.errors import ConfigError
from torch_qgc.simulator.gradients import Collate, Gradients, Loss, Samples

__all__ = ["noise_ratio"]


def noise_ratio(
    model: torch.nn.Module,
    loss: Loss,
    dataset: Samples,
    *,
    batch_size: int,
    batches: int = 64,
    collate: Collate | None = None,
    seed: int = 0,
) -> float:
    """Measure eta at the model's parameters: the variance of a batch gradient over the squared norm of its mean.

        eta = mean_i ||h_i||^2 / signal - 1,   signal = (||sum_i h_i||^2 - sum_i ||h_i||^2) / (B (B - 1))

    over B independent batches. Products of different batches estimate the squared norm of the mean without bias, so
    no pass over the data is needed. Larger batches have a smaller eta, and eta rises as training converges: measure it
    at parameters from the middle of a run.

    Args:
        model: a module; a copy of it is used.
        loss: (model, batch) -> mean loss over the batch.
        dataset: a map-style data set.
        batch_size: samples per batch, drawn from all of the data.
        batches: B >= 2; more batches give a more precise estimate.
        collate: makes a batch of a list of samples; None takes torch's default.
        seed: the seed of the draws.
    Returns:
        eta >= 0, or inf if the estimated squared norm of the mean is not positive.
    Raises:
        ConfigError: fewer than two batches, or a batch size out of range.
    """
    if batches < 2 or not 1 <= batch_size <= len(dataset):
        raise ConfigError(f"expected at least 2 batches of 1..{len(dataset)} samples, got {batches} of {batch_size}")
    gradients = Gradients(copy.deepcopy(model), loss, dataset, collate=collate, seed=seed)
    total = torch.zeros_like(gradients.scratch)
    energy = 0.0
    with torch.random.fork_rng():
        for i in range(batches):
            chosen = np.random.default_rng([seed, i]).choice(len(dataset), batch_size, replace=False)
            gradients.mean(chosen.tolist(), 0, i)
            energy += float(gradients.scratch.double().square().sum())
            total.add_(gradients.scratch)
    signal = (float(total.double().square().sum()) - energy) / (batches * (batches - 1))
    return max(energy / batches / signal - 1.0, 0.0) if signal > 0.0 else float("inf")
