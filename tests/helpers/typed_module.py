"""A LightningModule and its Trainer as a user writes them who checks types: `tests/test_typing.py` gives it to mypy."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from helpers.typed_script import samples
from torch_qgc.lightning import QGCStrategy


class Classifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(8, 3)

    def training_step(self, batch: list[torch.Tensor], batch_index: int) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self.layer(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def fit() -> None:
    strategy = QGCStrategy(bits_per_coordinate=4, deadline_s=0.5)
    trainer = Trainer(accelerator="cpu", devices=2, strategy=strategy, max_epochs=1)
    trainer.fit(Classifier(), DataLoader(samples(), batch_size=8))
    if strategy.state is not None:
        print(strategy.state.report())
