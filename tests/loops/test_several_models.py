"""Several models in one loop, and ten loops more: all ranks stay equal although one is late."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.loops import BATCH, STEPS, Case, Job, check_case, dataset, mlp, mse, run_cases

import torch_qgc as qgc

guess = torch.nn.functional.binary_cross_entropy_with_logits


def critic() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))


# --- adversarial networks ------------------------------------------------------------------------------------


def in_turns(rank: int, job: Job) -> Any:
    """torch's DCGAN example: discriminator on real and fake, then the generator through it."""
    generator, _ = job.wrap(mlp())
    discriminator, of_d = job.wrap(critic())
    opt_g = torch.optim.Adam(generator.parameters(), lr=1e-2, betas=(0.5, 0.9))
    opt_d = torch.optim.Adam(discriminator.parameters(), lr=1e-2, betas=(0.5, 0.9))
    for _, y in of_d.loader(dataset(), batch_size=BATCH):
        discriminator.zero_grad()
        guess(discriminator(y), torch.ones_like(y)).backward()
        fake = generator(torch.randn(len(y), 6))
        guess(discriminator(fake.detach()), torch.zeros_like(y)).backward()
        opt_d.step()
        generator.zero_grad()
        guess(discriminator.module(fake), torch.ones_like(y)).backward()
        opt_g.step()
    return None


def at_unequal_rates(rank: int, job: Job) -> Any:
    """Three steps of the critic to one of the generator, weights clipped, noise batches cut to the data's."""
    generator, of_g = job.wrap(mlp(), late=False)
    discriminator, of_d = job.wrap(critic())
    opt_g = torch.optim.RMSprop(generator.parameters(), lr=1e-3)
    opt_d = torch.optim.RMSprop(discriminator.parameters(), lr=1e-3)
    for i, (_, y) in enumerate(of_d.loader(dataset(24), batch_size=BATCH)):
        opt_d.zero_grad()
        with torch.no_grad():
            fake = generator.module(torch.randn(len(y), 6))
        scores = discriminator(torch.cat([y, fake]))
        (scores[len(y) :].mean() - scores[: len(y)].mean()).backward()
        opt_d.step()
        with torch.no_grad():
            for p in discriminator.parameters():
                p.clamp_(-0.1, 0.1)
        if i % 3 == 2:
            opt_g.zero_grad()
            z = of_g.thin(torch.randn(BATCH, 6))
            (-discriminator.module(generator(z)).mean()).backward()
            opt_g.step()
    return None


def frozen_in_turns(rank: int, job: Job) -> Any:
    """requires_grad of the discriminator's inner module is switched off by using it without DDP, under no grad."""
    actor, of_a = job.wrap(mlp())
    value, _ = job.wrap(mlp())
    optimizers = [qgc.CodedAdam(actor.parameters(), of_a, lr=1e-2), torch.optim.SGD(value.parameters(), lr=0.05)]
    for x, y in of_a.loader(dataset(), batch_size=BATCH):
        with torch.no_grad():
            baseline = value.module(x)
        for optimizer in optimizers:
            optimizer.zero_grad()
        ((actor(x) - y + 0.1 * baseline).square().mean() + mse(value(x), y)).backward()
        for optimizer in optimizers:
            optimizer.step()
    return None


# --- ten more -------------------------------------------------------------------------------------------------


class Queue(torch.nn.Module):
    """MoCo's: an encoder, a momentum encoder, a queue of keys in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key = torch.nn.Linear(6, 8), torch.nn.Linear(6, 8)
        self.key.load_state_dict(self.query.state_dict())
        self.key.requires_grad_(False)
        self.register_buffer("queue", torch.randn(16, 8))
        self.register_buffer("at", torch.zeros((), dtype=torch.long))

    def forward(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        query = self.query(x)
        with torch.no_grad():
            for k, q in zip(self.key.parameters(), self.query.parameters()):
                k.mul_(0.9).add_(q, alpha=0.1)
            key = self.key(other)
        positive, negative = (query * key).sum(1, keepdim=True), query @ self.queue.clone().T
        with torch.no_grad():
            rows = (int(self.at) + torch.arange(len(key))) % len(self.queue)
            self.queue[rows] = key
            self.at.add_(BATCH).remainder_(len(self.queue))
        return torch.cat([positive, negative], dim=1)


def momentum_contrast(rank: int, job: Job) -> Any:
    """A momentum encoder that forward itself updates; the queue stays each rank's own."""
    model, state = job.wrap(Queue())
    state.verify_also(key=model.module.key)
    optimizer = torch.optim.SGD(model.module.query.parameters(), lr=0.03, momentum=0.9)
    for x, _ in state.loader(dataset(), batch_size=BATCH):
        logits = model(x, x + 0.1)
        loss = torch.nn.functional.cross_entropy(logits, torch.zeros(len(x), dtype=torch.long))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {"key": model.module.key, "at": int(model.module.at)}


