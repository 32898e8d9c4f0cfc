"""A run that was interrupted and goes on from its checkpoint is the run that was not."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.loops import BATCH, LATE, RANKS, Witness, coded, dataset, fall_behind, job, mlp
from helpers.ranks import aggregators, run_ranks
from torch.utils.data import TensorDataset

import torch_qgc as qgc
from torch_qgc.ddp.loader import CodedLoader, make_loader
from torch_qgc.planner import Plan, make_plan
from torch_qgc.worker.checkpoint import Checkpoint

EPOCHS, STEPS_PER_EPOCH = 3, 6


class Run:
    """A training script: everything in it that a checkpoint must hold."""

    def __init__(self, endpoint: str, *, batch_size: int = BATCH, **options: Any) -> None:
        self.ddp, self.state = coded(mlp(), endpoint, **options)
        self.loader = self.state.loader(dataset(STEPS_PER_EPOCH), batch_size=batch_size)
        self.optimizer = qgc.CodedAdam(self.ddp.parameters(), self.state, lr=1e-2)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, EPOCHS * STEPS_PER_EPOCH)
        self.state.bind(self.optimizer, scheduler=self.scheduler, max_grad_norm=1.0)
        self.losses: dict[int, float] = {}

    def parts(self) -> dict[str, Any]:
        """What has a state_dict, by name."""
        return {
            "model": self.ddp.module,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "state": self.state,
        }

    def save(self) -> bytes:
        file = io.BytesIO()
        torch.save({name: part.state_dict() for name, part in self.parts().items()}, file)
        return file.getvalue()

    def load(self, saved: bytes) -> None:
        found = torch.load(io.BytesIO(saved), weights_only=True)
        for name, part in self.parts().items():
            part.load_state_dict(found[name])

    def train(self, rank: int, *, stop_at: int = EPOCHS * STEPS_PER_EPOCH) -> None:
        while self.loader.sampler.epoch < EPOCHS:
            for x, y in self.loader:
                fall_behind(rank, self.state)
                step = self.state.step
                loss = torch.nn.functional.mse_loss(self.ddp(x), y)
                loss.backward()
                self.state.update()
                self.losses[step] = float(loss)
                if self.state.step == stop_at:
                    return
            if self.state.step == stop_at:
                return


def interrupted(rank: int, whole: str, before: str, after: str, stop_at: int) -> tuple[dict[int, float], ...]:
    runs = [Run(endpoint, deadline_s=None) for endpoint in (whole, before, after)]
    with job(*(run.state for run in runs)):
        runs[0].train(rank)
        runs[1].train(rank, stop_at=stop_at)
        runs[2].load(runs[1].save())
        runs[2].train(rank)
    assert runs[0].state.replica.layout.parameter_digest() == runs[2].state.replica.layout.parameter_digest()
    return runs[0].losses, {**runs[1].losses, **runs[2].losses}


@pytest.mark.parametrize("stop_at", [4, STEPS_PER_EPOCH, STEPS_PER_EPOCH + 5])
def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(stop_at: int) -> None:
    """In the middle of the first epoch, between two, and in the middle of the second."""
    with aggregators(3) as endpoints:
        ranks = run_ranks(interrupted, *endpoints, stop_at, ranks=RANKS)
    for whole, parts in ranks:
        assert sorted(whole) == list(range(EPOCHS * STEPS_PER_EPOCH))
        assert parts == whole


def save_late_run(rank: int, endpoint: str) -> tuple[bytes, list[float], int]:
    run = Run(endpoint)
    with job(run.state):
        run.train(rank, stop_at=STEPS_PER_EPOCH + 2)
        saved = run.save()
    return saved, run.state.report().rates.tolist(), run.state.report().replayed_steps


def go_on(rank: int, endpoint: str, saved: bytes, batch_size: int) -> dict[str, Any]:
    run = Run(endpoint, batch_size=batch_size)
    run.load(saved)
    begun = (run.state.step, run.loader.sampler.epoch, run.loader.steps_done, run.loader.steps)
    witness = Witness(run.state)
    with job(run.state):
        run.train(rank, stop_at=run.state.step + 5)
        return witness.seen(begun=begun, straggle_probs=run.state.plan.straggle_probs.tolist())


@pytest.mark.parametrize(("ranks", "batch_size"), [(3, BATCH), (2, BATCH), (2, 3)])
def test_another_number_of_workers_goes_on_at_the_same_step_and_sample(ranks: int, batch_size: int) -> None:
    with aggregators(2) as endpoints:
        before = run_ranks(save_late_run, endpoints[0], ranks=RANKS)
        saved, rates, _ = before[0]
        assert before[LATE][2] > 0
        after = run_ranks(go_on, endpoints[1], saved, batch_size, ranks=ranks)
    contents = [torch.load(io.BytesIO(each[0]), weights_only=True)["state"] for each in before]
    assert contents[0] == contents[1] == contents[2]
    assert rates[LATE] < 1.0
    # 8 steps of 3 x 4 samples were made, 2 of them in the second epoch of 72 samples.
    per_step = ranks * batch_size
    for rank in after:
        assert rank["begun"] == (8, 1, 24 // per_step, 72 // per_step)
        assert rank["digests"] == after[0]["digests"]
        assert set(rank["digests"]) == set(range(8, 14))
        expected = 1 - np.array(rates) if ranks == RANKS else np.full(ranks, 0.05)
        np.testing.assert_allclose(rank["straggle_probs"], expected)


# --- positions, without processes --------------------------------------------------------------------------


class State:
    """A QGCState as far as the loader can see: every batch is a step."""

    may_be_late = in_step = False

    def __init__(self, workers: int = 2) -> None:
        self.plan: Plan = make_plan([0.1] * workers)
        self.worker, self.spec, self.step = 0, SimpleNamespace(workers=workers), 0

    def check_replayable(self) -> None: ...
    def catch_up(self, end_step: int) -> None: ...
    def await_step(self, end_step: int) -> None: ...


class Augmented(TensorDataset):
    """Samples with noise from the random numbers that a loader's process was started with."""

    def __getitem__(self, index: int) -> Any:
        return index + float(torch.rand(()))


