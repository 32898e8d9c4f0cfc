"""Before the first step: what must be true of the DDP model, and how workers and aggregators find each other."""

from __future__ import annotations

import contextlib
import socket
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from torch_qgc.aggregator.process import AggregatorProcess
from torch_qgc.errors import ConfigError, JobFailed, QGCError
from torch_qgc.logs import logger
from torch_qgc.worker.layout import Layout

__all__ = [
    "Network",
    "agree",
    "check_model",
    "check_step",
    "exchanged_parameters",
    "start_aggregators",
    "usable_deadline",
]


@dataclass(frozen=True, kw_only=True)
class Network:
    """How workers reach the aggregators.

    Args:
        host: address on which aggregators that are started as children of this job listen.
        insecure: allow a host that other machines can reach, without encryption; on a network you trust.
        endpoints: addresses of aggregators that run already (`qgc aggregator --bind`); none is started then.
        trace: a file for the events of the aggregators that are started, one JSON line each; "{}" in its name becomes
            the aggregator's number.
    """

    host: str = "127.0.0.1"
    insecure: bool = False
    endpoints: tuple[str, ...] = ()
    trace: str | None = None


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


def start_aggregators(
    process_group: dist.ProcessGroup | None, count: int, network: Network
) -> tuple[Sequence[str], list[AggregatorProcess]]:
    """Start aggregator i as a child of rank i mod K, and tell every rank where they are.

    Returns:
        The endpoints of all aggregators, and the ones that this rank started.
    Raises:
        ConfigError: on every rank if it happens on one.
    """
    if network.endpoints:
        return network.endpoints, []
    rank, workers = dist.get_rank(process_group), dist.get_world_size(process_group)
    children: list[AggregatorProcess] = []
    try:
        with agree(process_group):
            hosts = sorted(set(gather(process_group, socket.gethostname())))
            if len(hosts) > 1 and network.host in ("127.0.0.1", "localhost", "::1"):
                raise ConfigError(
                    f"the ranks run on {len(hosts)} machines ({', '.join(hosts[:4])}), but the aggregator would listen "
                    f"on {network.host} alone: Network(host=<rank 0's address>, insecure=True) on a network you trust"
                )
            for index in range(rank, count, workers):
                children.append(_start(network, index, count))
    except QGCError:
        for child in children:
            child.stop(timeout_s=0.0)
        raise
    found = gather(process_group, [child.endpoint for child in children])
    return [found[index % workers][index // workers] for index in range(count)], children


def _start(network: Network, index: int, count: int) -> AggregatorProcess:
    trace = None if network.trace is None else network.trace.format(index)
    try:
        return AggregatorProcess(network.host, index=index, count=count, insecure=network.insecure, trace=trace)
    except OSError as error:
        raise JobFailed(f"the aggregator's process cannot be started: {error}") from error
