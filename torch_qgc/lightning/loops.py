"""The two places where Lightning's training loop waits for every rank in each step, or lets ranks disagree."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer

__all__ = ["agree_on_monitored", "obey_own_signals"]


def obey_own_signals(trainer: Trainer) -> None:
    """Let each rank obey the SIGTERM it gets itself.

    Lightning 2.6 broadcasts rank 0's flag before each batch, so everybody would wait for rank 0 in each step. torchrun
    and SLURM send the signal to all ranks, as Lightning's own launcher does when rank 0 gets it.
    """
    loop = trainer.fit_loop.epoch_loop
    if hasattr(loop, "_broadcast_sigterm_tensor"):
        loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def agree_on_monitored(trainer: Trainer) -> None:
    """Let ReduceLROnPlateau see the mean over ranks of what it monitors.

    A metric that was logged without sync_dist differs between ranks; so would their learning rates, and with them the
    replicas.
    """

    def mean_over_ranks(key: str) -> torch.Tensor | None:
        value = trainer.callback_metrics.get(key)
        values: list[Any] = [None] * trainer.world_size
        dist.all_gather_object(values, None if value is None else float(value))
        return None if None in values else torch.tensor(values).mean()

    trainer.fit_loop.epoch_loop._get_monitor_value = mean_over_ranks  # type: ignore[method-assign]
