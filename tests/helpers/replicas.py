"""A replica as far as loaders can see: which steps close without it is known beforehand."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType, SimpleNamespace

from torch_qgc.planner import Plan


class FakeReplica:
    """Steps are made by `make_step`.

    Args:
        plan: the job's.
        worker: its number.
        late: steps that close without it.
        bound: late steps may be replayed.
        sizes: of the batches of steps; those of other steps have the mean's.
    """

    in_training_thread = True

    def __init__(
        self,
        plan: Plan,
        worker: int = 0,
        late: frozenset[int] = frozenset(),
        *,
        bound: bool = False,
        sizes: Mapping[int, int] = MappingProxyType({}),
    ) -> None:
        self.plan, self.worker, self.late, self.sizes = plan, worker, late, sizes
        self.spec = SimpleNamespace(workers=plan.num_workers)
        self.taken: list[tuple[int, int, bool]] = []  # what loaders have told: samples, their mean, whether data move
        self.facts = SimpleNamespace(
            took=lambda samples, batch_size, moves: self.taken.append((samples, batch_size, moves))
        )
        self.update = SimpleNamespace(known=bound)
        self.may_be_late = bool(late)
        self.in_step = self.awaits_backward = False
        self.step = self.abandoned_steps = 0
        self.others_step = 0  # at which the others' loops end
        self.leaves_at: int | None = None  # the step at which the others leave their loops early
        self.replayed: list[int] = []
        self.ends: list[tuple[int, int]] = []  # of loops: the step, and the batches owed

    @property
    def batch_step(self) -> int:
        return self.step + self.awaits_backward

    def batch_sizes(self, batch_size: int, step: int, least: int = 1) -> list[int]:
        sizes = [batch_size] * self.plan.num_workers
        sizes[self.worker] = self.sizes.get(step, batch_size)
        return sizes

    def missed(self) -> bool:
        return self.step in self.late

    def decide_again(self) -> None: ...

    def loop_begins(self) -> None: ...

    def state_now(self) -> None: ...

    def replay(self) -> None:
        self.replayed.append(self.step)
        self.step += 1

    def make_step(self) -> None:
        """Make the step that is next."""
        self.in_step = self.awaits_backward = False
        self.step += 1

    def loop_ended(self, *, owed: int) -> int:
        self.ends.append((self.step, owed))
        return len(self.ends) - 1

    def owes_step(self, loop: int) -> bool:
        assert loop == len(self.ends) - 1
        return self.step < self.others_step

    def loop_ended_elsewhere(self) -> bool:
        return self.leaves_at is not None and self.step >= self.leaves_at
