"""What replicas state is compared as soon as all have stated it, and named by who differs in what."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_qgc.aggregator.agreement import MOST_PENDING, Agreement
from torch_qgc.errors import QGCError
from torch_qgc.protocol.messages import Agreed, Mark, Marked
from torch_qgc.worker.layout import Layout
from torch_qgc.worker.position import Phase, Position
from torch_qgc.worker.statement import Statement

ALL = frozenset(range(3))


def stated(*parts: dict[str, str], step: int = 4, alive: frozenset[int] = ALL) -> Any:
    agreement = Agreement()
    for worker, each in enumerate(parts):
        agreement.state(worker, step, each)
    return agreement.settle(alive)


# --- what is stated -----------------------------------------------------------------------------------------


def test_nothing_is_said_before_all_that_are_alive_have_spoken() -> None:
    same = {"parameters": "a"}
    assert stated(same, same).messages == []
    assert stated(same, same, alive=frozenset({0, 1})).messages == [Agreed(4)]
    assert stated(same, same, same).messages == [Agreed(4)]


def test_a_difference_is_named_with_values_workers_and_since_when() -> None:
    agreement = Agreement()
    for step, rate in ((4, "0.1"), (8, "0.2")):
        for worker in range(3):
            own = "0.3" if (worker, step) == (1, 8) else rate
            agreement.state(worker, step, {"parameters": own, "Adam.lr": own})
        verdict = agreement.settle(ALL)
    assert verdict.messages == []
    assert verdict.problem is not None
    assert "replicas differ before step 8 (they were equal before step 4)" in verdict.problem
    assert "Adam.lr: workers [1] 0.3, workers [0, 2] 0.2; parameters: workers [1]" in verdict.problem


def test_what_only_some_state_is_a_difference() -> None:
    problem = stated({"ema": "x"}, {}, {}).problem
    assert problem is not None
    assert "ema: workers [0] x, workers [1, 2] not stated" in problem


def test_a_worker_that_has_left_is_compared_and_one_that_was_lost_is_not() -> None:
    for lost in (False, True):
        agreement = Agreement()
        agreement.state(0, 4, {"parameters": "other"})
        agreement.mark(0, Mark(0, 3, 0))
        if lost:
            agreement.forget(0)
        assert agreement.settle(frozenset({1, 2})).problem is None
        for worker in (1, 2):
            agreement.state(worker, 4, {"parameters": "a"})
            agreement.mark(worker, Mark(0, 9, 0))
        assert (agreement.settle(frozenset({1, 2})).problem is None) is lost


def test_memory_of_what_is_never_completed_is_bounded() -> None:
    agreement = Agreement()
    for step in range(10 * MOST_PENDING):
        agreement.state(0, step, {})
        agreement.mark(0, Mark(step, step, 0))
    assert len(agreement._stated) == len(agreement._loops) == MOST_PENDING


# --- ends of loops --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ends", "told", "wrong"),
    [
        ([(9, 0), (9, 0), (9, 0)], [Marked(3, 9, True)], False),
        ([(7, 2), (9, 0), (9, 0)], [Marked(3, 7, False), Marked(3, 9, True)], False),  # makes up for two steps
        ([(9, 1), (9, 1), (9, 1)], [Marked(3, 9, False), Marked(3, 9, True)], False),
        ([(9, 0), (9, 0), (7, 0)], [Marked(3, 9, True)], True),
        ([(9, 0), (8, 1), (7, 0)], [Marked(3, 9, True)], True),
    ],
)
def test_ends_of_loops_are_equal_but_for_those_who_make_up(
    ends: list[tuple[int, int]], told: list[Marked], wrong: bool
) -> None:
    agreement, messages, problem = Agreement(), [], None
    for worker, (step, owed) in enumerate(ends):
        agreement.mark(worker, Mark(3, step, owed))
        verdict = agreement.settle(ALL)
        messages += verdict.messages
        assert problem is None  # it is known when all have come to their ends
        problem = verdict.problem
    assert messages == told
    assert (problem is not None) is wrong
    if wrong:
        assert f"workers [2] at step 7, workers [0{'' if ends[1][1] else ', 1'}] at step 9" in str(problem)


class Looping:
    """A worker whose loops have batches that make a step, are left out, or are given up after the forward pass.

    Args:
        worker: its number.
        loops: the batches of each loop, by what becomes of them.
    """

    def __init__(self, worker: int, loops: list[list[str]]) -> None:
        self.worker, self.loops = worker, loops
        self.step = self.loop = self.at = self.owed = 0
        self.in_step = self.ended = False
        self.ends: list[int] = []  # the step at which each loop has ended
        self.told: dict[int, Marked] = {}

    def runnable(self, everybody: list[Looping], *, all_wait: bool) -> bool:
        if self.in_step:
            return not all_wait or all(other.step > self.step or other.in_step for other in everybody)
        if self.ended and self.owed:
            known = self.told.get(self.loop)
            return known is not None and (known.ended or known.step > self.step)
        return self.loop < len(self.loops)

    def go(self, agreement: Agreement) -> bool:
        """Do what comes next; tell whether the agreement has to be settled."""
        batches = self.loops[self.loop]
        if self.in_step:
            self.in_step, self.step = False, self.step + 1
            return False
        if self.at < len(batches):
            kind, self.at = batches[self.at], self.at + 1
            self.in_step = kind == "step"
            self.owed += kind != "step"
            return kind != "left out" and agreement.begin(self.worker, self.step)
        if not self.ended:
            self.ended = True
            agreement.mark(self.worker, Mark(self.loop, self.step, self.owed))
            return True
        if self.owed and self.told[self.loop].step > self.step:
            self.in_step = True
            return agreement.begin(self.worker, self.step)
        self.ends.append(self.step)
        self.loop, self.at, self.owed, self.ended = self.loop + 1, 0, 0, False
        return False


batches = st.lists(st.sampled_from(["step", "step", "left out", "given up"]), min_size=4, max_size=4)


@given(st.lists(st.lists(batches, min_size=3, max_size=3), min_size=3, max_size=3), st.booleans(), st.randoms())
@settings(deadline=None)
def test_whatever_each_rank_leaves_out_all_loops_end_at_the_same_step_and_nobody_waits_forever(
    loops: list[list[list[str]]], all_wait: bool, order: random.Random
) -> None:
    agreement = Agreement()
    everybody = [Looping(worker, each) for worker, each in enumerate(loops)]
    while any(each.loop < 3 for each in everybody):
        free = [each for each in everybody if each.runnable(everybody, all_wait=all_wait)]
        assert free, "all wait"
        if order.choice(free).go(agreement):
            verdict = agreement.settle(ALL)
            assert verdict.problem is None
            for message in verdict.messages:
                assert isinstance(message, Marked)
                for each in everybody:
                    each.told[message.number] = message
    assert everybody[0].ends == everybody[1].ends == everybody[2].ends
    begin = 0
    for loop, end in enumerate(everybody[0].ends):
        made = [each.loops[loop].count("step") for each in everybody]
        assert max(made) <= end - begin <= len(loops[0][loop])
        begin = end


# --- statements -------------------------------------------------------------------------------------------------


def statement_of(module: torch.nn.Module) -> Statement:
    return Statement(Layout(module.named_parameters(), chunk_numel=512))


def test_hyperparameters_of_all_optimizers_are_stated_by_name_and_value() -> None:
    module = torch.nn.Linear(3, 2)
    statement = statement_of(module)
    groups = [{"params": [module.weight], "lr": 0.1}, {"params": [module.bias], "lr": 0.2}]
    optimizers = [
        torch.optim.SGD(groups, lr=0.1, momentum=0.9),
        torch.optim.Adam(module.parameters(), lr=torch.tensor(0.5)),
    ]
    for optimizer in (*optimizers, optimizers[0]):
        statement.watch(optimizer)
    parts = statement.parts()
    assert parts["SGD.lr"] == "0.1, 0.2"
    assert parts["SGD.momentum"] == "0.9"
    assert parts["Adam1.lr"] == "0.5"
    assert parts["Adam1.betas"] == "(0.9, 0.999)"
    optimizers[0].param_groups[1]["lr"] = 0.3
    assert statement.parts()["SGD.lr"] == "0.1, 0.3"
    del optimizers, optimizer
    assert "Adam1.lr" in statement.parts()  # at the end of a script, ranks forget their optimizers at different times


def test_long_values_are_shortened_and_still_tell_a_difference() -> None:
    module = torch.nn.Linear(3, 2)
    statement = statement_of(module)
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))], "lr": 0.1 + i} for i in range(300)]
    optimizer = torch.optim.SGD(groups)
    statement.watch(optimizer)
    before = statement.parts()["SGD.lr"]
    groups[299]["lr"] = 0.5
    optimizer.param_groups[299]["lr"] = 0.5
    assert len(before) < 256
    assert statement.parts()["SGD.lr"] != before


@pytest.mark.parametrize(
    "kind",
    [
        lambda m: m,
        lambda m: dict(m.named_parameters()),
        lambda m: list(m.parameters()),
        lambda m: m.parameters,
        lambda m: lambda: {"sum": [m.weight.sum().item(), m.bias]},
    ],
)
def test_whatever_is_added_is_stated_as_it_is_now(kind: Any) -> None:
    module = torch.nn.Linear(3, 2)
    average = copy.deepcopy(module)
    statement = statement_of(module)
    statement.add("ema", kind(average))
    first = statement.parts()["ema"]
    assert statement.parts()["ema"] == first
    with torch.no_grad():
        average.bias.add_(1e-3)
        average.weight.add_(1e-3)
    assert statement.parts()["ema"] != first


# --- positions ------------------------------------------------------------------------------------------------------

WAYS = {
    "full": ["begin", "gather", "exchange"],
    "thin": ["begin thin", "gather", "exchange"],
    "replayed": ["replay", "exchange"],
    "abandoned, then full": ["begin", "abandon", "begin", "gather", "exchange"],
    "abandoned, then thin": ["begin thin", "abandon", "begin thin", "gather", "exchange"],
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_through_a_step_ends_at_the_next(way: str) -> None:
    position = Position(5)
    for _ in range(2):
        for event in WAYS[way]:
            position.go(event)
    assert (position.step, position.phase, position.in_step) == (7, Phase.EXCHANGED, False)
    position.go("leave")
    position.go("leave")
    assert position.phase is Phase.LEFT


@pytest.mark.parametrize(
    ("before", "event"),
    [
        ([], "gather"),
        ([], "exchange"),
        ([], "abandon"),
        (["begin"], "begin"),
        (["begin"], "replay"),
        (["begin", "gather"], "abandon"),
        (["replay"], "begin"),
        (["leave"], "begin"),
        (["leave"], "replay"),
    ],
)
def test_what_cannot_follow_is_refused_and_changes_nothing(before: list[str], event: str) -> None:
    position = Position()
    for each in before:
        position.go(each)
    phase = position.phase
    with pytest.raises(QGCError, match=f"cannot {event} while '{phase.value}'"):
        position.go(event)
    assert (position.phase, position.step) == (phase, 0)
