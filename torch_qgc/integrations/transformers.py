"""Hugging Face's Trainer: `trainer.add_callback(QGCCallback(trainer, ...))`. It needs `torch_qgc[transformers]`.

The Trainer's own loop runs on every rank, for every step. For a step that has closed without this rank its batches are
thin, so that logging, evaluation, checkpoints and schedules line up without further ado.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

try:
    from accelerate.data_loader import DataLoaderDispatcher
    from transformers import Trainer, TrainerCallback
except ImportError as error:
    raise ImportError(
        "torch_qgc.integrations.transformers: expected transformers and accelerate, got no module "
        f"{error.name!r}: pip install 'torch_qgc[transformers]'",
        name=error.name,
    ) from error

import torch
from torch.nn.parallel import DistributedDataParallel

from torch_qgc.ddp.numbers import check_framework
from torch_qgc.ddp.optim import make_coded
from torch_qgc.ddp.state import QGCState, attach
from torch_qgc.ddp.thin import batch_size_of, first_samples
from torch_qgc.ddp.thinner import Slice, Thinner
from torch_qgc.errors import ConfigError

__all__ = ["QGCCallback", "make_coded_inside"]


class QGCCallback(TrainerCallback):  # type: ignore[misc,unused-ignore]
    """Let a Trainer train with quantized gradient coding.

        args = TrainingArguments(..., ddp_find_unused_parameters=False)
        trainer = Trainer(model, args, ...)
        trainer.add_callback(QGCCallback(trainer, deadline_s=0.5))
        trainer.train()

    Args:
        trainer: the one that it is added to.
        thin: samples of a batch for a step that has closed without this rank.
        slice: (batch, samples) -> the batch with that many samples, for batches that cannot be cut along dim 0.
        **options: QGCState's (`bits_per_coordinate`, `deadline_s`, ...).
    Attributes:
        state: the QGCState since the Trainer's first `train()`, None before. It is closed when the process ends, or by
            `close()`; until then further calls of `train()` go on with it.
    Raises:
        ConfigError: the Trainer was asked for something that cannot work, with the remedy.
    """

    def __init__(self, trainer: Trainer, *, thin: int = 2, slice: Slice | None = None, **options: Any) -> None:
        self.state: QGCState | None = None
        self._trainer, self._options = trainer, options
        self._thin, self._slice = thin, slice
        self._thinner: Thinner | None = None
        self._model: Any = None
        self._averages_buffers = False
        _check(trainer, may_be_late=options.get("deadline_s", "auto") is not None)
        samples = trainer.get_batch_samples

        def thinned(epoch_iterator: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
            thinner = self._thinner
            if thinner is not None and thinner.closed_without_us():  # decided for all batches of the step at once
                epoch_iterator = map(thinner.thin, epoch_iterator)
            return samples(epoch_iterator, *args, **kwargs)

        trainer.get_batch_samples = thinned  # type: ignore[method-assign,unused-ignore]

    # --- what the Trainer calls -------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach to the model that the Trainer has wrapped."""
        trainer = self._trainer
        model = trainer.model_wrapped
        if self.state is not None and model is self._model:
            return  # a further call of train()
        if not isinstance(model, DistributedDataParallel):
            raise ConfigError(
                f"QGCCallback: expected a model that the Trainer has wrapped in DistributedDataParallel, got "
                f"{type(model).__name__}: start the script with torchrun or accelerate launch, on at least two "
                "processes, without DeepSpeed or FSDP"
            )
        may_be_late = self._options.get("deadline_s", "auto") is not None
        if may_be_late and isinstance(kwargs.get("train_dataloader"), DataLoaderDispatcher):
            raise ConfigError(
                "a training loader that rank 0 reads and broadcasts makes every rank wait in each step: "
                "TrainingArguments(accelerator_config={'dispatch_batches': False}), and a stream that each rank cuts"
            )
        self.close()
        self._model, self.state = model, attach(model, **self._options)
        check_framework("QGCCallback", self.state.workers)
        self.state.scaler = trainer.accelerator.scaler
        if state.global_step:  # a resumed run: the job counts on from there
            self.state.replica.start_at(state.global_step, self.state.replica.spec.seed, self.state.plan)
        usual = trainer.args.train_batch_size
        cut = self._slice or (lambda batch, n: first_samples(batch, n, batch_size_of(batch) or usual))
        self._thinner = Thinner(self.state.replica, self._thin, cut)
        self._averages_buffers = any(getattr(m, "running_mean", None) is not None for m in model.modules())
        assert trainer.optimizer is not None
        make_coded_inside(trainer.optimizer, self.state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let all ranks evaluate and save with the same statistics."""
        if self.state is not None and self._averages_buffers and (control.should_evaluate or control.should_save):
            self.state.sync_buffers()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell the job where this rank's epoch has ended."""
        if self.state is not None:
            self.state.replica.loop_ended(owed=0)
        self.on_step_end(args, state, control)

    def close(self) -> None:
        """Compare replicas a last time and leave the job."""
        if self.state is not None:
            self.state.close()
        self._thinner = None


def _check(trainer: Trainer, *, may_be_late: bool) -> None:
    """Refuse, or switch off, what would make every rank wait in each step."""
    args, handler = trainer.args, getattr(trainer.accelerator, "ddp_handler", None)
    if handler is not None and handler.find_unused_parameters:
        raise ConfigError(
            "the Trainer would make DDP with find_unused_parameters=True (its default), where every rank waits for "
            "every other in each step: TrainingArguments(ddp_find_unused_parameters=False), and freeze parameters that "
            "get no gradient"
        )
    if not hasattr(trainer, "get_batch_samples"):
        raise ConfigError("expected a Trainer of transformers 4.46 or newer: get_batch_samples is not there")
    if args.torch_compile:
        raise ConfigError("TrainingArguments(torch_compile=True) has not been tried with QGCCallback: leave it out")
    if not may_be_late:
        return
    if getattr(args, "include_num_input_tokens_seen", "no") not in ("no", False):
        raise ConfigError(
            "TrainingArguments(include_num_input_tokens_seen=...) gathers counts from every rank in each step: leave "
            "it out, or deadline_s=None"
        )
    if getattr(args, "average_tokens_across_devices", False):
        args.average_tokens_across_devices = False
        warnings.warn(
            "QGCCallback switched off average_tokens_across_devices: it gathers token counts from every rank in each "
            "step. Each rank's loss is now the mean over its own tokens. "
            "TrainingArguments(average_tokens_across_devices=False) silences this notice.",
            stacklevel=3,
        )


def make_coded_inside(optimizer: torch.optim.Optimizer, state: QGCState) -> None:
    """Turn the optimizer inside of accelerate's wrapper into a coded one, in place."""
    inner = getattr(optimizer, "optimizer", optimizer)
    make_coded(inner, state.replica)
    if getattr(optimizer, "scaler", None) is not None:
        # For a scaler the wrapper changes the optimizer's step to and fro, between these two.
        from accelerate.optimizer import patch_optimizer_step

        optimizer._optimizer_original_step_method = inner.step  # type: ignore[attr-defined]
        optimizer._optimizer_patched_step_method = patch_optimizer_step(optimizer, inner.step)  # type: ignore[attr-defined]
