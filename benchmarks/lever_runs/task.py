"""5,000 real digits at half their size, two small models, and how well a model does."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from common import digits
from torch import nn
from torch.utils.data import TensorDataset

from lever_runs.settings import CLASSES

__all__ = ["MODELS", "dataset", "initial_model", "loss", "score"]

DATA_DIR = Path(__file__).resolve().parents[2] / "data"
LOOKED_AT = 1000  # training samples of which the loss is computed
PIXELS = 14


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(PIXELS**2, 32), nn.ReLU(), nn.Linear(32, CLASSES))


def _cnn() -> nn.Module:
    features = (nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU())
    return nn.Sequential(*features, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16 * 9, CLASSES))


MODELS: dict[str, Callable[[], nn.Module]] = {"mlp": _mlp, "cnn": _cnn}


def initial_model(name: str, seed: int) -> nn.Module:
    """Return a model; equal seeds give equal parameters."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MODELS[name]()


def loss(model: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
    """Return the mean cross-entropy."""
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


@cache
def dataset(held_out: bool = False) -> TensorDataset:
    """Return 4,000 digits in random order, or 1,000 others that are held out: images [1, 14, 14], labels."""
    images, labels = digits.datasets(DATA_DIR)[int(held_out)].tensors
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(labels)))
    return TensorDataset(nn.functional.avg_pool2d(images, 2)[order], labels[order])


@torch.no_grad()
def score(model: nn.Module, slow: np.ndarray) -> dict[str, float]:
    """Return the "loss" of training samples, and the "accuracy" on held-out digits and on the "slow" workers' classes.

    Args:
        slow: these classes; none: their accuracy is NaN.
    """
    images, labels = dataset().tensors
    training = float(loss(model, [images[:LOOKED_AT], labels[:LOOKED_AT]]))
    images, labels = dataset(held_out=True).tensors
    right = (model(images).argmax(dim=1) == labels).numpy()
    chosen = right[np.isin(labels.numpy(), slow)]
    slow_accuracy = float(chosen.mean()) if chosen.size else float("nan")
    return {"loss": training, "accuracy": float(right.mean()), "slow": slow_accuracy}
