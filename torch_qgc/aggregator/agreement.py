"""What all replicas must agree on: their parameters and hyperparameters before a step, and where their loops end."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

from torch_qgc.protocol.messages import Agreed, Mark, Marked

__all__ = ["Agreement", "Verdict"]

MOST_PENDING = 64  # steps, and ends of loops, that wait for somebody's word
MOST_ENDS = 4  # of loops that are told again to whoever was away


@dataclass
class Verdict:
    """What has become clear: what to tell everybody, and what is wrong."""

    messages: list[Agreed | Marked] = field(default_factory=list)
    problem: str | None = None


@dataclass
class _Loop:
    """A loop that some worker has come to the end of."""

    number: int
    marks: dict[int, Mark] = field(default_factory=dict)  # worker -> its end
    told: Marked | None = None  # what everybody knows of its end


class Agreement:
    """Collect what workers state, and compare it as soon as all that are alive have."""

    def __init__(self) -> None:
        self._stated: dict[int, dict[int, Mapping[str, str]]] = {}  # step -> worker -> name -> value
        self._loops: dict[int, _Loop] = {}
        self._begun: dict[int, int] = {}  # worker -> the newest step that it has begun
        self._agreed_step = -1
        self._ends: dict[int, Marked] = {}  # of the newest loops, also of those that all have left

    def state(self, worker: int, step: int, parts: Mapping[str, str]) -> None:
        """Enter what a replica is before a step."""
        self._stated.setdefault(step, {})[worker] = parts
        _bound(self._stated)

    def mark(self, worker: int, mark: Mark) -> None:
        """Enter where a worker's loop has ended."""
        self._loops.setdefault(mark.number, _Loop(mark.number)).marks[worker] = mark
        _bound(self._loops)

    def begin(self, worker: int, step: int) -> bool:
        """Enter a step that a worker has begun; tell whether it may show that a loop goes on."""
        self._begun[worker] = step
        pending = [loop for loop in self._loops.values() if loop.told is not None and not loop.told.ended]
        return any(worker not in loop.marks for loop in pending)

    def forget(self, worker: int) -> None:
        """Drop the word of a worker that was lost: its loop ended where it died."""
        self._begun.pop(worker, None)
        for stated in self._stated.values():
            stated.pop(worker, None)
        for loop in self._loops.values():
            loop.marks.pop(worker, None)

    def settle(self, alive: AbstractSet[int]) -> Verdict:
        """Compare what is complete, and find out what is new about the ends of loops."""
        verdict = Verdict()
        for step in [s for s, stated in self._stated.items() if stated and alive <= stated.keys()]:
            stated = self._stated.pop(step)
            verdict.problem = verdict.problem or self._difference(step, stated)
            if verdict.problem is None:
                self._agreed_step = max(self._agreed_step, step)
                verdict.messages.append(Agreed(step))
        for loop in [loop for loop in self._loops.values() if loop.marks]:
            known = self._end(loop, alive)
            if known != loop.told:
                loop.told = self._ends[loop.number] = known
                verdict.messages.append(known)
            if alive <= loop.marks.keys():
                del self._loops[loop.number]
                verdict.problem = verdict.problem or _unequal_ends(loop.marks)
        _bound(self._ends, MOST_ENDS)
        return verdict

    def awaited(self, step: int, alive: AbstractSet[int]) -> AbstractSet[int]:
        """Return the workers that others wait for who have stated what they are before a step, and cannot begin it."""
        stated = self._stated.get(step, {})
        return alive - stated.keys() if stated else frozenset()

    def known(self) -> list[Agreed | Marked]:
        """Return what everybody has been told, for one that may have missed it."""
        agreed: list[Agreed | Marked] = [Agreed(self._agreed_step)] if self._agreed_step >= 0 else []
        return agreed + list(self._ends.values())

    def _end(self, loop: _Loop, alive: AbstractSet[int]) -> Marked:
        """Return what is known of the end of a loop.

        All workers' loops end at the same step, so the first that has come to its end and owes nothing says where that
        is. Until then the loop makes at least the steps that somebody has begun in it, and a worker that owes one of
        these need not hear more to make up for it: the others may be waiting for it in this very step.
        """
        ends = [mark.step for mark in loop.marks.values() if not mark.owed]
        if ends:
            return Marked(loop.number, max(ends), ended=True)
        reached = [mark.step for mark in loop.marks.values()]
        reached += [self._begun[k] + 1 for k in alive - loop.marks.keys() if k in self._begun]
        reached += [] if loop.told is None else [loop.told.step]  # somebody may be making it up already
        return Marked(loop.number, max(reached), ended=alive <= loop.marks.keys())

    def _difference(self, step: int, stated: Mapping[int, Mapping[str, str]]) -> str | None:
        names = {name for parts in stated.values() for name in parts}
        found = []
        # What explains a difference comes first: parameters differ because a learning rate does.
        for name in sorted(names, key=lambda n: (n == "parameters", n)):
            groups: dict[str, list[int]] = {}
            for worker, parts in sorted(stated.items()):
                groups.setdefault(parts.get(name, "not stated"), []).append(worker)
            if len(groups) > 1:
                rare_first = sorted(groups.items(), key=lambda group: len(group[1]))
                found.append(f"{name}: " + ", ".join(f"workers {ks} {value[:40]}" for value, ks in rare_first))
        if not found:
            return None
        since = f"they were equal before step {self._agreed_step}" if self._agreed_step >= 0 else "since the beginning"
        return (
            f"replicas differ before step {step} ({since}): {'; '.join(found[:6])}. Whatever a loop changes must be "
            "changed in the same way on every rank: not by the rank's own loss or clock, and, where late steps are "
            "replayed without running the loop body (state.bind), not outside of the bound update"
        )


def _unequal_ends(marks: Mapping[int, Mark]) -> str | None:
    """Say which loops ended elsewhere than others, but for workers that are about to make up for steps they owe."""
    ends: dict[int, list[int]] = {}
    for worker, mark in sorted(marks.items()):
        if not mark.owed:
            ends.setdefault(mark.step, []).append(worker)
    if len(ends) < 2:
        return None
    named = ", ".join(f"workers {ks} at step {step}" for step, ks in sorted(ends.items()))
    return (
        f"loops have ended at different steps: {named}. Every rank's loop must make equally many steps. What ends it "
        "early (early stopping, a limit on time or loss) must be decided by all ranks together, for example by "
        "rank 0 and broadcast every n-th step"
    )


def _bound(pending: dict[int, Any], most: int = MOST_PENDING) -> None:
    while len(pending) > most:
        del pending[min(pending)]
