"""Loops as accelerate, timm and torchvision's references write them, with one rank late by an event."""

from __future__ import annotations

import contextlib
import copy
import os
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.ranks import aggregators, run_ranks
from torch.nn.functional import cross_entropy, mse_loss
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import torch_qgc as qgc

RANKS, LATE, LATE_AT = 3, 1, 4
BATCH, STEPS = 4, 9


def images(classes: int = 0) -> TensorDataset:
    """Two epochs of STEPS batches on every rank."""
    x = torch.randn(STEPS * BATCH * RANKS, 6, generator=torch.Generator().manual_seed(5))
    if classes:
        return TensorDataset(x, x.argmax(1) % classes)
    return TensorDataset(x, torch.sin(x).sum(1, keepdim=True))


def network(outputs: int = 1) -> torch.nn.Sequential:
    torch.manual_seed(0)
    layers = torch.nn.Linear(6, 40), torch.nn.BatchNorm1d(40), torch.nn.Tanh(), torch.nn.Linear(40, outputs)
    return torch.nn.Sequential(*layers)


def options_for(endpoint: str) -> dict[str, Any]:
    return {"deadline_s": 0.1, "verify_every": 4, "network": qgc.Network(endpoints=(endpoint,))}


def fall_behind(state: qgc.QGCState, at: int = LATE_AT) -> None:
    """On the late rank: sleep until the others have closed this step and the next without it."""
    if dist.get_rank() == LATE and state.step == at and not state.replica.in_step:
        give_up = time.monotonic() + 20.0
        while not state.replica.joined()[0].closed(at + 1) and time.monotonic() < give_up:
            time.sleep(0.02)


def seen(state: qgc.QGCState, *also: Any, **numbers: Any) -> dict[str, Any]:
    """Leave the job, and return what must be equal on all ranks, and the report."""
    tensors = [p.detach() for each in also for p in (each.parameters() if hasattr(each, "parameters") else each)]
    digests = [float(t.double().sum()) for t in tensors]
    dist.barrier()
    state.close()
    return {"agreed": (state.step, state.replica.layout.parameter_digest(), digests, numbers), "report": state.report()}


def check(loop: Callable[..., Any], steps: int, *args: Any) -> list[Any]:
    with aggregators(1) as endpoints:
        ranks = run_ranks(loop, endpoints[0], *args, ranks=RANKS, timeout_s=60)
    for found in ranks:
        assert found["agreed"] == ranks[0]["agreed"]
        assert found["agreed"][0] == steps
        assert not found["report"].rejections
    assert ranks[LATE]["report"].thin_steps >= 1
    assert sum(found["report"].computed_steps for found in ranks) >= steps  # no step closes without anybody
    return ranks


# --- accelerate -------------------------------------------------------------------------------------------


