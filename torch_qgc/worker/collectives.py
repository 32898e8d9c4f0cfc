"""What all workers of a job do together outside of its steps, over aggregator 0: it goes on without those that die."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from typing import Any

import torch

from torch_qgc.errors import CollectiveFailed, ConfigError, ProtocolError
from torch_qgc.worker.content import pack, unpack
from torch_qgc.worker.position import Phase
from torch_qgc.worker.replica import Replica

__all__ = ["Collectives", "weighted_mean"]

#: Steps from which on a running average has all but forgotten what it began with: 2 / BatchNorm's usual least momentum.
_REMEMBERED_STEPS = 200


class Collectives:
    """Gather objects, meet, and average buffers; see the methods of the same names of `torch_qgc.QGCState`.

    Args:
        replica: this worker's; it joins its job with the first collective, should it have made no step yet.
    """

    def __init__(self, replica: Replica) -> None:
        self._replica = replica

    def all_gather(self, value: Any, timeout_s: float, *, call: str = "all_gather") -> dict[int, Any]:
        """Return the value of every worker in the job, by its number.

        Raises:
            ConfigError: the value is none that can travel, or the job was left.
            CollectiveFailed: not all came in time, or they have called different things.
        """
        replica = self._replica
        if replica.position.phase is Phase.LEFT:
            raise ConfigError(f"{call}: expected a job that goes on, got one that was left: call it before close()")
        content = pack([call, value])
        connection, _ = replica.joined()
        replica.made_collective()
        heard = {k: _read(k, content) for k, content in connection.gather(content, timeout_s).items()}
        calls = {k: name for k, (name, _) in heard.items()}
        if len(set(calls.values())) > 1:
            raise CollectiveFailed(f"expected the same call on all ranks, got {calls}: make them in the same order")
        return {k: value for k, (_, value) in heard.items()}

    def barrier(self, timeout_s: float) -> None:
        """Wait until every worker in the job is here."""
        self.all_gather(None, timeout_s, call="barrier")

    @torch.no_grad()
    def sync_buffers(self, module: torch.nn.Module, timeout_s: float) -> None:
        """Make a module's buffers equal on all workers; those that are equal do not travel."""
        buffers = dict(module.named_buffers())
        if not buffers:
            return
        call, until_s = "sync_buffers", time.monotonic() + timeout_s
        stated = self.all_gather({name: _digest(b) for name, b in buffers.items()}, timeout_s, call=call)
        differing = [name for name in buffers if len({each.get(name) for each in stated.values()}) > 1]
        if not differing:
            return
        weight = float(min(self._replica.counts.computed_steps, _REMEMBERED_STEPS))
        mine = [weight, [buffers[name] for name in differing]]
        heard = list(self.all_gather(mine, until_s - time.monotonic(), call=call).values())
        weights = [weight for weight, _ in heard]
        for i, name in enumerate(differing):
            values = [tensors[i] for _, tensors in heard]
            kinds = {(tuple(v.shape), v.dtype) for v in values}
            if len(kinds) > 1:
                raise CollectiveFailed(f"buffer {name!r}: expected one shape and type on all ranks, got {kinds}")
            buffers[name].copy_(weighted_mean(values, weights) if values[0].is_floating_point() else values[0])


def weighted_mean(values: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Average tensors in float64, one operation at a time, so that all machines round alike.

    sum_k w_k x_k / sum_k w_k, or the plain mean where nobody has any weight.

    Args:
        values: K tensors of one shape and floating-point type.
        weights: [K], not negative; what has weight 0 has no say, whatever it is.
    """
    weights = weights if any(weights) else [1.0] * len(values)
    mean = torch.zeros_like(values[0], dtype=torch.float64)
    for value, weight in zip(values, weights):
        if weight:
            mean += value.double() * weight
    return (mean / sum(weights)).to(values[0].dtype)


def _digest(buffer: torch.Tensor) -> bytes:
    return hashlib.blake2b(pack(buffer), digest_size=16).digest()


def _read(worker: int, content: bytes) -> tuple[str, Any]:
    value = unpack(content, f"what worker {worker} has handed over")
    if not isinstance(value, list) or len(value) != 2 or not isinstance(value[0], str):
        raise ProtocolError(f"what worker {worker} has handed over: expected a call and a value, got something else")
    return value[0], value[1]
