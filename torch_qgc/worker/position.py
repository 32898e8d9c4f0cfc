"""Where a replica is in the job: one owner, one table of what may follow what."""

from __future__ import annotations

import enum

from torch_qgc.errors import QGCError

__all__ = ["Phase", "Position"]


class Phase(enum.Enum):
    """What a replica is doing with `Position.step`."""

    IDLE = "idle"  # nothing yet; before the first step, or after one that was abandoned
    BEGUN = "begun"  # a forward pass has begun it
    THIN = "thin"  # a forward pass has begun it, for its result only: it has closed without this worker
    GATHERED = "gathered"  # its gradient is complete and on its way
    EXCHANGED = "exchanged"  # the step before has its result in .grad: the update, then the next step
    REPLAYING = "replaying"  # it has closed without this worker, which takes its result without a forward pass
    LEFT = "left"  # the state was closed


_AFTER: dict[str, dict[Phase, Phase]] = {
    "begin": {Phase.IDLE: Phase.BEGUN, Phase.EXCHANGED: Phase.BEGUN},
    "begin thin": {Phase.IDLE: Phase.THIN, Phase.EXCHANGED: Phase.THIN},
    "gather": {Phase.BEGUN: Phase.GATHERED, Phase.THIN: Phase.GATHERED},
    "replay": {Phase.IDLE: Phase.REPLAYING, Phase.EXCHANGED: Phase.REPLAYING},
    "exchange": {Phase.GATHERED: Phase.EXCHANGED, Phase.REPLAYING: Phase.EXCHANGED},
    "abandon": {Phase.BEGUN: Phase.IDLE, Phase.THIN: Phase.IDLE},
    "leave": dict.fromkeys(Phase, Phase.LEFT),
}


class Position:
    """The step that a replica makes next or is in, and the phase it is in.

    Args:
        step: the first step.
    """

    def __init__(self, step: int = 0) -> None:
        self._step, self._phase = step, Phase.IDLE

    @property
    def step(self) -> int:
        """The step that is made next, or is being made."""
        return self._step

    @property
    def phase(self) -> Phase:
        """What the replica is doing."""
        return self._phase

    @property
    def in_step(self) -> bool:
        """A forward pass has begun a step whose gradient has not been exchanged."""
        return self._phase in (Phase.BEGUN, Phase.THIN, Phase.GATHERED)

    def go(self, event: str) -> None:
        """Follow an event of the table; "exchange" ends a step.

        Raises:
            QGCError: it cannot happen now.
        """
        after = _AFTER[event].get(self._phase)
        if after is None:
            allowed = " or ".join(repr(phase.value) for phase in _AFTER[event])
            raise QGCError(
                f"step {self._step}: cannot {event} while {self._phase.value!r}, expected {allowed}: "
                "was the state used after close(), or from two threads?"
            )
        self._phase = after
        self._step += event == "exchange"

    def __repr__(self) -> str:
        return f"step {self._step}, {self._phase.value}"
