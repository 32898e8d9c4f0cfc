"""Workers that exist only as messages: they drive a real Aggregator under a virtual clock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from torch_qgc.aggregator.job import Aggregator
from torch_qgc.aggregator.process import serve
from torch_qgc.kernels import Encoded, decode_sum, derive_key, encode
from torch_qgc.planner import Plan, make_plan
from torch_qgc.protocol import messages
from torch_qgc.protocol.transport import MemoryNetwork


def make_spec(plan: Plan, **changes: Any) -> messages.JobSpec:
    """A job over 512 coordinates in one chunk, unless told otherwise."""
    fields: dict[str, Any] = dict(
        workers=plan.num_workers,
        numel=512,
        chunk_numel=512,
        layout_digest="layout",
        plan_digest=plan.digest(),
        first_step=0,
        seed=0,
        aggregators=1,
        tracks=1,
        downlink_bits=32,
        deadline_s=1.0,
        warmup_steps=0,
        quorum=1,
        late="drop",
        max_staleness=8,
        verify_every=0,
        log_steps=64,
        log_bytes=1 << 30,
        join_timeout_s=1e9,
    )
    return messages.JobSpec(**{**fields, **changes})


def peer_of(worker: int) -> bytes:
    return b"worker-%d" % worker


class Job:
    """An aggregator, its virtual network, and K simulated workers.

    Args:
        gradients: [K, numel] the constant gradient each worker sends.
        delay: (worker, step) -> seconds from BEGIN to the arrival of the payload; inf: it never comes.
        abandon: a late worker drops what it computes when its step closes, so that arrivals are independent.
    """

    def __init__(
        self,
        plan: Plan,
        spec: messages.JobSpec,
        gradients: torch.Tensor,
        delay: Callable[[int, int], float],
        *,
        abandon: bool = False,
    ) -> None:
        self.abandon = abandon
        self.plan, self.spec, self.gradients, self.delay = plan, spec, gradients, delay
        self.net = MemoryNetwork(self._on_send)
        self.aggregator = Aggregator()
        self.decoded: list[torch.Tensor] = []  # [steps] of [numel], as worker 0 sees them
        self.second: list[torch.Tensor] = []
        self.contributions: list[np.ndarray] = []
        self.answers: dict[int, list[messages.FromAggregator]] = {k: [] for k in range(spec.workers)}
        self.workers = [SimulatedWorker(self, k) for k in range(spec.workers)]
        self.last_step = 0

    def run(self, steps: int) -> None:
        """Let time pass until every worker has applied `steps` steps."""
        self.last_step = steps
        for worker in self.workers:
            self.net.at(0.0, worker.hello)
        serve(self.aggregator, self.net, self.net, stop=lambda: self.done)
        assert self.aggregator.failed is None, self.aggregator.failed

    @property
    def done(self) -> bool:
        return all(worker.step >= self.last_step for worker in self.workers)

    def tell(self, worker: int, message: messages.FromWorker, *payload: Any) -> None:
        self.net.deliver(self.net.now(), peer_of(worker), [messages.encode_message(message), *payload])

    def _on_send(self, peer: bytes, frames: Any) -> None:
        worker = int(peer.split(b"-")[1])
        message = messages.decode_from_aggregator(frames[0])
        if isinstance(message, messages.Result):
            if worker == 0 and message.chunk == 0:
                self.contributions.append(np.frombuffer(message.contributions, np.uint8).astype(int))
            self.net.at(self.net.now(), lambda: self.workers[worker].on_result(message, frames[1:]))
        elif isinstance(message, messages.Welcome):
            self.net.at(self.net.now(), self.workers[worker].start)
        elif not isinstance(message, messages.Ping | messages.Started):
            self.answers[worker].append(message)


class SimulatedWorker:
    """Computes, pushes, takes results, replays what closed without it; joins the open step at once."""

    def __init__(self, job: Job, number: int) -> None:
        self.job, self.number = job, number
        self.step = 0
        self.computed = 0
        self.computing = False
        self.tracks: dict[int, dict[int, list[Any]]] = {}

    def hello(self) -> None:
        message = messages.Hello(version=messages.PROTOCOL_VERSION, worker=self.number, step=0, spec=self.job.spec)
        self.job.tell(self.number, message, *([self.job.plan.to_json().encode()] if self.number == 0 else []))

    def start(self) -> None:
        """Begin the first step that has not closed, after replaying those that have."""
        while len(self.tracks.get(self.step, ())) == self.job.spec.chunks:
            self.apply()
        if self.step >= self.job.last_step:
            return
        self.computing = True
        self.job.tell(self.number, messages.Begin(self.step))
        seconds = self.job.delay(self.number, self.step)
        if np.isfinite(seconds):
            step = self.step
            self.job.net.at(self.job.net.now() + seconds, lambda: self.finish(step))

    def finish(self, step: int) -> None:
        if self.job.abandon and step < self.step:
            return
        spec, bits = self.job.spec, int(self.job.plan.bits[self.number])
        key = derive_key(spec.seed, step, self.number)
        for chunk in range(spec.chunks):
            offset, numel = spec.chunk_span(chunk)
            values = self.job.gradients[self.number, offset : offset + numel]
            encoded = encode(values, bits, key=key, offset=offset)
            push = messages.Push(step, chunk, bits, encoded.variance, encoded.squared_norm)
            self.job.tell(self.number, push, encoded.to_buffer())
        self.computing = False
        self.computed += 1
        if len(self.tracks.get(step, ())) == spec.chunks:
            self.apply()
            self.start()

    def on_result(self, result: messages.Result, tracks: list[Any]) -> None:
        if result.step < self.step:
            return
        self.tracks.setdefault(result.step, {})[result.chunk] = [result.bits, *tracks]
        if self.computing and not self.job.abandon:
            return
        if result.step == self.step and len(self.tracks[self.step]) == self.job.spec.chunks:
            self.apply()
            self.start()

    def apply(self) -> None:
        results = self.tracks.pop(self.step)
        if self.number == 0:
            for track, kept in ((1, self.job.decoded), (2, self.job.second)):
                if track <= self.job.spec.tracks:
                    kept.append(torch.cat([self._decode(c, results[c], track) for c in sorted(results)]))
        self.step += 1

    def _decode(self, chunk: int, result: list[Any], track: int) -> torch.Tensor:
        numel = self.job.spec.chunk_span(chunk)[1]
        out = torch.empty(numel)
        decode_sum([Encoded.from_buffer(result[track], numel, result[0])], [1.0], out, accumulate=False)
        return out


def simple_plan(workers: int = 2, **options: Any) -> Plan:
    """Equal workers that are late one time in ten, 4 bits."""
    return make_plan([0.1] * workers, **{"bits_per_coordinate": 4, **options})
