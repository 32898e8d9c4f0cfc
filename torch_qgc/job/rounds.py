"""Who is in, and when does it close: the pure rule of one chunk of one step."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

from torch_qgc.errors import ConfigError

__all__ = ["ClosingRule", "Round"]

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ClosingRule:
    """When a step closes, and what becomes of payloads that come after that.

    Args:
        deadline_s: seconds after the step's first BEGIN at which it closes without the late ones; None waits
            for all, as DDP does. Shorter: faster steps, more stragglers left out.
        warmup_steps: that many first steps wait for all (DDP's own one-time collectives happen there).
        quorum: a step never closes on fewer arrivals; the deadline is extended until they are in.
        late: "fold" lets a late payload enter the open round of its chunk, "drop" discards it.
        max_staleness: how many steps old a folded payload may be.
    """

    deadline_s: float | None = None
    warmup_steps: int = 3
    quorum: int = 1
    late: Literal["fold", "drop"] = "fold"
    max_staleness: int = 8

    def __post_init__(self) -> None:
        if self.deadline_s is not None and not 0 < self.deadline_s < float("inf"):
            raise ConfigError(
                f"deadline_s: expected a positive number of seconds, or None to wait for all, got {self.deadline_s!r}"
            )
        if self.warmup_steps < 0 or self.quorum < 1 or self.max_staleness < 0:
            raise ConfigError(
                "expected warmup_steps >= 0, quorum >= 1 and max_staleness >= 0, got "
                f"{self.warmup_steps}, {self.quorum} and {self.max_staleness}"
            )
        if self.late not in ("fold", "drop"):
            raise ConfigError(f"late: expected 'fold' or 'drop', got {self.late!r}")

    def waits_for_all(self, step: int) -> bool:
        """Tell whether a step closes only when every live worker is in."""
        return self.deadline_s is None or step < self.warmup_steps

    def wait_before_joining_s(self, step: int, elapsed_s: float | None, usual_s: float | None) -> float:
        """Tell a worker that comes to an open step how long to wait for it to close; 0: join it.

        Where late payloads are dropped, a worker that can no longer make it had better begin the next step with the
        others. A step that has just begun is always tried, else a slow worker would never take part; one that is
        still open after its deadline lacks its quorum, and needs everybody.

        Args:
            step: counted from the job's first.
            elapsed_s: for how long the step's clock has been running; None if nobody has begun it.
            usual_s: how long this worker usually takes; None if it does not know yet.
        """
        if self.late == "fold" or self.waits_for_all(step) or elapsed_s is None or usual_s is None:
            return 0.0
        assert self.deadline_s is not None
        if elapsed_s < self.deadline_s / 4 or elapsed_s + usual_s <= self.deadline_s or elapsed_s > self.deadline_s:
            return 0.0
        return 1.25 * self.deadline_s - elapsed_s  # a quarter for the results to come


@dataclass
class Round(Generic[T]):
    """One chunk of one step while it is open. `T` is whatever is kept of a payload."""

    step: int
    chunk: int
    rule: ClosingRule
    payloads: dict[tuple[int, int], T] = field(default_factory=dict)  # (worker, the step it was made for)

    def add(self, worker: int, made_for: int, payload: T) -> None:
        """Enter a payload, timely (made_for == step) or folded (made_for < step)."""
        self.payloads[worker, made_for] = payload

    @property
    def present(self) -> set[int]:
        """Workers whose payload for this very step is in."""
        return {worker for worker, made_for in self.payloads if made_for == self.step}

    def is_due(
        self, now: float, began_at: float | None, awaited: AbstractSet[int], leashed: AbstractSet[int] = frozenset()
    ) -> bool:
        """Tell whether the round closes now.

        Args:
            now: seconds on the aggregator's clock.
            began_at: when the step's clock started; None if nobody has begun it.
            awaited: workers that may still send (not dead, not gone).
            leashed: workers without which the round must not close, deadline or not: they would fall off the log.
        """
        present = self.present
        if awaited and awaited <= present:
            return True
        if began_at is None or self.rule.waits_for_all(self.step) or not leashed <= present:
            return False
        assert self.rule.deadline_s is not None
        return now >= began_at + self.rule.deadline_s and len(present) >= min(self.rule.quorum, max(len(awaited), 1))
