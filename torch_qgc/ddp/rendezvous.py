"""Before the first step: what must be true of the DDP model, and what the ranks tell each other."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from torch_qgc.errors import ConfigError, QGCError
from torch_qgc.logs import logger
from torch_qgc.worker.layout import Layout

__all__ = ["agree", "check_model", "check_step", "exchanged_parameters", "gather", "scatter", "usable_deadline"]


def usable_deadline(model: Any, deadline_s: float | Literal["auto"] | None) -> float | Literal["auto"] | None:
    """Return the deadline, or None instead of "auto" where the model itself makes every rank wait for every other.

    Raises:
        ConfigError: a deadline was asked for, and the model makes it useless; names the remedy.
    """
    synced = [name for name, m in model.module.named_modules() if isinstance(m, torch.nn.SyncBatchNorm)]
    if deadline_s is None or not synced:
        return deadline_s
    problem = (
        f"SyncBatchNorm ({synced[0]}{', ...' if len(synced) > 1 else ''}) makes every rank wait for every other in "
        "each forward pass: use BatchNorm, whose statistics state.sync_buffers() averages before you evaluate, or "
        "deadline_s=None"
    )
    if deadline_s != "auto":
        raise ConfigError(problem)
    logger.warning("steps wait for all ranks: %s", problem)
    return None


def check_model(model: Any) -> DistributedDataParallel:
    """Refuse what cannot work, switch off what would bring the waiting back.

    Raises:
        ConfigError: names the remedy.
    """
    if not isinstance(model, DistributedDataParallel):
        raise ConfigError(
            f"expected a DistributedDataParallel model, got {type(model).__name__}: QGCState(DDP(model), ...)"
        )
    if model.find_unused_parameters:
        raise ConfigError(
            "DDP(find_unused_parameters=True) makes every rank wait for every other in each step (an all-reduce of the "
            "used parameters): use find_unused_parameters=False, and freeze parameters that get no gradient"
        )
    if model.mixed_precision is not None:
        raise ConfigError(
            "DDP(mixed_precision=...) does not take a communication hook: use torch.autocast in the training step"
        )
    if getattr(model, "_delay_all_reduce_params", None):
        raise ConfigError(
            "DDP(delay_all_reduce_named_params=...) all-reduces these parameters by itself, past the communication "
            "hook: leave it out"
        )
    if model.broadcast_buffers and any(True for _ in model.module.buffers()):
        model.broadcast_buffers = False
        warnings.warn(
            "QGCState switched off DDP's broadcast_buffers: it makes every rank wait for rank 0 in each forward pass. "
            "Buffers such as BatchNorm's statistics now differ between ranks; state.sync_buffers() averages them "
            "before you evaluate. DDP(broadcast_buffers=False), or forward_sync_buffers=False where torch has it, "
            "silences this notice.",
            stacklevel=3,
        )
    return model


def exchanged_parameters(model: DistributedDataParallel) -> list[tuple[str, torch.nn.Parameter]]:
    """Return the parameters whose gradients DDP exchanges: all that it was not told to ignore."""
    ignored = getattr(model, "parameters_to_ignore", ())
    return [(name, p) for name, p in model.module.named_parameters() if name not in ignored]


def check_step(
    model: DistributedDataParallel, layout: Layout, others: Sequence[tuple[torch.nn.Parameter, bool]]
) -> None:
    """Refuse what can change between steps and then does not work.

    Args:
        others: parameters that are not exchanged, and whether they needed a gradient when the layout was made.
    Raises:
        ConfigError: names the remedy.
    """
    if getattr(getattr(model, "_join_config", None), "enable", False):
        raise ConfigError(
            "Join makes every rank wait for every other in each forward pass, and would count exhausted ranks as zero "
            "gradients: leave it out, state.loader(...) gives every rank's loop the same number of steps"
        )
    if any(p.requires_grad != needed for p, needed in others) or not all(p.requires_grad for p in layout.parameters):
        raise ConfigError(
            "requires_grad of a parameter was changed after QGCState(model), whose layout is fixed, like DDP's: close "
            "the state, make DDP and QGCState again and hand the state_dict on"
        )


@contextlib.contextmanager
def agree(process_group: dist.ProcessGroup | None) -> Iterator[None]:
    """Let what one rank refuses in this block be refused by all: nobody is left waiting for it.

    Raises:
        ConfigError: on every rank if this rank or another has raised a QGCError.
    """
    error: QGCError | None = None
    try:
        yield
    except QGCError as own:
        error = own
    problems = gather(process_group, None if error is None else str(error)) if process_group is not None else []
    if error is not None:
        raise error
    for rank, problem in enumerate(problems):
        if problem is not None:
            raise ConfigError(f"rank {rank}: {problem}")


def gather(process_group: dist.ProcessGroup | None, value: Any) -> list[Any]:
    """Return every rank's value, in rank order."""
    values: list[Any] = [None] * dist.get_world_size(process_group)
    dist.all_gather_object(values, value, group=process_group)
    return values


def scatter(process_group: dist.ProcessGroup | None, values: Sequence[Any] | None) -> Any:
    """Return this rank's value of those that rank 0 has, one for each rank; None on the others."""
    own: list[Any] = [None]
    source = 0 if process_group is None else dist.get_global_rank(process_group, 0)
    dist.scatter_object_list(own, None if values is None else list(values), src=source, group=process_group)
    return own[0]