def mixed_up(rank: int, job: Job) -> Any:
    """mixup over a permutation of the batch, label smoothing, a random resize per iteration."""
    model, state = job.wrap(mlp())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    torch.manual_seed(10 + rank)
    for x, y in state.loader(dataset(), batch_size=BATCH):
        lam = float(torch.distributions.Beta(0.4, 0.4).sample())
        order = torch.randperm(len(x))
        optimizer.zero_grad()
        out = model(lam * x + (1 - lam) * x[order])
        (lam * mse(out, y) + (1 - lam) * mse(out, y[order])).backward()
        optimizer.step()
    return None


def distillation(rank: int, job: Job) -> Any:
    """A frozen teacher under no_grad, its outputs cut with the batch."""
    model, state = job.wrap(mlp())
    torch.manual_seed(1)
    teacher = torch.nn.Linear(6, 1).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, amsgrad=True)
    for x, _ in state.loader(dataset(), batch_size=BATCH):
        with torch.no_grad():
            wanted = teacher(x)
        optimizer.zero_grad(set_to_none=True)
        torch.nn.functional.smooth_l1_loss(model(x), wanted).backward()
        optimizer.step()
    return None


def plateau(rank: int, job: Job) -> Any:
    """ReduceLROnPlateau on a validation loss that all ranks compute alike, warm restarts by the batch."""
    model, state = job.wrap(mlp())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    warm = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 4)
    x_all, y_all = dataset(4).tensors
    loader = state.loader(dataset(8), batch_size=BATCH)
    for epoch in range(3):
        model.train()
        for i, (x, y) in enumerate(loader):
            optimizer.zero_grad()
            mse(model(x), y).backward()
            optimizer.step()
            warm.step(epoch + i / len(loader))
        model.eval()
        with torch.no_grad():
            assert float(mse(model(x_all), y_all)) > 0
    return warm.get_last_lr()


def best_checkpoint(rank: int, job: Job) -> Any:
    """Keep the best by a loss that is averaged over all ranks after each epoch, and go back to it in the middle."""
    model, state = job.wrap(mlp())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    loader = state.loader(dataset(8), batch_size=BATCH)
    best, kept = float("inf"), None
    for epoch in range(3):
        total = torch.zeros(())
        for x, y in loader:
            optimizer.zero_grad()
            loss = mse(model(x), y)
            loss.backward()
            optimizer.step()
            total += loss.detach()
        dist.all_reduce(total)
        if float(total) < best:
            best = float(total)
            kept = {name: value.clone() for name, value in model.state_dict().items()}
        if epoch == 1:
            model.load_state_dict(kept)
            optimizer.load_state_dict(optimizer.state_dict())
    return best


