"""What a step costs a worker that it closed without: full, thin, or replayed by a bound update.

    python benchmarks/thin.py --rounds 15

One process, one thread, no network: forward and backward pass, optimizer, and the copying of a result into the
gradients. The ways take turns. A worker that is behind catches up only if its thin step takes less time than a step of
the job: one that is s times slower than the others needs a thin step below 1 / s of its full one.
"""

from __future__ import annotations

import csv
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import torchvision
import typer
from rich.console import Console
from rich.table import Table
from transformers import GPT2Config, GPT2LMHeadModel

from torch_qgc.worker.ghost import Ghost
from torch_qgc.worker.layout import Layout

RESULTS = Path(__file__).parent / "results"
THIN = 2


def mobilenet() -> tuple[torch.nn.Module, Callable[[int], torch.Tensor], int]:
    """MobileNetV3-Small, 96 pixels, 16 images."""
    model = torchvision.models.mobilenet_v3_small(num_classes=10)
    images, labels = torch.randn(16, 3, 96, 96), torch.randint(10, (16,))
    return model, lambda n: torch.nn.functional.cross_entropy(model(images[:n]), labels[:n]), 16


def resnet() -> tuple[torch.nn.Module, Callable[[int], torch.Tensor], int]:
    """ResNet-50, 64 pixels, 16 images."""
    model = torchvision.models.resnet50(num_classes=10)
    images, labels = torch.randn(16, 3, 64, 64), torch.randint(10, (16,))
    return model, lambda n: torch.nn.functional.cross_entropy(model(images[:n]), labels[:n]), 16


def gpt2() -> tuple[torch.nn.Module, Callable[[int], torch.Tensor], int]:
    """GPT-2 with 4 layers of width 128, 128 tokens, 16 samples."""
    model = GPT2LMHeadModel(GPT2Config(n_layer=4, n_embd=128, n_head=4, vocab_size=256, n_positions=128))
    tokens = torch.randint(256, (16, 128))
    return model, lambda n: model(input_ids=tokens[:n], labels=tokens[:n]).loss, 16


MODELS = {"mobilenet_v3_small": mobilenet, "resnet50": resnet, "gpt2 4x128": gpt2}


class Bench:
    """One model and its three kinds of steps."""

    def __init__(self, make: Callable[[], Any]) -> None:
        torch.manual_seed(0)
        self.model, self.loss, self.batch = make()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.layout = Layout(self.model.named_parameters())
        self.result = torch.randn(self.layout.numel) * 1e-3
        self.ghost = Ghost(self.model, self.layout.parameters)

    def deliver(self) -> None:
        """Copy a result into the gradients, as the hook does."""
        for p, slot in zip(self.layout.parameters, self.layout.slots):
            if p.grad is None:
                p.grad = torch.empty_like(p)
            p.grad.copy_(self.result[slot.span].view(slot.shape))

    def step(self, kind: str) -> None:
        """Make one step."""
        if kind == "ghost":
            with self.ghost.instead_of_forward():
                self.loss(THIN).backward()
        elif kind != "replayed":
            self.loss(self.batch if kind == "full" else THIN).backward()
        self.deliver()
        self.optimizer.step()
        self.optimizer.zero_grad()


def main(rounds: Annotated[int, typer.Option(help="turns of each kind of step")] = 15) -> None:
    """Print and save medians, and ratios to the full step of the same turn."""
    torch.set_num_threads(1)
    command = f"python benchmarks/thin.py --rounds {rounds}"
    hardware = f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}"
    table = Table("model", "step", "ms, median", "of a full step, median", "quartiles")
    with open(RESULTS / "thin.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["model", "kind", "turn", "seconds", "ratio_to_full", "hardware", "command"])
        for name, make in MODELS.items():
            bench = Bench(make)
            kinds = ("full", "thin", "ghost", "replayed")
            for kind in kinds:
                bench.step(kind)
            seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
            for _ in range(rounds):
                for kind in kinds:
                    start = time.perf_counter()
                    bench.step(kind)
                    seconds[kind].append(time.perf_counter() - start)
            for kind in kinds:
                ratios = [mine / full for mine, full in zip(seconds[kind], seconds["full"])]
                for turn, (value, ratio) in enumerate(zip(seconds[kind], ratios)):
                    writer.writerow([name, kind, turn, f"{value:.5f}", f"{ratio:.4f}", hardware, command])
                low, middle, high = statistics.quantiles(ratios, n=4)
                row = f"{statistics.median(seconds[kind]) * 1e3:.1f}", f"{middle:.2f}", f"{low:.2f}-{high:.2f}"
                table.add_row(name, kind, *row)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
