"""A simulated job against the real aggregator, and against real processes."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import simulated
from helpers.ranks import run_ranks
from helpers.simulation import decoded_gradients
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

import torch_qgc as qgc
from torch_qgc.errors import ConfigError
from torch_qgc.planner import make_plan
from torch_qgc.protocol.contract import ClosingRule
from torch_qgc.simulator import coding, descent, simulate
from torch_qgc.simulator.arrivals import DelaySource, JobRounds


# ------------------------------------------------------------------------------------- against a running job
class Impatient(ClosingRule):
    """Workers join every open step, as those of tests/helpers/simulated.py do."""

    def wait_before_joining_s(self, step: int, elapsed_s: float | None, usual_s: float | None) -> float:
        return 0.0


@pytest.mark.parametrize("late", ["drop", "fold"])
def test_a_simulated_job_decodes_the_bits_of_the_aggregator(late: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same payloads and delays through the real Aggregator: who is in, and every decoded float, are equal."""
    plan = make_plan([0.05, 0.1, 0.2, 0.5], bits_per_coordinate=4, noise_ratio=1.0, second_track="hajek")
    steps, numel = 120, 512
    rng = np.random.default_rng(5)
    delays = rng.uniform(0.3, 1.05, (steps, 4))
    delays[:, 3] += 4.0 * (rng.random(steps) < 0.4)
    rows = torch.randn(4, numel, generator=torch.Generator().manual_seed(2))

    codec = coding.SchemeCodec(plan, numel, seed=0)
    sent = torch.zeros(4, numel)
    for n in range(4):
        codec.mix(n, rows[n], lambda k: sent[k])
    spec = simulated.make_spec(plan, late=late, warmup_steps=3, quorum=2)
    job = simulated.Job(plan, spec, sent, lambda k, step: float(delays[step % steps, k]))
    job.run(steps)

    tracks: list[list[torch.Tensor]] = [[], []]

    def keep(optimizer: torch.optim.Adam, seconds: dict[torch.Tensor, torch.Tensor]) -> None:
        (weight,) = optimizer.param_groups[0]["params"]
        tracks[0].append(weight.grad.reshape(-1))
        tracks[1].append(seconds[weight].reshape(-1).clone())

    monkeypatch.setattr(descent, "two_track_adam", keep)
    trace = simulate(
        torch.nn.Linear(numel, 1, bias=False),
        lambda m, batch: m(batch[0]).mean(),
        TensorDataset(rows),
        plan,
        partitions=[[0], [1], [2], [3]],
        delays=delays,
        rule=Impatient(deadline_s=1.0, warmup_steps=3, quorum=2, late=late),
        steps=steps,
        optimizer="adam",
        lr=0.1,
    )
    np.testing.assert_array_equal(trace.contributions[0], np.array(job.contributions[:steps]))
    assert torch.equal(torch.stack(tracks[0]), torch.stack(job.decoded[:steps]))
    assert torch.equal(torch.stack(tracks[1]), torch.stack(job.second[:steps]))
    assert (trace.contributions == 2).any() == (late == "fold")


def test_a_late_worker_misses_the_steps_it_is_late_for() -> None:
    delays = np.array([[0.1, 0.1, 3.5]])
    rounds = JobRounds(
        DelaySource(delays, 3, 0),
        ClosingRule(deadline_s=1.0, warmup_steps=0, late="drop"),
        np.ones(3, dtype=bool),
        make_plan([0.1] * 3),
        log_steps=256,
    )
    outcomes = [rounds.close(step) for step in range(8)]
    assert outcomes[0].began == [0, 1, 2]
    assert outcomes[1].began == [0, 1]  # worker 2 computes for the step before
    assert outcomes[-1].rates is not None
    assert outcomes[-1].rates[2] < 0.9  # what the plan expects has been unlearned
    assert outcomes[7].closed_at_s == pytest.approx(8.0)


