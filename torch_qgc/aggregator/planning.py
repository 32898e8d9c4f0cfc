"""What aggregator 0 learns of the workers from their messages and from rounds, and the plans that it makes of it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from torch_qgc.aggregator.decoder import Decoded
from torch_qgc.job.courses import Course
from torch_qgc.job.events import Event, Trace
from torch_qgc.job.replanning import replan_if_due
from torch_qgc.job.rounds import Closing, Rounds
from torch_qgc.job.steering import Steering
from torch_qgc.job.stopwatch import Stopwatch
from torch_qgc.kernels.buffers import Payload
from torch_qgc.planner import Plan
from torch_qgc.protocol import messages
from torch_qgc.protocol.contract import JobSpec

__all__ = ["Planning"]


class Planning:
    """Plan a job anew while it runs.

    Args:
        spec, plan: the job.
        rounds: of aggregator 0.
        trace: is told of new plans.
    """

    def __init__(self, spec: JobSpec, plan: Plan, rounds: Rounds[Payload], trace: Trace) -> None:
        self._rounds, self._trace = rounds, trace
        self._stopwatch = Stopwatch(len(rounds.chunks))
        self._steering = Steering(
            spec.workers,
            spec.numel,
            every=spec.replan_every,
            auto_deadline=spec.rule.deadline_s == "auto",
            late=spec.rule.late,
            max_staleness=spec.rule.max_staleness,
            first_step=spec.first_step,
            norm=plan.norm,
            most_batch=spec.most_batch,
        )
        self._energies = np.zeros((2, spec.workers))  # of the newest payloads: squared norm, rounding variance
        self._may_plan = False  # rounds have closed since the last look

    def begin(self, worker: int, begin: messages.Begin, now: float) -> None:
        """Note that a worker begins a step."""
        self._stopwatch.begin(worker, begin, now)

    def push(self, worker: int, push: messages.Push, now: float) -> None:
        """Note a payload."""
        self._steering.variance.update(worker, push.bits, push.variance, push.squared_norm)
        if self._stands_for_all(push.chunk):
            self._energies[:, worker] = push.squared_norm, push.variance
        timed = self._stopwatch.push(worker, push, now)
        if timed is not None:
            self._steering.note(worker, timed, push.bits)

    def close(self, closing: Closing[Payload], decoded: Decoded, now: float) -> None:
        """Note that a round has closed, and learn from it how much of workers' gradients is noise of their batches."""
        self._may_plan = True
        self._stopwatch.close(self._rounds.oldest - 1, now)
        workers = [worker for worker, _, _ in closing.payloads]
        if not self._stands_for_all(closing.chunk) or len(workers) < 2:
            return
        if any(made_for != closing.step for _, made_for, _ in closing.payloads):
            return  # payloads of several steps have no mean in common
        coefficients, energy, rounding = np.zeros((3, self._energies.shape[1]))
        coefficients[workers] = decoded.coefficients
        energy[workers], rounding[workers] = self._energies[:, workers]
        batches = self._rounds.courses.at(closing.step).plan.batches
        with np.errstate(all="ignore"):  # what is not finite is passed over
            result = float(decoded.gradient @ decoded.gradient)
            self._steering.noise.update(coefficients, energy, energy + rounding, result, batches)

    def plan_if_due(self, enter: Callable[[Plan, float | None], Course], now: float) -> None:
        """Plan anew if it is time to.

        Args:
            enter: makes a plan and a deadline the next course.
        """
        if not self._may_plan:
            return
        self._may_plan = False
        made = replan_if_due(self._steering, self._rounds, enter)
        if made is not None:
            course, choice = made
            plan = course.plan
            detail = {
                "version": course.version,
                "deadline_s": course.deadline_s,
                "batches": plan.batches,
                "bits": plan.bits,
                "shares": plan.shares,
                "late": plan.straggle_probs,
                "causes": choice.causes,
            }
            self._trace(Event(now, "replan", course.from_step, None, None, detail))

    def _stands_for_all(self, chunk: int) -> bool:
        """Noise is learnt from one chunk."""
        return chunk == self._rounds.chunks[0]
