"""Training as a user writes it who checks types: `tests/test_typing.py` runs this file and gives it to mypy."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

import torch_qgc as qgc
from torch_qgc.planner.delays import ShiftedExponential
from torch_qgc.simulator import IDEAL, Trace, noise_ratio, simulate


def samples() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(64, 8, generator=generator), torch.randint(0, 3, (64,), generator=generator))


def loss_of(model: torch.nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])


def make_optimizer(name: str, model: torch.nn.Module, state: qgc.QGCState) -> torch.optim.Optimizer:
    if name == "sgd":
        return qgc.CodedSGD(model.parameters(), state, lr=0.1, momentum=0.9)
    if name == "adamw":
        return qgc.CodedAdamW(model.parameters(), state, lr=1e-3, weight_decay=0.1)
    return qgc.CodedAdam(model.parameters(), state, lr=1e-3)


def train(optimizer_name: str, workers: int) -> dict[str, Any]:
    """Train for an epoch in a process group that exists; return the checkpoint's part that is torch_qgc's."""
    plan: qgc.Plan = qgc.make_plan([0.1] * workers, bits_per_coordinate=4, noise_ratio=1.0, second_track="hajek")
    model = DistributedDataParallel(torch.nn.Linear(8, 3))
    state = qgc.QGCState(
        model, plan=plan, deadline_s=5.0, limits=qgc.Limits(log_steps=128), network=qgc.Network(host="127.0.0.1")
    )
    model.register_comm_hook(state, qgc.qgc_hook)
    loader = state.loader(samples(), batch_size=8)
    optimizer = make_optimizer(optimizer_name, model, state)
    state.bind(optimizer, scheduler=torch.optim.lr_scheduler.StepLR(optimizer, 10), max_grad_norm=1.0)
    try:
        for batch in loader:
            loss_of(model, batch).backward()
            state.update()
        report = state.report()
        print(report, report.computed_steps + report.replayed_steps, report.rates.mean())
        return state.state_dict()
    except qgc.JobFailed as error:
        raise SystemExit(str(error)) from error
    finally:
        state.close()


def compare_schemes() -> float:
    """Simulate two schemes; return the final loss of the first."""
    late = [0.1, 0.4]
    model = torch.nn.Linear(8, 3)
    eta: float = noise_ratio(model, loss_of, samples(), batch_size=8, batches=4)
    plan = qgc.make_plan(late, noise_ratio=eta)
    delays = ShiftedExponential(mu=[2.0, 1.0], shift=1.0)
    traces: dict[str, Trace] = simulate(
        model, loss_of, samples(), {"ours": plan, "ideal": IDEAL}, delays=delays, deadline_s=2.0, steps=3, lr=0.1
    )
    single: Trace = simulate(
        model, loss_of, samples(), qgc.schemes.sgc(late), delays=delays, deadline_s=2.0, steps=3, lr=0.1
    )
    error: float = qgc.schemes.residual(plan)
    bits = qgc.planner.allocate_bits([[0.0, 0.0, 1.0, 2.0]] * 2, 5)
    print(error, bits.sum(), single.total_bits[0, -1], traces["ours"].band("loss")[0])
    return float(traces["ours"].loss[0, -1])
