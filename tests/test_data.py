"""Batches from a worker's own share, thin or left out where it was too late for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers.replicas import FakeReplica
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, default_collate

from torch_qgc.ddp.loader import make_loader
from torch_qgc.ddp.sampler import random_partitions
from torch_qgc.ddp.thin import batch_size_of
from torch_qgc.ddp.thinner import FollowedLoader, Thinner
from torch_qgc.errors import ConfigError
from torch_qgc.planner import Plan, make_plan


def plan_of(workers: int = 3, **options: Any) -> Plan:
    return make_plan(np.linspace(0.05, 0.4, workers), bits_per_coordinate=4, **options)


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


# --- batches of workers that differ -------------------------------------------------------------------------------


def divided(total: int, workers: int) -> Any:
    """Ways to divide a number of samples among workers, at least one for each."""
    cuts = st.lists(st.integers(1, total - 1), min_size=workers - 1, max_size=workers - 1, unique=True)
    return cuts.map(lambda at: np.diff([0, *sorted(at), total]).tolist())


@given(data=st.data(), workers=st.integers(2, 4), samples=st.integers(8, 200), batch_size=st.integers(2, 5))
def test_every_rank_makes_as_many_steps_however_the_global_batch_is_divided(
    data: Any, workers: int, samples: int, batch_size: int
) -> None:
    total = workers * batch_size
    batches = -(-samples // total)
    cut = data.draw(st.lists(divided(total, workers), min_size=batches, max_size=batches))
    states, seen = [], np.zeros(batches, dtype=int)
    for rank in range(workers):
        replica = FakeReplica(plan_of(workers), rank, sizes={step: each[rank] for step, each in enumerate(cut)})
        loader = make_loader(replica, TensorDataset(torch.arange(samples)), batch_size=batch_size)
        assert (len(loader), loader.batch_size) == (batches, batch_size)
        states.append([])
        for step, (batch,) in enumerate(steps(loader)):
            seen[step] += len(batch)
            states[rank].append(loader.state_dict())
    assert seen.tolist() == [total] * batches
    assert all(each == states[0] for each in states)


@pytest.mark.parametrize("bound", [False, True])
def test_late_steps_take_from_the_stream_what_their_batches_would_have_had(bound: bool) -> None:
    sizes = {step: 1 + step % 4 for step in range(10)}
    replica = FakeReplica(plan_of(), late=frozenset({0, 3, 4, 9}), bound=bound, sizes=sizes)
    loader = make_loader(replica, TensorDataset(torch.arange(120)), batch_size=4)
    draws = loader.sampler.stream()
    whole = [draws.take(sizes[step]).tolist() for step in range(10)]
    seen = [batch.tolist() for (batch,) in steps(loader)]
    if bound:
        assert seen == [batch for step, batch in enumerate(whole) if step not in replica.late]
    else:
        assert seen == [batch[:2] if step in replica.late else batch for step, batch in enumerate(whole)]


def test_a_batch_that_is_fetched_before_the_backward_pass_has_the_next_steps_size() -> None:
    replica = FakeReplica(plan_of(), sizes={step: 1 + step for step in range(10)})
    loader = make_loader(replica, TensorDataset(torch.arange(120)), batch_size=4)
    sizes = []
    for (batch,) in loader:
        sizes.append(len(batch))
        if replica.awaits_backward:
            replica.make_step()
        replica.in_step = replica.awaits_backward = True
    assert sizes == list(range(1, 11))


def test_batches_that_are_loaded_ahead_have_the_size_of_the_step_at_which_they_are_cut() -> None:
    """And are thinned by their own size: lists of samples, whose length the mean batch size says nothing about."""
    sizes = {step: 5 + step for step in range(10)}
    replica = FakeReplica(plan_of(), late=frozenset({2, 8}), sizes=sizes)
    data = TensorDataset(torch.arange(120), torch.ones(120, 3))
    options = {"num_workers": 1, "prefetch_factor": 2, "collate_fn": lambda items: tuple(zip(*items))}
    loader = make_loader(replica, data, batch_size=4, **options)
    for step, (indices, rows) in enumerate(steps(loader)):
        if step in replica.late:
            assert len(indices) == len(rows) == 2
        else:
            assert len(indices) == len(rows)
            assert sizes[max(0, step - 2)] <= len(indices) <= sizes[step]


KINDS = [
    tuple,
    lambda pair: {"x": pair[0], "y": {"z": pair[1]}},
    lambda pair: (list(pair[1].unbind()), [{"label": label} for label in pair[0]]),
    lambda pair: [{"image": torch.ones(3, 5), "label": label} for label in pair[0]],
]


@pytest.mark.parametrize("kind", KINDS)
def test_followed_batches_are_cut_to_this_workers_size(kind: Any) -> None:
    def collate(items: list[Any]) -> Any:
        return kind(default_collate(items))

    source = DataLoader(TensorDataset(torch.arange(24), torch.ones(24, 6)), batch_size=6, collate_fn=collate)
    replica = FakeReplica(plan_of(), late=frozenset({1}), sizes={0: 4, 1: 5, 3: 9})
    followed = FollowedLoader(source, Thinner(replica, batch_size=source.batch_size))
    seen = list(steps(followed))
    assert [batch_size_of(batch, n) for batch, n in zip(seen, [4, 2, 6, 6])] == [4, 2, 6, 6]


class Unknown:
    """A batch that nobody can look into."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items


@pytest.mark.parametrize(
    "batch",
    [
        Unknown([1, 2, 3, 4]),
        (torch.arange(9), torch.tensor([0, 2, 4, 6])),  # texts one after the other, and where each begins
        (torch.ones(7, 4), torch.ones(7, 4)),  # time first, or an epoch's last batch
        (torch.ones(4, 5), torch.ones(10)),  # class weights
        ["a", "b", "c", "d"],
        None,
    ],
)
def test_followed_batches_that_cannot_be_told_apart_stay_whole(batch: Any) -> None:
    """A gradient is made of them, so a cut in the wrong place would be a wrong gradient."""
    replica = FakeReplica(plan_of(), sizes={0: 2})
    assert Thinner(replica, batch_size=4)(batch) is batch
    assert Thinner(replica)(batch) is batch
    assert Thinner(replica, cut=lambda batch, count: (batch, count), batch_size=4)(batch) == (batch, 2)


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
    """Within each partition, in proportion, up to one draw per pass."""
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
    assert np.all(np.abs(counts - expected) < np.ceil(expected.max()))  # 1 / max p draws are a pass
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
