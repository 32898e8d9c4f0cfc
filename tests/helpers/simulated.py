"""Workers that compute nothing: constant gradients and given delays, through both real ends under a virtual clock."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from helpers.virtual import World, session_for
from torch_qgc.aggregator.aggregator import Aggregator
from torch_qgc.job.events import Trace, silent
from torch_qgc.kernels import Encoded, decode_sum, derive_key, encode
from torch_qgc.planner import Plan, make_plan
from torch_qgc.protocol.contract import ClosingRule, JobSpec
from torch_qgc.protocol.transport import Peer
from torch_qgc.worker.connection import Connection
from torch_qgc.worker.inbox import ClosedRound

RULE: dict[str, Any] = dict(deadline_s=1.0, warmup_steps=0, quorum=1, late="drop", max_staleness=8)


def make_spec(plan: Plan, **changes: Any) -> JobSpec:
    """A job over 512 coordinates in one chunk, unless told otherwise; fields of the rule are given as the others."""
    rule = {**RULE, **{name: changes.pop(name) for name in list(changes) if name in ClosingRule.__struct_fields__}}
    fields: dict[str, Any] = dict(
        workers=plan.num_workers,
        numel=512,
        chunk_numel=512,
        layout_digest="layout",
        plan_digest=plan.digest(),
        first_step=0,
        seed=0,
        aggregators=1,
        downlink_bits=32,
        rule=ClosingRule(**rule),
        verify_every=0,
        replan_every=0,
        control_variates=False,
        most_batch=2.0,
        log_steps=64,
        log_bytes=1 << 30,
        join_timeout_s=1e9,
        away_s=0.0,
        stall_timeout_s=1e9,
        one_group=True,
    )
    return JobSpec(**{**fields, **changes})


def peer_of(worker: int, connection: bytes = b"first") -> Peer:
    return Peer(worker, connection)


def push_all(connection: Connection, plan: Plan, step: int, values: torch.Tensor) -> None:
    """Send a worker's whole gradient."""
    spec, worker = connection.spec, connection.session.worker
    bits, key = int(plan.bits[worker]), derive_key(spec.seed, step, worker)
    for chunk in range(spec.chunks):
        offset, numel = spec.chunk_span(chunk)
        encoded = encode(values[offset : offset + numel], bits, key=key, offset=offset)
        connection.push(step, chunk, bits, lambda e=encoded: (e.to_buffer(), e.variance, e.squared_norm))


def take(connection: Connection, note: Callable[[ClosedRound], None] = lambda result: None) -> torch.Tensor:
    """Take the results of the step at hand, and return the decoded gradient."""
    spec = connection.spec
    out = torch.zeros(spec.numel)
    for result in connection.results():
        offset, numel = spec.chunk_span(result.chunk)
        encoded = Encoded.from_buffer(result.payload, numel, result.bits)
        decode_sum([encoded], [1.0], out[offset : offset + numel], accumulate=False)
        note(result)
    return out


class Job:
    """An aggregator, its virtual network, and K simulated workers.

    Args:
        gradients: [K, numel] the constant gradient each worker sends.
        delay: (worker, step) -> seconds from BEGIN to the arrival of the payload; inf: it never comes.
        abandon: a late worker drops what it computes when its step closes, so that arrivals are independent.
        link: see `World`.
    """

    def __init__(
        self,
        plan: Plan,
        spec: JobSpec,
        gradients: torch.Tensor,
        delay: Callable[[int, int], float],
        *,
        abandon: bool = False,
        trace: Trace = silent,
        link: Callable[[str, bytes, Sequence[Any]], float] | None = None,
        **session: Any,
    ) -> None:
        self.plan, self.spec, self.gradients, self.delay, self.abandon = plan, spec, gradients, delay, abandon
        self.world = World(Aggregator(trace=trace), link=link)
        self.decoded: list[torch.Tensor] = []  # [steps] of [numel], as worker 0 sees them
        self.second: list[torch.Tensor] = []
        self.contributions: list[np.ndarray] = []
        self.steps = [0] * spec.workers
        self.computed = [0] * spec.workers
        self.connections = [
            self.world.connect(peer_of(k), session_for(spec, plan, k, **session)) for k in range(spec.workers)
        ]

    @property
    def aggregator(self) -> Aggregator:
        return self.world.aggregator

    @property
    def net(self) -> Any:
        return self.world.net

    def run(self, steps: int, stop: Callable[[], bool] | None = None) -> None:
        """Let time pass until every worker has applied `steps` steps."""
        for worker in range(self.spec.workers):
            self.world.start(lambda worker=worker: self._work(worker, steps))
        self.world.run(stop)
        assert self.aggregator.failed is None, self.aggregator.failed

    def _work(self, worker: int, steps: int) -> None:
        """Compute, push, take results, replay what closed without it; join the open step at once."""
        connection = self.connections[worker]
        connection.join(math.inf)
        while self.steps[worker] < steps:
            step = self.steps[worker]
            if not connection.closed(step):
                connection.begin(step)
                delay_s = self.delay(worker, step)
                closed = self.world.wait_for(lambda step=step: self.abandon and connection.closed(step), delay_s)
                if not closed:
                    push_all(connection, connection.session.courses.at(step).plan, step, self.gradients[worker])
                    self.computed[worker] += 1
            self._apply(worker)

    def _apply(self, worker: int) -> None:
        scales: dict[int, float] = {}

        def note(result: ClosedRound) -> None:
            scales[result.chunk] = result.second_scale
            if worker == 0 and result.chunk == 0:
                self.contributions.append(result.counts)

        decoded = take(self.connections[worker], note)
        if worker == 0:
            self.decoded.append(decoded)
            second = decoded.clone()
            for chunk, scale in scales.items():
                offset, numel = self.spec.chunk_span(chunk)
                second[offset : offset + numel] *= scale
            self.second.append(second)
        self.steps[worker] += 1


def simple_plan(workers: int = 2, **options: Any) -> Plan:
    """Equal workers that are late one time in ten, 4 bits."""
    return make_plan([0.1] * workers, **{"bits_per_coordinate": 4, **options})