def loader_of(state: State, **options: Any) -> CodedLoader:
    return make_loader(state, Augmented(torch.arange(48)), batch_size=3, accumulate=2, seed=4, **options)


def take(loader: CodedLoader, state: State, steps: int) -> list[list[float]]:
    """Train for some steps of two batches; the rest of the epoch is left."""
    seen = []
    for i, batch in enumerate(loader):
        seen.append(batch.tolist())
        state.in_step = i % 2 == 0  # type: ignore[misc]
        state.step += i % 2
        if i == 2 * steps - 1:
            break
    return seen


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_loader_goes_on_with_the_very_next_batch(num_workers: int) -> None:
    def fresh() -> tuple[CodedLoader, State]:
        state = State()
        return loader_of(state, num_workers=num_workers), state

    def indices(batches: list[list[float]]) -> list[list[int]]:
        return [[int(value) for value in batch] for batch in batches]

    loader, state = fresh()
    whole = take(loader, state, 4)
    loader, state = fresh()
    first = take(loader, state, 3)
    saved = loader.state_dict()
    assert saved == {"epoch": 0, "samples": 3 * 2 * 2 * 3}
    loader, state = fresh()
    state.step = 3
    loader.load_state_dict(saved)
    next(iter(loader))  # a look at a batch takes no step
    assert loader.state_dict() == saved
    assert indices(first) + indices(take(loader, state, 1)) == indices(whole)
    saved = loader.state_dict()
    assert saved == {"epoch": 0, "samples": 48}  # the last step was made, the loop was not left yet
    loader, state = fresh()
    loader.load_state_dict(saved)
    assert list(loader) == []
    assert loader.state_dict() == {"epoch": 1, "samples": 0}


def test_random_numbers_of_loading_processes_depend_on_the_epoch_alone() -> None:
    state, again = State(), State()
    loader, other = loader_of(state, num_workers=1), loader_of(again, num_workers=1)
    take(loader, state, 4)
    state.in_step = again.in_step = False  # type: ignore[misc]
    loader.set_epoch(1)
    other.set_epoch(1)
    assert take(loader, state, 2) == take(other, again, 2)


def test_an_epoch_that_is_chosen_starts_at_its_beginning() -> None:
    state = State()
    loader = loader_of(state)
    loader.load_state_dict({"epoch": 2, "samples": 24})
    loader.set_epoch(2)
    assert loader.steps_done == 2
    loader.set_epoch(3)
    assert loader.state_dict() == {"epoch": 3, "samples": 0}


@pytest.mark.parametrize(("workers", "steps"), [(2, 3), (1, 7), (3, 2), (8, 0)])
def test_positions_are_samples_and_round_down_to_steps(workers: int, steps: int) -> None:
    state = State(workers)
    loader = make_loader(state, TensorDataset(torch.arange(400)), batch_size=5, seed=4)
    loader.load_state_dict({"epoch": 0, "samples": 37})
    assert loader.steps_done == steps


def test_what_is_no_checkpoint_is_refused_by_what_it_holds() -> None:
    with pytest.raises(qgc.ConfigError, match=r"got \['param_groups', 'state'\].*the optimizer's"):
        Checkpoint.from_dict(torch.optim.SGD(mlp().parameters(), lr=0.1).state_dict())
    with pytest.raises(qgc.ConfigError, match="got bytes"):
        Checkpoint.from_dict(b"")  # type: ignore[arg-type]


def test_a_worker_that_was_never_in_is_not_taken_for_lost() -> None:
    plan = make_plan([0.1, 0.1])
    saved = Checkpoint(step=5, seed=0, rates=[1.3, 0.0], loaders=[], plan=plan.to_json())
    informed = saved.informed(plan)
    assert informed.straggle_probs.tolist() == [0.0, 0.99]
    np.testing.assert_array_equal(informed.shares, plan.shares)
    assert saved.informed(make_plan([0.1] * 3)) == make_plan([0.1] * 3)