def accelerated(rank: int, endpoint: str, accumulate: int) -> dict[str, Any]:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "ACCELERATE_USE_CPU": "1"}
    os.environ |= {"LOCAL_WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2 * STEPS * RANKS)
    loader = DataLoader(images(), batch_size=BATCH, shuffle=True)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    state = qgc.attach(model, **options_for(endpoint))
    loader = state.follow(loader)
    for _ in range(2):
        for x, y in loader:
            fall_behind(state)
            with accelerator.accumulate(model):
                loss = mse_loss(model(x), y)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    state.sync_buffers()
    mean = accelerator.gather(loss.detach()).mean()
    return seen(state, model, model.buffers(), lr=scheduler.get_last_lr(), loss=float(mean))


@pytest.mark.parametrize(("accumulate", "steps"), [(1, 2 * STEPS), (2, 10)])
def test_accelerate(accumulate: int, steps: int) -> None:
    pytest.importorskip("accelerate")
    check(accelerated, steps, accumulate)


# --- timm -------------------------------------------------------------------------------------------------


class Prefetcher:
    """Holds a batch in reserve, as timm's PrefetchLoader does; its attributes are the loader's."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        held: Any = None
        for following in self.loader:
            if held is not None:
                yield held
            held = following
        yield held

    def __len__(self) -> int:
        return len(self.loader)

    @property
    def sampler(self) -> Any:
        return self.loader.sampler


class Mixup:
    """Mix each batch with itself in reverse; takes even batches only."""

    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert len(x) % 2 == 0, "Batch size should be even when using this"
        share = torch.rand(())
        soft = torch.nn.functional.one_hot(y, 3).float()
        return x * share + x.flip(0) * (1 - share), soft * share + soft.flip(0) * (1 - share)


class NativeScaler:
    """Backward pass, clipping and step in one call."""

    def __call__(
        self, loss: torch.Tensor, optimizer: Any, *, clip_grad: float, parameters: Any, need_update: bool
    ) -> None:
        loss.backward()
        if need_update:
            torch.nn.utils.clip_grad_norm_(parameters, clip_grad)
            optimizer.step()


class ModelEma(torch.nn.Module):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.module = copy.deepcopy(model).eval()

    @torch.no_grad()
    def update(self, model: torch.nn.Module) -> None:
        for average, value in zip(self.module.state_dict().values(), model.state_dict().values()):
            average.copy_(0.9 * average + 0.1 * value)


def timm_style(rank: int, endpoint: str, accumulate: int) -> dict[str, Any]:
    """`train_one_epoch` of timm's train.py."""
    data = images(classes=3)
    model = network(3)
    ema = ModelEma(model)
    model = DistributedDataParallel(model, broadcast_buffers=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sampler = DistributedSampler(data, seed=1)
    loader = Prefetcher(DataLoader(data, batch_size=BATCH, sampler=sampler, drop_last=True))
    state = qgc.attach(model, **options_for(endpoint))
    state.verify_also(ema=ema)
    loader = state.follow(loader)
    mixup, scaler = Mixup(), NativeScaler()
    updates = 0
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        last_batch = len(loader) - 1
        optimizer.zero_grad()
        model.train()
        for index, (x, y) in enumerate(loader):
            fall_behind(state, LATE_AT if accumulate == 1 else 6)  # an epoch's end, where all meet, is not in between
            need_update = index == last_batch or (index + 1) % accumulate == 0
            x, y = mixup(x, y)
            with contextlib.nullcontext() if need_update else model.no_sync():
                loss = cross_entropy(model(x), y) / accumulate
                scaler(loss, optimizer, clip_grad=1.0, parameters=model.parameters(), need_update=need_update)
            if not need_update:
                continue
            updates += 1
            optimizer.zero_grad()
            ema.update(model.module)
            for group in optimizer.param_groups:  # scheduler.step_update(num_updates=...)
                group["lr"] = 1e-2 * 0.95**updates
        state.sync_buffers()  # distribute_bn
    return seen(state, model, ema.module, updates=updates, lr=optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize(("accumulate", "steps"), [(1, 2 * STEPS), (2, 10)])
def test_a_loop_as_timm_writes_it(accumulate: int, steps: int) -> None:
    check(timm_style, steps, accumulate)


# --- torchvision's references -----------------------------------------------------------------------------


class MetricLogger:
    """Smoothed values, and `log_every` around a loader, as in references/classification/utils.py."""

    def __init__(self) -> None:
        self.meters: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=20))
        self.printed: list[str] = []

    def update(self, **values: Any) -> None:
        for name, value in values.items():
            self.meters[name].append(float(value))

    def log_every(self, iterable: Any, print_freq: int, header: str) -> Iterator[Any]:
        for i, item in enumerate(iterable):
            yield item
            if i % print_freq == 0:
                self.printed.append(f"{header} [{i}/{len(iterable)}] {dict(self.meters)}")

    def synchronize_between_processes(self) -> dict[str, float]:
        found = {}
        for name, values in sorted(self.meters.items()):
            pair = torch.tensor([len(values), sum(values)], dtype=torch.float64)
            dist.barrier()
            dist.all_reduce(pair)
            found[name] = float(pair[1] / pair[0])
        return found


def reference_style(rank: int, endpoint: str) -> dict[str, Any]:
    """`train_one_epoch` and `evaluate` of torchvision's references/classification/train.py."""
    data = images(classes=3)
    sampler = DistributedSampler(data, seed=1)
    data_loader = DataLoader(data, batch_size=BATCH, sampler=sampler)
    model = DistributedDataParallel(network(3), broadcast_buffers=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.1)
    ema = torch.optim.swa_utils.AveragedModel(model.module, avg_fn=lambda a, p, n: 0.9 * a + 0.1 * p)
    state = qgc.attach(model, **options_for(endpoint))
    data_loader = state.follow(data_loader)
    metrics = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        model.train()
        logger = MetricLogger()
        for x, target in logger.log_every(data_loader, 3, f"Epoch: [{epoch}]"):
            fall_behind(state)
            loss = cross_entropy(model(x), target)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            ema.update_parameters(model.module)
            logger.update(loss=loss.item(), accuracy=(loss > 0).float())
        assert len(logger.printed) == 3
        scheduler.step()
        state.sync_buffers()
        model.eval()
        with torch.inference_mode():
            logger = MetricLogger()
            for x, target in logger.log_every(DataLoader(data, batch_size=16), 100, "Test:"):
                logger.update(loss=cross_entropy(model(x), target))
        metrics.append(logger.synchronize_between_processes())
    return seen(state, model, ema, metrics=metrics, lr=optimizer.param_groups[0]["lr"])


def test_a_loop_as_torchvisions_references_write_it() -> None:
    ranks = check(reference_style, 2 * STEPS)
    first, last = ranks[0]["agreed"][3]["metrics"]
    assert last["loss"] < first["loss"] + 0.2


# --- a model that was left in eval mode -------------------------------------------------------------------


def frozen_statistics(rank: int, endpoint: str) -> dict[str, Any]:
    """Fine-tuning with BatchNorm's statistics frozen: DDP's wrapper is in eval mode, its gradients count."""
    model = DistributedDataParallel(network(), broadcast_buffers=False)
    model.eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    state = qgc.attach(model, **options_for(endpoint))
    data = images()
    loader = state.follow(DataLoader(data, batch_size=BATCH, sampler=DistributedSampler(data, seed=1)))
    for x, y in loader:
        fall_behind(state)
        mse_loss(model(x), y)  # nobody takes its gradient
        mse_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return seen(state, model)


def test_a_model_in_eval_mode_is_trained_alike() -> None:
    check(frozen_statistics, STEPS)
