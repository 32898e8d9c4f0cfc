"""A simulated job against the real aggregator, and against real processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import simulated
from helpers.ranks import PATIENCE_S, run_ranks
from helpers.simulation import decoded_gradients
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

import torch_qgc as qgc
from torch_qgc.ddp.settings import Limits
from torch_qgc.errors import ConfigError
from torch_qgc.job.courses import Courses
from torch_qgc.job.rounds import Closing, Rounds
from torch_qgc.planner import make_plan
from torch_qgc.protocol import messages
from torch_qgc.protocol.contract import ClosingRule
from torch_qgc.simulator import coding, descent, simulate, trajectory
from torch_qgc.simulator.arrivals import Contribution, JobRounds, RoundOutcome
from torch_qgc.simulator.delays import DelaySource
from torch_qgc.simulator.machines import Demand, Machines

# ------------------------------------------------------------------------------------- against a running job
STEPS_OF_JOB = 120


def recorded() -> np.ndarray:
    """Seconds [120, 4]; worker 3 pauses in two steps of five."""
    rng = np.random.default_rng(5)
    delays = rng.uniform(0.3, 1.05, (STEPS_OF_JOB, 4))
    delays[:, 3] += 4.0 * (rng.random(STEPS_OF_JOB) < 0.4)
    return delays


# In milliseconds: a real worker asks again for a result that takes a second. Worker 2 has a slow link up, 3 down.
LINKED = Machines(
    workers=4,
    batch_s=(0.003, 0.003, 0.002, 0.003),
    tail_s=0.001,
    jitter=0.2,
    up_s=(0.00113, 0.00097, 0.0307, 0.00203),
    down_s=(0.00107, 0.00091, 0.00217, 0.0123),  # no two events at the same time
)


@pytest.mark.parametrize("late", ["drop", "fold"])
@pytest.mark.parametrize(
    ("delays", "deadline_s", "downlink_bits"),
    [(recorded(), 1.0, 32), (LINKED, 0.008, 32), (LINKED, 0.008, 8), (LINKED, 0.005, 8)],
    ids=["recorded", "linked", "linked, coded down", "linked, short"],
)
def test_a_simulated_job_decodes_the_bits_of_the_aggregator(
    late: Any, delays: Any, deadline_s: float, downlink_bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same payloads and delays through the real Aggregator: who is in, and every decoded float, are equal."""
    # Workers join every open step, as those of tests/helpers/simulated.py do.
    monkeypatch.setattr(Courses, "wait_before_joining_s", lambda *args: 0.0)
    plan = make_plan([0.05, 0.1, 0.2, 0.5], bits_per_coordinate=4, noise_ratio=1.0, second_track="hajek")
    steps, numel = STEPS_OF_JOB, 512
    rows = torch.randn(4, numel, generator=torch.Generator().manual_seed(2))

    codec = coding.SchemeCodec(plan, numel, 0, downlink_bits)
    sent = torch.zeros(4, numel)
    for n in range(4):
        codec.mix(n, rows[n], lambda k: sent[k])
    source, load = DelaySource(delays, 4, 0), Demand((numel,), (numel,), downlink_bits).load(plan)

    def link(way: str, peer: bytes, frames: Any) -> float:
        worker = [simulated.peer_of(k) for k in range(4)].index(peer)
        decode = messages.decode_from_worker if way == "up" else messages.decode_from_aggregator
        if not isinstance(decode(frames[0]), messages.Push | messages.Result):
            return 0.0
        times = source.draw(0, load)._asdict()
        return float(times[f"{way}_s"][worker])

    rule = dict(late=late, warmup_steps=3, quorum=2, max_staleness=8, deadline_s=deadline_s)
    spec = simulated.make_spec(plan, downlink_bits=downlink_bits, log_steps=Limits().log_steps, **rule)
    job = simulated.Job(plan, spec, sent, lambda k, step: float(source.draw(step, load).own_s[k]), link=link)
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
        rule=ClosingRule(**rule),
        downlink_bits=downlink_bits,
        steps=steps,
        optimizer="adam",
        lr=0.1,
    )
    np.testing.assert_array_equal(trace.contributions[0], np.array(job.contributions[:steps]))
    assert torch.equal(torch.stack(tracks[0]), torch.stack(job.decoded[:steps]))
    assert torch.equal(torch.stack(tracks[1]), torch.stack(job.second[:steps]))
    assert (trace.contributions == 2).any() == (late == "fold")
    assert (trace.contributions == 0).any()


@pytest.mark.parametrize(("awaits", "step_s"), [("alive", 1.0), ("begun", 0.1)])
def test_a_late_worker_misses_the_steps_it_is_late_for(awaits: Any, step_s: float) -> None:
    delays = np.array([[0.1, 0.1, 3.5]])
    rounds = JobRounds(
        DelaySource(delays, 3, 0),
        ClosingRule(deadline_s=1.0, warmup_steps=0, late="drop", awaits=awaits),
        np.ones(3, dtype=bool),
        make_plan([0.1] * 3),
        demand=Demand((1,), (1,), 32),
        log_steps=256,
    )
    outcomes = [rounds.close(step) for step in range(8)]
    assert outcomes[0].began == [0, 1, 2]
    assert outcomes[1].began == [0, 1]  # worker 2 computes for the step before
    assert outcomes[-1].rates is not None
    assert outcomes[-1].rates[2] < 0.9  # what the plan expects has been unlearned
    assert outcomes[7].closed_at_s == pytest.approx(1.0 + 7 * step_s)  # the first waits for everybody that began


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
RULE = ClosingRule(deadline_s=0.05, warmup_steps=3, quorum=2)
BATCH, SAMPLES, LR, STEPS = 8, 256, 0.1, 32
LATE_BY = 3  # this worker is made late most often


