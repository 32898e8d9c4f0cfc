"""Models, options of DDP, optimizers and averages of models that scripts use: all ranks stay equal, one late."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.loops import BATCH, STEPS, Case, Job, Late, check_case, dataset, mlp, mse, run_cases
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import torch_qgc as qgc


def train(
    model: Any,
    state: qgc.QGCState,
    optimizer: Any,
    *,
    steps: int = STEPS,
    batch_size: int = BATCH,
    after: Callable[[], Any] = lambda: None,
) -> None:
    for x, y in state.loader(dataset(steps), batch_size=batch_size):
        optimizer.zero_grad()
        mse(model(x), y).backward()
        optimizer.step()
        after()


def sgd(model: Any) -> torch.optim.SGD:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)


# --- averages of models --------------------------------------------------------------------------------------


def exponential_average(rank: int, job: Job) -> Any:
    """timm's ModelEma and torch's AveragedModel, verified."""
    model, state = job.wrap(mlp())
    ema = copy.deepcopy(model.module)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    state.verify_also(ema=ema, averaged=averaged)

    @torch.no_grad()
    def update() -> None:
        for mine, new in zip(ema.parameters(), model.module.parameters()):
            mine.lerp_(new, 0.1)
        averaged.update_parameters(model)

    train(model, state, sgd(model), after=update)
    return {"ema": ema, "averaged": averaged, "n": averaged.n_averaged}


class Crops(torch.nn.Module):
    """DINO's MultiCropWrapper: crops of equal size together, one forward pass of the head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone, self.head = torch.nn.AdaptiveAvgPool1d(6), mlp()

    def forward(self, crops: list[torch.Tensor]) -> torch.Tensor:
        return self.head(torch.cat([self.backbone(crop) for crop in crops]))


def self_distillation(rank: int, job: Job) -> Any:
    """DINO: student, teacher, a centre, schedules by hand, the last layer frozen in the first epoch."""
    student, state = job.wrap(Crops())
    teacher = Crops()
    teacher.load_state_dict(student.module.state_dict())
    teacher.requires_grad_(False)
    state.verify_also(teacher=teacher)
    loader = state.loader(dataset(), batch_size=BATCH, collate_fn=lambda items: [x for x, _ in items])
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    for epoch in range(2):
        for it, samples in enumerate(loader):
            it = len(loader) * epoch + it
            optimizer.param_groups[0].update(lr=1e-2 / (1 + it), weight_decay=0.04 * (1 + it))
            x = torch.stack(samples)
            crops = [x, x + 0.1, x[:, :4], x[:, 1:5]]
            loss = mse(student(crops), teacher(crops[:2]).repeat(2, 1))
            optimizer.zero_grad()
            loss.backward()
            if epoch == 0:
                for p in student.module.head[2].parameters():
                    p.grad = None
            optimizer.step()
            with torch.no_grad():
                for q, k in zip(student.module.parameters(), teacher.parameters()):
                    k.data.mul_(0.99).add_(0.01 * q.detach().data)
    return teacher


def lookahead_and_swa(rank: int, job: Job) -> Any:
    """SWA from half-way on, and slow weights copied back every third step."""
    model, state = job.wrap(mlp())
    slow = [p.detach().clone() for p in model.parameters()]
    averaged = AveragedModel(model.module)
    made = 0

    @torch.no_grad()
    def update() -> None:
        nonlocal made
        made += 1
        if made % 3 == 0:
            for p, s in zip(model.parameters(), slow):
                p.copy_(s.lerp_(p, 0.5))
        if made > 4:
            averaged.update_parameters(model.module)

    train(model, state, sgd(model), after=update)
    return averaged


# --- models -----------------------------------------------------------------------------------------------------


class LowRank(torch.nn.Module):
    """A frozen layer with a trained update of low rank."""

    def __init__(self, inner: torch.nn.Linear) -> None:
        super().__init__()
        self.inner = inner.requires_grad_(False)
        self.down = torch.nn.Linear(inner.in_features, 2, bias=False)
        self.up = torch.nn.Linear(2, inner.out_features, bias=False)
        torch.nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + self.up(self.down(x))


