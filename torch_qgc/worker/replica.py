"""A replica's way through the job: steps computed with the others, or replayed when they closed without it."""

from __future__ import annotations

import statistics
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec
import torch

from torch_qgc.errors import ConfigError, QGCError
from torch_qgc.job.events import Trace, silent
from torch_qgc.job.rates import ArrivalRates
from torch_qgc.planner import Plan
from torch_qgc.protocol.contract import JobSpec
from torch_qgc.worker.connection import Connection
from torch_qgc.worker.exchange import Exchange
from torch_qgc.worker.inbox import ClosedRound
from torch_qgc.worker.layout import Layout
from torch_qgc.worker.position import Position
from torch_qgc.worker.report import Report
from torch_qgc.worker.spans import Spans
from torch_qgc.worker.update import Update

__all__ = ["Connect", "Replica"]

#: Makes the connection when the first step is made: (the job, the plan, the first step, the trace) -> connection.
Connect = Callable[[JobSpec, Plan, int, Trace], Connection]


class Replica:
    """One worker's copy of the model, and where it is in the job. It joins the job with its first step.

    Args:
        layout: where parameters and chunks lie.
        plan, spec: the job.
        worker: this worker's number.
        connect: makes the connection to the job.
        trace: is told what happens.
        now: seconds; measures how long this worker's steps take.
    """

    def __init__(
        self,
        layout: Layout,
        plan: Plan,
        spec: JobSpec,
        *,
        worker: int,
        connect: Connect,
        trace: Trace = silent,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.layout, self.plan, self.spec, self.worker = layout, plan, spec, worker
        self.position = Position(spec.first_step)
        self.counts = Report(workers=spec.workers, numel=layout.numel)
        self.rates = ArrivalRates(1.0 - plan.straggle_probs, len(layout.chunks))
        self.update = Update(layout, self.check_exchanged)
        self._spans = Spans(worker, trace, now)
        self._connect, self._trace, self._now = connect, trace, now
        self._connection: Connection | None = None
        self._exchange: Exchange | None = None
        self._hashed_step = spec.first_step
        self._begun_at_s = 0.0
        self._own_times_s: deque[float] = deque(maxlen=16)  # BEGIN to last push, of the newest computed steps
        self._closer: weakref.finalize[..., Any] | None = None

    @property
    def step(self) -> int:
        """The step that is made next, or is being made."""
        return self.position.step

    @property
    def in_step(self) -> bool:
        """A forward pass has begun a step whose gradient has not been exchanged."""
        return self.position.in_step

    @property
    def may_be_late(self) -> bool:
        """Steps may close without this worker."""
        return self.spec.rule.deadline_s is not None

    def start_at(self, step: int, seed: int, plan: Plan) -> None:
        """Begin with another step than 0, as a checkpoint says.

        Raises:
            ConfigError: steps have been made already.
        """
        if self._connection is not None:
            raise ConfigError(
                "load_state_dict: expected a state that has made no step yet; load right after QGCState(...)"
            )
        self.plan = plan
        self.spec = msgspec.structs.replace(self.spec, first_step=step, seed=seed, plan_digest=plan.digest())
        self.spec.validate(plan)
        self.position, self._hashed_step = Position(step), step
        self.rates = ArrivalRates(1.0 - plan.straggle_probs, len(self.layout.chunks))

    # --- computed steps ---------------------------------------------------------------------------------

    def begin(self) -> None:
        """Announce the step in which this worker now computes, unless it has: a step may take several forward passes.

        Raises:
            ConfigError: the last backward pass has left out parameters.
        """
        connection, exchange = self.joined()
        if exchange.half_way:
            self.check_exchanged()
        if self.in_step:
            return
        self._verify()
        self.position.go("begin")
        self._begun_at_s = self._now()
        self._spans.mark("begin", step=self.step)
        connection.begin(self.step)

    def exchange(self, bucket: Any) -> torch.futures.Future[torch.Tensor]:
        """Take one of DDP's buckets; with the last one wait for the step's result, which is then in all of them."""
        try:
            connection, exchange = self.joined()
            if not self.in_step:
                self.begin()  # a backward pass whose forward ran in eval mode
            scale = self.update.loss_scale()
            closed_without_us = connection.closed(self.step)
            future = exchange.take(bucket, self.step, scale)
            if exchange.gathered:
                self.position.go("gather")
                self._own_times_s.append(self._now() - self._begun_at_s)
                self.counts.late_steps += closed_without_us
                # Every gradient is out, so waiting here delays nothing; and unlike DDP's own wait for the futures it
                # can be interrupted, and an error surfaces as itself and not as a failed cast of a future's value.
                waiting_since_s = self._now()
                exchange.finish(self.step, scale, self._note)
                self.counts.wait_s += self._now() - waiting_since_s
                self.counts.computed_steps += 1
                self.position.go("exchange")
            return future
        except Exception as error:
            self.tell_all(repr(error))
            if isinstance(error, QGCError):
                raise
            raise QGCError(f"worker {self.worker}, step {self.step}: the hook failed: {error!r}") from error

    def check_exchanged(self) -> None:
        """Raise ConfigError, here and on all ranks, if a step has begun whose gradient was not exchanged."""
        if not self.in_step:
            return
        missing = self.joined()[1].without_gradient()
        if missing:
            problem = (
                f"expected a gradient of every parameter, got none of {', '.join(missing[:8])}"
                f"{' ...' if len(missing) > 8 else ''}: freeze it (requires_grad_(False)) before DDP(model), or let "
                "the loss depend on it in every step"
            )
        else:
            problem = (
                "a forward pass has begun the step, but its gradient was not exchanged before the update. Was the hook "
                "registered (model.register_comm_hook(state, qgc.qgc_hook))? Forward passes that are not trained on "
                "belong under torch.no_grad()"
            )
        self.tell_all(problem)
        raise ConfigError(f"worker {self.worker}, step {self.step}: {problem}")

    def tell_all(self, problem: str) -> None:
        """Make the job end on every rank, because of an error here; returns when all have heard of it, or soon."""
        if self._connection is not None and self._connection.session.error is None:
            self._spans.mark("fault", step=self.step, text=problem)
            self._connection.send_fault(self.step, problem)

    def second_scale(self, parameter: torch.Tensor) -> float | torch.Tensor:
        """Return what a parameter's gradient of the last step is to be multiplied with before Adam squares it."""
        if self._exchange is None or self.plan.second_track is None:
            return 1.0
        return self._exchange.flat.second_scale(self.layout.slot(parameter))

    def _note(self, result: ClosedRound) -> None:
        """Enter a result: into the counts, and into the same estimate of rates that the aggregators have."""
        self.counts.note(result.counts, chunks=len(self.layout.chunks))
        if not self.spec.waits_for_all(result.step):
            self.rates.update(result.chunk, result.counts, result.alive)

    # --- steps that closed without us -------------------------------------------------------------------

    def missed(self) -> bool:
        """Tell whether the next step closes without this worker: then it is replayed, else computed.

        A worker whose late payloads would be dropped joins a step that is under way only if it can still make it.
        """
        connection, _ = self.joined()
        if connection.closed(self.step):
            return True
        usual_s = statistics.median(self._own_times_s) if self._own_times_s else None
        patience_s = self.spec.rule.wait_before_joining_s(
            self.step - self.spec.first_step, connection.elapsed_s(self.step), usual_s
        )
        return patience_s > 0.0 and connection.wait_closed(self.step, patience_s)

    def take_missed(self) -> None:
        """Put the result of a step that closed without this worker into `.grad`; an update has to follow."""
        self._verify()
        _, exchange = self.joined()
        scale = self.update.loss_scale()
        self.position.go("replay")
        with self._spans("replay", step=self.step):
            exchange.receive(self.step, self._note)
            for p, slot in zip(self.layout.parameters, self.layout.slots):
                # In the parameter's own memory format, as autograd makes it: optimizers round differently over others.
                p.grad = exchange.flat.put(slot, torch.empty_like(p), scale)
        self.counts.replayed_steps += 1
        self.position.go("exchange")

    def replay(self) -> None:
        """Apply a step that closed without this worker as everybody else did."""
        update = self.update.call
        found = [p.grad for p in self.layout.parameters]
        self.take_missed()
        update()
        for p, gradient in zip(self.layout.parameters, found):
            p.grad = gradient  # as it was: whoever clears gradients after loading a batch still does

    def catch_up(self, end_step: int) -> None:
        """Replay the steps below end_step that closed without this worker."""
        while self.step < end_step and self.missed():
            self.replay()

    def await_step(self, end_step: int) -> None:
        """Replay the steps below end_step, waiting for them to close.

        Raises:
            ConfigError: one does not close, although the other models of the loop are past it.
        """
        while self.step < end_step:
            if not self.joined()[0].wait_closed(self.step, 30.0):
                raise ConfigError(
                    f"worker {self.worker}: expected every state of the loop to make as many steps, but one has made "
                    f"{self.step} where another has made {end_step}, and nobody makes the next: "
                    "models that step at different rates need deadline_s=None"
                )
            self.replay()

    def check_replayable(self) -> None:
        """Raise ConfigError if this worker may have to replay steps and does not know the update."""
        if self.may_be_late:
            _ = self.update.call

    # --- joining, agreement -----------------------------------------------------------------------------

    def joined(self) -> tuple[Connection, Exchange]:
        """Return the connection and the exchange; join the job now if that has not been done."""
        if self._connection is None or self._exchange is None:
            connection = self._connect(self.spec, self.plan, self.step, self._trace)
            self._closer = weakref.finalize(self, connection.close)  # also at interpreter exit
            connection.join(self.spec.join_timeout_s)
            self._connection = connection
            self._exchange = Exchange(
                self.layout, self.plan, connection, worker=self.worker, seed=self.spec.seed, spans=self._spans
            )
        return self._connection, self._exchange

    def report(self) -> Report:
        """Return what this worker has done and seen so far."""
        session = None if self._connection is None else self._connection.session
        return self.counts.snapshot(self.rates.overall(), session)

    def close(self) -> None:
        """Leave the job; twice does no harm."""
        self.position.go("leave")
        if self._closer is not None:
            self._closer()

    def _verify(self) -> None:
        every = self.spec.verify_every
        if every and self.step % every == 0 and self.step > self._hashed_step:
            self._hashed_step = self.step
            self._spans.mark("hash", step=self.step)
            self.joined()[0].send_hash(self.step, self.layout.parameter_digest())

    def __repr__(self) -> str:
        return f"Replica(worker {self.worker} of {self.spec.workers}, {self.position!r}, {self.layout!r})"
