"""New plans in real processes: the batch of a worker that becomes slow falls, and rises again when it recovers."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from helpers.loops import coded
from helpers.ranks import aggregators, run_ranks
from torch.utils.data import TensorDataset

RANKS, SLOW, BATCH = 4, 2, 16
SLOW_FROM = 25
PER_SAMPLE_S = 0.002  # far above what the machine's other work adds, whose cores sleep meanwhile
FALLEN, RISEN = 0.6, 0.8
SOON = 100  # steps: a worker that is late for most of them has made some twenty of its own
STEPS = SLOW_FROM + 2 * SOON + 15


def train(rank: int, endpoint: str) -> dict[str, Any]:
    """Train, of which one rank is five times slower from a step on, until it has had its smaller batch for a while."""
    torch.manual_seed(0)
    model, state = coded(torch.nn.Linear(64, 10), endpoint, deadline_s="auto", replan_every=40)
    x = torch.randn(RANKS * BATCH * STEPS, 64, generator=torch.Generator().manual_seed(1))
    loader = state.loader(TensorDataset(x, x[:, :10].argmax(1)), batch_size=BATCH)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    sizes: dict[int, int] = {}
    recovers_at = STEPS
    for inputs, labels in loader:
        step = state.step
        sizes[step] = len(inputs)
        if state.replica.courses.at(step).plan.batches[SLOW] < FALLEN and step >= SLOW_FROM:
            recovers_at = min(recovers_at, step + 10)
        slow = rank == SLOW and SLOW_FROM <= step < recovers_at
        time.sleep(len(inputs) * PER_SAMPLE_S * (5.0 if slow else 1.0))
        torch.nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    dist.barrier()
    plans = [(c.from_step, tuple(c.plan.batches.tolist()), c.deadline_s) for c in state.replica.courses.changes]
    parameters = [p.detach().numpy().tobytes() for p in model.parameters()]
    end = state.step
    state.close()
    return {"plans": plans, "sizes": sizes, "recovers_at": recovers_at, "parameters": parameters, "steps": end}


def test_the_batch_of_a_worker_that_becomes_slow_falls_and_rises_again_and_replicas_stay_equal() -> None:
    with aggregators() as (endpoint,):
        ranks = run_ranks(train, endpoint, ranks=RANKS)
    for rank in ranks:
        assert rank["steps"] == STEPS
        assert rank["plans"] == ranks[0]["plans"]
        assert rank["parameters"] == ranks[0]["parameters"]
    plans, slow = ranks[0]["plans"], ranks[SLOW]
    fell_at = min((step for step, batches, _ in plans if step >= SLOW_FROM and batches[SLOW] < FALLEN), default=STEPS)
    assert fell_at <= SLOW_FROM + SOON
    rose_at = min(
        (step for step, batches, _ in plans if step > slow["recovers_at"] and batches[SLOW] > RISEN), default=STEPS
    )
    assert slow["recovers_at"] < rose_at <= slow["recovers_at"] + SOON
    # Its loader has followed, and the global batch is what it was.
    sizes = slow["sizes"]
    assert max(size for step, size in sizes.items() if fell_at < step < slow["recovers_at"]) <= FALLEN * BATCH + 1
    assert max(size for step, size in sizes.items() if step > rose_at) >= RISEN * BATCH - 1
    assert all(np.mean(batches) >= 1.0 - 1e-9 for _, batches, _ in plans)
    assert all(deadline_s is not None for _, _, deadline_s in plans)
