"""What scripts do between the backward pass and the next step: all ranks stay equal although one is late."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from helpers.loops import BATCH, STEPS, Case, Job, check_case, dataset, mlp, mse, run_cases

import torch_qgc as qgc

LINEAR, TANH = torch.nn.Linear, torch.nn.Tanh


# --- accumulation ------------------------------------------------------------------------------------------


def accumulate_by_counter(rank: int, job: Job) -> Any:
    """`if (i + 1) % n == 0`, without no_sync: DDP exchanges every micro-batch's gradient."""
    model, state = job.wrap(mlp())
    loader = state.loader(dataset(12), batch_size=BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = 0
    for i, (x, y) in enumerate(loader):
        loss = mse(model(x), y) / 3
        loss.backward()
        if (i + 1) % 3 == 0:
            optimizer.step()
            optimizer.zero_grad()
        losses += 1
    return losses


def accumulate_by_flag(rank: int, job: Job) -> Any:
    """nanoGPT's `require_backward_grad_sync`, set by hand."""
    model, state = job.wrap(mlp())
    loader = state.loader(dataset(20), batch_size=BATCH)
    optimizer = qgc.CodedAdamW(model.parameters(), state, lr=1e-2)
    batches = iter(loader)
    for _ in range(10):
        for micro_step in range(2):
            x, y = next(batches)
            model.require_backward_grad_sync = micro_step == 1
            (mse(model(x), y) / 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return optimizer.param_groups[0]["lr"]


def accumulate_no_sync(rank: int, job: Job) -> Any:
    model, state = job.wrap(mlp())
    loader = state.loader(dataset(20), batch_size=BATCH)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for i, (x, y) in enumerate(loader):
        sync = (i + 1) % 2 == 0 or i + 1 == len(loader)
        with contextlib.nullcontext() if sync else model.no_sync():
            (mse(model(x), y) / 2).backward()
        if sync:
            optimizer.step()
            optimizer.zero_grad()
    return None


def accumulate_with_a_rest(rank: int, job: Job) -> Any:
    """Gradients that are left over at the end of an epoch go into the next one's first update."""
    model, state = job.wrap(mlp())
    loader = state.loader(dataset(7), batch_size=BATCH)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    for _ in range(2):
        for i, (x, y) in enumerate(loader):
            mse(model(x), y).backward()
            if (i + 1) % 2 == 0:
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad(set_to_none=False)
    return scheduler.state_dict()


# --- learning rates, schedules, clipping ------------------------------------------------------------------------


def learning_rate_by_hand(rank: int, job: Job) -> Any:
    """MAE's and nanoGPT's: set in each iteration, from the fraction of the epoch."""
    model, state = job.wrap(mlp())
    loader = state.loader(dataset(), batch_size=BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, betas=(0.9, 0.95))
    for epoch in range(2):
        for i, (x, y) in enumerate(loader):
            lr = 1e-2 * (1 - (i / len(loader) + epoch) / 2)
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("lr_scale", 1.0)
            loss = mse(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return optimizer.param_groups[0]["lr"]


def scheduler_in_the_loop(rank: int, job: Job) -> Any:
    model, state = job.wrap(mlp())
    loader = state.loader(dataset(), batch_size=BATCH)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, epochs=2, steps_per_epoch=len(loader))
    for _ in range(2):
        for x, y in loader:
            optimizer.zero_grad()
            mse(model(x), y).backward()
            optimizer.step()
            scheduler.step()
    return scheduler.state_dict()


def clip_and_clamp(rank: int, job: Job) -> Any:
    model, state = job.wrap(mlp())
    loader = state.loader(dataset(), batch_size=BATCH)
    optimizer = qgc.CodedAdam(model.parameters(), state, lr=1e-2)
    norms = []
    for x, y in loader:
        optimizer.zero_grad()
        mse(model(x), y).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        torch.nn.utils.clip_grad_value_(model.parameters(), 0.1)
        optimizer.step()
        with torch.no_grad():
            for p in model.parameters():
                p.clamp_(-0.3, 0.3)
    return norms


def gradient_noise_and_penalties(rank: int, job: Job) -> Any:
    """Weight decay by hand, hooks on parameters, an l1 penalty in the loss."""
    model, state = job.wrap(mlp())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for x, y in state.loader(dataset(), batch_size=BATCH):
        penalty = sum(p.abs().sum() for p in model.parameters())
        (mse(model(x), y) + 1e-3 * penalty).backward()
        with torch.no_grad():
            for p in model.parameters():
                p.grad.add_(p, alpha=1e-2)
                p.grad.mul_(0.9)
        optimizer.step()
        model.zero_grad()
    return None


# --- several passes ---------------------------------------------------------------------------------------------


def sharpness_aware(rank: int, job: Job) -> Any:
    """davda54/sam: ascend, a second pass, descend."""
    model, state = job.wrap(mlp())
    loader = state.loader(dataset(), batch_size=BATCH)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for x, y in loader:
        mse(model(x), y).backward()
        with torch.no_grad():
            norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
            moves = [0.05 * p.grad / (norm + 1e-12) for p in model.parameters()]
            torch._foreach_add_(list(model.parameters()), moves)
        optimizer.zero_grad()
        mse(model(x), y).backward()
        with torch.no_grad():
            torch._foreach_sub_(list(model.parameters()), moves)
        optimizer.step()
        optimizer.zero_grad()
    return None


def adversarial(rank: int, job: Job) -> Any:
    """An attack whose gradient comes from a backward pass through DDP, then the step on the attacked batch."""
    model, state = job.wrap(mlp())
    loader = state.loader(dataset(), batch_size=BATCH)
    optimizer = qgc.CodedSGD(model.parameters(), state, lr=0.05)
    for x, y in loader:
        attacked = x.clone().requires_grad_()
        mse(model(attacked), y).backward()
        x = (attacked + 0.05 * attacked.grad.sign()).detach()
        optimizer.zero_grad()
        mse(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return None


def virtual_adversarial(rank: int, job: Job) -> Any:
    """Gradients with respect to the input by torch.autograd.grad, through DDP: no step of the job."""
    model, state = job.wrap(mlp())
    loader = state.loader(dataset(), batch_size=BATCH)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for x, y in loader:
        noisy = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(mse(model(noisy), y), noisy)
        loss = mse(model(x + 0.1 * gradient.sign()), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return None


def gradient_penalty(rank: int, job: Job) -> Any:
    """WGAN-GP's critic: a gradient with respect to the input inside of the loss."""
    model, state = job.wrap(mlp())
    loader = state.loader(dataset(), batch_size=BATCH)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.5, 0.9))
    for x, _ in loader:
        optimizer.zero_grad()
        fake = torch.randn_like(x)
        mixed = (0.5 * x + 0.5 * fake).requires_grad_()
        scores = model(torch.cat([x, fake, mixed]))
        real, false, between = scores.chunk(3)
        (gradient,) = torch.autograd.grad(between.sum(), mixed, create_graph=True)
        (false.mean() - real.mean() + 10 * (gradient.norm(dim=1) - 1).square().mean()).backward()
        optimizer.step()
    return None


def two_forwards(rank: int, job: Job) -> Any:
    """Two views through DDP, one loss, one backward pass."""
    model, state = job.wrap(mlp())
    loader = state.loader(dataset(), batch_size=BATCH)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for x, y in loader:
        one, two = model(x), model(x + 0.1 * torch.randn_like(x))
        optimizer.zero_grad()
        (mse(one, y) + mse(one, two)).backward()
        optimizer.step()
    return None


def two_losses(rank: int, job: Job) -> Any:
    """Two backward passes an update, each exchanged, gradients added up."""
    model, state = job.wrap(mlp())
    loader = state.loader(dataset(), batch_size=BATCH)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for x, y in loader:
        optimizer.zero_grad()
        mse(model(x), y).backward()
        (0.1 * model(x).square().mean()).backward()
        optimizer.step()
    return None


def closure(rank: int, job: Job) -> Any:
    """optimizer.step(closure), as torch's documentation writes it."""
    model, state = job.wrap(mlp())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for x, y in state.loader(dataset(), batch_size=BATCH):

        def evaluate(x: Any = x, y: Any = y) -> Any:
            optimizer.zero_grad()
            loss = mse(model(x), y)
            loss.backward()
            return loss

        optimizer.step(evaluate)
    return None


CASES = {
    f.__name__: Case(f, **options)
    for f, options in [
        (accumulate_by_counter, {"steps": 12}),
        (accumulate_by_flag, {}),
        (accumulate_no_sync, {}),
        (accumulate_with_a_rest, {"steps": 14}),
        (learning_rate_by_hand, {"steps": 2 * STEPS}),
        (scheduler_in_the_loop, {"steps": 2 * STEPS}),
        (clip_and_clamp, {}),
        (gradient_noise_and_penalties, {}),
        (sharpness_aware, {"steps": 2 * STEPS}),
        (adversarial, {"steps": 2 * STEPS}),
        (virtual_adversarial, {}),
        (gradient_penalty, {}),
        (two_forwards, {}),
        (two_losses, {"steps": 2 * STEPS}),
        (closure, {}),
    ]
}


@pytest.fixture(scope="module")
def played() -> Any:
    return run_cases(CASES)


@pytest.mark.parametrize("name", CASES)
def test_all_ranks_stay_equal_although_one_is_late(played: Any, name: str) -> None:
    check_case([rank[name] for rank in played], CASES[name])
