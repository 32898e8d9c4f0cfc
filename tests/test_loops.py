"""What real training loops do, with one rank late: all replicas stay bit-identical after every step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.loops import BATCH, STEPS, Witness, check_replicas, coded, dataset, fall_behind, job, mlp, mse, run
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import torch_qgc as qgc

# --- accumulation, clipping, schedules -------------------------------------------------------------------


def accumulating(rank: int, endpoint: str) -> dict[str, Any]:
    ddp, state = coded(mlp(), endpoint)
    loader = state.loader(dataset(), batch_size=BATCH // 2, accumulate=2)
    optimizer = qgc.CodedAdamW(ddp.parameters(), state, lr=1e-2, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=STEPS + 1, div_factor=20)
    state.bind(optimizer, scheduler=scheduler, max_grad_norm=0.5)
    witness = Witness(state)
    with job(state):
        for x, y in loader:
            fall_behind(rank, state)
            last = state.replica.in_step  # the first of two micro-batches has begun the step
            with contextlib.nullcontext() if last else ddp.no_sync():
                (mse(ddp(x), y) / 2).backward()
            if last:
                state.update()
        return witness.seen(lr=optimizer.param_groups[0]["lr"])


def test_accumulation_with_no_sync_clipping_and_a_schedule() -> None:
    ranks = run(accumulating)
    check_replicas(ranks)
    assert ranks[0]["lr"] == pytest.approx(1e-2 / 20 / 1e4)  # the schedule's end, reached in as many steps


# --- mixed precision --------------------------------------------------------------------------------------


def half_precision(rank: int, endpoint: str, late: str) -> dict[str, Any]:
    ddp, state = coded(mlp(), endpoint, late=late)
    loader = state.loader(dataset(), batch_size=BATCH)
    optimizer = qgc.CodedAdam(ddp.parameters(), state, lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    if late == "fold":
        state.bind(optimizer, scaler=scaler, max_grad_norm=1.0)
    else:

        def update() -> None:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(ddp.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

        state.update, state.scaler = update, scaler
    witness = Witness(state)
    with job(state):
        for x, y in loader:
            fall_behind(rank, state)
            with torch.autocast("cpu", dtype=torch.float16):
                loss = mse(ddp(x), y)
            if rank == 0 and state.step == 6:
                loss = loss * torch.inf
            scaler.scale(loss).backward()
            state.update()
        return witness.seen(scale=scaler.get_scale())


@pytest.mark.parametrize("late", ["fold", "drop"], ids=["bound", "own update"])
def test_grad_scaler_with_an_overflow_on_one_rank(late: str) -> None:
    ranks = run(half_precision, late)
    check_replicas(ranks, changed=False)
    unchanged = [step for step in range(STEPS) if ranks[0]["digests"][step] == ranks[0]["digests"][step + 1]]
    assert unchanged == [6]  # skipped on every rank, though one overflowed
    assert ranks[0]["scale"] == 2.0**10 * 2 * 2 / 2  # doubled after steps 2 and 5, halved after step 6


def brain_float(rank: int, endpoint: str) -> dict[str, Any]:
    ddp, state = coded(mlp(), endpoint)
    loader = state.loader(dataset(), batch_size=BATCH)
    optimizer = torch.optim.Adam(ddp.parameters(), lr=1e-2)  # torch's own, bound
    state.bind(optimizer)
    witness = Witness(state)
    with job(state):
        for x, y in loader:
            fall_behind(rank, state)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = mse(ddp(x), y)
            loss.backward()
            state.update()
        return witness.seen()


def test_bf16_autocast_with_a_plain_torch_optimizer() -> None:
    check_replicas(run(brain_float))


def scaled_differently(rank: int, scaled: str, plain: str) -> list[str]:
    digests = []
    for endpoint in (scaled, plain):
        ddp, state = coded(mlp(), endpoint, bits_per_coordinate=32, deadline_s=None)
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9)
        # As if the payloads of one step had been made at three scales, which is what folding late ones can lead to.
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0 ** (rank + 1), enabled=endpoint == scaled)
        state.bind(optimizer, scaler=scaler)
        with job(state):
            for x, y in state.loader(dataset(), batch_size=BATCH):
                scaler.scale(mse(ddp(x), y)).backward()
                state.update()
            digests.append(state.replica.layout.parameter_digest())
    return digests


def test_gradients_travel_without_the_scale_of_the_loss() -> None:
    digests = {digest for digests in run(scaled_differently, jobs=2) for digest in digests}
    assert len(digests) == 1


# --- models and DDP's options -----------------------------------------------------------------------------


class Tied(torch.nn.Module):
    """Two layers that share one weight, a frozen one between them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last = (torch.nn.Linear(6, 6) for _ in range(3))
        self.last.weight = self.first.weight
        self.middle.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.middle(torch.tanh(self.first(x))))).sum(1, keepdim=True)


class Checkpointed(torch.nn.Module):
    """An MLP whose hidden layer is computed again in the backward pass."""

    def __init__(self, *, use_reentrant: bool) -> None:
        super().__init__()
        self.layers, self.use_reentrant = mlp(), use_reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.layers[0](x)
        return self.layers[2](checkpoint(self.layers[1], hidden, use_reentrant=self.use_reentrant))


