"""Two small tasks to try schemes on: real text that needs no download, and least squares, whose optimum is known.

A file for `qgc simulate` that is run in this folder names them as `task = "tasks:text"`; the table `[task_options]`
holds the arguments.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import TensorDataset

from torch_qgc.simulator import Task

__all__ = ["least_squares", "text"]


def least_squares(*, samples: int = 1000, features: int = 100, noise: float = 0.1, seed: int = 0) -> Task:
    """Fit a linear model to Gaussian data: convex, and exact in a few steps.

    Args:
        samples, features: of the data.
        noise: standard deviation of what no model can explain.
        seed: of the data.
    Returns:
        A task whose evaluation is "excess": the loss above the least possible one.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(samples, features, generator=generator)
    targets = inputs @ torch.randn(features, 1, generator=generator)
    targets += noise * torch.randn(samples, 1, generator=generator)
    best = torch.linalg.lstsq(inputs.double(), targets.double()).solution
    least = torch.nn.functional.mse_loss(inputs.double() @ best, targets.double()).item()
    model = torch.nn.Linear(features, 1, bias=False)
    torch.nn.init.zeros_(model.weight)

    def loss(m: torch.nn.Module, batch: Any) -> torch.Tensor:
        return torch.nn.functional.mse_loss(m(batch[0]), batch[1])

    def evaluate(m: torch.nn.Module) -> dict[str, float]:
        return {"excess": loss(m, (inputs, targets)).item() - least}

    return Task(model=model, loss=loss, dataset=TensorDataset(inputs, targets), evaluate=evaluate)


def text(
    *,
    model: Literal["logistic", "mlp"] = "logistic",
    context: int = 4,
    symbols: int = 64,
    samples: int = 8000,
    width: int = 128,
    seed: int = 0,
) -> Task:
    """Predict the next character of the running Python's standard library from the characters before it.

    Real text that is on every machine; it depends on the Python version.

    Args:
        model: "logistic" regression on the context (convex), or a network with one hidden layer.
        context: characters that are seen.
        symbols: the most frequent characters; all others are one more.
        samples: positions to train on; a quarter as many others to evaluate on.
        width: of the hidden layer, and a quarter of it per embedded character.
        seed: of the positions and of the initial parameters.
    Returns:
        A task whose evaluations are "validation_loss" (nats per character) and "accuracy".
    """
    if model not in ("logistic", "mlp"):
        raise ValueError(f"model: expected 'logistic' or 'mlp', got {model!r}")
    characters = _characters(symbols)
    generator = torch.Generator().manual_seed(seed)
    held_out = samples // 4
    if samples < 4 or len(characters) - context < samples + held_out:
        raise ValueError(f"samples: expected 4 to {(len(characters) - context) * 4 // 5}, got {samples}")
    chosen = torch.randperm(len(characters) - context, generator=generator)[: samples + held_out]
    windows = characters[chosen[:, None] + torch.arange(context + 1)]
    inputs, targets = windows[:, :-1], windows[:, -1]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = _network(model, context, symbols + 1, width)

    def loss(m: torch.nn.Module, batch: Any) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(m(batch[0]), batch[1])

    def evaluate(m: torch.nn.Module) -> dict[str, float]:
        scores = m(inputs[samples:])
        right = (scores.argmax(dim=1) == targets[samples:]).float().mean()
        return {
            "validation_loss": torch.nn.functional.cross_entropy(scores, targets[samples:]).item(),
            "accuracy": right.item(),
        }

    data = TensorDataset(inputs[:samples], targets[:samples])
    return Task(model=network, loss=loss, dataset=data, evaluate=evaluate)


def _characters(symbols: int) -> torch.Tensor:
    """Return the modules of the standard library as numbers of symbols, most frequent first, int64."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    raw = torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8).long()
    frequent = torch.bincount(raw, minlength=256).argsort(descending=True, stable=True)[:symbols]
    numbers = torch.full((256,), symbols)
    numbers[frequent] = torch.arange(symbols)
    return numbers[raw]


def _network(model: str, context: int, classes: int, width: int) -> torch.nn.Module:
    if model == "logistic":
        return _Logistic(context, classes)
    return torch.nn.Sequential(
        torch.nn.Embedding(classes, width // 4),
        torch.nn.Flatten(),
        torch.nn.Linear(context * (width // 4), width),
        torch.nn.ReLU(),
        torch.nn.Linear(width, classes),
    )


class _Logistic(torch.nn.Module):
    """Add up a column of scores for each character of the context."""

    def __init__(self, context: int, classes: int) -> None:
        super().__init__()
        self.offsets: torch.Tensor
        self.scores = torch.nn.Parameter(torch.zeros(context * classes, classes))
        self.register_buffer("offsets", torch.arange(context) * classes)

    def forward(self, characters: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.embedding_bag(characters + self.offsets, self.scores, mode="sum")
