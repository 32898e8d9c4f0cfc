"""Batches from a worker's own share, and the skipping of what it was too late for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from torch_qgc.ddp.loader import CodedLoader, make_loader
from torch_qgc.ddp.sampler import CodedSampler, random_partitions
from torch_qgc.errors import ConfigError
from torch_qgc.planner import Plan, make_plan


class State:
    """A replica as far as the loader can see; `late` lists the steps that close without it."""

    def __init__(self, plan: Plan, rank: int = 0, late: frozenset[int] = frozenset()) -> None:
        self.plan, self.worker, self.late = plan, rank, late
        self.spec = SimpleNamespace(workers=plan.num_workers)
        self.step = 0
        self.in_step = False
        self.replayed: list[int] = []

    def check_replayable(self) -> None:
        pass

    def catch_up(self, end_step: int) -> None:
        while self.step < end_step and self.step in self.late:
            self.replayed.append(self.step)
            self.step += 1


def plan_of(workers: int = 3, **options: Any) -> Plan:
    return make_plan(np.linspace(0.05, 0.4, workers), bits_per_coordinate=4, **options)


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    batches=st.integers(1, 12),
    batch_size=st.integers(1, 7),
    seed=st.integers(0, 2**16),
    data=st.data(),
)
def test_every_sample_is_drawn_its_expected_number_of_times_up_to_one(
    sizes: list[int], batches: int, batch_size: int, seed: int, data: Any
) -> None:
    raw = data.draw(st.lists(st.floats(0, 1), min_size=len(sizes), max_size=len(sizes)).filter(lambda w: sum(w) > 0.1))
    probs = np.array(raw) / sum(raw)
    starts = np.cumsum([0, *sizes])
    partitions = [np.arange(a, b) for a, b in zip(starts, starts[1:])]
    sampler = CodedSampler(probs, partitions, batch_size=batch_size, batches=batches, seed=seed)
    draws = np.concatenate([np.array(batch) for batch in sampler])
    assert len(draws) == batches * batch_size
    counts = np.bincount(draws, minlength=starts[-1])
    expected = np.repeat(probs / sizes, sizes) * len(draws)
    assert np.all(np.abs(counts - expected) < 1 + 1e-6)


def test_each_position_of_the_epoch_is_an_unbiased_draw() -> None:
    """The mean over epochs of f(sample at a fixed position) is the share's mean of f, within 4 standard errors."""
    probs = np.array([0.7, 0.0, 0.3])
    partitions = [np.arange(0, 7), np.arange(7, 20), np.arange(20, 23)]
    values = np.random.default_rng(0).normal(size=23)
    sampler = CodedSampler(probs, partitions, batch_size=4, batches=2, seed=3)
    runs = []
    for epoch in range(4000):
        sampler.set_epoch(epoch)
        runs.append(values[sampler.draws()])
    true = 0.7 * values[:7].mean() + 0.3 * values[20:].mean()
    errors = np.std(runs, axis=0, ddof=1) / np.sqrt(len(runs))
    assert np.all(np.abs(np.mean(runs, axis=0) - true) < 4 * errors)


def test_epochs_and_workers_draw_differently_and_reproducibly() -> None:
    def draws(worker: int, epoch: int) -> list[int]:
        sampler = CodedSampler(np.ones(1), [np.arange(100)], batch_size=10, batches=5, seed=1, worker=worker)
        sampler.set_epoch(epoch)
        return sampler.draws().tolist()

    assert draws(0, 0) == draws(0, 0)
    assert draws(0, 0) != draws(0, 1)
    assert draws(0, 0) != draws(1, 0)


def test_together_the_workers_cover_the_data_set_in_an_epoch() -> None:
    plan = plan_of(4, noise_ratio=10.0)  # shares tend to the fair ones
    data = TensorDataset(torch.arange(1000))
    covered = set()
    for rank in range(4):
        loader = make_loader(State(plan, rank), data, batch_size=10)
        covered |= {int(i) for batch in loader.sampler for i in batch}
        assert len(loader) == 25
    # A worker with a share above 1/4 cannot visit all of it in an epoch of equal batches; the others can.
    assert len(covered) > 800


