"""What a worker has said to one aggregator, until it is known to be heard: on a new connection it is said again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["Message", "Spoken"]

#: A call that gives the frames of a message: payloads may have to wait for a device.
Message = Callable[[], list[Any]]


@dataclass
class _Kept:
    """A message that the aggregator may not have heard.

    Attributes:
        message: as it was said.
        step: it is of no use once this step is over; None: it always is.
        number: how many were sent before it since the last answered Hello; None: not sent since.
    """

    message: Message
    step: int | None
    number: int | None = None


class Spoken:
    """Messages to one aggregator: each is heard once, in order, whatever becomes of connections.

    Both ends count the messages that were sent since the last Hello that was answered. The aggregator tells its count
    with every sign of life, and with the answer to the next Hello; what it has not heard by then is sent again. While a
    Hello is unanswered nothing is sent, so that nothing can overtake what is to be said again.
    """

    def __init__(self) -> None:
        self.attempt = 0  # Hellos so far
        self.since = 0  # the last one that was answered, from which on messages are counted
        self.let_in = False  # that was the last of all
        self._kept: list[_Kept] = []
        self._sent = 0  # since the last answered Hello

    def say(self, message: Message, step: int | None = None) -> None:
        """Add a message. If `step` is given, it need not be said again once that step is over."""
        self._kept.append(_Kept(message, step))

    def hello(self) -> int:
        """Begin to introduce this worker anew; return the number of the attempt."""
        self.attempt += 1
        self.let_in = False
        return self.attempt

    def answered(self, attempt: int, heard: int) -> bool:
        """Note the answer to a Hello; tell whether it was the last one's.

        Args:
            heard: messages since `since`.
        """
        if attempt != self.attempt:
            return False
        self.heard(heard)
        for kept in self._kept:
            kept.number = None
        self._sent, self.since, self.let_in = 0, attempt, True
        return True

    def heard(self, count: int) -> None:
        """Forget the first `count` messages that were sent since the last answered Hello."""
        self._kept = [kept for kept in self._kept if kept.number is None or kept.number >= count]

    def step_begins(self, step: int) -> None:
        """Forget what is of no use from this step on, but for what is on its way out."""
        self._kept = [
            kept
            for kept in self._kept
            if kept.step is None or kept.step >= step or (self.let_in and kept.number is None)
        ]

    def drain(self) -> list[Message]:
        """Return what is to be sent now, in order."""
        due = [kept for kept in self._kept if kept.number is None] if self.let_in else []
        for kept in due:
            kept.number = self._sent
            self._sent += 1
        return [kept.message for kept in due]

    def __len__(self) -> int:
        """Messages that may not have been heard."""
        return len(self._kept)