def test_a_running_job_that_waits_for_who_never_comes_is_an_error() -> None:
    with pytest.raises(ConfigError, match="never comes"):
        decoded_gradients(
            make_plan([0.1] * 2),
            delays=np.array([[0.1, np.inf]]),
            deadline_s=None,
            rule=ClosingRule(deadline_s=1.0),
            steps=3,
        )


# ----------------------------------------------------------------------------------- against real processes
PLAN = make_plan([0.05, 0.05, 0.1, 0.6], bits_per_coordinate=4, noise_ratio=1.0)
RULE: dict[str, Any] = {"deadline_s": 0.2, "warmup_steps": 3}
BATCH, SAMPLES, LR = 8, 256, 0.1


def recorded_delays(steps: int) -> np.ndarray:
    """[steps, 4] seconds, far from the deadline on either side: a busy machine must not change who is late."""
    rng = np.random.default_rng(1)
    late = rng.random((steps, 4)) < [0.0, 0.05, 0.1, 0.4]
    late[: RULE["warmup_steps"]] = False
    return np.where(late, 0.5, 0.02)


def regression() -> tuple[torch.nn.Module, TensorDataset]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(SAMPLES, 16, generator=generator)
    targets = torch.tanh(inputs @ torch.randn(16, 4, generator=generator))
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 4)), TensorDataset(
        inputs, targets
    )


def loss_of(model: torch.nn.Module, batch: Any) -> torch.Tensor:
    return torch.nn.functional.mse_loss(model(batch[0]), batch[1])


def real_job(rank: int, late: Any, delays: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """Train with injected delays; return contributions per round, and the loss of all data after each step."""
    model, dataset = regression()
    ddp = DistributedDataParallel(model, broadcast_buffers=False)
    state = qgc.QGCState(ddp, plan=PLAN, late=late, quorum=2, **RULE)
    ddp.register_comm_hook(state, qgc.qgc_hook)
    loader = state.loader(dataset, batch_size=BATCH)
    optimizer = qgc.CodedSGD(ddp.parameters(), state, lr=LR)
    losses = []
    for _ in range(len(delays) // len(loader)):
        for batch in loader:
            loss = loss_of(ddp, batch)
            time.sleep(delays[state.step, rank])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                losses.append(loss_of(model, dataset.tensors).item())
    dist.barrier()  # nobody takes the aggregator away while a late rank still replays
    report = state.report()
    state.close()
    return report.contributions, losses


def assert_real_and_simulated_agree(late: Any, steps: int) -> None:
    delays = recorded_delays(steps)
    contributions, losses = run_ranks(real_job, late, delays)[0]  # worker 0 is never late: it sees every step
    assert len(losses) == steps
    model, dataset = regression()
    trace = simulate(
        model,
        loss_of,
        dataset,
        PLAN,
        delays=delays,
        rule=ClosingRule(late=late, quorum=2, **RULE),
        steps=steps,
        batch_size=BATCH,
        lr=LR,
        runs=8,
        evaluate=lambda m: {"loss": loss_of(m, dataset.tensors).item()},
        evaluate_every=1,
    )
    simulated_rates = trace.contributions[0].mean(axis=0)
    # Two rounds in which a busy machine made another worker late, or in time.
    np.testing.assert_allclose(contributions, simulated_rates, atol=2.5 / steps + 0.05)
    assert simulated_rates[3] < 0.8  # it did miss rounds
    curves = trace.evaluations["loss"][:, 1:]
    for part in np.array_split(np.arange(steps), 4):  # the loss of a quarter of the steps, against that of eight runs
        spread = curves[:, part].mean(axis=1)
        mean = float(spread.mean())
        assert np.mean(np.array(losses)[part]) == pytest.approx(mean, abs=4 * spread.std(ddof=1) + 0.02 * mean)


def test_a_simulated_and_a_real_job_agree() -> None:
    assert_real_and_simulated_agree("fold", 32)


@pytest.mark.slow
@pytest.mark.parametrize("late", ["drop", "fold"])
def test_long_simulated_and_real_jobs_agree(late: Any) -> None:
    assert_real_and_simulated_agree(late, 160)
