"""Both ends of a job under a virtual clock: the real aggregator, the real sessions and connections, no sleeping.

Scripts are ordinary blocking functions, one per worker. Each has a thread, of which one runs at a time: when a script
waits, the next one that can go on does, and when none can, time jumps to the next event. Runs are deterministic.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

from torch_qgc.aggregator.aggregator import Aggregator
from torch_qgc.aggregator.process import serve
from torch_qgc.job.courses import Courses
from torch_qgc.planner import Plan
from torch_qgc.protocol.contract import JobSpec
from torch_qgc.protocol.transport import MemoryNetwork, Peer
from torch_qgc.worker.connection import Connection
from torch_qgc.worker.session import Session


class Over(BaseException):
    """The world has ended while a script was waiting."""


class Script:
    """A function in a thread that runs only when it is given the baton."""

    def __init__(self, world: World, function: Callable[[], Any]) -> None:
        self.world = world
        self.condition: Callable[[], object] = lambda: True
        self.until_s = math.inf
        self.done = False
        self.error: BaseException | None = None
        self.over = False
        # Locks that one thread releases and another acquires: a fraction of what semaphores cost.
        self._go, self._back = threading.Lock(), threading.Lock()
        self._go.acquire()
        self._back.acquire()
        self._thread = threading.Thread(target=self._run, args=(function,), daemon=True)
        self._thread.start()

    def _run(self, function: Callable[[], Any]) -> None:
        self._go.acquire()
        try:
            if not self.over:
                function()
        except Over:
            pass
        except BaseException as error:
            self.error = error
        self.done = True
        self._back.release()

    def runnable(self) -> bool:
        return not self.done and (bool(self.condition()) or self.world.net.now() >= self.until_s)

    def resume(self) -> None:
        """Let it run until it waits or ends."""
        self._go.release()
        self._back.acquire()

    def wait(self, condition: Callable[[], object], until_s: float) -> bool:
        """Give the baton back until the condition holds or it is time; called in the script's thread."""
        self.condition, self.until_s = condition, until_s
        self._back.release()
        self._go.acquire()
        if self.over:
            raise Over
        return bool(condition())

    def end(self) -> None:
        self.over = True
        if not self.done:
            self.resume()


class Together:
    """Several aggregators of one job, served as one: the connections to all but the first have its number in front."""

    def __init__(self, aggregators: Sequence[Aggregator]) -> None:
        self._aggregators = aggregators

    def receive(self, peer: Peer, frames: Sequence[Any], now: float) -> None:
        self._aggregators[aggregator_of(peer)].receive(peer, frames, now)

    def lost(self, peer: Peer, now: float) -> None:
        self._aggregators[aggregator_of(peer)].lost(peer, now)

    def tick(self, now: float) -> None:
        for each in self._aggregators:
            each.tick(now)

    def plan(self, now: float) -> None:
        for each in self._aggregators:
            each.plan(now)

    def drain(self) -> list[tuple[Peer, list[Any]]]:
        return [sent for each in self._aggregators for sent in each.drain()]

    def wakeup_in(self, now: float) -> float:
        return min(each.wakeup_in(now) for each in self._aggregators)

    @property
    def finished(self) -> bool:
        return all(each.finished for each in self._aggregators)


class Network(MemoryNetwork):
    """A network on which a connection that is cut loses what is on its way."""

    def __init__(self, on_send: Callable[[Peer, Sequence[Any]], None]) -> None:
        super().__init__(on_send)
        self.cut: set[Peer] = set()

    def deliver(self, time_s: float, peer: Peer, frames: Sequence[Any]) -> None:
        def arrive() -> None:
            if peer not in self.cut:
                self._inbox.append((peer, list(frames)))

        self.at(time_s, arrive)


def address(aggregator: int, peer: Peer) -> Peer:
    """Name a peer's connection to an aggregator."""
    return peer._replace(connection=b"%d/%s" % (aggregator, peer.connection)) if aggregator else peer


def aggregator_of(name: Peer) -> int:
    number, slash, _ = name.connection.partition(b"/")
    return int(number) if slash else 0


