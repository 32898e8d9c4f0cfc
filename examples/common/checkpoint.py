"""Checkpoints of a whole job, written where all workers are at the same step: behind a loader's loop."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import torch_qgc as qgc

NAME = "checkpoint.pt"


def save(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    state: qgc.QGCState | None,
    **extra: Any,
) -> None:
    """Write model, optimizer, scheduler, torch_qgc's state and `extra`; a crash leaves the old file or the new one.

    On every rank: the replicas are bit-identical, so rank 0 writes for all (buffers are rank 0's).
    """
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler} | ({"qgc": state} if state else {})
    content = {name: part.state_dict() for name, part in parts.items()} | {"extra": extra}
    if dist.get_rank() == 0:
        partial = folder / (NAME + ".partial")
        torch.save(content, partial)
        partial.replace(folder / NAME)


def restore(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, state: qgc.QGCState | None
) -> dict[str, Any]:
    """Load what `save` wrote and return its `extra`; empty where there is no checkpoint. Before the first step."""
    if not (folder / NAME).exists():
        return {}
    content = torch.load(folder / NAME, weights_only=True, map_location="cpu")
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler} | ({"qgc": state} if state else {})
    for name, part in parts.items():
        part.load_state_dict(content[name])
    return content["extra"]
