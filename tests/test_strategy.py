"""Lightning's real Trainer on real processes: late ranks replay, and everything at which ranks meet lines up."""

from __future__ import annotations

import copy
import csv
import hashlib
import importlib
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers.ranks import aggregators, run_ranks
from helpers.replicas import FakeReplica
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset, WeightedRandomSampler

import torch_qgc as qgc

pl = pytest.importorskip("lightning.pytorch")

from lightning.pytorch.callbacks import (  # noqa: E402
    BackboneFinetuning,
    Callback,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)
from lightning.pytorch.callbacks.spike import SpikeDetection  # noqa: E402
from lightning.pytorch.loggers import CSVLogger  # noqa: E402
from lightning.pytorch.plugins.precision import MixedPrecision  # noqa: E402

from torch_qgc.ddp.optim import make_coded  # noqa: E402
from torch_qgc.lightning import QGCStrategy  # noqa: E402
from torch_qgc.lightning.loader import ReplayingLoader, Turn, code_sampling  # noqa: E402
from torch_qgc.lightning.times import StepTimes  # noqa: E402

RANKS = 3
BATCHES = 8  # per epoch and rank
DEADLINE_S = 0.1
LATE_S = 0.4


def dataset(samples: int = 8 * RANKS * BATCHES, *, seed: int = 0) -> TensorDataset:
    x = torch.randn(samples, 10, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, torch.sin(x).sum(1, keepdim=True))


class Regression(pl.LightningModule):
    """A small network. `late` makes its rank sleep in every other step that it computes."""

    def __init__(
        self, optimizer: str = "SGD", *, scheduler: str = "", monitor: str = "val_loss", batch_norm: bool = False
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        middle = [torch.nn.BatchNorm1d(32)] if batch_norm else []
        self.net = torch.nn.Sequential(torch.nn.Linear(10, 32), *middle, torch.nn.ReLU(), torch.nn.Linear(32, 1))
        self.optimizer, self.scheduler, self.monitor = optimizer, scheduler, monitor
        self.late = False
        self.seen: list[float] = []
        self._rng = np.random.default_rng(3)

    def loss(self, batch: Any) -> torch.Tensor:
        return torch.nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.append(float(batch[0].sum()))
        if self.late and self.trainer.global_step >= 3 and self._rng.random() < 0.5:
            time.sleep(LATE_S)
        loss = self.loss(batch)
        self.log("loss", loss)
        self.log("epoch_loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return {"loss": loss, "target": batch[1]}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)
        self.log("own_val_loss", self.loss(batch) + self.global_rank)
        self.log("constant", 1.0, sync_dist=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch), sync_dist=True)

    def configure_optimizers(self) -> Any:
        parameters = list(self.parameters())
        groups = [{"params": parameters[:2], "lr": 0.02}, {"params": parameters[2:]}]
        optimizer = getattr(torch.optim, self.optimizer)(groups, lr=0.01)
        if not self.scheduler:
            return optimizer
        if self.scheduler == "plateau":
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", patience=0, factor=0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": self.monitor}}
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": self.scheduler}}


def digest(module: torch.nn.Module) -> str:
    values = torch.cat([p.detach().flatten() for p in module.parameters()])
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16]


class Watch(Callback):
    """Note what every rank must agree on, at the end of every batch, replayed or not."""

    def __init__(self) -> None:
        self.agreed: list[Any] = []
        self.digests: dict[int, str] = {}

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert outputs["target"].shape == batch[1].shape  # what callbacks read is there in replayed steps, too
        rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
        self.digests[trainer.global_step] = digest(module)
        self.agreed.append((trainer.current_epoch, batch_idx, trainer.global_step, rates, digest(module)))

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        buffers = [buffer.tolist() for buffer in module.buffers()]
        self.agreed.append(("validated", trainer.global_step, float(trainer.callback_metrics["val_loss"]), buffers))

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self.agreed.append(("epoch", float(trainer.callback_metrics["epoch_loss"])))


