"""torch's own ways to average gradients in fewer bytes, to compare with."""

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

TITLES = {"ddp": "DDP, fp32", "bf16": "DDP, bf16 hook", "powersgd": "DDP, PowerSGD hook", "qgc": "torch_qgc"}
# Rank 4 raised on gloo; behind 10 steps with the plain all-reduce DDP has rebuilt its buckets.
POWERSGD = {"matrix_approximation_rank": 1, "start_powerSGD_iter": 10}


def attach(way: str, model: DistributedDataParallel) -> Callable[[], float]:
    """Register the hook of "bf16" or "powersgd"; "ddp" has none. Return what computes its part of fp32's bytes."""
    if way == "powersgd":
        state = PowerSGDState(None, **POWERSGD)
        model.register_comm_hook(state, _bucket_by_bucket)
        return lambda: 1 / max(state.compression_stats()[0], 1)  # of its compressed steps
    if way == "bf16":
        model.register_comm_hook(None, bf16_compress_hook)
    return lambda: 0.5 if way == "bf16" else 1.0


def _bucket_by_bucket(state: PowerSGDState, bucket: dist.GradBucket) -> Future[Tensor]:
    """Run powerSGD_hook and wait for it: on gloo the all-reduces of several buckets would mix, and the job crash."""
    future = powerSGD_hook(state, bucket)
    future.wait()
    return future
