"""The worker's end: a background thread that sends payloads and receives results, and the inbox between them.

The training thread calls the public methods; only the background thread touches sockets. Results arrive
unasked, for the step the worker is in and for steps that closed without it; the inbox keeps them in bounded
memory, and what did not fit or was lost is asked for again when it is needed.
"""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torch_qgc.errors import JobFailed, ProtocolError, QGCError, Refused
from torch_qgc.protocol import messages
from torch_qgc.protocol.transport import ZmqClient

__all__ = ["ClosedRound", "Worker"]

Frame = Any
REFETCH_S = 1.0  # after that long without news, missing results are asked for again


@dataclass(frozen=True)
class ClosedRound:
    """A result as received: who is in it ([K] uint8), and one payload frame per track."""

    step: int
    chunk: int
    bits: int
    contributions: NDArray[np.uint8]
    tracks: list[Frame]

    @property
    def nbytes(self) -> int:
        """Payload bytes."""
        return sum(memoryview(track).nbytes for track in self.tracks)


class Worker:
    """One worker's connection to all aggregators of its job.

    Args:
        endpoints: "tcp://host:port" of aggregator 0, 1, ...; chunk c belongs to aggregator c mod their number.
        spec: the job.
        worker: this worker's number, 0 .. K-1.
        plan_json: the plan; worker 0 tells the aggregators.
        first_step: the first step this worker has no result of.
        inbox_bytes: results of future steps kept at most.
        silence_s: an aggregator from which nothing was heard for that long is gone.
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        spec: messages.JobSpec,
        worker: int,
        plan_json: str,
        *,
        first_step: int = 0,
        inbox_bytes: int = 512 << 20,
        silence_s: float = 30.0,
    ) -> None:
        self.spec, self.worker = spec, worker
        self.bytes_sent = self.bytes_received = 0
        self.rejections: list[str] = []
        self._endpoints = list(endpoints)
        self._plan_json = plan_json
        self._inbox_bytes, self._silence_s = inbox_bytes, silence_s
        self._news = threading.Condition()
        self._inbox: dict[int, dict[int, ClosedRound]] = {}
        self._held_bytes = 0
        self._step = first_step  # the first step whose results the training thread has not taken
        self._newest = -1  # the newest step of which any result was received, kept or not
        self._started: dict[int, float] = {}
        self._welcomed: set[int] = set()
        self._error: QGCError | None = None
        self._outgoing: queue.SimpleQueue[tuple[int, Callable[[], list[Frame]]]] = queue.SimpleQueue()
        self._wake_out, self._wake_in = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._closing = False
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._run, name="torch_qgc worker", daemon=True)
        self._thread.start()

    # --- the training thread's side ---------------------------------------------------------------------

    def join(self, timeout_s: float) -> None:
        """Wait until every aggregator has let this worker in.

        Raises:
            Refused: an aggregator does not accept it; the message names the remedy.
            JobFailed: no answer in time.
        """
        with self._news:
            self._news.wait_for(lambda: self._error or len(self._welcomed) == len(self._endpoints), timeout_s)
            self._check()
            if len(self._welcomed) < len(self._endpoints):
                missing = [e for a, e in enumerate(self._endpoints) if a not in self._welcomed]
                raise JobFailed(
                    f"worker {self.worker}: no answer from the aggregator at {', '.join(missing)} within "
                    f"{timeout_s:.0f} s: is it running and reachable, and has worker 0 joined?"
                )

    def begin(self, step: int) -> None:
        """Announce the step's forward pass to every aggregator."""
        self._broadcast(messages.Begin(step))

    def push(self, step: int, chunk: int, bits: int, payload: Callable[[], tuple[Frame, float, float]]) -> None:
        """Send a chunk.

        Args:
            payload: returns (buffer, rounding variance, squared norm); called in the background thread, so that
                it may wait for a device to finish.
        """

        def frames() -> list[Frame]:
            buffer, variance, squared_norm = payload()
            return [messages.encode_message(messages.Push(step, chunk, bits, variance, squared_norm)), buffer]

        self._enqueue(chunk % len(self._endpoints), frames)

    def send_hash(self, step: int, digest: str) -> None:
        """State the digest of the parameters before `step`; aggregator 0 compares."""
        self._tell(0, messages.Hash(step, digest))

    def send_fault(self, step: int, text: str) -> None:
        """Make the job end on every rank."""
        self._broadcast(messages.Fault(step, text[:8000]))

    def closed(self, step: int) -> bool:
        """Tell whether a step has closed: all its results are in, or those of a later one.

        Raises:
            JobFailed, Refused: the job has ended.
        """
        with self._news:
            self._check()
            return self._is_closed(step)

    def results(self, step: int) -> Iterator[ClosedRound]:
        """Yield the step's results, each as soon as it is in, until all chunks are; then forget them.

        Raises:
            JobFailed, Refused: the job has ended.
        """
        taken: set[int] = set()
        asked = False
        while len(taken) < self.spec.chunks:
            with self._news:
                self._check()
                ready = [r for c, r in self._inbox.get(step, {}).items() if c not in taken]
                if not ready:
                    lost = step < self._newest and not asked  # did not fit into the inbox when it came
                    if lost or not self._news.wait(REFETCH_S):
                        self._refetch(step)
                        asked = True
                    continue
            for result in ready:
                taken.add(result.chunk)
                yield result
        with self._news:
            for past in [s for s in self._inbox if s <= step]:
                self._held_bytes -= sum(r.nbytes for r in self._inbox.pop(past).values())
            self._started = {s: t for s, t in self._started.items() if s > step}
            self._step = step + 1

    def wait_closed(self, step: int, timeout_s: float) -> bool:
        """Wait until a step has closed without this worker, at most timeout_s; tell whether it has."""
        with self._news:
            self._news.wait_for(lambda: self._error or self._is_closed(step), timeout_s)
            self._check()
            return self._is_closed(step)

    def elapsed_s(self, step: int) -> float | None:
        """Return for how long the step's clock has been running, None if nobody has begun it."""
        with self._news:
            started = self._started.get(step)
            return None if started is None else time.monotonic() - started

    def close(self) -> None:
        """Say goodbye and stop the thread; what is queued is still sent for a moment."""
        if os.getpid() != self._pid or self._closing:
            return
        self._broadcast(messages.Bye())
        self._closing = True
        self._wake()
        self._thread.join(10.0)

    def _is_closed(self, step: int) -> bool:
        return len(self._inbox.get(step, ())) == self.spec.chunks or step < self._newest

    def _check(self) -> None:
        if self._error is not None:
            # A fresh exception each time: the training thread may raise it in more than one place.
            raise type(self._error)(*self._error.args)

    def _refetch(self, step: int) -> None:
        for chunk in range(self.spec.chunks):
            if chunk not in self._inbox.get(step, {}):
                self._tell(chunk % len(self._endpoints), messages.Fetch(step, chunk))

    def _broadcast(self, message: messages.FromWorker) -> None:
        for aggregator in range(len(self._endpoints)):
            self._tell(aggregator, message)

    def _tell(self, aggregator: int, message: messages.FromWorker) -> None:
        header = messages.encode_message(message)
        self._enqueue(aggregator, lambda: [header])

    def _enqueue(self, aggregator: int, frames: Callable[[], list[Frame]]) -> None:
        self._outgoing.put((aggregator, frames))
        self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError, OSError):  # full: the thread is already being woken
            self._wake_in.send(b"\0")

    # --- the background thread's side -------------------------------------------------------------------

    def _run(self) -> None:
        client = ZmqClient(self._endpoints)
        try:
            client.watch(self._wake_out.fileno())
            for aggregator in range(len(self._endpoints)):
                client.send(aggregator, self._hello())
            self._loop(client)
        except Exception as error:
            self._end(JobFailed(f"worker {self.worker}: the connection's thread failed: {error!r}"))
        finally:
            client.close()

    def _loop(self, client: ZmqClient) -> None:
        silent_s = [0.0] * len(self._endpoints)
        last = time.monotonic()
        while True:
            closing = self._closing  # read first: what was queued before it was set is still sent
            with contextlib.suppress(queue.Empty):
                while True:
                    aggregator, frames = self._outgoing.get_nowait()
                    message = frames()
                    self.bytes_sent += sum(memoryview(frame).nbytes for frame in message)
                    client.send(aggregator, message)
            if closing:
                return
            messages = client.poll(0.25)
            with contextlib.suppress(BlockingIOError):
                while self._wake_out.recv(4096):
                    pass
            # Only time in which this thread ran counts as silence: a suspended process must not blame its peer.
            now = time.monotonic()
            silent_s = [s + min(now - last, 1.0) for s in silent_s]
            last = now
            for aggregator, message in messages:
                silent_s[aggregator] = 0.0
                self._receive(client, aggregator, message)
            for aggregator, silence in enumerate(silent_s):
                if silence > self._silence_s:
                    self._end(
                        JobFailed(
                            f"worker {self.worker}: nothing heard from the aggregator at {self._endpoints[aggregator]} "
                            f"for {silence:.0f} s: its process (a child of rank 0 by default) or the network is gone"
                        )
                    )

    def _hello(self) -> list[Frame]:
        hello = messages.Hello(version=messages.PROTOCOL_VERSION, worker=self.worker, step=self._step, spec=self.spec)
        plan = [self._plan_json.encode()] if self.worker == 0 else []
        return [messages.encode_message(hello), *plan]

    def _receive(self, client: ZmqClient, aggregator: int, frames: list[Frame]) -> None:
        self.bytes_received += sum(memoryview(frame).nbytes for frame in frames)
        match message := messages.decode_from_aggregator(frames[0]):
            case messages.Result():
                self._keep(message, frames[1:])
            case messages.Started(step, elapsed_s):
                with self._news:
                    self._started.setdefault(step, time.monotonic() - elapsed_s)
            case messages.Welcome():
                with self._news:
                    self._welcomed.add(aggregator)
                    self._news.notify_all()
            case messages.Introduce():
                client.send(aggregator, self._hello())
            case messages.Refusal(text):
                self._end(Refused(text))
            case messages.Failed(text):
                self._end(JobFailed(text))
            case messages.Rejected(text):
                with self._news:
                    self.rejections = [*self.rejections[-99:], text]
            case messages.Ping():
                pass

    def _keep(self, header: messages.Result, tracks: list[Frame]) -> None:
        contributions = np.frombuffer(header.contributions, dtype=np.uint8)
        if (
            len(tracks) != self.spec.tracks
            or header.chunk >= self.spec.chunks
            or len(contributions) != self.spec.workers
        ):
            raise ProtocolError(
                f"result of step {header.step}, chunk {header.chunk}: expected {self.spec.tracks} tracks and "
                f"{self.spec.workers} workers, got {len(tracks)} and {len(contributions)}: "
                "the aggregator serves another job"
            )
        result = ClosedRound(header.step, header.chunk, header.bits, contributions, tracks)
        with self._news:
            self._newest = max(self._newest, result.step)
            if result.step < self._step or result.chunk in self._inbox.get(result.step, {}):
                return  # answered twice
            if result.step > self._step and self._held_bytes + result.nbytes > self._inbox_bytes:
                return  # will be asked for again when its turn comes
            self._inbox.setdefault(result.step, {})[result.chunk] = result
            self._held_bytes += result.nbytes
            self._news.notify_all()

    def _end(self, error: QGCError) -> None:
        with self._news:
            self._error = self._error or error
            self._news.notify_all()
