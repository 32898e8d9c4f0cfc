"""A run that was interrupted and goes on from its checkpoint is the run that was not."""

from __future__ import annotations

import contextlib
import io
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from helpers.loops import BATCH, LATE, RANKS, Late, Witness, closing, coded, dataset, mlp
from helpers.ranks import aggregators, run_ranks
from helpers.replicas import FakeReplica
from torch.utils.data import TensorDataset

import torch_qgc as qgc
from torch_qgc.ddp.loader import CodedLoader, make_loader
from torch_qgc.planner import make_plan
from torch_qgc.worker.checkpoint import Checkpoint

EPOCHS, STEPS_PER_EPOCH = 3, 6


class Run:
    """A training script: everything in it that a checkpoint must hold."""

    def __init__(self, endpoint: str, *, batch_size: int = BATCH, **options: Any) -> None:
        self.ddp, self.state = coded(mlp(), endpoint, **options)
        self.loader = self.state.loader(dataset(STEPS_PER_EPOCH), batch_size=batch_size)
        self.optimizer = qgc.CodedAdam(self.ddp.parameters(), self.state, lr=1e-2)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, EPOCHS * STEPS_PER_EPOCH)
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
                step = self.state.step
                loss = torch.nn.functional.mse_loss(self.ddp(x), y)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.ddp.parameters(), 1.0)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
                self.losses[step] = float(loss)
                if self.state.step == stop_at:
                    return
            if self.state.step == stop_at:
                return


def interrupted(rank: int, whole: str, before: str, after: str, stop_at: int) -> tuple[dict[int, float], ...]:
    runs = [Run(endpoint, deadline_s=None) for endpoint in (whole, before, after)]
    with closing(*(run.state for run in runs)):
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
    if rank == LATE:
        Late(run.ddp, run.state, {4})
    with closing(run.state):
        run.train(rank, stop_at=STEPS_PER_EPOCH + 2)
        saved = run.save()
    return saved, run.state.report().rates.tolist(), run.state.report().thin_steps


