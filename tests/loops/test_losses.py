"""With a late rank a loop ends with a loss within the spread that plain DDP has over seeds."""

from __future__ import annotations

import copy
import statistics

import numpy as np
import torch
from helpers.loops import BATCH, RANKS, Late, coded, dataset, mse
from helpers.ranks import aggregators, run_ranks
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

SEEDS, STEPS = 10, 40


def trained(rank: int, seed: int, endpoint: str | None) -> float:
    """Accumulate by a counter, set the learning rate by hand, clip, average; return the averaged model's loss."""
    torch.manual_seed(seed)
    module = torch.nn.Sequential(torch.nn.Linear(6, 40), torch.nn.Tanh(), torch.nn.Linear(40, 1))
    data = dataset(STEPS)
    loader = DataLoader(data, batch_size=BATCH, sampler=DistributedSampler(data, seed=seed))
    if endpoint is None:
        model, batches = DistributedDataParallel(module), loader
    else:
        model, state = coded(module, endpoint, seed=seed)
        batches = state.follow(loader)
        rng = np.random.default_rng(seed)
        is_late = rank == rng.integers(RANKS)
        if is_late:
            Late(model, state, set(rng.choice(np.arange(4, STEPS - 2), size=6, replace=False).tolist()))
    ema = copy.deepcopy(model.module)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    for i, (x, y) in enumerate(batches):
        optimizer.param_groups[0]["lr"] = 0.03 * min(1.0, (i + 1) / 8) * (1 - i / STEPS)
        (mse(model(x), y) / 2).backward()
        if i % 2:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                for old, new in zip(ema.parameters(), model.parameters()):
                    old.lerp_(new, 0.3)
    if endpoint is not None:
        report = state.report()
        assert report.thin_steps > 0 or not is_late
        state.close()
    x, y = data.tensors
    with torch.no_grad():
        return float(mse(ema(x), y))


def train_all(rank: int, *endpoints: str) -> tuple[list[float], list[float]]:
    """Run the loop with every seed: plain DDP's losses, and those with a late rank."""
    with_late = [trained(rank, seed, endpoint) for seed, endpoint in enumerate(endpoints)]
    return [trained(rank, seed, None) for seed in range(len(endpoints))], with_late


def test_a_loop_with_a_late_rank_ends_within_the_spread_that_plain_ddp_has_over_seeds() -> None:
    with aggregators(SEEDS) as endpoints:
        ranks = run_ranks(train_all, *endpoints, ranks=RANKS)
    assert ranks[0] == ranks[1] == ranks[2]
    plain, late = ranks[0]
    differences = [b - a for a, b in zip(plain, late)]
    spread = statistics.stdev(plain)
    # One standard deviation of plain DDP's losses. The mean difference was 0.3 of it, with a standard error of 0.1.
    assert abs(statistics.mean(differences)) < spread, (plain, late)