def low_rank(rank: int, job: Job) -> Any:
    base = mlp()
    model, state = job.wrap(torch.nn.Sequential(LowRank(base[0]), base[1], LowRank(base[2])))
    frozen = [p.clone() for p in model.parameters() if not p.requires_grad]
    train(model, state, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2))
    assert all(torch.equal(p, q) for p, q in zip(frozen, (p for p in model.parameters() if not p.requires_grad)))
    return None


def normalized(rank: int, job: Job) -> Any:
    """BatchNorm's statistics are those of whole batches, also on the late rank, and counted alike."""
    torch.manual_seed(0)
    layers = torch.nn.Linear(6, 20), torch.nn.BatchNorm1d(20), torch.nn.ReLU(), torch.nn.Linear(20, 1)
    model, state = job.wrap(torch.nn.Sequential(*layers))
    train(model, state, sgd(model))
    assert int(layers[1].num_batches_tracked) == STEPS
    assert 0.0 < float(layers[1].running_var.min()) < float(layers[1].running_var.max()) < 10.0
    state.sync_buffers()
    return [b.tolist() for b in model.buffers()]


def spectral_and_weight_norm(rank: int, job: Job) -> Any:
    """Parametrizations, old and new, and the vectors that iterate with each forward pass."""
    torch.manual_seed(0)
    norms = torch.nn.utils.parametrizations
    old, new = torch.nn.utils.spectral_norm, norms.spectral_norm
    layers = (
        old(torch.nn.Linear(6, 8)),
        torch.nn.Tanh(),
        new(torch.nn.Linear(8, 8)),
        norms.weight_norm(torch.nn.Linear(8, 1)),
    )
    model, state = job.wrap(torch.nn.Sequential(*layers))
    train(model, state, sgd(model))
    return [b for b in model.buffers() if b.is_floating_point()]


def convolutions(rank: int, job: Job) -> Any:
    """InstanceNorm, GroupNorm, dropout, channels last."""
    torch.manual_seed(0)
    layers = [
        torch.nn.Unflatten(1, (1, 2, 3)),
        torch.nn.Conv2d(1, 8, 3, padding=1),
        torch.nn.InstanceNorm2d(8, affine=True),
    ]
    layers += [torch.nn.GELU(), torch.nn.Dropout(0.1), torch.nn.Conv2d(8, 8, 1), torch.nn.GroupNorm(2, 8)]
    layers += [torch.nn.Flatten(), torch.nn.LazyLinear(1)]
    module = torch.nn.Sequential(*layers)
    module(torch.ones(2, 6))
    model, state = job.wrap(module.to(memory_format=torch.channels_last))
    train(model, state, sgd(model))
    return None


def double_precision(rank: int, job: Job) -> Any:
    """torch.set_default_dtype(float64)."""
    torch.set_default_dtype(torch.float64)
    try:
        model, state = job.wrap(mlp().double())
        optimizer = qgc.CodedAdam(model.parameters(), state, lr=1e-2)
        for x, y in state.loader(dataset(), batch_size=BATCH):
            optimizer.zero_grad()
            mse(model(x.double()), y.double()).backward()
            optimizer.step()
        assert all(p.dtype == p.grad.dtype == torch.float64 for p in model.parameters())
    finally:
        torch.set_default_dtype(torch.float32)
    return None


def half_parameters(rank: int, job: Job) -> Any:
    """A model in bfloat16 altogether."""
    model, state = job.wrap(mlp().bfloat16())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x, y in state.loader(dataset(), batch_size=BATCH):
        optimizer.zero_grad()
        mse(model(x.bfloat16()), y.bfloat16()).backward()
        optimizer.step()
    return None