def go_on(rank: int, endpoint: str, saved: bytes, batch_size: int) -> dict[str, Any]:
    run = Run(endpoint, batch_size=batch_size)
    run.load(saved)
    begun = (run.state.step, run.loader.state_dict(), len(run.loader))
    witness = Witness(run.ddp, run.state)
    with closing(run.state):
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
        assert rank["begun"] == (8, {"epoch": 1, "samples": 24 // per_step * per_step}, 72 // per_step)
        assert rank["digests"] == after[0]["digests"]
        assert set(rank["digests"]) == set(range(8, 14))
        expected = 1 - np.array(rates) if ranks == RANKS else np.full(ranks, 0.05)
        np.testing.assert_allclose(rank["straggle_probs"], expected)


# --- positions, without processes --------------------------------------------------------------------------


class Augmented(TensorDataset):
    """Samples with noise from the random numbers that a loader's process was started with."""

    def __getitem__(self, index: int) -> Any:
        return index + float(torch.rand(()))


def loader_of(replica: FakeReplica, **options: Any) -> CodedLoader:
    return make_loader(replica, Augmented(torch.arange(48)), batch_size=3, seed=4, **options)  # type: ignore[arg-type]


def fresh(workers: int = 2, **options: Any) -> CodedLoader:
    return loader_of(FakeReplica(make_plan([0.1] * workers)), **options)


def take(loader: CodedLoader, batches: int) -> list[list[float]]:
    """Train on some batches; the rest of the epoch is left."""
    replica: Any = loader._replica
    seen = []
    for batch in loader:
        seen.append(batch.tolist())
        replica.make_step()
        if len(seen) == batches:
            break
    return seen


def indices(batches: list[list[float]]) -> list[list[int]]:
    return [[int(value) for value in batch] for batch in batches]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_loader_goes_on_with_the_very_next_batch(num_workers: int) -> None:
    whole = take(fresh(num_workers=num_workers), 8)
    loader = fresh(num_workers=num_workers)
    first = take(loader, 6)
    saved = loader.state_dict()
    assert saved == {"epoch": 0, "samples": 6 * 2 * 3}
    loader = fresh(num_workers=num_workers)
    loader.load_state_dict(saved)
    next(iter(loader))  # a look at a batch takes no step
    assert loader.state_dict() == saved
    assert indices(first) + indices(take(loader, 2)) == indices(whole)
    assert loader.state_dict() == {"epoch": 0, "samples": 48}  # the last step was made, the loop was left in its body
    assert len(take(loader, 9)) == 8
    assert loader.state_dict() == {"epoch": 2, "samples": 0}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_workers_of_unequal_batches_go_on_with_the_very_next_one_from_the_same_position(num_workers: int) -> None:
    def of(rank: int) -> CodedLoader:
        sizes = dict.fromkeys(range(100), (1, 5)[rank])
        return loader_of(FakeReplica(make_plan([0.1] * 2), rank, sizes=sizes), num_workers=num_workers)

    positions = []
    for rank in range(2):
        whole, loader = take(of(rank), 8), of(rank)
        first = take(loader, 3)
        positions.append(loader.state_dict())
        loader = of(rank)
        loader.load_state_dict(positions[0])
        assert indices(first) + indices(take(loader, 5)) == indices(whole)
    assert positions[0] == positions[1] == {"epoch": 0, "samples": 3 * 2 * 3}


@pytest.mark.parametrize(("before", "after"), [(5, 3), (1, 3)])
def test_other_batch_sizes_after_a_restart_draw_some_samples_again_or_leave_some_out(before: int, after: int) -> None:
    """As many as the batches before the restart had more, or less, than as many batches of now: data that stay."""
    held = [range(24), range(24, 48)]

    def of(size: int) -> CodedLoader:
        replica = FakeReplica(make_plan([0.1] * 2), sizes=dict.fromkeys(range(100), size))
        return loader_of(replica, partitions=held)

    first, second = of(before), of(after)
    seen = indices(take(first, 2))
    second.load_state_dict(first.state_dict())
    rest = indices(take(second, 6))
    assert [len(batch) for batch in rest] == [after] * 6
    draws = second.sampler.stream().take(8 * 5).tolist()
    assert list(chain(*seen)) == draws[: 2 * before]
    assert list(chain(*rest)) == draws[2 * after : 8 * after]


def test_random_numbers_of_loading_processes_depend_on_the_epoch_alone() -> None:
    loader, other = fresh(num_workers=1), fresh(num_workers=1)
    take(loader, 4)
    loader.set_epoch(1)
    other.set_epoch(1)
    assert take(loader, 2) == take(other, 2)


def test_an_epoch_that_is_chosen_starts_at_its_beginning() -> None:
    loader = fresh()
    loader.load_state_dict({"epoch": 2, "samples": 24})
    loader.set_epoch(2)
    assert loader.state_dict() == {"epoch": 2, "samples": 24}
    loader.set_epoch(3)
    assert loader.state_dict() == {"epoch": 3, "samples": 0}


@pytest.mark.parametrize("how", ["break", "exception"])
def test_leaving_an_epoch_early_begins_the_order_of_the_next_one(how: str) -> None:
    loader, orders = fresh(), []
    for epoch in range(3):
        if how == "break":
            orders.append(take(loader, 2))
        else:
            with contextlib.suppress(ZeroDivisionError):
                for batch in loader:
                    orders.append([batch.tolist()])
                    loader._replica.make_step()  # type: ignore[attr-defined]
                    _ = 1 / 0
        assert loader.state_dict() == {"epoch": epoch, "samples": len(orders[-1]) * 6}
    assert len({str(indices(order)) for order in orders}) == 3


def test_loops_that_make_no_steps_change_nothing() -> None:
    loader = fresh()
    looks = [indices([next(iter(loader)).tolist()]) for _ in range(2)]
    assert looks[0] == looks[1] == indices(take(loader, 1))
    assert loader.state_dict() == {"epoch": 0, "samples": 6}


def test_a_loop_has_come_to_its_end_with_its_last_batch() -> None:
    """Where a checkpoint is loaded that was written then, nothing is left of the loop, and it is not counted."""
    replica: Any = FakeReplica(make_plan([0.1] * 2))
    loader = make_loader(replica, TensorDataset(torch.arange(40)), batch_size=5)
    seen = []
    for _ in loader:
        seen.append(loader.at_its_end)
        replica.make_step()
        seen.append(loader.at_its_end)
    assert seen == [False] * 6 + [True] * 2  # a position counts batches that were handed out, too
    assert not loader.at_its_end
    assert loader.state_dict() == {"epoch": 1, "samples": 0}


@pytest.mark.parametrize(("workers", "batches"), [(2, 3), (1, 7), (3, 2), (8, 0)])
def test_positions_are_samples_and_round_down_to_batches(workers: int, batches: int) -> None:
    replica: Any = FakeReplica(make_plan([0.1] * workers))
    loader = make_loader(replica, TensorDataset(torch.arange(400)), batch_size=5, seed=4)
    loader.load_state_dict({"epoch": 0, "samples": 37})
    assert loader.state_dict() == {"epoch": 0, "samples": batches * 5 * workers}
    assert len(list(loader)) == len(loader) - batches


def test_what_is_no_checkpoint_is_refused_by_what_it_holds() -> None:
    with pytest.raises(qgc.ConfigError, match=r"got \['param_groups', 'state'\].*the optimizer's"):
        Checkpoint.from_dict(torch.optim.SGD(mlp().parameters(), lr=0.1).state_dict())
    with pytest.raises(qgc.ConfigError, match="got bytes"):
        Checkpoint.from_dict(b"")  # type: ignore[arg-type]


def test_a_worker_that_was_never_in_is_not_taken_for_lost() -> None:
    plan = make_plan([0.1, 0.1])
    saved = Checkpoint(
        step=5, seed=0, rates=[1.3, 0.0], loaders=[], plan=plan.to_json(), peak_lr=0.0, loops=0, gatherings=0
    )
    informed = saved.informed(plan)
    assert informed.straggle_probs.tolist() == [0.0, 0.99]
    np.testing.assert_array_equal(informed.shares, plan.shares)
    assert saved.informed(make_plan([0.1] * 3)) == make_plan([0.1] * 3)