def as_under_torchrun(rank: int) -> None:
    """Let Lightning find its processes started, and be quiet."""
    ranks = dist.get_world_size()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "WORLD_SIZE": str(ranks)}
    os.environ |= {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def trainer_for(rank: int, strategy: Any, *callbacks: Callback, **options: Any) -> Any:
    as_under_torchrun(rank)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "max_epochs": 2}
    quiet["enable_checkpointing"] = any(isinstance(c, ModelCheckpoint) for c in callbacks)
    return pl.Trainer(
        accelerator="cpu",
        devices=dist.get_world_size(),
        strategy=strategy,
        callbacks=list(callbacks),
        **{**quiet, **options},
    )


_endpoints: Iterator[str] = iter(())  # of aggregators that no job has used, the same on every rank


def run_jobs(function: Any, *args: Any, ranks: int, jobs: int = 1) -> list[Any]:
    """As run_ranks; aggregators are forked for that many calls of strategy_for."""
    with aggregators(jobs) as endpoints:
        return run_ranks(_with_endpoints, endpoints, function, *args, ranks=ranks)


def _with_endpoints(rank: int, endpoints: tuple[str, ...], function: Any, *args: Any) -> Any:
    global _endpoints
    _endpoints = iter(endpoints)
    return function(rank, *args)


def strategy_for(**options: Any) -> QGCStrategy:
    defaults = {"deadline_s": DEADLINE_S, "limits": qgc.Limits(chunk_numel=512), "verify_every": 5}
    return QGCStrategy(**{**defaults, "network": qgc.Network(endpoints=(next(_endpoints),)), **options})


def train_loader(**options: Any) -> DataLoader[Any]:
    samples = 8 * dist.get_world_size() * BATCHES
    return DataLoader(dataset(samples), **{"batch_size": 8, "shuffle": True, **options})


def val_loader() -> DataLoader[Any]:
    return DataLoader(dataset(60, seed=1), batch_size=8)


# --- a late rank ------------------------------------------------------------------------------------------


def late_job(rank: int, late: int, model: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    watch, strategy, module = Watch(), strategy_for(), Regression(**model)
    module.late = rank == late
    trainer = trainer_for(rank, strategy, watch, **options)
    trainer.fit(module, train_loader())
    assert strategy.state is not None
    return {
        "agreed": watch.agreed,
        "optimizer": type(trainer.optimizers[0]).__name__,
        "computed": len(module.seen),
        "report": strategy.state.report(),
    }


FP16 = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**19))  # it begins with overflows