class Recurrent(torch.nn.Module):
    """A network whose state goes from batch to batch, detached."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cell, self.out = torch.nn.GRUCell(6, 8), torch.nn.Linear(8, 1)

    def forward(self, x: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.cell(x, hidden)
        return self.out(hidden), hidden


def truncated_backpropagation(rank: int, job: Job) -> Any:
    """The hidden state of the batch before, of other size where that was thin: the loop's own business."""
    model, state = job.wrap(Recurrent())
    optimizer = sgd(model)
    hidden = torch.zeros(BATCH, 8)
    for x, y in state.loader(dataset(), batch_size=BATCH):
        out, new = model(x, hidden[: len(x)].detach())
        hidden = torch.cat([new.detach(), hidden[len(x) :]])
        optimizer.zero_grad()
        mse(out, y).backward()
        optimizer.step()
    return None


# --- DDP's options ------------------------------------------------------------------------------------------------


def bucket_views(rank: int, job: Job) -> Any:
    model, state = job.wrap(mlp(), ddp={"gradient_as_bucket_view": True, "bucket_cap_mb": 1e-4})
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for i, (x, y) in enumerate(state.loader(dataset(12), batch_size=BATCH)):
        mse(model(x), y).backward()
        if i % 2:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
    return None


def static_graph(rank: int, job: Job) -> Any:
    model, state = job.wrap(mlp(), ddp={"static_graph": True})
    train(model, state, sgd(model))
    return None


def parameters_to_ignore(rank: int, job: Job) -> Any:
    """What DDP ignores is neither exchanged nor waited for."""
    module = torch.nn.Sequential(mlp(), torch.nn.Linear(1, 1))
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, ["1.weight", "1.bias"])
    model, state = job.wrap(module)
    train(model, state, sgd(model.module[0]))
    return None


def copies(rank: int, job: Job) -> Any:
    """deepcopy and pickle of the DDP model and of the optimizer take no part in the job."""
    model, state = job.wrap(mlp())
    optimizer = qgc.CodedAdam(model.parameters(), state, lr=1e-2)
    best: list[Any] = []

    def keep() -> None:
        # DDP's process group cannot be copied by torch itself; the module can, with whatever hooks it has.
        best[:] = [copy.deepcopy(model.module), pickle.loads(pickle.dumps(model.module))]
        with contextlib.suppress(Exception):
            copy.deepcopy(optimizer)
        for other in best:
            other(torch.ones(2, 6)).sum().backward()

    train(model, state, optimizer, after=keep)
    return best


# --- optimizers ------------------------------------------------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are made orthogonal, as in modded-nanogpt, without its collectives."""

    def __init__(self, params: Any, lr: float = 0.02, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = buffer / (buffer.norm() + 1e-7)
                for _ in range(3):
                    update = 1.5 * update - 0.5 * update @ update.T @ update
                p.add_(update, alpha=-group["lr"])


def muon_and_adam(rank: int, job: Job) -> Any:
    model, state = job.wrap(mlp())
    matrices, rest = ([p for p in model.parameters() if (p.ndim == 2) is wanted] for wanted in (True, False))
    optimizers = [Muon(matrices), torch.optim.AdamW(rest, lr=1e-2)]
    schedulers = [torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.1, STEPS) for o in optimizers]
    for i, (x, y) in enumerate(state.loader(dataset(), batch_size=BATCH)):
        mse(model(x), y).backward()
        optimizers[0].param_groups[0]["momentum"] = 0.85 + 0.1 * min(i / 5, 1)
        for o, s in zip(optimizers, schedulers):
            o.step()
            s.step()
        model.zero_grad(set_to_none=True)
    return [s.state_dict() for s in schedulers]


def embeddings_by_sgd(rank: int, job: Job) -> Any:
    """Two optimizers, the second of which steps every other iteration."""
    model, state = job.wrap(torch.nn.Sequential(torch.nn.Embedding(16, 8), torch.nn.Linear(8, 16)))
    of_tables = torch.optim.SGD(model.module[0].parameters(), lr=0.1)
    of_rest = qgc.CodedAdamW(model.module[1].parameters(), state, lr=1e-2)
    for i, (x, _) in enumerate(state.loader(dataset(), batch_size=BATCH)):
        tokens = (x.abs() * 7).long() % 16
        loss = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        of_tables.zero_grad()
        of_rest.zero_grad()
        loss.backward()
        of_tables.step()
        if i % 2:
            of_rest.step()
    return None


