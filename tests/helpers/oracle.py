"""What every worker must have applied, from a job's trace and the payloads that were sent: float64, written anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torch_qgc.job.events import Event
from torch_qgc.kernels.buffers import Payload, decode_sum
from torch_qgc.planner import Plan
from torch_qgc.protocol.contract import JobSpec


class Oracle:
    """A trace that adds up what is in each round:  sum of m_k / (r_k S) Q_k,  S the living's part of the shares.

    m_k is the share in the step that Q_k was made for; r_k is one over the mean number of rounds between contributions,
    of which the prior 1 - p_k counts as eight rounds. It begins anew with a plan that changes p_k, and after steps that
    have waited for all; a 32nd of the rounds that payloads have not stood for so far is added, within factors of two.

    Args:
        plan, spec: the job; plans decode without bias and have no second track.
        payload_of: (worker, step, chunk) -> the bytes that were sent.
    Attributes:
        plans: (from which step on, plan, deadline), the newest last; to be told of new ones.
        expected: (step, chunk) -> [n] float64.
        counts: (step, chunk) -> [K] payloads of each worker.
        events: everything that was traced, in order.
    """

    def __init__(self, plan: Plan, spec: JobSpec, payload_of: Callable[[int, int, int], Any]) -> None:
        self.spec, self.payload_of = spec, payload_of
        deadline_s = None if spec.rule.deadline_s == "auto" else spec.rule.deadline_s
        self.plans: list[tuple[int, Plan, float | None]] = [(spec.first_step, plan, deadline_s)]
        self.expected: dict[tuple[int, int], NDArray[np.float64]] = {}
        self.counts: dict[tuple[int, int], list[int]] = {}
        self.events: list[Event] = []
        self._in: dict[int, list[tuple[int, int]]] = {chunk: [] for chunk in range(spec.chunks)}
        prior = 1.0 - plan.straggle_probs
        self._prior = {chunk: [8.0 * rate for rate in prior] for chunk in range(spec.chunks)}
        self._gap = {chunk: [1.0 / rate for rate in prior] for chunk in range(spec.chunks)}
        self._owed = {chunk: [0.0] * spec.workers for chunk in range(spec.chunks)}
        self._since = {chunk: [0] * spec.workers for chunk in range(spec.chunks)}
        self._seen = {chunk: [0] * spec.workers for chunk in range(spec.chunks)}

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if event.name == "arrive" and event.detail["fate"] != "dropped":
            assert event.chunk is not None
            assert event.worker is not None
            assert event.step is not None
            self._in[event.chunk].append((event.worker, event.step))
        elif event.name == "close":
            self._close(event)

    def _close(self, event: Event) -> None:
        step, chunk, alive = event.step, event.chunk, event.detail["alive"]
        assert step is not None
        assert chunk is not None
        _, numel = self.spec.chunk_span(chunk)
        shares, waits = self._at(step)[1].shares, self._waits(step)
        if len(self.plans) > 1 and self._at(step)[0] == step:
            self._begin_anew(step, chunk)
        living = sum(share for share, here in zip(shares.tolist(), alive) if here)
        total, counts = np.zeros(numel), [0] * self.spec.workers
        for worker, made_for in self._in[chunk]:
            counts[worker] += 1
            rate = 1.0 if waits else 1.0 / self._stands_for(chunk, worker)
            share = self._at(made_for)[1].shares[worker]
            total += share / rate / living * self._values(worker, made_for, chunk)
        assert counts == list(event.detail["counts"])
        self.expected[step, chunk], self.counts[step, chunk] = total, counts
        self._in[chunk] = []
        if not waits:
            self._learn(chunk, counts, alive)

    def _at(self, step: int) -> tuple[int, Plan, float | None]:
        return [entry for entry in self.plans if entry[0] <= max(step, self.spec.first_step)][-1]

    def _waits(self, step: int) -> bool:
        return step < self.spec.first_step + self.spec.rule.warmup_steps or self._at(step)[2] is None

    def _begin_anew(self, step: int, chunk: int) -> None:
        old, new = self._at(step - 1)[1].straggle_probs, self._at(step)[1].straggle_probs
        for worker in range(self.spec.workers):
            if self._waits(step - 1) or old[worker] != new[worker]:
                self._owed[chunk][worker] += self._since[chunk][worker]
                self._gap[chunk][worker] = 1.0 / (1.0 - new[worker])
                self._prior[chunk][worker] = 8.0 * (1.0 - new[worker])
                self._since[chunk][worker] = self._seen[chunk][worker] = 0

    def _stands_for(self, chunk: int, worker: int) -> float:
        gap = self._gap[chunk][worker]
        return float(min(max(gap + self._owed[chunk][worker] / 32.0, gap / 2.0), 2.0 * gap))

    def _learn(self, chunk: int, counts: list[int], alive: Any) -> None:
        gap, since, seen = self._gap[chunk], self._since[chunk], self._seen[chunk]
        for worker, count in enumerate(counts):
            since[worker] += int(alive[worker])
            if count:
                self._owed[chunk][worker] += since[worker] - count * self._stands_for(chunk, worker)
            for _ in range(count):
                seen[worker] += 1
                weight = max(1.0 / (self._prior[chunk][worker] + seen[worker]), 1.0 / 128.0)
                gap[worker] += weight * (since[worker] - gap[worker])
                since[worker] = 0

    def _values(self, worker: int, made_for: int, chunk: int) -> NDArray[np.float64]:
        """Return what one payload decodes to."""
        _, numel = self.spec.chunk_span(chunk)
        out = np.empty(numel, dtype=np.float32)
        payload = Payload(self.payload_of(worker, made_for, chunk), numel, int(self._at(made_for)[1].bits[worker]))
        decode_sum([payload], [1.0], out, accumulate=False)
        return out.astype(np.float64)
