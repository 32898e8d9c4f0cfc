"""What a Trainer may be asked for that cannot work when ranks do not wait for each other."""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
    Timer,
)
from lightning.pytorch.callbacks.spike import SpikeDetection
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from torch_qgc.errors import ConfigError

__all__ = ["check_trainer"]


def check_trainer(trainer: Trainer, *, may_be_late: bool) -> None:
    """Refuse what would bring the waiting back in each step, or what a late rank could not replay.

    Args:
        trainer: about to fit.
        may_be_late: steps close at a deadline.
    Raises:
        ConfigError: names all that was found, each with its remedy.
    """
    found = _for_any_job(trainer) + (_with_a_deadline(trainer) if may_be_late else [])
    problems = [text for is_there, text in found if is_there]
    if problems:
        which = "strategy 'qgc' with a deadline" if may_be_late else "strategy 'qgc'"
        raise ConfigError(f"{which} cannot work with " + "; nor with ".join(problems))


def _callbacks(trainer: Trainer, *kinds: type[object]) -> list[object]:
    return [c for c in trainer.callbacks if isinstance(c, kinds)]  # type: ignore[attr-defined]


def _named(callbacks: list[object]) -> str:
    return ", ".join(sorted({type(c).__name__ for c in callbacks}))


def _for_any_job(trainer: Trainer) -> list[tuple[bool, str]]:
    finetuning = _callbacks(trainer, BaseFinetuning)
    finders = _callbacks(trainer, LearningRateFinder)
    return [
        (
            bool(finetuning),
            f"{_named(finetuning)}: it unfreezes parameters during the fit, which DDP's buckets and the layout of the "
            "exchange do not know; call fit once with the backbone frozen (requires_grad_(False)) and a second time "
            "with it unfrozen, each fit makes both anew",
        ),
        (
            bool(finders),
            f"{_named(finders)}: it makes trial steps, takes them back and ends them by each rank's own loss, "
            "and the ranks would disagree about steps; find the value in a run of its own on one device",
        ),
    ]


def _with_a_deadline(trainer: Trainer) -> list[tuple[bool, str]]:
    module = trainer.lightning_module
    callbacks: list[object] = trainer.callbacks  # type: ignore[attr-defined]
    spikes = _callbacks(trainer, SpikeDetection)
    timers = [c for c in callbacks if isinstance(c, Timer) and c._interval == "step"]
    timed = [c for c in callbacks if isinstance(c, ModelCheckpoint) and c._train_time_interval is not None]
    averaging = [c for c in callbacks if isinstance(c, StochasticWeightAveraging)]
    takes_iterator = is_overridden("training_step", module) and is_param_in_hook_signature(
        module.training_step, "dataloader_iter", explicit=True
    )
    return [
        (
            not module.automatic_optimization,
            "manual optimization: a late rank replays a step without running training_step, where the optimizer is "
            "called; use automatic optimization (one optimizer), or deadline_s=None",
        ),
        (
            takes_iterator,
            "training_step(dataloader_iter): a late rank replays a step without running it; take a batch instead",
        ),
        (
            bool(timers),
            "Trainer(max_time=...): rank 0's clock is broadcast in each step; use Timer(..., interval='epoch'), "
            "max_steps or max_epochs",
        ),
        (
            bool(timed),
            "ModelCheckpoint(train_time_interval=...): rank 0's clock is broadcast in each step; take every_n_epochs",
        ),
        (
            getattr(trainer, "_val_check_time_interval", None) is not None,
            "a val_check_interval in time: ranks' clocks decide differently; give a number of batches",
        ),
        (
            bool(averaging),
            "StochasticWeightAveraging: it runs an epoch without steps; use the callback WeightAveraging",
        ),
        (
            bool(spikes),
            f"{_named(spikes)}: it waits for every rank after each batch; leave it out, or check the loss where you "
            "validate",
        ),
        (
            trainer.strategy._layer_sync is not None,  # type: ignore[attr-defined]
            "Trainer(sync_batchnorm=True): every forward pass would wait for every rank; leave it out, the running "
            "statistics are averaged before validation and checkpoints",
        ),
        (
            trainer.overfit_batches > 0,  # type: ignore[attr-defined]
            "Trainer(overfit_batches=...): the plan draws in another order each epoch; train on a "
            "torch.utils.data.Subset",
        ),
    ]
