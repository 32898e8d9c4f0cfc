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
from typing import Annotated, Any, ClassVar

import lightning.pytorch as pl
import torch
from common import closing, curve, digits
from common.command import run as run_command
from common.curve import Row
from common.journal import Journal
from common.result import collect
from common.run import Run
from common.schedule import warmup_cosine
from common.settings import BatchSize, EvalEvery, LearningRate, Out, Settings, SlowShiftS, SlowWaitS, Steps
from common.ways import TITLES
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Subset
from typer import Option

from torch_qgc.lightning import QGCStrategy


@dataclass(frozen=True, kw_only=True)
class Options(Settings):
    """What this example lets you choose."""

    steps: Steps = 120
    eval_every: EvalEvery = 20
    batch_size: BatchSize = 16
    lr: LearningRate = 0.01
    slow_shift_s: SlowShiftS = 0.1
    slow_wait_s: SlowWaitS = 0.4
    out: Out = Path("demo/lightning")
    # Half of so small a step is Lightning's own work, so a multiple of the forward and backward pass will not do.
    deadline_s: Annotated[float | None, Option(help="Seconds after which a step closes; 0: never.")] = 0.1

    QUICK: ClassVar[dict[str, Any]] = {
        "steps": 6,
        "eval_every": 3,
        "batch_size": 2,
        "val_limit": 16,
        "lr": 1e-3,
        "slow_wait_s": 0.1,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.way not in ("ddp", "qgc"):
            raise ValueError(f"--way: expected ddp or qgc, got {self.way}: Lightning drops DDP's hooks unless on CUDA")


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
    """What an example needs around any Trainer: injected delays, a journal, the curve. Validation is off the clock."""

    def __init__(self, run: Run) -> None:
        self.s, self.rank = run.s, run.rank
        self.rows: list[Row] = []
        self._pause: Any = None

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds of it."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with a checkpoint's curve."""
        self.rows = state_dict["rows"]

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Start the clock."""
        step, elapsed_s = (int(self.rows[-1]["step"]), self.rows[-1]["time_s"]) if self.rows else (0, 0.0)
        trainer.strategy.barrier()
        self.journal = Journal(self.s.folder, self.rank, step=step, elapsed_s=elapsed_s)

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Meet the delay that is injected into this worker's step, unless it is replayed."""
        if not getattr(trainer.strategy, "replays", False):
            self.journal.begin()
            self.s.delays.wait(self.rank, trainer.global_step)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, *args: Any) -> None:
        """Note a step that this rank computed."""
        if not getattr(trainer.strategy, "replays", False):
            state = getattr(trainer.strategy, "state", None)
            waited_s = state.report().wait_s if state else 0.0
            self.journal.write(trainer.global_step, outputs["loss"].item(), waited_s=waited_s)

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Stop the clock."""
        self._time_s = self.journal.elapsed_s
        self._pause = self.journal.paused()
        self._pause.__enter__()

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Take what was found into the curve, and let the clock go on."""
        found = {name: float(trainer.callback_metrics[name]) for name in ("loss", "top-1 accuracy")}
        self.rows.append({"step": trainer.global_step, "time_s": round(self._time_s, 3)} | found)
        trainer.strategy.barrier()
        self._pause.__exit__(None, None, None)


def train(s: Options) -> None:
    """Train on this rank."""
    run = Run(s)
    with run.rank_zero_first():
        train_data, val_data = digits.datasets(s.data_dir)
    model = Digits(s)
    images, labels = next(iter(DataLoader(train_data, batch_size=s.batch_size)))
    compute_s = run.usual_step_s(lambda: cross_entropy(model.net(images), labels), model)

    example, checkpoint = Example(run), s.folder / "checkpoint.ckpt"
    saving = ModelCheckpoint(s.folder, "checkpoint", save_on_train_epoch_end=False, enable_version_counter=False)
    trainer = pl.Trainer(
        strategy=QGCStrategy(**s.coding(compute_s)) if s.way == "qgc" else "ddp",
        devices=run.workers,
        max_steps=s.steps,
        val_check_interval=s.eval_every,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=10,
        logger=CSVLogger(s.folder),
        callbacks=[example, saving],
        enable_progress_bar=False,  # the launcher shows one
        enable_model_summary=False,
    )
    loader = DataLoader(train_data, batch_size=s.batch_size, shuffle=True)
    shown = Subset(val_data, range(0, len(val_data), max(1, len(val_data) // s.val_limit)))
    resumed = checkpoint if s.resume and checkpoint.exists() else None
    trainer.fit(model, loader, DataLoader(shown, batch_size=64), ckpt_path=resumed)
    finish(run, model, example, getattr(trainer.strategy, "state", None))


def finish(run: Run, model: nn.Module, example: Example, state: Any) -> None:
    """Write the curve and the result; rank 0 prints the closing report."""
    s, last = run.s, example.rows[-1]
    metrics = {name: value for name, value in last.items() if name not in ("step", "time_s")}
    result = collect(s.way, model, example.journal, last["time_s"], state=state, metrics=metrics)
    if run.rank == 0:
        curve.write(example.rows, s.folder)
        curve.draw({TITLES[s.way]: example.rows}, s.folder / "curve.png")
        closing.show(result, Console())
        result.save(s.folder)


if __name__ == "__main__":
    run_command(Options, train, __file__, __doc__)
