"""Batches from a worker's own share, thin or left out where it was too late for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers.replicas import FakeReplica
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from torch_qgc.ddp.loader import FollowedLoader, Thinner, make_loader
from torch_qgc.ddp.sampler import CodedSampler, random_partitions
from torch_qgc.errors import ConfigError
from torch_qgc.planner import Plan, make_plan


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
        loader = make_loader(FakeReplica(plan, rank), data, batch_size=10)
        covered |= {int(i) for batch in loader.sampler for i in batch}
        assert len(loader) == 25
    # A worker with a share above 1/4 cannot visit all of it in an epoch of equal batches; the others can.
    assert len(covered) > 800


def test_partitions_of_ones_own_are_respected() -> None:
    placement = np.eye(3, dtype=bool)
    plan = plan_of(3, num_partitions=3, placement=placement, partition_sizes=[10, 20, 30])
    partitions = [range(10), range(10, 30), range(30, 60)]
    for rank, block in enumerate(partitions):
        loader = make_loader(
            FakeReplica(plan, rank), TensorDataset(torch.arange(60)), batch_size=4, partitions=partitions
        )
        assert {int(i) for (batch,) in steps(loader) for i in batch} <= set(block)


def steps(loader: Any) -> Any:
    """Iterate as a training loop does: one step per batch."""
    for batch in loader:
        yield batch
        loader._thinner.replica.make_step()


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("batch_size", [4, 1])
def test_batches_of_late_steps_are_thin(num_workers: int, batch_size: int) -> None:
    late = frozenset({0, 3, 4, 9})
    loader = make_loader(
        FakeReplica(plan_of(), late=late),
        TensorDataset(torch.arange(30 * batch_size)),
        batch_size=batch_size,
        num_workers=num_workers,
    )
    whole = list(loader.sampler)
    seen = [batch.tolist() for (batch,) in steps(loader)]
    assert seen == [batch[:2] if step in late else batch for step, batch in enumerate(whole)]
    assert loader.state_dict() == {"epoch": 1, "samples": 0}


def test_late_steps_are_replayed_and_their_batches_left_out_where_the_update_is_bound() -> None:
    for num_workers in (0, 1):
        replica = FakeReplica(plan_of(), late=frozenset({0, 3, 4, 9}), bound=True)
        loader = make_loader(replica, TensorDataset(torch.arange(120)), batch_size=4, num_workers=num_workers)
        whole = list(loader.sampler)
        assert [b.tolist() for (b,) in steps(loader)] == [b for s, b in enumerate(whole) if s not in replica.late]
        assert replica.replayed == [0, 3, 4, 9]
        assert replica.step == 10
        replica.late = frozenset()
        assert len(list(steps(loader))) == 10


def test_an_epoch_can_close_without_this_worker_altogether() -> None:
    replica = FakeReplica(plan_of(), late=frozenset(range(100)), bound=True)
    assert list(steps(make_loader(replica, TensorDataset(torch.arange(120)), batch_size=4))) == []
    assert replica.step == 10


def test_a_replayed_step_leaves_out_as_many_batches_as_steps_take() -> None:
    replica = FakeReplica(plan_of(), late=frozenset({1}), bound=True)
    loader = make_loader(replica, TensorDataset(torch.arange(120)), batch_size=4)
    seen = 0
    for _ in loader:
        seen += 1
        if seen % 2 == 0:
            replica.make_step()
        else:
            replica.in_step = True
    assert (len(loader), seen, replica.step) == (10, 8, 5)


# --- batches that make no step ------------------------------------------------------------------------------------


def looped(replica: FakeReplica, unused: set[int], *, follow: bool) -> int:
    """Run a loop of 10 batches, some of which make no step; return how many were handed out."""
    data = TensorDataset(torch.arange(120))
    loader: Any = make_loader(replica, data, batch_size=4)
    if follow:
        loader = FollowedLoader(range(10), Thinner(replica))
    count = 0
    for count, _ in enumerate(loader, 1):
        if count not in unused:
            replica.make_step()
    return count


@pytest.mark.parametrize("follow", [False, True])
@pytest.mark.parametrize("unused", [{2}, {10}, {3, 4, 10}])
def test_steps_that_others_have_made_are_made_up_for_at_the_end(follow: bool, unused: set[int]) -> None:
    replica = FakeReplica(plan_of())
    replica.others_step = 10
    assert looped(replica, unused, follow=follow) == 10 + len(unused)
    assert replica.step == 10
    assert replica.ends == [(10 - len(unused), len(unused))]


@pytest.mark.parametrize("follow", [False, True])
def test_nothing_is_made_up_for_where_all_have_made_as_many_steps(follow: bool) -> None:
    replica = FakeReplica(plan_of())
    replica.others_step = 5  # they accumulate two batches, too
    assert looped(replica, {1, 3, 5, 7, 9}, follow=follow) == 10
    replica = FakeReplica(plan_of())
    assert looped(replica, set(), follow=follow) == 10
    assert replica.ends == [(10, 0)]


def test_making_up_ends_where_too_many_batches_make_no_step_again() -> None:
    for bad, count, made in (({3, 4, 11, 13}, 14, 10), ({3, 4, 11, 12}, 12, 8)):
        replica = FakeReplica(plan_of())
        replica.others_step = 10
        assert looped(replica, bad, follow=True) == count
        assert replica.step == made


@pytest.mark.parametrize("late", [{4, 5}, {4, 5, 6, 7}])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_where_others_have_left_the_loop_in_a_step_that_is_replayed_it_ends_here_too(
    late: set[int], num_workers: int
) -> None:
    replica = FakeReplica(plan_of(), late=frozenset(late), bound=True)
    loader = make_loader(replica, TensorDataset(torch.arange(120)), batch_size=4, num_workers=num_workers)
    replica.leaves_at = 6
    assert len(list(steps(loader))) == 4
    assert replica.replayed == [4, 5]
    assert replica.ends == [(6, 0)]
    assert loader.state_dict() == {"epoch": 0, "samples": 6 * 4 * 3}  # as on ranks that have left it by themselves
    replica.leaves_at, replica.late = None, frozenset()
    assert len(list(steps(loader))) == 10
    assert loader.state_dict() == {"epoch": 2, "samples": 0}


def test_a_look_at_the_data_is_no_loop_but_one_whose_steps_were_all_given_up_is() -> None:
    replica = FakeReplica(plan_of())
    thinner = Thinner(replica)
    for in_step in (False, True):  # a rest of micro-batches may be under way
        replica.in_step = in_step
        next(thinner.loop(map(thinner, range(10)), lambda: None))
        assert replica.ends == []
    replica.in_step, replica.others_step = False, 1
    for i, _ in enumerate(thinner.loop(map(thinner, range(1)), lambda: None)):
        replica.in_step = replica.awaits_backward = True
        if i == 1:
            replica.make_step()
    assert (replica.ends, replica.step) == ([(0, 1)], 1)


def test_a_batch_that_is_fetched_between_forward_and_backward_pass_is_not_owed() -> None:
    replica = FakeReplica(plan_of())
    thinner = Thinner(replica)
    iterator = thinner.loop(map(thinner, range(10)), lambda: None)
    next(iterator)
    for _ in range(9):
        replica.in_step = replica.awaits_backward = True
        next(iterator)
        replica.make_step()
    assert thinner.owed == 0


def test_other_threads_may_fetch_batches_ahead() -> None:
    replica = FakeReplica(plan_of())
    replica.in_training_thread = False
    assert looped(replica, {1, 2, 3, 4, 5}, follow=True) == 10
    assert replica.ends == [(5, 0)]


def test_followed_loaders_keep_their_attributes() -> None:
    source = DataLoader(TensorDataset(torch.arange(12)), batch_size=4)
    followed = FollowedLoader(source, Thinner(FakeReplica(plan_of(), late=frozenset({1}))))
    assert len(followed) == 3
    assert followed.batch_size == 4
    assert followed.dataset is source.dataset
    assert [len(batch) for (batch,) in steps(followed)] == [4, 2, 4]


def test_weights_decide_how_often_samples_are_drawn() -> None:
    """Within each partition, in proportion, up to one draw."""
    plan = plan_of(2, noise_ratio=10.0)
    weights = np.concatenate([np.zeros(20), np.ones(60), np.full(20, 3.0)])
    loader = make_loader(FakeReplica(plan), TensorDataset(torch.arange(100)), batch_size=4, weights=weights)
    blocks = random_partitions(100, plan.num_partitions, 0)
    probs = plan.partition_probabilities(0)
    draws = np.concatenate([np.array(batch) for batch in loader.sampler])
    counts = np.bincount(draws, minlength=100)
    expected = np.zeros(100)
    for block, prob in zip(blocks, probs):
        expected[block] = len(draws) * prob * weights[block] / weights[block].sum()
    assert np.all(np.abs(counts - expected) < 1 + 1e-6)
    assert not counts[:20].any()


def test_dataloader_arguments_pass_through() -> None:
    loader = make_loader(
        FakeReplica(plan_of()),
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
        ({"thin": 0}, "thin: expected at least 1 sample"),
        ({"weights": [1.0]}, "one finite number >= 0 for each of the 120 samples"),
        ({"weights": [-1.0] * 120}, "one finite number >= 0"),
        ({"partitions": [[0], [1]]}, "num_partitions=2"),
        ({"partitions": [[0], [1], [999]]}, "partition 2"),
        ({"partitions": [[0], [], [1]]}, "partition 1"),
    ],
)
def test_bad_arguments_are_refused_with_the_remedy(arguments: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        make_loader(
            FakeReplica(plan_of(num_partitions=3)), TensorDataset(torch.arange(120)), **{"batch_size": 4, **arguments}
        )


def test_data_sets_without_indices_or_with_too_few_samples_are_refused() -> None:
    with pytest.raises(ConfigError, match="map-style"):
        make_loader(FakeReplica(plan_of()), Stream(), batch_size=4)
    with pytest.raises(ConfigError, match="fewer partitions"):
        make_loader(FakeReplica(plan_of(num_partitions=9)), TensorDataset(torch.arange(8)), batch_size=4)


def test_random_partitions_are_a_partition() -> None:
    blocks = random_partitions(103, 10, seed=5)
    assert sorted(np.concatenate(blocks).tolist()) == list(range(103))
    assert {len(b) for b in blocks} == {10, 11}