def test_partitions_of_ones_own_are_respected() -> None:
    placement = np.eye(3, dtype=bool)
    plan = plan_of(3, num_partitions=3, placement=placement, partition_sizes=[10, 20, 30])
    partitions = [range(10), range(10, 30), range(30, 60)]
    for rank, block in enumerate(partitions):
        loader = make_loader(State(plan, rank), TensorDataset(torch.arange(60)), batch_size=4, partitions=partitions)
        assert {int(i) for (batch,) in steps(loader) for i in batch} <= set(block)


def steps(loader: CodedLoader) -> Any:
    """Iterate as a training loop does: one step per batch."""
    for batch in loader:
        yield batch
        loader._replica.step += 1


def test_late_steps_are_replayed_and_their_batches_skipped() -> None:
    state = State(plan_of(), late=frozenset({0, 3, 4, 9}))
    loader = make_loader(state, TensorDataset(torch.arange(120)), batch_size=4)
    assert len(loader) == 10
    assert len(list(steps(loader))) == 6
    assert state.replayed == [0, 3, 4, 9]
    assert state.step == 10
    state.late = frozenset()
    assert len(list(steps(loader))) == 10
    assert loader.sampler.epoch == 2


def test_an_epoch_can_close_without_this_worker_altogether() -> None:
    state = State(plan_of(), late=frozenset(range(100)))
    assert list(steps(make_loader(state, TensorDataset(torch.arange(120)), batch_size=4))) == []
    assert state.step == 10


def test_accumulation_takes_several_batches_per_step() -> None:
    state = State(plan_of(), late=frozenset({1}))
    loader = make_loader(state, TensorDataset(torch.arange(120)), batch_size=4, accumulate=2)
    seen = 0
    for _ in loader:
        seen += 1
        state.in_step = seen % 2 == 1
        state.step += seen % 2 == 0
    assert (len(loader), loader.steps, seen, state.step) == (10, 5, 8, 5)


def test_states_of_one_loop_are_brought_to_the_same_step_by_waiting() -> None:
    plan = plan_of()
    first, second = State(plan, late=frozenset({3, 9})), State(plan, late=frozenset({5}))
    waited: list[tuple[int, int]] = []
    for state, number in ((first, 1), (second, 2)):

        def await_step(end_step: int, state: State = state, number: int = number) -> None:
            waited.append((number, state.step))
            state.step = end_step

        state.await_step = await_step  # type: ignore[attr-defined]
    loader = make_loader(first, TensorDataset(torch.arange(120)), batch_size=4, together=[second])
    for _ in loader:
        assert first.step == second.step
        first.step += 1
        second.step += 1
    assert waited == [(2, 3), (1, 5), (2, 9)]  # the last one after the loop's last batch
    assert first.step == second.step == 10


def test_a_loop_that_makes_no_steps_is_told_so() -> None:
    loader = make_loader(State(plan_of()), TensorDataset(torch.arange(120)), batch_size=4)
    with pytest.raises(ConfigError, match="accumulate=n"):
        for _ in loader:
            pass


def test_dataloader_arguments_pass_through() -> None:
    loader = make_loader(
        State(plan_of()),
        TensorDataset(torch.arange(120)),
        batch_size=4,
        num_workers=1,
        collate_fn=lambda items: len(items),
    )
    assert isinstance(loader._loader, DataLoader)
    assert list(steps(loader)) == [4] * 10


class Stream(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Any:
        return iter(range(3))


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"shuffle": True}, "shuffle"),
        ({"sampler": [1]}, "sampler"),
        ({"batch_size": 0}, "batch_size"),
        ({"partitions": [[0], [1]]}, "num_partitions=2"),
        ({"partitions": [[0], [1], [999]]}, "partition 2"),
        ({"partitions": [[0], [], [1]]}, "partition 1"),
    ],
)
def test_bad_arguments_are_refused_with_the_remedy(arguments: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        make_loader(
            State(plan_of(num_partitions=3)), TensorDataset(torch.arange(120)), **{"batch_size": 4, **arguments}
        )


def test_data_sets_without_indices_or_with_too_few_samples_are_refused() -> None:
    with pytest.raises(ConfigError, match="map-style"):
        make_loader(State(plan_of()), Stream(), batch_size=4)
    with pytest.raises(ConfigError, match="fewer partitions"):
        make_loader(State(plan_of(num_partitions=9)), TensorDataset(torch.arange(8)), batch_size=4)


def test_random_partitions_are_a_partition() -> None:
    blocks = random_partitions(103, 10, seed=5)
    assert sorted(np.concatenate(blocks).tolist()) == list(range(103))
    assert {len(b) for b in blocks} == {10, 11}