def lateness() -> np.ndarray:
    """[steps, 4] bool: who waits until the others have closed the step; with the quorum of 2, at most two of them."""
    late = np.random.default_rng(1).random((STEPS, 4)) < [0.0, 0.05, 0.1, 0.4]
    late[: RULE.warmup_steps] = False
    late[late.sum(axis=1) > 2] = False
    return late


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


def real_job(rank: int, late: Any, recording: str) -> tuple[np.ndarray, list[float]]:
    """Train with late workers; return contributions per round, and the loss of all data after each step."""
    model, dataset = regression()
    ddp = DistributedDataParallel(model, broadcast_buffers=False)
    rule = dict(deadline_s=RULE.deadline_s, warmup_steps=RULE.warmup_steps, quorum=RULE.quorum)
    state = qgc.QGCState(ddp, plan=PLAN, late=late, network=qgc.Network(trace=recording), **rule)
    ddp.register_comm_hook(state, qgc.qgc_hook)
    loader = state.loader(dataset, batch_size=BATCH)
    optimizer = qgc.CodedSGD(ddp.parameters(), state, lr=LR)
    waits, losses = lateness(), []
    for _ in range(STEPS // len(loader)):
        for batch in loader:
            loss = loss_of(ddp, batch)
            if waits[state.step, rank]:
                assert state.replica.joined()[0].wait_closed(state.step, PATIENCE_S)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                losses.append(loss_of(model, dataset.tensors).item())
    dist.barrier()  # nobody takes the aggregator away while a late rank still replays
    report = state.report()
    state.close()
    return report.contributions, losses


class Recorded:
    """A job's arrivals as its aggregator noted them, through the job's rules again: `Arrivals` for the simulator."""

    courses = None

    def __init__(self, recording: Path, rule: ClosingRule) -> None:
        self.events = [msgspec.json.decode(line) for line in recording.read_bytes().splitlines()]
        self.closings: list[Closing[None]] = []
        self._rounds: Rounds[None] = Rounds(Courses(rule, PLAN), log_steps=1 << 30)
        for event, then in zip(self.events, [*self.events[1:], None]):
            if event["name"] == "close":
                self._closes_as(event)
            else:
                self._happens(event)
                # The aggregator looks at once whether this has closed a round.
                if then is None or (then["name"], then["time_s"]) != ("close", event["time_s"]):
                    assert self._rounds.close_due(event["time_s"]) == []

    def _happens(self, event: dict[str, Any]) -> None:
        worker, step, now = event["worker"], event["step"], event["time_s"]
        match event["name"]:
            case "join":
                self._rounds.join(worker, step, now)
            case "begin":
                self._rounds.begin(worker, step, now)
            case "take":
                self._rounds.take(worker, step, now)
            case "arrive":
                assert self._rounds.arrive(worker, step, event["chunk"], None, now).value == event["detail"]["fate"]
            case "left":
                self._rounds.leave(worker, now)
            case name:
                raise AssertionError(name)

    def _closes_as(self, event: dict[str, Any]) -> None:
        (closing,) = self._rounds.close_due(event["time_s"])
        assert (closing.step, closing.chunk) == (event["step"], event["chunk"])
        assert closing.counts.tolist() == event["detail"]["counts"]
        assert closing.extended_s == event["detail"]["extended_s"]
        self.closings.append(closing)

    def close(self, step: int) -> RoundOutcome:
        closing = self.closings[step]
        assert closing.step == step
        began = [e["worker"] for e in self.events if (e["name"], e["step"]) == ("begin", step)]
        contributions = [Contribution(worker, made_for, 1) for worker, made_for, _ in closing.payloads]
        return RoundOutcome(sorted(began), sorted(began), contributions, closing.rates, float(step))


@pytest.mark.parametrize("late", ["drop", "fold"])
def test_recorded_arrivals_close_the_rounds_of_the_real_job_and_train_to_its_losses(
    late: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recording also has whom a busy machine made late; every decision follows from the recording."""
    file = tmp_path / "events.jsonl"
    contributions, losses = run_ranks(real_job, late, str(file))[0]  # worker 0 sees every step
    assert len(losses) == STEPS
    rule = ClosingRule(**{**msgspec.structs.asdict(RULE), "late": late})
    recorded = Recorded(file, rule)
    counts = np.array([closing.counts for closing in recorded.closings])
    assert len(counts) == STEPS
    np.testing.assert_allclose(contributions, counts.mean(axis=0))
    arrivals = [e for e in recorded.events if e["name"] == "arrive" and e["worker"] == LATE_BY]
    assert {e["detail"]["fate"] for e in arrivals} >= {"in time", "dropped" if late == "drop" else "folded"}

    monkeypatch.setattr(trajectory, "_arrivals", lambda *args, **options: recorded)
    model, dataset = regression()
    trace = simulate(
        model,
        loss_of,
        dataset,
        PLAN,
        delays=np.ones((1, 4)),  # replaced by what was recorded
        rule=rule,
        steps=STEPS,
        batch_size=BATCH,
        lr=LR,
        evaluate=lambda m: {"loss": loss_of(m, dataset.tensors).item()},
        evaluate_every=1,
    )
    np.testing.assert_array_equal(trace.contributions[0], counts)
    # The same payloads in the same rounds; DDP and the simulator sum a batch's gradient in another order.
    np.testing.assert_allclose(trace.evaluations["loss"][0, 1:], losses, rtol=1e-4)
