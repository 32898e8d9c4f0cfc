"""Four ways for DDP's workers to average their gradients, behind one training loop."""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader, Dataset, DistributedSampler

import torch_qgc as qgc
from common.result import ring_bytes

TITLES = {
    "ddp": "DDP, fp32",
    "bf16": "DDP, bf16 hook",
    "powersgd": "DDP, PowerSGD hook",
    "qgc": "torch_qgc",
}
POWERSGD_RANK = 1  # rank 4 raised on gloo
POWERSGD_START = 10  # steps that still use the plain all-reduce; DDP has rebuilt its buckets by then


class Way:
    """One of TITLES, attached to a DDP model: the hook, and the parts of a loop that depend on it.

    Args:
        name: "ddp" leaves the model as it is; "bf16" and "powersgd" register torch's hooks, "qgc" ours.
        model: a DDP model without a hook.
        **coding: QGCState's arguments, for "qgc" alone.
    """

    def __init__(self, name: str, model: DistributedDataParallel, **coding: Any) -> None:
        if name not in TITLES:
            raise ValueError(f"way: expected one of {', '.join(TITLES)}, got {name!r}")
        self.name, self._model = name, model
        self.state: qgc.QGCState | None = None
        self._power_sgd: PowerSGDState | None = None
        self._update: Callable[[], None] | None = None
        if name == "qgc":
            self.state = qgc.QGCState(model, **coding)
            model.register_comm_hook(self.state, qgc.qgc_hook)
        elif name == "powersgd":
            self._power_sgd = PowerSGDState(
                None, matrix_approximation_rank=POWERSGD_RANK, start_powerSGD_iter=POWERSGD_START
            )
            model.register_comm_hook(self._power_sgd, power_sgd_bucket_by_bucket)
        elif name == "bf16":
            model.register_comm_hook(None, bf16_compress_hook)

    def loader(self, dataset: Dataset[Any], *, batch_size: int, seed: int, **kwargs: Any) -> Any:
        """Make this rank's loader: a coded one, or torch's with a DistributedSampler."""
        if self.state:
            loader = self.state.loader(dataset, batch_size=batch_size, seed=seed, **kwargs)
            self.set_epoch = loader.set_epoch
            return loader
        sampler: DistributedSampler[Any] = DistributedSampler(dataset, seed=seed)
        self.set_epoch = sampler.set_epoch
        return DataLoader(dataset, batch_size=batch_size, sampler=sampler, **kwargs)

    def bind(self, optimizer: Any, *, scheduler: Any = None, max_grad_norm: float | None = None) -> None:
        """Say how gradients become parameters, for `update`."""
        if self.state:
            self.state.bind(optimizer, scheduler=scheduler, max_grad_norm=max_grad_norm)
            self._update = self.state.update
            return

        def update() -> None:
            if max_grad_norm is not None:
                clip_grad_norm_(self._model.parameters(), max_grad_norm)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            optimizer.zero_grad()

        self._update = update

    def update(self) -> None:
        """Clip, step the optimizer and the scheduler, clear the gradients."""
        assert self._update is not None, "bind first"
        self._update()

    @property
    def waited_s(self) -> float:
        """Seconds this rank has waited for others, as far as that can be told: DDP's own waiting cannot."""
        return self.state.report().wait_s if self.state else 0.0

    @property
    def bytes_per_step(self) -> float | None:
        """Bytes a rank sends per step in torch's all-reduces, computed; None for torch_qgc, which counts its own."""
        if self.state:
            return None
        numel = float(sum(p.numel() for p in self._model.parameters()))
        if self._power_sgd and self._power_sgd.total_numel_before_compression:  # of its compressed steps alone
            numel *= self._power_sgd.total_numel_after_compression / self._power_sgd.total_numel_before_compression
        width = 2.0 if self.name == "bf16" else 4.0
        return ring_bytes(numel, workers=dist.get_world_size(), bytes_per_coordinate=width)

    def sync_buffers(self) -> None:
        """Make BatchNorm's statistics the same on all ranks: averaged, or rank 0's where DDP takes those."""
        if self.state:
            self.state.sync_buffers()
        else:
            for buffer in self._model.module.buffers():
                dist.broadcast(buffer, 0)

    def close(self) -> None:
        """Leave the job."""
        if self.state:
            self.state.close()


def power_sgd_bucket_by_bucket(state: PowerSGDState, bucket: dist.GradBucket) -> Future[Tensor]:
    """Run torch's powerSGD_hook and wait for it, before the next bucket is taken.

    Its all-reduces follow each other in callbacks. On gloo those of several buckets come in different orders on
    different ranks, and the job crashes ("Received data size doesn't match expected size").
    """
    future = powerSGD_hook(state, bucket)
    future.wait()
    return future
