"""What all replicas must agree on: their parameters and hyperparameters before a step, and where their loops end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from torch_qgc.protocol.messages import Agreed, Mark, Marked

__all__ = ["Agreement", "Verdict"]

MOST_PENDING = 64  # steps, and ends of loops, that wait for somebody's word


@dataclass
class Verdict:
    """What has become clear: what to tell everybody, and what is wrong."""

    messages: list[Agreed | Marked] = field(default_factory=list)
    problem: str | None = None


class Agreement:
    """Collect what workers state, and compare it as soon as all that are alive have."""

    def __init__(self) -> None:
        self._stated: dict[int, dict[int, Mapping[str, str]]] = {}  # step -> worker -> name -> value
        self._marks: dict[int, dict[int, Mark]] = {}  # loop -> worker -> its end
        self._agreed_step = -1

    def state(self, worker: int, step: int, parts: Mapping[str, str]) -> None:
        """Enter what a replica is before a step."""
        self._stated.setdefault(step, {})[worker] = parts
        _bound(self._stated)

    def mark(self, worker: int, mark: Mark) -> None:
        """Enter where a worker's loop has ended; one that owed steps and has made up for them says so again."""
        self._marks.setdefault(mark.number, {})[worker] = mark
        _bound(self._marks)

    def forget(self, worker: int) -> None:
        """Drop the word of a worker that was lost: its loop ended where it died."""
        for stated in self._stated.values():
            stated.pop(worker, None)
        for marks in self._marks.values():
            marks.pop(worker, None)

    def settle(self, alive: AbstractSet[int]) -> Verdict:
        """Compare what is complete."""
        verdict = Verdict()
        for step in [s for s, stated in self._stated.items() if stated and alive <= stated.keys()]:
            stated = self._stated.pop(step)
            verdict.problem = verdict.problem or self._difference(step, stated)
            if verdict.problem is None:
                self._agreed_step = max(self._agreed_step, step)
                verdict.messages.append(Agreed(step))
        for number in [n for n, marks in self._marks.items() if marks and alive <= marks.keys()]:
            marks = self._marks.pop(number)
            verdict.messages.append(Marked(number, max(mark.step for mark in marks.values())))
            verdict.problem = verdict.problem or _unequal_ends(marks)
        return verdict

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


def _bound(
    pending: dict[int, Iterable[int]] | dict[int, dict[int, Mark]] | dict[int, dict[int, Mapping[str, str]]],
) -> None:
    while len(pending) > MOST_PENDING:
        del pending[min(pending)]
