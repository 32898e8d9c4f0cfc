"""How scripts go through their data: all ranks stay equal although one is late, and loops end at the same iteration."""

from __future__ import annotations

import itertools
from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.loops import BATCH, RANKS, STEPS, Case, Job, check_case, dataset, mlp, mse, run_cases
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, WeightedRandomSampler
from torch.utils.data.distributed import DistributedSampler

import torch_qgc as qgc


def trained(model: Any, optimizer: Any, x: Any, y: Any) -> None:
    optimizer.zero_grad()
    mse(model(x), y).backward()
    optimizer.step()


# --- leaving a loop -------------------------------------------------------------------------------------------


def enumerate_and_break(rank: int, job: Job) -> Any:
    """timm's and HF's limit on the batches of an epoch."""
    model, state = job.wrap(mlp())
    loader = state.loader(dataset(30), batch_size=BATCH)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    iterations, starts = 0, set()
    for _ in range(3):
        for i, (x, y) in enumerate(loader):
            if i >= 6:
                break
            starts.add(str(x[:2])) if i == 0 else None
            trained(model, optimizer, x, y)
            iterations += 1
    assert len(starts) == 3  # other samples each time
    return iterations


def own_step_counter(rank: int, job: Job) -> Any:
    model, state = job.wrap(mlp())
    loader = state.loader(dataset(8), batch_size=BATCH)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    step, max_steps = 0, 13
    while step < max_steps:
        for x, y in loader:
            trained(model, optimizer, x, y)
            step += 1
            if step >= max_steps:
                break
    return step


def look_at_a_batch_first(rank: int, job: Job) -> Any:
    """`next(iter(loader))` before the loop: to draw a picture, to initialise, on all ranks."""
    model, state = job.wrap(mlp())
    loader = state.loader(dataset(), batch_size=BATCH)
    images, _ = next(iter(loader))
    assert len(images) == BATCH
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for x, y in loader:
        trained(model, optimizer, x, y)
    return None


def look_at_a_batch_on_rank_0(rank: int, job: Job) -> Any:
    model, state = job.wrap(mlp())
    loader = state.loader(dataset(), batch_size=BATCH)
    if rank == 0:
        next(iter(loader))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(2):
        for x, y in loader:
            trained(model, optimizer, x, y)
    return None


def infinite_iterator(rank: int, job: Job) -> Any:
    """An iterator that is made again when it is exhausted."""
    model, state = job.wrap(mlp())
    loader = state.loader(dataset(7), batch_size=BATCH)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    iterator, restarts = iter(loader), 0
    for _ in range(17):
        try:
            x, y = next(iterator)
        except StopIteration:
            iterator, restarts = iter(loader), restarts + 1
            x, y = next(iterator)
        trained(model, optimizer, x, y)
    return restarts


def infinite_generator(rank: int, job: Job) -> Any:
    """improved-diffusion's `while True: yield from loader`, persistent workers."""
    model, state = job.wrap(mlp())
    loader = state.loader(dataset(7), batch_size=BATCH, num_workers=1, persistent_workers=True)

    def forever() -> Any:
        while True:
            yield from loader

    data = forever()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(12):
        trained(model, optimizer, *next(data))
    return None


# --- several loaders ----------------------------------------------------------------------------------------------


def zipped(rank: int, job: Job) -> Any:
    """FixMatch: labelled and unlabelled batches, from two coded loaders."""
    model, state = job.wrap(mlp())
    labelled, unlabelled = (state.loader(dataset(n), batch_size=BATCH) for n in (7, 9))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    starts = set()
    for _ in range(3):
        for i, ((x, y), (u, _)) in enumerate(zip(labelled, unlabelled)):
            starts.add(str(u[:2])) if i == 0 else None
            out = model(torch.cat([x, u]))
            guess = out[len(x) :].detach().sign()
            optimizer.zero_grad()
            (mse(out[: len(x)], y) + 0.1 * mse(out[len(x) :], guess)).backward()
            optimizer.step()
    assert len(starts) == 3  # other samples in each epoch
    return None