def normalized() -> torch.nn.Module:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(6, 20), torch.nn.BatchNorm1d(20), torch.nn.ReLU(), torch.nn.Linear(20, 1)]
    return torch.nn.Sequential(*layers)


MODELS: dict[str, tuple[Callable[[], torch.nn.Module], dict[str, Any]]] = {
    "tied and frozen": (Tied, {}),
    "checkpointed": (lambda: Checkpointed(use_reentrant=False), {}),
    "checkpointed, reentrant": (lambda: Checkpointed(use_reentrant=True), {}),
    "checkpointed, reentrant, static graph": (lambda: Checkpointed(use_reentrant=True), {"static_graph": True}),
    "static graph": (mlp, {"static_graph": True}),
    "gradients in buckets": (mlp, {"gradient_as_bucket_view": True, "bucket_cap_mb": 0.0001}),
    "BatchNorm": (normalized, {}),
}


def train_model(rank: int, endpoint: str, name: str, backend: str | None = None) -> dict[str, Any]:
    make, options = MODELS[name]
    ddp, state = coded(make(), endpoint, ddp=options)
    loader = state.loader(dataset(), batch_size=BATCH)
    optimizer = qgc.CodedSGD(ddp.parameters(), state, lr=0.05, momentum=0.9)
    compiled = CompileCounterWithBackend(backend)
    model = ddp if backend is None else torch.compile(ddp, backend=compiled)
    frozen = [p.clone() for p in ddp.parameters() if not p.requires_grad]
    witness = Witness(state)
    with job(state):
        for x, y in loader:
            fall_behind(rank, state)
            mse(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        state.sync_buffers()
        buffers = [b.tolist() for b in ddp.buffers()]
        assert all(torch.equal(p, q) for p, q in zip(frozen, (p for p in ddp.parameters() if not p.requires_grad)))
        return witness.seen(buffers=buffers, compiled=compiled.frame_count > 0)


def train_models(rank: int, *endpoints: str) -> dict[str, dict[str, Any]]:
    return {name: train_model(rank, endpoint, name) for name, endpoint in zip(MODELS, endpoints)}


@pytest.fixture(scope="module")
def trained_models() -> list[dict[str, dict[str, Any]]]:
    return run(train_models, jobs=len(MODELS))


@pytest.mark.parametrize("name", MODELS)
def test_models_and_options_of_ddp(trained_models: list[dict[str, dict[str, Any]]], name: str) -> None:
    check_replicas([rank[name] for rank in trained_models])


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_ddp(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool of compilers in each rank
    ranks = run(train_model, "tied and frozen", backend, timeout_s=200.0)
    check_replicas(ranks)
    assert ranks[0]["compiled"]


# --- several models, several optimizers --------------------------------------------------------------------


def two_optimizers(rank: int, endpoint: str) -> dict[str, Any]:
    ddp, state = coded(mlp(), endpoint)
    loader = state.loader(dataset(), batch_size=BATCH)
    weights, biases = ([p for p in ddp.parameters() if p.ndim == n] for n in (2, 1))
    optimizers = [qgc.CodedAdam(weights, state, lr=1e-2), torch.optim.SGD(biases, lr=0.05)]
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in optimizers]
    state.bind(optimizers, scheduler=schedulers, max_grad_norm=1.0)
    witness = Witness(state)
    with job(state):
        for x, y in loader:
            fall_behind(rank, state)
            mse(ddp(x), y).backward()
            state.update()
        return witness.seen(lr=[o.param_groups[0]["lr"] for o in optimizers])


def test_two_optimizers_on_one_model() -> None:
    ranks = run(two_optimizers)
    check_replicas(ranks)
    assert ranks[0]["lr"] == pytest.approx([1e-2 * 0.9**STEPS, 0.05 * 0.9**STEPS])


def two_models(rank: int, first: str, second: str) -> list[dict[str, Any]]:
    """A generator and a discriminator, trained in turns."""
    torch.manual_seed(0)
    generator, of_g = coded(mlp(), first)
    discriminator, of_d = coded(
        torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)), second
    )
    qgc.CodedAdam(generator.parameters(), of_g, lr=1e-2, betas=(0.5, 0.9))
    qgc.CodedAdam(discriminator.parameters(), of_d, lr=1e-2)
    loader = of_d.loader(dataset(), batch_size=BATCH, together=[of_g])
    witnesses = [Witness(of_g), Witness(of_d)]
    noise = torch.Generator().manual_seed(rank)
    guess = torch.nn.functional.binary_cross_entropy_with_logits
    with job(of_g, of_d):
        for _, y in loader:
            fall_behind(rank, of_d, of_g)
            z = torch.randn(BATCH, 6, generator=noise)
            with torch.no_grad():
                fake = generator(z)
            logits = discriminator(torch.cat([y, fake]))
            guess(logits, torch.cat([torch.ones_like(y), torch.zeros_like(y)])).backward()
            of_d.update()
            logits = discriminator.module(generator(z))  # past DDP: this pass trains the generator alone
            guess(logits, torch.ones_like(y)).backward()
            of_g.update()
            discriminator.zero_grad()
        return [witness.seen() for witness in witnesses]


def test_two_models_that_take_turns() -> None:
    ranks = run(two_models, jobs=2)
    for model in range(2):
        check_replicas([rank[model] for rank in ranks])
