"""Loops whose update is bound: late steps are replayed without running the loop body, and all ranks stay equal."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.loops import BATCH, STEPS, Case, Job, check_case, closing, coded, dataset, mlp, mse, run, run_cases
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import torch_qgc as qgc

# --- bound updates -----------------------------------------------------------------------------------------


def accumulating(rank: int, job: Job) -> Any:
    """A replayed step leaves out as many batches as a step takes."""
    ddp, state = job.wrap(mlp())
    loader = state.loader(dataset(), batch_size=BATCH // 2)
    optimizer = qgc.CodedAdamW(ddp.parameters(), state, lr=1e-2, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=STEPS + 1, div_factor=20)
    state.bind(optimizer, scheduler=scheduler, max_grad_norm=0.5)
    for i, (x, y) in enumerate(loader):
        with contextlib.nullcontext() if i % 2 else ddp.no_sync():
            (mse(ddp(x), y) / 2).backward()
        if i % 2:
            state.update()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 / 20 / 1e4)  # the schedule's end, in as many steps
    return scheduler.state_dict()


def scaled(job: Job, rank: int, *, bound: bool) -> Any:
    ddp, state = job.wrap(mlp(), late="fold" if bound else "drop")
    loader = state.loader(dataset(12), batch_size=BATCH)
    optimizer = qgc.CodedAdam(ddp.parameters(), state, lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    if bound:
        state.bind(optimizer, scaler=scaler, max_grad_norm=1.0)
    else:

        def update() -> None:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(ddp.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

        state.update, state.scaler = update, scaler
    for x, y in loader:
        with torch.autocast("cpu", dtype=torch.float16):
            loss = mse(ddp(x), y)
        if rank == 0 and state.step == 2:  # the last step that waits for all
            loss = loss * torch.inf
        scaler.scale(loss).backward()
        state.update()
    return scaler.get_scale()


def scaled_and_bound(rank: int, job: Job) -> Any:
    return scaled(job, rank, bound=True)


def scaled_by_an_own_update(rank: int, job: Job) -> Any:
    return scaled(job, rank, bound=False)


def brain_float(rank: int, job: Job) -> Any:
    ddp, state = job.wrap(mlp())
    optimizer = torch.optim.Adam(ddp.parameters(), lr=1e-2)  # torch's own, bound
    state.bind(optimizer)
    for x, y in state.loader(dataset(), batch_size=BATCH):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = mse(ddp(x), y)
        loss.backward()
        state.update()
    return None


def two_optimizers(rank: int, job: Job) -> Any:
    ddp, state = job.wrap(mlp())
    weights, biases = ([p for p in ddp.parameters() if p.ndim == n] for n in (2, 1))
    optimizers = [qgc.CodedAdam(weights, state, lr=1e-2), torch.optim.SGD(biases, lr=0.05)]
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in optimizers]
    state.bind(optimizers, scheduler=schedulers, max_grad_norm=1.0)
    for x, y in state.loader(dataset(), batch_size=BATCH):
        mse(ddp(x), y).backward()
        state.update()
    rates = [o.param_groups[0]["lr"] for o in optimizers]
    assert rates == pytest.approx([1e-2 * 0.9**STEPS, 0.05 * 0.9**STEPS])
    return rates


def averaged_and_scheduled_by_hand(rank: int, job: Job) -> Any:
    """before= and after= take what the loop body would have done."""
    ddp, state = job.wrap(mlp())
    optimizer, ema = torch.optim.SGD(ddp.parameters(), lr=0.1), mlp()
    state.verify_also(ema=ema)

    def set_rate(step: int) -> None:
        optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)

    @torch.no_grad()
    def average(step: int) -> None:
        for old, new in zip(ema.parameters(), ddp.parameters()):
            old.lerp_(new, 0.1)

    state.bind(optimizer, before=set_rate, after=average)
    for _ in range(2):
        for x, y in state.loader(dataset(), batch_size=BATCH):
            mse(ddp(x), y).backward()
            state.update()
    return ema


BOUND = {
    f.__name__: Case(f, replays=True, **options)
    for f, options in [
        (accumulating, {}),
        (scaled_and_bound, {"steps": 12}),
        (scaled_by_an_own_update, {"steps": 12}),
        (brain_float, {}),
        (two_optimizers, {}),
        (averaged_and_scheduled_by_hand, {"steps": 2 * STEPS}),
    ]
}


@pytest.fixture(scope="module")
def bound() -> Any:
    return run_cases(BOUND)


@pytest.mark.parametrize("name", BOUND)
def test_late_steps_are_replayed_by_the_bound_update(bound: Any, name: str) -> None:
    check_case([rank[name] for rank in bound], BOUND[name])


def scaled_differently(rank: int, with_scaler: str, plain: str) -> list[str]:
    digests = []
    for endpoint in (with_scaler, plain):
        ddp, state = coded(mlp(), endpoint, bits_per_coordinate=32, deadline_s=None)
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9)
        # As if the payloads of one step had been made at three scales, which is what folding late ones can lead to.
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0 ** (rank + 1), enabled=endpoint == with_scaler)
        state.bind(optimizer, scaler=scaler)
        with closing(state):
            for x, y in state.loader(dataset(), batch_size=BATCH):
                scaler.scale(mse(ddp(x), y)).backward()
                state.update()
            digests.append(state.replica.layout.parameter_digest())
    return digests


def test_gradients_travel_without_the_scale_of_the_loss() -> None:
    digests = {digest for digests in run(scaled_differently, jobs=2) for digest in digests}
    assert len(digests) == 1


# --- models and DDP's options, thin ---------------------------------------------------------------------------


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


MODELS: dict[str, tuple[Callable[[], torch.nn.Module], dict[str, Any]]] = {
    "tied and frozen": (Tied, {}),
    "checkpointed": (lambda: Checkpointed(use_reentrant=False), {}),
    "checkpointed, reentrant": (lambda: Checkpointed(use_reentrant=True), {}),
    "checkpointed, reentrant, static graph": (lambda: Checkpointed(use_reentrant=True), {"static_graph": True}),
    "gradients in small buckets": (mlp, {"gradient_as_bucket_view": True, "bucket_cap_mb": 0.0001}),
}


def training(name: str, backend: str | None = None) -> Case:
    def train(rank: int, job: Job) -> Any:
        make, options = MODELS[name]
        ddp, state = job.wrap(make(), ddp=options)
        optimizer = qgc.CodedSGD(ddp.parameters(), state, lr=0.05, momentum=0.9)
        compiled = CompileCounterWithBackend(backend)
        model = ddp if backend is None else torch.compile(ddp, backend=compiled)
        frozen = [p.clone() for p in ddp.parameters() if not p.requires_grad]
        for x, y in state.loader(dataset(), batch_size=BATCH):
            mse(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert all(torch.equal(p, q) for p, q in zip(frozen, (p for p in ddp.parameters() if not p.requires_grad)))
        assert backend is None or compiled.frame_count > 0

    return Case(train)


@pytest.fixture(scope="module")
def trained_models() -> Any:
    return run_cases({name: training(name) for name in MODELS})


@pytest.mark.parametrize("name", MODELS)
def test_models_and_options_of_ddp(trained_models: Any, name: str) -> None:
    check_case([rank[name] for rank in trained_models], training(name))


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_ddp(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool of compilers in each rank
    case = training("tied and frozen", backend)
    check_case([rank["compiled"] for rank in run_cases({"compiled": case})], case)
