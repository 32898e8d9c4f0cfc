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
TAKEN_S = 15.0  # for which a worker waits whose number another process has: its end may not have been noticed yet

_REMEDIES = {
    "workers": "start every rank with the same world size",
    "layout_digest": "build the same model on every rank (names, shapes, order, requires_grad)",
    "plan_digest": "pass the same plan to every rank",
    "first_step": "load the same checkpoint on every rank; a later one is for workers that come back to a running job",
    "seed": "pass the same seed on every rank, and load a checkpoint of this job",
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
    """Who owns which worker's number, over which connection, and the hellos that wait to be let in.

    A number belongs to a session, one life of a worker. Connections of it come and go; what was said over one that is
    lost is said again over the next, so messages are counted here.
    """

    def __init__(self) -> None:
        self._peer_of: dict[int, Peer] = {}
        self._session_of: dict[int, str] = {}
        self._heard: dict[int, dict[int, int]] = {}  # worker -> Hello -> messages since then; the last one comes last
        self._waiting: dict[Peer, tuple[messages.Hello, float]] = {}  # and since when

    def worker_of(self, peer: Peer) -> int | None:
        """Return the worker behind a connection, None if it is not in."""
        return peer.worker if self._peer_of.get(peer.worker) == peer else None

    def peer_of(self, worker: int) -> Peer | None:
        """Return the connection of a worker, None if it is not in."""
        return self._peer_of.get(worker)

    def peers(self) -> list[Peer]:
        """Return the connections of all that are in."""
        return list(self._peer_of.values())

    def hear(self, worker: int) -> None:
        """Count a message of a worker that is in."""
        heard = self._heard[worker]
        heard[max(heard)] += 1

    def heard(self, worker: int) -> int:
        """Return how many messages of a worker have come since its last Hello."""
        heard = self._heard[worker]
        return heard[max(heard)]

    def speaks_for(self, peer: Peer, session: str) -> bool:
        """Tell whether what a session says over a connection is the worker's word, before its Hello as well."""
        if peer.worker not in self._peer_of or self.worker_of(peer) is not None:
            return True
        return bool(session) and self._session_of[peer.worker] == session

    def is_taken(self, hello: messages.Hello) -> bool:
        """Tell whether the number belongs to another process that is in."""
        return hello.worker in self._peer_of and not self._is_owner(hello)

    def _is_owner(self, hello: messages.Hello) -> bool:
        return bool(hello.session) and self._session_of.get(hello.worker) == hello.session

    def check(self, hello: messages.Hello, spec: JobSpec, *, running: bool) -> None:
        """Check that a worker belongs to a job.

        Args:
            running: a step has closed, so that a worker may come back with a later checkpoint, of a plan that knows
                more than the job has begun with.
        Raises:
            ProtocolError: it does not; names the field that differs.
        """
        expects = hello.spec
        if running:
            expects = msgspec.structs.replace(expects, first_step=spec.first_step, plan_digest=spec.plan_digest)
        if expects != spec:
            mine, theirs = msgspec.to_builtins(spec), msgspec.to_builtins(expects)
            mine |= {f"rule.{name}": value for name, value in mine.pop("rule").items()}
            theirs |= {f"rule.{name}": value for name, value in theirs.pop("rule").items()}
            name = next(name for name, value in mine.items() if theirs[name] != value)
            remedy = _REMEDIES.get(name, "pass the same arguments to QGCState on every rank")
            raise ProtocolError(
                f"worker {hello.worker}: expected {name}={mine[name]!r} as worker 0, got {theirs[name]!r}: {remedy}"
            )
        if hello.worker >= spec.workers:
            raise ProtocolError(f"expected a worker number below {spec.workers}, got {hello.worker}")

    def admit(self, peer: Peer, hello: messages.Hello) -> int | None:
        """Let a worker in: for the first time, back from the dead, or over another connection than before.

        Returns:
            How many messages of its session were heard since the Hello whose answer it has; None if the session is new.
        """
        heard = self._heard[hello.worker].get(hello.since, 0) if self._is_owner(hello) else None
        self._peer_of[hello.worker], self._session_of[hello.worker] = peer, hello.session
        # The answer to this one may be lost as well, and then the next one names the same Hello again.
        self._heard[hello.worker] = {hello.since: heard or 0, hello.attempt: 0}
        return heard

    def remove(self, peer: Peer) -> int | None:
        """Forget a connection; return the worker it spoke for."""
        self._waiting.pop(peer, None)
        worker = self.worker_of(peer)
        if worker is not None:
            del self._peer_of[worker]
        return worker

    # --- hellos that wait ---------------------------------------------------------------------------------

    def keep_waiting(self, peer: Peer, hello: messages.Hello, now: float) -> None:
        """Keep a hello until the job is known, or its number free; beyond a bound it is not, and asked for again."""
        if peer in self._waiting or len(self._waiting) < MOST_WAITING:
            self._waiting[peer] = hello, now

    def is_waiting(self, peer: Peer) -> bool:
        """Tell whether a connection's hello is kept."""
        return peer in self._waiting

    def take_waiting(self) -> list[tuple[Peer, messages.Hello]]:
        """Return the hellos that may be let in now, and forget them."""
        ready = [(peer, hello) for peer, (hello, _) in self._waiting.items() if not self.is_taken(hello)]
        for peer, _ in ready:
            del self._waiting[peer]
        return ready

    def take_refused(self, now: float) -> list[tuple[Peer, str]]:
        """Return those that have waited in vain for a number that another process has, and why; forget them."""
        refused = [
            (peer, hello.worker)
            for peer, (hello, since_s) in self._waiting.items()
            if self.is_taken(hello) and now > since_s + TAKEN_S
        ]
        for peer, _ in refused:
            del self._waiting[peer]
        return [
            (peer, f"worker {worker} is in this job from another process: give every rank its own number")
            for peer, worker in refused
        ]

    def __repr__(self) -> str:
        return f"Lobby({len(self._peer_of)} workers in, {len(self._waiting)} waiting)"
