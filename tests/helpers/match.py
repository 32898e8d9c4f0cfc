"""A job under a virtual clock whose workers send random gradients, and the oracle that knows what they must apply."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from helpers.oracle import Oracle
from helpers.simulated import peer_of
from helpers.virtual import World, session_for
from torch_qgc.aggregator.aggregator import Aggregator
from torch_qgc.job.courses import Courses
from torch_qgc.job.rates import ArrivalRates
from torch_qgc.kernels import derive_key, encode
from torch_qgc.planner import Plan
from torch_qgc.protocol.contract import JobSpec
from torch_qgc.worker.connection import Connection
from torch_qgc.worker.inbox import ClosedRound

__all__ = ["Match", "Member"]


@dataclass
class Member:
    """One worker: what it does, and what it has applied.

    Attributes:
        connection: to the job.
        rates: measured from results, as a replica does.
        applied, counts: the payload bytes and the contributions of every step, by chunk.
        computed: steps that it has begun.
    """

    connection: Connection
    rates: ArrivalRates

    def __post_init__(self) -> None:
        self.applied: list[dict[int, bytes]] = []
        self.counts: list[dict[int, list[int]]] = []
        self.computed: list[int] = []

    @property
    def step(self) -> int:
        return len(self.applied)

    @property
    def worker(self) -> int:
        return self.connection.session.worker

    @property
    def courses(self) -> Courses:
        return self.connection.session.courses


class Match:
    """All members of a job under a virtual clock, their payloads, and the oracle that watches it."""

    def __init__(self, plan: Plan, spec: JobSpec, *, inbox_bytes: int = 1 << 20, **world: Any) -> None:
        self.plan, self.spec = plan, spec
        self.payloads: dict[tuple[int, int, int], Any] = {}
        self.oracle = Oracle(plan, spec, lambda *key: self.payloads[key])
        first, *others = (Aggregator(i, spec.aggregators, trace=self.oracle) for i in range(spec.aggregators))
        self.world = World(first, others=others, **world)
        endpoints = [f"virtual-{i}" for i in range(spec.aggregators)]
        self.members = [
            Member(
                self.world.connect(
                    peer_of(k), session_for(spec, plan, k, endpoints=endpoints, inbox_bytes=inbox_bytes)
                ),
                ArrivalRates(1.0 - plan.straggle_probs, spec.chunks),
            )
            for k in range(spec.workers)
        ]

    def begin(self, member: Member) -> None:
        member.connection.begin(member.step)
        member.computed.append(member.step)

    def push(self, member: Member, chunk: int) -> None:
        step, worker = member.step, member.worker
        bits = int(member.courses.at(step).plan.bits[worker])
        offset, numel = self.spec.chunk_span(chunk)
        seed = worker + self.spec.workers * step + 100 * chunk
        values = torch.randn(numel, generator=torch.Generator().manual_seed(seed))
        encoded = encode(values, bits, key=derive_key(self.spec.seed, step, worker), offset=offset)
        self.payloads[worker, step, chunk] = encoded.to_buffer()
        member.connection.push(step, chunk, bits, lambda: (encoded.to_buffer(), 0.0, 0.0))

    def take(self, member: Member) -> None:
        rounds: dict[int, ClosedRound] = {}
        for result in member.connection.results():
            assert result.step == member.step
            assert result.chunk not in rounds
            rounds[result.chunk] = result
            if member.courses.changes_at(result.step):
                member.rates.expect(result.chunk, *member.courses.rates_at(result.step))
            if not member.courses.waits_for_all(result.step):
                member.rates.update(result.chunk, result.counts, result.alive)
        member.applied.append({chunk: bytes(r.payload) for chunk, r in rounds.items()})
        member.counts.append({chunk: r.counts.tolist() for chunk, r in rounds.items()})

    def compute(self, member: Member, delay_s: float) -> None:
        """Begin the open step, send all chunks after a delay, take the result."""
        self.begin(member)
        self.world.sleep(delay_s)
        for chunk in range(self.spec.chunks):
            self.push(member, chunk)
        self.take(member)

    def script(self, member: Member, call: Callable[[Member], None]) -> None:
        def run() -> None:
            member.connection.join(math.inf)
            call(member)

        self.world.start(run)

    def run(self, limit_s: float = 1e5) -> None:
        self.world.run(stop=lambda: self.world.now() > limit_s)
        assert all(script.done for script in self.world.scripts)
        assert self.world.now() <= limit_s, "somebody waits forever"
        assert [each.failed for each in self.world.aggregators] == [None] * self.spec.aggregators

    def check(self, *, gone: Sequence[int] = ()) -> None:
        """All who are still there have applied the same bytes, which are the sums of what was in the rounds."""
        living = [member for member in self.members if member.worker not in gone]
        for member in living:
            assert member.applied == living[0].applied
            assert member.counts == living[0].counts
        for member in self.members:
            assert member.applied == living[0].applied[: member.step]
        for step, (applied, counts) in enumerate(zip(living[0].applied, living[0].counts)):
            for chunk in range(self.spec.chunks):
                expected = self.oracle.expected[step, chunk]
                assert counts[chunk] == self.oracle.counts[step, chunk]
                # A few fp32 additions of fp32 coefficients.
                np.testing.assert_allclose(
                    np.frombuffer(applied[chunk], np.float32), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max()
                )
        self._check_rates(living)

    def _check_rates(self, living: Sequence[Member]) -> None:
        """The estimate that a worker keeps from results is the aggregator's, to the last bit."""
        for aggregator in self.world.aggregators:
            assert aggregator.job is not None
            for member in living:
                if member.step == aggregator.job.rounds.oldest:
                    kept, rounds = member.rates, aggregator.job.rounds
                    np.testing.assert_array_equal(kept.mean_gap[:, rounds.chunks], rounds.rates.mean_gap)
                    np.testing.assert_array_equal(kept.owed[:, rounds.chunks], rounds.rates.owed)
