"""Who may come in: the hellos of a job's workers, and which connection speaks for whom."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from torch_qgc.errors import ConfigError, ProtocolError
from torch_qgc.planner import Plan
from torch_qgc.protocol import messages
from torch_qgc.protocol.contract import MOST_WORKERS, JobSpec
from torch_qgc.protocol.transport import Peer

__all__ = ["Lobby", "check_job", "read_job"]

MOST_WAITING = MOST_WORKERS  # hellos

_REMEDIES = {
    "workers": "start every rank with the same world size",
    "layout_digest": "build the same model on every rank (names, shapes, order, requires_grad)",
    "plan_digest": "pass the same plan to every rank",
}


def read_job(hello: messages.Hello, rest: Sequence[Any], *, aggregators: int) -> tuple[JobSpec, Plan]:
    """Return the job that worker 0's Hello announces, checked: nothing has been built for it yet.

    Args:
        rest: the frames after the header: the plan as JSON.
        aggregators: how many this aggregator was started as one of.
    Raises:
        ProtocolError, PlanError, ConfigError: it cannot be; names the remedy.
    """
    plan = messages.plan_frame(rest, "worker 0's Hello")
    check_job(hello.spec, plan, aggregators=aggregators)
    return hello.spec, plan


def check_job(spec: JobSpec, plan: Plan, *, aggregators: int) -> None:
    """Check that a job can be, and is one for as many aggregators.

    Raises:
        ConfigError: it cannot; names the remedy.
    """
    spec.validate(plan)
    if spec.aggregators != aggregators:
        raise ConfigError(
            f"the job has {spec.aggregators} aggregators, this one was started as one of {aggregators}: "
            f"start it with --count {spec.aggregators}"
        )


class Lobby:
    """The connections of the workers that are in, and the hellos that wait until it is known what the job is."""

    def __init__(self) -> None:
        self._peer_of: dict[int, Peer] = {}
        self._session_of: dict[int, str] = {}
        self._waiting: dict[Peer, messages.Hello] = {}

    def worker_of(self, peer: Peer) -> int | None:
        """Return the worker behind a connection, None if it is not in."""
        return peer.worker if self._peer_of.get(peer.worker) == peer else None

    def peer_of(self, worker: int) -> Peer | None:
        """Return the connection of a worker, None if it is not in."""
        return self._peer_of.get(worker)

    def peers(self) -> list[Peer]:
        """Return the connections of all that are in."""
        return list(self._peer_of.values())

    def admit(self, peer: Peer, hello: messages.Hello, spec: JobSpec) -> None:
        """Let a worker in, for the first time, back from the dead, or on another connection than before.

        Raises:
            ProtocolError: it does not fit the job: names the field that differs, or who has its number already.
        """
        if hello.spec != spec:
            mine, theirs = msgspec.to_builtins(spec), msgspec.to_builtins(hello.spec)
            mine |= {f"rule.{name}": value for name, value in mine.pop("rule").items()}
            theirs |= {f"rule.{name}": value for name, value in theirs.pop("rule").items()}
            name = next(name for name, value in mine.items() if theirs[name] != value)
            remedy = _REMEDIES.get(name, "pass the same arguments to QGCState on every rank")
            raise ProtocolError(
                f"worker {hello.worker}: expected {name}={mine[name]!r} as worker 0, got {theirs[name]!r}: {remedy}"
            )
        if hello.worker >= spec.workers:
            raise ProtocolError(f"expected a worker number below {spec.workers}, got {hello.worker}")
        same = hello.session and hello.session == self._session_of.get(hello.worker)
        if hello.worker in self._peer_of and not same:
            raise ProtocolError(
                f"worker {hello.worker} is already in this job from another process: give every rank its own number; "
                "if it was restarted, try again when the old process's connection has timed out"
            )
        self._peer_of[hello.worker], self._session_of[hello.worker] = peer, hello.session

    def remove(self, peer: Peer) -> int | None:
        """Forget a connection; return the worker it spoke for."""
        self._waiting.pop(peer, None)
        worker = self.worker_of(peer)
        if worker is not None:
            del self._peer_of[worker]
        return worker

    # --- before the job is known --------------------------------------------------------------------------

    def keep_waiting(self, peer: Peer, hello: messages.Hello) -> None:
        """Keep a hello until it is known what the job is; beyond a bound it is not kept, and asked for again."""
        if len(self._waiting) < MOST_WAITING:
            self._waiting[peer] = hello

    def is_waiting(self, peer: Peer) -> bool:
        """Tell whether a connection's hello is kept."""
        return peer in self._waiting

    def take_waiting(self) -> list[tuple[Peer, messages.Hello]]:
        """Return the hellos that were kept, and forget them."""
        waiting, self._waiting = list(self._waiting.items()), {}
        return waiting

    def __repr__(self) -> str:
        return f"Lobby({len(self._peer_of)} workers in, {len(self._waiting)} waiting)"