# Name: the late rank, the model's arguments, the Trainer's, the optimizer's class, the numbers of batches and of steps.
LATE_CASES: dict[str, Any] = {
    "sgd, rank 0 late": (0, {}, {}, "CodedSGD", 16, 16),
    "adam with two tracks in fp16 with a scaler, clipped by norm, a scheduler per step": (
        2,
        {"optimizer": "Adam", "scheduler": "step"},
        {"gradient_clip_val": 0.5, "plugins": FP16},
        "CodedAdam",
        16,
        16,
    ),
    "adamw in bf16, accumulating, clipped by value, a scheduler per epoch": (
        1,
        {"optimizer": "AdamW", "scheduler": "epoch"},
        {"precision": "bf16-mixed", "accumulate_grad_batches": 3, "max_epochs": 3}
        | {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"},
        "CodedAdamW",
        24,
        9,  # in each epoch of 8 batches: 3 + 3 + 2
    ),
    "an optimizer of which there is no coded one, until max_steps": (
        2,
        {"optimizer": "RMSprop"},
        {"max_steps": 11, "max_epochs": -1},
        "RMSprop",
        11,
        11,
    ),
}


@pytest.mark.parametrize("case", LATE_CASES)
def test_a_late_rank_replays_and_agrees_with_the_others_after_every_batch(case: str) -> None:
    late, model, options, optimizer, batches, steps = LATE_CASES[case]
    ranks = run_jobs(late_job, late, model, options, ranks=RANKS)
    made = [entry for entry in ranks[0]["agreed"] if len(entry) == 5]
    assert len(made) == batches
    assert [entry[2] for entry in made][-1] == steps  # Lightning's global_step
    assert len({entry[4] for entry in made}) >= (steps if "fp16" not in case else steps // 2)  # it learns in every step
    for found in ranks:
        assert found["agreed"] == ranks[0]["agreed"]
        assert found["report"].steps == steps
        assert found["optimizer"] == optimizer
    slow, fast = ranks[late]["report"], ranks[late - 1]["report"]
    assert slow.replayed_steps > 2
    assert ranks[late]["computed"] < ranks[late - 1]["computed"]  # which may be late, too, on a busy machine
    # Nothing in Lightning's loop made the others wait for it: else it would be in every round.
    assert fast.computed_steps > slow.computed_steps
    assert fast.contributions[late] < 0.8


def meeting_job(rank: int, folder: str) -> dict[str, Any]:
    """Validate in mid-epoch, save, stop early, test; then go on from the checkpoint."""
    watch, module = Watch(), Regression("Adam", scheduler="plateau", monitor="own_val_loss", batch_norm=True)
    module.late = rank == RANKS - 1
    strategy = strategy_for()
    saving = ModelCheckpoint(folder, every_n_train_steps=3, save_last=True, monitor="loss", save_top_k=1)
    stopping = EarlyStopping("constant", patience=3)
    trainer = trainer_for(rank, strategy, watch, saving, stopping, max_epochs=9, val_check_interval=0.5)
    trainer.fit(module, train_loader(), val_loader())
    tested = trainer.test(module, val_loader(), verbose=False)
    assert strategy.state is not None
    replayed = strategy.state.report().replayed_steps
    went_on = trainer_for(rank, strategy_for(), watch, max_epochs=trainer.current_epoch + 2)
    went_on.fit(module, train_loader(), val_loader(), ckpt_path=f"{folder}/last.ckpt")
    saved = torch.load(f"{folder}/last.ckpt", weights_only=True)
    return {
        "agreed": watch.agreed,
        "tested": tested,
        "stopped": (trainer.current_epoch, trainer.global_step, went_on.global_step),
        "saved": (saved["global_step"], saved["torch_qgc"]["step"]),
        "replayed": replayed,
    }


def test_validation_checkpoints_early_stopping_and_test_line_up_although_one_rank_was_late(tmp_path: Path) -> None:
    ranks = run_jobs(meeting_job, str(tmp_path), ranks=RANKS, jobs=2)
    assert ranks[-1]["replayed"] > 2
    for found in ranks:
        for name in ("agreed", "tested", "stopped", "saved"):
            assert found[name] == ranks[0][name], name
    # A constant metric improves once, and then not in three validations: the fourth ends the second epoch.
    assert ranks[0]["stopped"][:2] == (2, 16)
    assert ranks[0]["saved"] == (15, 15)
    assert ranks[0]["stopped"][2] == 32
    learning_rates = {tuple(entry[3]) for entry in ranks[0]["agreed"] if len(entry) == 5}
    assert len(learning_rates) > 1  # the plateau was found, by all alike, in a metric on which the ranks disagree


# --- resuming ---------------------------------------------------------------------------------------------


def resumed_job(rank: int, folder: str) -> dict[str, Any]:
    """Train three epochs, and again from checkpoints of the first job: in mid-epoch, and at the end of one."""
    model, options = {"optimizer": "AdamW", "scheduler": "step"}, {"max_epochs": 3, "accumulate_grad_batches": 2}
    runs = {}
    for name, path in {"whole": None, "mid-epoch": "step=6.ckpt", "end of an epoch": "step=8.ckpt"}.items():
        watch, module = Watch(), Regression(**model)
        saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
        callbacks = [watch, saving] if path is None else [watch]
        trainer = trainer_for(rank, strategy_for(deadline_s=None), *callbacks, **options)
        trainer.fit(module, train_loader(), val_loader(), ckpt_path=path and f"{folder}/{path}")
        runs[name] = {"digests": watch.digests, "seen": module.seen}
    return runs


def test_a_resumed_job_makes_the_very_steps_of_one_that_was_not_interrupted(tmp_path: Path) -> None:
    for runs in run_jobs(resumed_job, str(tmp_path), ranks=2, jobs=3):
        whole = runs["whole"]
        assert len(whole["seen"]) == 3 * BATCHES
        for name, step in {"mid-epoch": 6, "end of an epoch": 8}.items():
            assert runs[name]["seen"] == whole["seen"][2 * step :], name
            later = {k: v for k, v in whole["digests"].items() if k > step}
            assert len(later) == 12 - step
            assert {k: v for k, v in runs[name]["digests"].items() if k > step} == later, name


# --- ends of loops, and errors ---------------------------------------------------------------------------


class Leaving(Regression):
    """Its epochs, its fit or its job end in some unusual way, while one rank is late by an event: it waits until the
    others have closed two steps without it."""

    def __init__(self, kind: str, rank: int) -> None:
        super().__init__("AdamW")
        self.kind, self.rank = kind, rank
        self.one = rank == RANKS - 1  # which rank alone does it

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        assert batch is not None
        replica = self.trainer.strategy.state.replica
        if self.rank == 1 and replica.step == 4 and self.kind != "lonely step" and not self.trainer.strategy.replays:
            give_up = time.monotonic() + 20
            while not replica.joined()[0].closed(5) and replica.failure is None and time.monotonic() < give_up:
                time.sleep(0.02)
        everybody = self.kind in ("all leave the epoch", "all leave an accumulated step")
        if batch_idx == 6 and (everybody or (self.kind == "one leaves the epoch" and self.one)):
            return -1
        if batch_idx == 6 and self.kind == "one stops" and self.one:
            self.trainer.should_stop = True
        return None

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 6 and self.one:
            if self.kind == "one skips a batch":
                return None
            if self.kind == "one fails":
                raise ValueError("no such sample")
            if self.kind == "one is interrupted":
                raise KeyboardInterrupt
        return super().training_step(batch, batch_idx)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.kind == "one has another learning rate" and self.one and self.trainer.global_step == 5:
            self.trainer.optimizers[0].param_groups[0]["lr"] *= 2


# Name: the Trainer's arguments, and the steps that all have made.
ENDINGS: dict[str, Any] = {
    "all leave the epoch": ({}, 12),
    "all leave an accumulated step": ({"accumulate_grad_batches": 4}, 2),
    "max_steps": ({"max_steps": 11, "max_epochs": -1}, 11),
    "early stopping": ({"max_epochs": 9, "val_check_interval": 3}, 6),
    "half an epoch": ({"limit_train_batches": 0.5, "val_check_interval": 2, "max_epochs": 3}, 12),
    "an accumulation that changes": ({}, 7),
    "fast_dev_run": ({"fast_dev_run": 6}, 6),
    "no batches": ({"limit_train_batches": 0}, 0),
    "average of the weights": ({}, 16),
    "pruning": ({}, 16),
}


def ending_job(rank: int, kind: str, options: dict[str, Any]) -> dict[str, Any]:
    callbacks: list[Callback] = {
        "early stopping": [EarlyStopping("constant", patience=1)],
        "an accumulation that changes": [GradientAccumulationScheduler({0: 2, 1: 3})],
        "average of the weights": [WeightAveraging()],
        "pruning": [ModelPruning("l1_unstructured", amount=0.2, parameter_names=["weight"])],
    }.get(kind, [])
    module = Leaving(kind, rank)
    strategy = strategy_for()
    trainer = trainer_for(rank, strategy, *callbacks, **options)
    trainer.fit(module, train_loader(), val_loader())
    assert strategy.state is not None
    report = strategy.state.report()
    return {
        "agreed": (trainer.global_step, trainer.current_epoch, strategy.state.step, digest(module)),
        "replayed": report.replayed_steps,
    }


@pytest.mark.parametrize("kind", ENDINGS)
def test_loops_that_end_alike_on_all_ranks_end_equal(kind: str) -> None:
    options, steps = ENDINGS[kind]
    ranks = run_jobs(ending_job, kind, options, ranks=RANKS)
    for found in ranks:
        assert found["agreed"] == ranks[0]["agreed"]
        assert found["agreed"][2] == steps
    assert ranks[1]["replayed"] >= (steps > 5)


LONELY = {
    "one leaves the epoch": "loops have ended at different steps: workers [2] at step 6, workers [0, 1] at step 8",
    "one stops": "loops have ended at different steps: workers [2] at step 7, workers [0, 1] at step 8",
    "one skips a batch": "returning None in distributed training is not supported",
    "one fails": "no such sample",
    "one is interrupted": "KeyboardInterrupt",
    "one has another learning rate": "AdamW.lr",
}


def lonely_job(rank: int, kind: str) -> None:
    trainer_for(rank, strategy_for()).fit(Leaving(kind, rank), train_loader(), val_loader())


@pytest.mark.parametrize("kind", LONELY)
def test_what_one_rank_does_alone_is_an_error_on_all(kind: str) -> None:
    with aggregators(1) as endpoints:
        outcomes = run_ranks(_with_endpoints, endpoints, lonely_job, kind, ranks=RANKS, timeout_s=60, check=False)
    errors = [outcome.error or "" for outcome in outcomes]
    assert all(errors), errors
    assert all("timed out" not in error for error in errors)
    told = [LONELY[kind] in error for error in errors]
    assert sum(told) >= (1 if kind == "one is interrupted" else 2), errors


def two_fits_job(rank: int) -> list[Any]:
    module, found = Leaving("two fits", rank), []
    trainer = trainer_for(rank, strategy_for(), max_epochs=1)
    for endpoint in (None, next(_endpoints)):
        if endpoint is not None:
            trainer.strategy._state_options["network"] = qgc.Network(endpoints=(endpoint,))
            trainer.fit_loop.max_epochs = 2
        trainer.fit(module, train_loader(), val_loader())
        found.append((trainer.global_step, trainer.strategy.state.step, digest(module)))
    return found


def test_a_trainer_fits_twice() -> None:
    ranks = run_jobs(two_fits_job, ranks=RANKS, jobs=2)
    assert ranks[0] == ranks[1] == ranks[2]
    assert [entry[:2] for entry in ranks[0]] == [(8, 8), (16, 8)]


# --- what Lightning users bring ---------------------------------------------------------------------------


def tagged(samples: list[Any]) -> Any:
    x, y = zip(*samples)
    return torch.stack(x), torch.stack(y)


def flag_job(rank: int, folder: str) -> dict[str, Any]:
    """The flag alone, a logger, and loaders with options of their own."""
    module, found = Regression(), {}

    class Look(Callback):
        def on_train_end(self, trainer: Any, module: Any) -> None:
            found["bar"] = trainer.progress_bar_metrics
            loader = trainer.train_dataloader
            found["train"] = loader.batch_size, loader.collate_fn, loader.worker_init_fn
            found["val"] = type(trainer.val_dataloaders.sampler)

    trainer = trainer_for(
        rank, "qgc", Look(), logger=CSVLogger(folder), log_every_n_steps=4, use_distributed_sampler=True
    )
    loader = train_loader(collate_fn=tagged, timeout=0.0, worker_init_fn=print)
    trainer.fit(module, loader, val_loader())
    assert isinstance(loader.sampler, torch.utils.data.RandomSampler)  # the user's own loader is left alone
    return found | {"digest": digest(module), "seen": len(module.seen), "folder": trainer.logger.log_dir}


def test_the_flag_is_enough_and_counts_are_logged_and_shown(tmp_path: Path) -> None:
    ranks = run_ranks(flag_job, str(tmp_path), ranks=2)
    assert ranks[0]["digest"] == ranks[1]["digest"]
    for found in ranks:
        assert 0 < found["seen"] <= 2 * BATCHES  # a deadline may be chosen, and steps close without a busy rank
        assert found["train"] == (8, tagged, print)
        assert found["val"] is DistributedSampler
        assert {"slowest", "step_s", "arrives"} <= found["bar"].keys()
    with open(Path(ranks[0]["folder"]) / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["qgc/bits/worker0"]]
    assert [int(row["step"]) for row in rows] == [3, 7, 11, 15]  # with the metrics of the module's own
    assert all(row["loss"] for row in rows)
    assert 0 < float(rows[-1]["qgc/arrival_rate/worker1"]) < 3
    assert float(rows[0]["qgc/arrival_rate/worker1"]) == 1
    assert float(rows[-1]["qgc/bits/worker1"]) == 4
    assert 0 < float(rows[-1]["qgc/step_s/worker1"]) < 5
    assert float(rows[0]["qgc/replayed_steps"]) == 0
    assert not rows[0].get("qgc/deadline_s")  # these steps waited for all


class Stream(IterableDataset):
    def __init__(self, rank: int, samples: int) -> None:
        self.rank, self.samples = rank, samples

    def __iter__(self) -> Iterator[Any]:
        return iter([(torch.full((10,), float(self.rank)), torch.zeros(1))] * self.samples)

    def __len__(self) -> int:
        return self.samples


class Endless(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return iter(dataset())


class Manual(Regression):
    """Steps the optimizer itself."""

    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


def own_data_job(rank: int) -> Any:
    streamed = Regression()
    trainer_for(rank, strategy_for()).fit(streamed, DataLoader(Stream(rank, 32), batch_size=8))
    indices = torch.utils.data.SequentialSampler(range(24))
    sequential = Regression()
    trainer = trainer_for(rank, strategy_for(), use_distributed_sampler=False, max_epochs=1)
    trainer.fit(sequential, DataLoader(dataset(24, seed=rank), batch_size=8, sampler=indices))
    manual = Manual()
    trainer_for(rank, strategy_for(deadline_s=None), max_epochs=1).fit(manual, train_loader())
    own = [float(batch[0].sum()) for batch in DataLoader(dataset(24, seed=rank), batch_size=8)]
    return streamed.seen, sequential.seen == own, [digest(m) for m in (streamed, sequential, manual)]


def test_a_rank_may_bring_its_own_data_and_without_a_deadline_step_by_itself() -> None:
    ranks = run_jobs(own_data_job, ranks=2, jobs=3)
    assert [seen for seen, _, _ in ranks] == [[0.0] * 8, [80.0] * 8]
    assert all(same for _, same, _ in ranks)
    assert ranks[0][2] == ranks[1][2]
    assert digest(Regression()) not in ranks[0][2]  # each of them learnt


# --- refusals ---------------------------------------------------------------------------------------------


class Synchronous(Regression):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("loss", loss, sync_dist=True)
        return loss


class Iterating(Regression):
    def training_step(self, dataloader_iter: Any) -> Any:
        return self.loss(next(dataloader_iter)[0])


class TwoPasses(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        closure()
        return super().step(closure)


class Sharp(Regression):
    def configure_optimizers(self) -> Any:
        return TwoPasses(self.parameters(), lr=0.01)


class Searching(Regression):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters())


class Eager(Regression):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return [optimizer], [{"scheduler": plateau, "monitor": "loss", "interval": "step"}]


class Backboned(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = self.net[0]


class Grouped(torch.utils.data.BatchSampler):
    """Batches as a user wants them."""


def refused_job(rank: int) -> dict[str, str]:
    said = {}

    def attempt(
        name: str, *callbacks: Callback, model: Any = None, loader: Any = None, strategy: Any = None, **options: Any
    ) -> None:
        trainer = trainer_for(rank, strategy or strategy_for(), *callbacks, **options)
        try:
            trainer.fit(model or Regression(), train_loader() if loader is None else loader)
        except qgc.QGCError as error:  # JobFailed, where another rank was the first to see it
            said[name] = str(error)

    samples = len(dataset())
    weighted = WeightedRandomSampler([1.0] * samples, samples)
    grouped = Grouped(torch.utils.data.SequentialSampler(range(samples)), 8, drop_last=False)
    hours = timedelta(hours=1)
    callbacks = Timer(hours), ModelCheckpoint(train_time_interval=hours), StochasticWeightAveraging(swa_lrs=0.1)
    attempt("trainer", *callbacks, model=Manual(), val_check_interval=hours, overfit_batches=2)
    attempt("iterator", model=Iterating())
    attempt("finetuning", BackboneFinetuning(), model=Backboned())
    attempt("finders", LearningRateFinder(), strategy=strategy_for(deadline_s=None))
    attempt("spikes", SpikeDetection())
    attempt("unused", strategy=strategy_for(find_unused_parameters=True))
    attempt("synchronous", model=Synchronous())
    attempt("two passes", model=Sharp())
    attempt("lbfgs", model=Searching())
    attempt("eager", model=Eager())
    attempt("sampler", loader=DataLoader(dataset(), batch_size=8, sampler=weighted))
    attempt("batch sampler", loader=DataLoader(dataset(), batch_sampler=grouped))
    attempt("lengths", loader=DataLoader(Stream(rank, 8 * (rank + 1)), batch_size=8))
    attempt("no length", loader=DataLoader(Endless(), batch_size=8))
    attempt("partitions", strategy=strategy_for(partitions=[[0], [1]]), loader=DataLoader(Stream(rank, 8)))
    return said


def test_what_cannot_work_is_refused_with_the_remedy() -> None:
    remedies = {
        "trainer": [
            "use automatic optimization (one optimizer), or deadline_s=None",
            "Timer(..., interval='epoch')",
            "every_n_epochs",
            "give a number of batches",
            "WeightAveraging",
            "torch.utils.data.Subset",
        ],
        "iterator": ["take a batch instead"],
        "finetuning": ["BackboneFinetuning: it unfreezes"],
        "finders": ["LearningRateFinder: ", "a run of its own on one device"],
        "spikes": ["SpikeDetection: it waits for every rank"],
        "unused": ["find_unused_parameters=False"],
        "synchronous": ["on_step=False, on_epoch=True"],
        "two passes": ["TwoPasses made 2 passes in one step"],
        "lbfgs": ["use SGD, Adam"],
        "eager": ["interval='epoch'"],
        "sampler": ["torch.utils.data.Subset"],
        "batch sampler": ["batch_size=..."],
        "lengths": ["got [1, 2]"],
        "no length": ["got [None, None]"],
        "partitions": ["use_distributed_sampler=True"],
    }
    for said in run_jobs(refused_job, ranks=2, jobs=15):
        missing = [(name, text) for name, texts in remedies.items() for text in texts if text not in said.get(name, "")]
        assert not missing, said


def test_another_hook_is_refused() -> None:
    with pytest.raises(qgc.ConfigError, match="ddp_comm_hook"):
        QGCStrategy(ddp_comm_hook=print)


def test_without_lightning_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("torch_qgc.lightning")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    with pytest.raises(ImportError, match=r"torch_qgc\[lightning\]"):
        importlib.import_module("torch_qgc.lightning")


# --- who is slow -----------------------------------------------------------------------------------------


def test_the_slowest_worker_is_the_one_whose_own_steps_take_longest_though_all_wait_for_all() -> None:
    """Each worker's step: 1, 3 and 2 s of its own, and the waiting until the slowest is through."""
    store = torch.distributed.HashStore()
    clocks = [[0.0] for _ in range(RANKS)]
    times = [StepTimes(store, k, RANKS, name="job", now=lambda k=k: clocks[k][0]) for k in range(RANKS)]
    assert np.isnan(times[0].exchange()).all()
    for step in range(3):
        for k, own_s in enumerate((1.0, 3.0, 2.0)):
            times[k].begin(waited_s=step * (3.0 - own_s))
            clocks[k][0] += 3.0
            times[k].end(waited_s=(step + 1) * (3.0 - own_s))
            times[k].end(waited_s=100.0)  # of a replayed step: none has begun
    assert times[0].exchange()[0] == 1.0
    times[1].exchange()
    np.testing.assert_array_equal(times[2].exchange(), [1.0, 3.0, 2.0])
    np.testing.assert_array_equal(times[0].exchange(), [1.0, 3.0, 2.0])
    other = StepTimes(store, 0, RANKS, name="another job")
    assert np.isnan(other.exchange()).all()


# --- the parts --------------------------------------------------------------------------------------------


def test_each_ranks_training_loader_cuts_its_own_part_of_the_global_batch() -> None:
    lengths = []
    for rank, sizes in enumerate([{1: 3, 2: 1}, {1: 1, 2: 3}]):
        replica = FakeReplica(qgc.make_plan([0.1] * 2), rank, sizes=sizes)
        source = DataLoader(dataset(12), batch_size=2, sampler=DistributedSampler(dataset(12), 2, rank))
        coded = code_sampling(replica, source, partitions=None, seed=0)
        loader = ReplayingLoader(coded, Turn(replica))
        assert (len(loader), loader.batch_size) == (3, 2)
        lengths.append([])
        for x, _ in loader:
            lengths[rank].append(len(x))
            assert replica.taken[-1] == (len(x), 2, True)  # so that batches are chosen by what they take
            replica.make_step()
    assert lengths == [[2, 3, 1], [2, 1, 3]]


class Missing:
    """A state that misses the given steps."""

    def __init__(self, *steps: int) -> None:
        self.step, self.steps = 0, steps

    def missed(self) -> bool:
        return self.step in self.steps

    def decide_again(self) -> None:
        pass


def given(loader: ReplayingLoader, state: Missing, accumulate: int = 1) -> list[Any]:
    items = []
    for item in loader:
        items.append(item)
        state.step += len(items) % accumulate == 0
    return items


def test_replayed_steps_load_nothing_but_the_first_batch_of_an_epoch_is_computed() -> None:
    state = Missing(0, 2, 3, 6)
    loader = ReplayingLoader(list("abcdef"), Turn(state))
    assert "".join(given(loader, state)) == "abbbcd"
    assert "".join(given(loader, state)) == "abcdef"  # step 6 begins the second epoch


def test_a_step_that_was_left_in_the_middle_is_decided_again() -> None:
    state = Missing(1)
    loader = ReplayingLoader(list("abcdef"), Turn(state))
    batches = iter(loader)
    assert next(batches) == "a"
    state.step = 1
    assert next(batches) == "a"  # of step 1, which has closed without this rank; the epoch is left here
    assert "".join(given(loader, state)) == "abcdef"


def test_all_batches_of_an_accumulated_step_are_computed_or_replayed_together() -> None:
    state = Missing(1)
    assert "".join(given(ReplayingLoader(list("abcdef"), Turn(state)), state, accumulate=2)) == "abbbcd"


def test_a_loader_goes_on_from_its_checkpoint_in_the_same_epoch_only() -> None:
    source = DataLoader(list(range(6)), batch_size=None)
    first = ReplayingLoader(source, Turn(Missing()))
    first.set_epoch(4)
    batches = iter(first)
    assert [next(batches), next(batches)] == [0, 1]
    for epoch, expected in ((4, [2, 3, 4, 5]), (5, [0, 1, 2, 3, 4, 5])):
        second = ReplayingLoader(source, Turn(Missing()))
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        second.set_epoch(epoch)
        assert list(second) == expected
        assert list(second) == [0, 1, 2, 3, 4, 5]


def test_assignments_reach_the_wrapped_loader() -> None:
    source = DataLoader(list(range(6)))
    ReplayingLoader(source, Turn(Missing())).worker_init_fn = print
    assert source.worker_init_fn is print


class Anything:
    """Holds every parameter."""

    def __contains__(self, parameter: object) -> bool:
        return True


class OneTrack:
    plan = SimpleNamespace(second_track=None)
    layout = Anything()
    statement = SimpleNamespace(watch=lambda optimizer: None)

    def second_scale(self, parameter: torch.Tensor) -> float:
        return 1.0


def three_steps(name: str, *, code: bool) -> tuple[torch.optim.Optimizer, str, int]:
    """Return the optimizer, a digest of what it trained, and how often its hook was called."""
    torch.manual_seed(0)
    layer, called = torch.nn.Linear(3, 2), []
    optimizer = getattr(torch.optim, name)([{"params": [layer.weight], "lr": 0.3}, {"params": [layer.bias]}], lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    optimizer.register_step_post_hook(lambda *_: called.append(1))
    if code:
        assert make_coded(optimizer, OneTrack()) is optimizer  # type: ignore[arg-type]

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = layer(torch.ones(4, 3)).square().sum()
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
        scheduler.step()
    return optimizer, digest(layer), len(called)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_an_optimizer_becomes_a_coded_one_in_place_with_its_groups_scheduler_and_hooks(name: str) -> None:
    plain, wanted, _ = three_steps(name, code=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a scheduler warns if it no longer knows its optimizer's step
        coded, found, called = three_steps(name, code=True)
    assert type(coded) is getattr(qgc, f"Coded{name}")
    assert (found, called) == (wanted, 3)
    assert coded.state_dict()["param_groups"] == plain.state_dict()["param_groups"]
    assert coded.param_groups[0]["lr"] == pytest.approx(0.3 / 8)


def test_a_subclass_of_the_users_own_stays_what_it_is() -> None:
    optimizer = TwoPasses([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
    assert type(make_coded(optimizer, OneTrack())) is TwoPasses  # type: ignore[arg-type]