def made_before_ddp(rank: int, job: Job) -> Any:
    """Adam and its scheduler are made before DDP; state.bind makes it a coded one in place. Late steps are replayed."""
    module = mlp()
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
    counted: list[int] = []
    model, state = job.wrap(module)
    state.bind(optimizer, scheduler=scheduler, max_grad_norm=1.0, after=counted.append)
    assert isinstance(optimizer, qgc.CodedAdam)
    for x, y in state.loader(dataset(), batch_size=BATCH):
        mse(model(x), y).backward()
        state.update()
    assert counted == list(range(STEPS))
    return scheduler.state_dict()


def bound_until_a_step(rank: int, job: Job) -> Any:
    """`if state.step == n: break` ends the loop of a rank, too, that has replayed the last step without its body."""
    model, state = job.wrap(mlp(), late=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    goals = (8, 13)
    if rank == job.late_rank:
        Late(model, state, {goal - 2 for goal in goals})
    state.bind(optimizer, max_grad_norm=1.0)
    loader = state.loader(dataset(), batch_size=BATCH)
    positions = []
    for goal in goals:
        for x, y in loader:
            mse(model(x), y).backward()
            state.update()
            if state.step == goal:
                break
        positions.append((state.step, state.state_dict()["loaders"]))
    return positions


def from_groups(rank: int, job: Job) -> Any:
    """CodedAdamW(optimizer.param_groups, state), with weight decay for matrices only."""
    module = mlp()
    groups = [
        {"params": [p for p in module.parameters() if p.ndim == n], "weight_decay": 0.1 * (n > 1)} for n in (1, 2)
    ]
    before = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    model, state = job.wrap(module)
    optimizer = qgc.CodedAdamW(before.param_groups, state)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.0, 0.1]
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.95)
    train(model, state, optimizer)
    return optimizer.param_groups[0]["lr"]


def overflowing(job: Job, rank: int, *, told: bool) -> Any:
    model, state = job.wrap(mlp())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4)
    if told:
        state.scaler = scaler
    scales = []
    for i, (x, y) in enumerate(state.loader(dataset(12), batch_size=BATCH)):
        with torch.autocast("cpu", dtype=torch.float16):
            loss = mse(model(x), y)
        if rank == 0 and i == 2:  # a step that waits for all, so that all see it
            loss = loss * torch.inf
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
    assert scales[2] == scales[1] / 2
    return scales


def grad_scaler(rank: int, job: Job) -> Any:
    return overflowing(job, rank, told=False)


def grad_scaler_that_is_told(rank: int, job: Job) -> Any:
    return overflowing(job, rank, told=True)


CASES = {
    f.__name__: Case(f, **options)
    for f, options in [
        (exponential_average, {}),
        (self_distillation, {"steps": 2 * STEPS}),
        (lookahead_and_swa, {}),
        (low_rank, {}),
        (normalized, {}),
        (spectral_and_weight_norm, {}),
        (convolutions, {}),
        (double_precision, {}),
        (half_parameters, {}),
        (truncated_backpropagation, {}),
        (bucket_views, {"steps": 12}),
        (static_graph, {}),
        (parameters_to_ignore, {}),
        (copies, {}),
        (muon_and_adam, {}),
        (embeddings_by_sgd, {}),
        (made_before_ddp, {"replays": True}),
        (bound_until_a_step, {"steps": 13, "replays": True}),
        (from_groups, {}),
        (grad_scaler, {"steps": 12}),
        (grad_scaler_that_is_told, {"steps": 12}),
    ]
}


@pytest.fixture(scope="module")
def played() -> Any:
    return run_cases(CASES)


@pytest.mark.parametrize("name", CASES)
def test_all_ranks_stay_equal_although_one_is_late(played: Any, name: str) -> None:
    check_case([rank[name] for rank in played], CASES[name])
