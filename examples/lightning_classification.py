"""Train a small residual network with Lightning on four unequal workers, one of them slow.

    python examples/lightning_classification.py                         strategy="qgc", a minute or two on 2 cores
    python examples/lightning_classification.py --way ddp --way qgc     and strategy="ddp", with a comparison
    python examples/lightning_classification.py --quick                 everything runs, nothing is learnt
    torchrun --nproc-per-node 4 examples/lightning_classification.py    where you start the processes yourself

5,000 real handwritten digits. The LightningModule knows nothing of torch_qgc: the Trainer's strategy is all there is to
change.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from common import command, digits, hooks
from common.job import Job
from common.settings import Settings, warmup_cosine
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Subset

from torch_qgc.lightning import QGCStrategy


@dataclass(frozen=True, kw_only=True)
class Options(Settings):
    """What this example lets you choose."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.way not in ("ddp", "qgc"):
            raise ValueError(f"--way: expected ddp or qgc, got {self.way}: Lightning drops DDP's hooks unless on CUDA")


DEFAULTS = Options(
    steps=120,
    eval_every=20,
    batch_size=16,
    lr=0.01,
    slow_shift_s=0.1,
    slow_wait_s=0.4,
    out=Path("demo/lightning"),
    deadline_s=0.1,  # half of so small a step is Lightning's own work, so no multiple of its passes will do
)
QUICK = dict(steps=6, eval_every=3, batch_size=2, val_limit=16, lr=1e-3, slow_wait_s=0.1)


class Residual(nn.Module):
    """Two convolutions and a way around them; halves the image."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.around = nn.Conv2d(before, after, 1, stride=2)
        self.through = nn.Sequential(
            nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
            nn.Conv2d(after, after, 3, padding=1, bias=False),
            nn.BatchNorm2d(after),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, before, h, w] to [n, after, h/2, w/2]."""
        return torch.relu(self.around(x) + self.through(x))


class Digits(pl.LightningModule):
    """An ordinary LightningModule: 130,000 parameters, AdamW, a schedule per step."""

    def __init__(self, s: Options) -> None:
        super().__init__()
        self.s = s
        body = [Residual(1, 16), Residual(16, 32), Residual(32, 96), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        self.net = nn.Sequential(*body, nn.Linear(96, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean cross-entropy."""
        images, labels = batch
        loss = cross_entropy(self.net(images), labels)
        self.log("train loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and accuracy over all ranks."""
        scores, labels = self.net(batch[0]), batch[1]
        self.log("loss", cross_entropy(scores, labels), sync_dist=True)
        self.log("top-1 accuracy", (scores.argmax(1) == labels).float().mean(), sync_dist=True)

    def configure_optimizers(self) -> Any:
        """Return AdamW, which the strategy makes a coded one."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.s.lr)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(self.s.steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Example(pl.Callback):
    """What an example needs around any Trainer: injected delays, the clock and the curve."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds of it."""
        return {"curve": self.job.curve}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with a checkpoint's curve."""
        self.job.curve = state_dict["curve"]

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Start the clock."""
        self.job.model, self.job.state = module, getattr(trainer.strategy, "state", None)
        self.job.start_clock()

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Meet the delay that is injected into this worker's step, unless it is replayed."""
        if not getattr(trainer.strategy, "replays", False):
            self.job.begin_step()

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, *args: Any) -> None:
        """Say how far the job is."""
        self.job.end_step(outputs["loss"])

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Stop the clock."""
        self._row = {"step": trainer.global_step, "time_s": round(self.job.elapsed_s, 3)}

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Take what was found into the curve, and let the clock go on."""
        found = {name: float(trainer.callback_metrics[name]) for name in ("loss", "top-1 accuracy")}
        self.job.curve.append(self._row | found)
        self.job.start_clock()


def train(s: Options) -> None:
    """Train on this rank. The strategy is what torch_qgc adds."""
    job = Job(s)
    train_data, val_data = digits.datasets(s.data_dir)
    model = Digits(s)
    if s.way == "qgc":
        images, labels = next(iter(DataLoader(train_data, batch_size=s.batch_size)))
        compute_s = job.usual_step_s(lambda: cross_entropy(model.net(images), labels), model)
        deadline_s = s.deadline(compute_s)
        strategy = QGCStrategy(
            straggle_probs=s.delays.missed_rounds(deadline_s, compute_s),  # a first guess, which the job corrects
            bits_per_coordinate=s.bits,
            downlink_bits=s.downlink_bits,
            deadline_s=deadline_s,
            seed=s.seed,
        )
    else:
        strategy = "ddp"

    checkpoint = s.folder / "checkpoint.ckpt"
    saving = ModelCheckpoint(s.folder, "checkpoint", save_on_train_epoch_end=False, enable_version_counter=False)
    trainer = pl.Trainer(
        strategy=strategy,
        devices=job.workers,
        max_steps=s.steps,
        val_check_interval=s.eval_every,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=10,
        logger=CSVLogger(s.folder),
        callbacks=[Example(job), saving],
        enable_progress_bar=False,  # the launcher shows one
        enable_model_summary=False,
    )
    loader = DataLoader(train_data, batch_size=s.batch_size, shuffle=True)
    shown = Subset(val_data, range(0, len(val_data), max(1, len(val_data) // s.val_limit)))
    resumed = checkpoint if s.resume and checkpoint.exists() else None
    trainer.fit(model, loader, DataLoader(shown, batch_size=64), ckpt_path=resumed)
    job.finish(hooks.TITLES[s.way])


if __name__ == "__main__":
    command.build(DEFAULTS, QUICK, train, __file__, __doc__)()