class World:
    """An aggregator, its virtual network, and scripts.

    Args:
        aggregator: the one aggregator of the job, or the first.
        latency_s: of every message, either way, or what gives that of the next one. Messages of a connection keep
            their order.
        down: (frames) -> the latencies of what the aggregator sends, one for each time it arrives; they may overtake
            each other, none loses the message. None: as `latency_s` says.
        link: ("up" or "down", peer, frames) -> seconds for which a message occupies the link of a connection, on
            which the next one waits. None: no time at all.
        others: the job's other aggregators.
    """

    def __init__(
        self,
        aggregator: Aggregator | None = None,
        latency_s: float | Callable[[], float] = 0.0,
        down: Callable[[Sequence[Any]], Sequence[float]] | None = None,
        link: Callable[[str, Peer, Sequence[Any]], float] | None = None,
        others: Sequence[Aggregator] = (),
    ) -> None:
        self.net = Network(self._on_send)
        self.aggregator = aggregator if aggregator is not None else Aggregator()
        self.aggregators = [self.aggregator, *others]
        self._latency_s, self._down, self._link = latency_s, down, link
        self._arrives_s: dict[tuple[str, Peer], float] = {}  # when the newest message of a connection arrives
        self.sessions: dict[Peer, Session] = {}
        self._carriers: dict[Peer, VirtualCarrier] = {}  # by the name of a connection that stands
        self.scripts: list[Script] = []
        self._running: Script | None = None

    def now(self) -> float:
        return self.net.now()

    def start(self, function: Callable[[], Any]) -> Script:
        """Run a function as a script, from now on."""
        self.scripts.append(Script(self, function))
        return self.scripts[-1]

    def wait_for(self, condition: Callable[[], object], timeout_s: float = math.inf) -> bool:
        """Wait in a script."""
        if condition():
            return True
        assert self._running is not None
        script, until_s = self._running, self.now() + timeout_s
        if math.isfinite(until_s):
            self.net.at(until_s, self._settle)
        return script.wait(condition, until_s)

    def sleep(self, seconds: float) -> None:
        """Let time pass in a script."""
        self.wait_for(lambda: False, seconds)

    def connect(self, peer: Peer, session: Session) -> Connection:
        """Connect a session to the aggregators."""
        self.sessions[peer] = session
        carrier = VirtualCarrier(self, peer, session)
        self._carriers |= dict.fromkeys(carrier.names, carrier)
        for aggregator in range(len(carrier.names)):
            session.connected(aggregator)
        return Connection(session, carrier)

    def cut(self, connection: Connection, aggregator: int, after_s: float = 0.0) -> None:
        """Cut a connection, with all that is on its way or is said until there is a new one, after so many seconds."""
        carrier: Any = connection._carrier
        old = carrier.names[aggregator]
        if old in self.net.cut:
            return  # it is being mended
        self.net.disconnect(old)
        self.net.cut.add(old)
        del self._carriers[old]

        def mend() -> None:
            new = old._replace(connection=old.connection + b"'")
            carrier.names[aggregator] = new
            self._carriers[new] = carrier
            carrier.session.connected(aggregator)
            carrier.flush()

        self.net.at(self.now() + after_s, mend)

    def run(self, stop: Callable[[], bool] | None = None) -> None:
        """Let time pass until all scripts have ended, or `stop` says so; raise what a script has raised."""

        def over() -> bool:
            self._settle()
            ended = all(s.done for s in self.scripts) or any(s.error for s in self.scripts)
            return ended or (stop is not None and stop())

        try:
            together: Any = Together(self.aggregators) if len(self.aggregators) > 1 else self.aggregator
            serve(together, self.net, self.net, stop=over)
        finally:
            for script in self.scripts:
                script.end()
        for script in self.scripts:
            if script.error is not None:
                raise script.error

    def _on_send(self, name: Peer, frames: Sequence[Any]) -> None:
        if name not in self._carriers:
            return
        times_s = (
            [self.arrival_s("down", name, frames)]
            if self._down is None
            else [self.now() + s for s in self._down(frames)]
        )
        for time_s in times_s:
            self.net.at(time_s, lambda: self._receive(name, list(frames)))

    def arrival_s(self, way: str, peer: Peer, frames: Sequence[Any]) -> float:
        """Return when a message that is sent now arrives."""
        latency_s = self._latency_s() if callable(self._latency_s) else self._latency_s
        occupied_s = 0.0 if self._link is None else self._link(way, peer, frames)
        self._arrives_s[way, peer] = max(self.now() + latency_s, self._arrives_s.get((way, peer), 0.0)) + occupied_s
        return self._arrives_s[way, peer]

    def _receive(self, name: Peer, frames: list[Any]) -> None:
        if name in self._carriers:  # else it was cut meanwhile
            self._carriers[name].session.receive(aggregator_of(name), frames, self.now())
            self._carriers[name].flush()
            self._settle()

    def _settle(self) -> None:
        """Let scripts run until all of them wait for something that time has to bring."""
        while (script := next((s for s in self.scripts if s.runnable()), None)) is not None:
            self._running = script
            script.resume()
            self._running = None


class VirtualCarrier:
    """Carry a session's messages over the virtual network; see `torch_qgc.worker.connection.Carrier`."""

    def __init__(self, world: World, peer: Peer, session: Session) -> None:
        self._world, self.session = world, session
        self.names = [address(aggregator, peer) for aggregator in range(len(session.endpoints))]

    def now(self) -> float:
        return self._world.now()

    def locked(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def wait_for(self, condition: Callable[[], object], timeout_s: float) -> bool:
        return self._world.wait_for(condition, timeout_s)

    def flush(self) -> None:
        for aggregator, message in self.session.drain():
            frames, name = message(), self.names[aggregator]
            self._world.net.deliver(self._world.arrival_s("up", name, frames), name, frames)

    def close(self) -> None:
        self.flush()


def session_for(
    spec: JobSpec, plan: Plan, worker: int, *, endpoints: Sequence[str] = ("virtual",), **options: Any
) -> Session:
    """A session at the one virtual aggregator."""
    return Session(endpoints, spec, worker, Courses(spec.rule, plan, spec.first_step), **options)