class Policy(torch.nn.Module):
    """Two heads, one of which some losses alone take."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.actor, self.value = torch.nn.Linear(6, 8), torch.nn.Linear(8, 3), torch.nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.distributions.Categorical, torch.Tensor]:
        hidden = torch.tanh(self.body(x))
        return torch.distributions.Categorical(logits=self.actor(hidden)), self.value(hidden)


def policy_gradient(rank: int, job: Job) -> Any:
    """PPO: rollouts without gradient through the module, several epochs over the same rollout, no loader.

    The forward pass returns a distribution, which DDP cannot look into.
    """
    model, state = job.wrap(Policy())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(4):
        x = torch.randn(2 * BATCH, 6)
        with torch.no_grad():
            old, _ = model.module(x)
            actions = old.sample()
            old_log = old.log_prob(actions)
        for _ in range(2):
            for at in torch.randperm(len(x)).split(BATCH):
                rows = state.thin(at)
                now, value = model(x[rows])
                ratio = (now.log_prob(actions[rows]) - old_log[rows]).exp()
                loss = -ratio.clamp(0.8, 1.2).mean() + value.square().mean() - 0.01 * now.entropy().mean()
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
    return None


def tasks_in_turn(rank: int, job: Job) -> Any:
    """Two loaders by turns, of one model, each with its own iterator; the shorter begins again."""
    model, state = job.wrap(mlp())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    loaders = [state.loader(dataset(4), batch_size=BATCH), state.loader(dataset(9), batch_size=2 * BATCH)]
    iterators = [iter(loader) for loader in loaders]
    for step in range(14):
        task = step % 2
        try:
            x, y = next(iterators[task])
        except StopIteration:
            iterators[task] = iter(loaders[task])
            x, y = next(iterators[task])
        optimizer.zero_grad()
        mse(model(x), y).backward()
        optimizer.step()
    return None


def meta_learning(rank: int, job: Job) -> Any:
    """Reptile: inner steps on a copy, the difference as the outer gradient's companion in the loss."""
    model, state = job.wrap(mlp())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for x, y in state.loader(dataset(), batch_size=BATCH):
        inner = mlp()
        inner.load_state_dict(model.module.state_dict())
        inner_optimizer = torch.optim.SGD(inner.parameters(), lr=0.01)
        for _ in range(2):
            inner_optimizer.zero_grad()
            mse(inner(x), y).backward()
            inner_optimizer.step()
        optimizer.zero_grad()
        mse(model(x), inner(x).detach()).backward()
        optimizer.step()
    return None


def pseudo_labels(rank: int, job: Job) -> Any:
    """FixMatch: a mask that may be empty on some rank, unlabelled batches several times as large."""
    model, state = job.wrap(mlp(), plan=qgc.make_plan([0.1] * 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    labelled, unlabelled = state.loader(dataset(), batch_size=BATCH), state.loader(dataset(28), batch_size=3 * BATCH)
    for (x, y), (u, _) in zip(labelled, unlabelled):
        out = model(torch.cat([x, u, u + 0.1 * torch.randn_like(u)]))
        weak, strong = out[len(x) :].chunk(2)
        mask = (weak.detach().abs() > 0.2 + 0.2 * rank).float()
        optimizer.zero_grad()
        (mse(out[: len(x)], y) + ((strong - weak.detach()).square() * mask).mean()).backward()
        optimizer.step()
    return None


def losses_by_rank(rank: int, job: Job) -> Any:
    """Per-sample weights and losses that are looked at by `.item()`, a progress bar's mean."""
    model, state = job.wrap(mlp())
    optimizer = torch.optim.NAdam(model.parameters(), lr=1e-2)
    running, seen = 0.0, 0
    for x, y in state.loader(dataset(), batch_size=BATCH):
        weights = torch.softmax(-(model(x).detach() - y).abs().flatten(), 0)
        loss = ((model(x) - y).square().flatten() * weights).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        running, seen = running + loss.item() * len(x), seen + len(x)
    assert running / seen > 0
    return None


CASES = {
    f.__name__: Case(f, **options)
    for f, options in [
        (in_turns, {"models": 2, "steps": STEPS}),
        (at_unequal_rates, {"models": 2, "steps": 8}),
        (frozen_in_turns, {"models": 2}),
        (momentum_contrast, {}),
        (mixed_up, {}),
        (distillation, {}),
        (plateau, {"steps": 24}),
        (best_checkpoint, {"steps": 24, "every": 8}),
        (policy_gradient, {"steps": 16}),
        (tasks_in_turn, {"steps": 14}),
        (meta_learning, {}),
        (pseudo_labels, {}),
        (losses_by_rank, {}),
    ]
}


@pytest.fixture(scope="module")
def played() -> Any:
    return run_cases(CASES)


@pytest.mark.parametrize("name", CASES)
def test_all_ranks_stay_equal_although_one_is_late(played: Any, name: str) -> None:
    check_case([rank[name] for rank in played], CASES[name])