class Stream(IterableDataset):  # type: ignore[type-arg]
    """An endless stream, cut by rank."""

    def __init__(self, rank: int, samples: int) -> None:
        self.rank, self.samples = rank, samples

    def __iter__(self) -> Any:
        generator = torch.Generator().manual_seed(self.rank)
        for _ in range(self.samples):
            x = torch.randn(6, generator=generator)
            yield x, x.sum().view(1)


def followed_loaders(rank: int, job: Job) -> Any:
    """A weighted sampler and a stream, zipped, of loaders of one's own."""
    model, state = job.wrap(mlp())
    data = dataset(12)
    sampler = WeightedRandomSampler(torch.rand(len(data)), 12 * BATCH, generator=torch.Generator().manual_seed(rank))
    weighted = DataLoader(data, batch_size=BATCH, sampler=sampler)
    stream = DataLoader(Stream(rank, 14 * 6), batch_size=6, num_workers=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for (x, y), (u, v) in state.follow(zip(weighted, stream)):
        trained(model, optimizer, torch.cat([x, u]), torch.cat([y, v]))
    return None


def followed_distributed_sampler(rank: int, job: Job) -> Any:
    """torch's DDP tutorial, its loader wrapped: attributes and set_epoch stay."""
    model, state = job.wrap(mlp(), plan=qgc.make_plan([0.1] * RANKS))
    sampler = DistributedSampler(dataset())
    loader = state.follow(DataLoader(dataset(), batch_size=BATCH, sampler=sampler, drop_last=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        assert len(loader) == STEPS
        for x, y in loader:
            trained(model, optimizer, x, y)
    return None


def get_batch(rank: int, job: Job) -> Any:
    """nanoGPT: no loader; the next batch is fetched while the gradient travels."""
    model, state = job.wrap(torch.nn.Sequential(torch.nn.Embedding(32, 16), torch.nn.Linear(16, 32)))
    data = torch.randint(32, (4000,), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def batch() -> Any:
        at = torch.randint(len(data) - 9, (BATCH,)).tolist()
        x, y = (torch.stack([data[i + shift : i + shift + 8] for i in at]) for shift in (0, 1))
        return state.thin((x, y))

    for iteration in range(12):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + iteration)
        for micro_step in range(2):
            x, y = batch()
            model.require_backward_grad_sync = micro_step == 1
            logits = model(x)
            (torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten()) / 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return None


def get_batch_ahead(rank: int, job: Job) -> Any:
    """nanoGPT's own order: the next batch is made after the forward pass, before the backward pass."""
    model, state = job.wrap(mlp())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    data = dataset(20).tensors

    def batch() -> Any:
        at = torch.randint(len(data[0]), (BATCH,))
        return state.thin((data[0][at], data[1][at]))

    x, y = batch()
    for _ in range(14):
        loss = mse(model(x), y)
        x, y = batch()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return None


def curriculum(rank: int, job: Job) -> Any:
    """Another data set, batch size and model resolution from the second epoch on."""
    model, state = job.wrap(mlp())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for steps, batch_size in [(8, BATCH), (7, 2 * BATCH), (9, BATCH)]:
        loader = state.loader(dataset(steps * batch_size // BATCH), batch_size=batch_size)
        for x, y in loader:
            trained(model, optimizer, x, y)
    return None


def prefetched(rank: int, job: Job) -> Any:
    """apex's and MAE's data_prefetcher: the next batch is taken before this one's step."""
    model, state = job.wrap(mlp())
    loader = state.loader(dataset(12), batch_size=BATCH)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    steps = 0
    iterator = iter(loader)
    following = next(iterator, None)
    while following is not None:
        x, y = following
        following = next(iterator, None)
        trained(model, optimizer, x, y)
        steps += 1
    return steps


# --- inside of the loop ------------------------------------------------------------------------------------------


def evaluate_and_save(rank: int, job: Job) -> Any:
    """Evaluation and checkpoints every n steps, on rank 0 only and on all, in the loop."""
    model, state = job.wrap(mlp())
    loader = state.loader(dataset(16), batch_size=BATCH)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    x_all, y_all = dataset(4).tensors
    values = []
    for i, (x, y) in enumerate(loader):
        trained(model, optimizer, x, y)
        if (i + 1) % 4 == 0:
            model.eval()
            with torch.no_grad():
                values.append(float(mse(model(x_all), y_all)))
            model.train()
        if (i + 1) % 5 == 0:
            saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "qgc": state.state_dict()}
            assert saved["qgc"]["step"] == i + 1
            if rank == 0:
                torch.save(saved, "/dev/null")
    return values


def metrics_at_the_end_of_epochs(rank: int, job: Job) -> Any:
    """Metrics of all, barriers and averaged buffers between epochs: torch's own collectives, and the state's."""
    model, state = job.wrap(mlp())
    loader = state.loader(dataset(8), batch_size=BATCH)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    values = []
    for _ in range(3):
        total, batches = torch.zeros(()), 0
        for x, y in loader:
            trained(model, optimizer, x, y)
            batches += 1
        dist.all_reduce(total)
        state.sync_buffers()
        dist.barrier()
        everybody = state.all_gather([batches, state.step])
        assert everybody == {k: [batches, state.step] for k in range(state.workers)}
        state.barrier()
        values.append((float(total), batches))
    return values


# --- kinds of batches -------------------------------------------------------------------------------------------


Pair = namedtuple("Pair", ["x", "y"])


@dataclass
class Record:
    """A batch of a type of one's own."""

    x: torch.Tensor
    y: torch.Tensor
    names: list[str]


class Opaque:
    """A batch that can only be cut by its own method."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def first(self, count: int) -> Opaque:
        return Opaque(self.items[:count])


def as_dict(items: list[Any]) -> Any:
    x, y = (torch.stack(part) for part in zip(*items))
    return {"x": x, "y": y, "names": [f"sample {i}" for i in range(len(items))], "epoch": 3}


def kinds_of_batches(rank: int, job: Job) -> Any:
    """A dict, a namedtuple, a dataclass, and a type of one's own with slice=; batches loaded ahead and not."""
    model, state = job.wrap(mlp())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    kinds = {
        dict: as_dict,
        Pair: lambda items: Pair(*(torch.stack(part) for part in zip(*items))),
        Record: lambda items: Record(**{k: v for k, v in as_dict(items).items() if k != "epoch"}),
    }
    for ahead in (0, 1):
        for kind, collate in kinds.items():
            loader = state.loader(dataset(6), batch_size=BATCH, collate_fn=collate, num_workers=ahead)
            for batch in loader:
                assert isinstance(batch, kind)
                x, y = (batch["x"], batch["y"]) if kind is dict else (batch.x, batch.y)
                assert len(x) == len(y) in (2, BATCH)
                trained(model, optimizer, x, y)
    loader = state.loader(
        dataset(6), batch_size=BATCH, collate_fn=Opaque, num_workers=1, slice=lambda batch, count: batch.first(count)
    )
    for batch in loader:
        x, y = (torch.stack(part) for part in zip(*batch.items))
        trained(model, optimizer, x, y)
    return None


class Detections(TensorDataset):
    """Images of several sizes, and a dict of targets for each."""

    def __getitem__(self, index: int) -> Any:
        boxes = torch.ones(1 + index % 3, 4)
        return torch.ones(3, 5 + index % 2, 4), {"boxes": boxes, "labels": torch.ones(len(boxes))}


class Detector(torch.nn.Module):
    """Takes lists, as torchvision's detection models do, and returns a dict of losses."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 4)

    def forward(self, images: list[Any], targets: list[Any]) -> Any:
        assert len(images) == len(targets)
        found = torch.stack([self.layer(image.mean((1, 2))) for image in images])
        wanted = torch.stack([target["boxes"].mean(0) for target in targets])
        return {"loss_box": mse(found, wanted), "loss_rest": found.square().mean()}


def detection(rank: int, job: Job) -> Any:
    model, state = job.wrap(Detector())
    data = Detections(torch.arange(RANKS * BATCH * 10))
    loader = state.loader(data, batch_size=BATCH, collate_fn=lambda items: tuple(zip(*items)), num_workers=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for images, targets in loader:
        images = [image.float() for image in images]
        targets = [{k: v.float() for k, v in t.items()} for t in targets]
        losses = model(images, targets)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    return None


def batch_size_one(rank: int, job: Job) -> Any:
    model, state = job.wrap(mlp())
    loader = state.loader(dataset(3), batch_size=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for x, y in loader:
        assert len(x) == 1
        trained(model, optimizer, x, y)
    return None


def loaded_by_hand(rank: int, job: Job) -> Any:
    """Samples without collation (batch_size counts), weights for class balance, pinned loaders of processes."""
    model, state = job.wrap(mlp())
    weights = torch.rand(len(dataset(9)))
    loader = state.loader(dataset(9), batch_size=BATCH, weights=weights, num_workers=2, prefetch_factor=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for x, y in itertools.chain(loader, loader):
        trained(model, optimizer, x, y)
    return None


def unequal_batches(rank: int, job: Job) -> Any:
    """Each rank's part of the global batch is another, and changes while the loop runs; loaded ahead and not."""
    model, state = job.wrap(mlp())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    lengths = []
    for ahead in (0, 1):
        # 1, 4 or 7 samples of 12; at every fourth step the ranks change places.
        state.replica.batch_sizes = lambda mean, step, least=1: [
            mean + 3 * ((k + step // 4) % RANKS - 1) for k in range(RANKS)
        ]
        loader = state.loader(dataset(12), batch_size=BATCH, num_workers=ahead)
        for x, y in loader:
            assert len(x) in (1, 2, BATCH, 7)
            lengths.append(len(x))
            trained(model, optimizer, x, y)
    assert {1, BATCH, 7} <= set(lengths)
    return len(lengths), state.state_dict()["loaders"]


def unequal_followed_batches(rank: int, job: Job) -> Any:
    """A loader of one's own, whose batches a slow rank cuts."""
    model, state = job.wrap(mlp())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    state.replica.batch_sizes = lambda mean, step, least=1: [3, *[mean] * (RANKS - 1)]
    sampler = DistributedSampler(dataset())
    for x, y in state.follow(DataLoader(dataset(), batch_size=BATCH, sampler=sampler)):
        assert len(x) in (2, 3 if rank == 0 else BATCH)
        trained(model, optimizer, x, y)
    return None


CASES = {
    f.__name__: Case(f, **options)
    for f, options in [
        (enumerate_and_break, {"steps": 18}),
        (own_step_counter, {"steps": 13}),
        (look_at_a_batch_first, {}),
        (look_at_a_batch_on_rank_0, {"steps": 2 * STEPS}),
        (infinite_iterator, {"steps": 17}),
        (infinite_generator, {"steps": 12}),
        (zipped, {"steps": 21}),
        (followed_loaders, {"steps": 12}),
        (followed_distributed_sampler, {"steps": 2 * STEPS}),
        (get_batch, {"steps": 12}),
        (get_batch_ahead, {"steps": 14}),
        (curriculum, {"steps": 24}),
        (prefetched, {"steps": 12}),
        (evaluate_and_save, {"steps": 16}),
        (metrics_at_the_end_of_epochs, {"steps": 24, "every": 8}),
        (kinds_of_batches, {"steps": 42}),
        (detection, {"steps": 10}),
        (batch_size_one, {"steps": 12}),
        (loaded_by_hand, {"steps": 2 * STEPS}),
        (unequal_batches, {"steps": 24}),
        (unequal_followed_batches, {}),
    ]
}


@pytest.fixture(scope="module")
def played() -> Any:
    return run_cases(CASES)


@pytest.mark.parametrize("name", CASES)
def test_all_ranks_stay_equal_although_one_is_late(played: Any, name: str) -> None:
    check_case([rank[name] for rank in played], CASES[name])
