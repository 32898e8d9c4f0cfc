"""A replica's way through the job, one step after the other: full, thin, or replayed.

A full step is computed with the others. A thin step has closed without this worker: its loop body runs on a few
samples, nothing is sent, and the hook puts the logged result into DDP's buckets, so that every line of the loop runs
equally often on every rank. Replayed is a step that has closed without this worker where the user has bound the update:
the loop body is not run for it.
"""

from __future__ import annotations

import sys
import time
import weakref
from collections.abc import Callable
from typing import Any

import msgspec
import torch

from torch_qgc.errors import ConfigError, QGCError
from torch_qgc.job.courses import Courses
from torch_qgc.job.events import Trace, silent
from torch_qgc.job.pace import Pace
from torch_qgc.job.rates import ArrivalRates
from torch_qgc.logs import logger
from torch_qgc.planner import Plan
from torch_qgc.planner.checks import Ints
from torch_qgc.protocol.contract import JobSpec
from torch_qgc.worker.advice import Advice
from torch_qgc.worker.buffers import KeptBuffers
from torch_qgc.worker.connection import Connection
from torch_qgc.worker.exchange import Exchange
from torch_qgc.worker.facts import Facts
from torch_qgc.worker.inbox import ClosedRound
from torch_qgc.worker.layout import Layout
from torch_qgc.worker.passes import Passes
from torch_qgc.worker.position import Phase, Position
from torch_qgc.worker.report import Report
from torch_qgc.worker.spans import Spans
from torch_qgc.worker.statement import Statement
from torch_qgc.worker.update import Update

__all__ = ["Connect", "Replica"]

#: Makes the connection when the first step is made: (the job, its plans, the first step, the trace) -> connection.
Connect = Callable[[JobSpec, Courses, int, Trace], Connection]


class Replica:
    """One worker's copy of the model, and where it is in the job. It joins the job with its first step.

    Args:
        module: the model that DDP wraps.
        layout: where its parameters and chunks lie.
        plan, spec: the job.
        worker: this worker's number.
        connect: makes the connection to the job.
        sequence_number: of the process group's newest collective; None if it has none.
        trace: is told what happens.
        now: seconds; measures how long this worker's steps take.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        layout: Layout,
        plan: Plan,
        spec: JobSpec,
        *,
        worker: int,
        connect: Connect,
        sequence_number: Callable[[], int | None] = lambda: None,
        trace: Trace = silent,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.layout, self.spec, self.worker = layout, spec, worker
        self.courses = Courses(spec.rule, plan, spec.first_step)
        self.position = Position(spec.first_step)
        self.counts = Report(workers=spec.workers, numel=layout.numel)
        self.rates = ArrivalRates(1.0 - plan.straggle_probs, len(layout.chunks))
        self.statement = Statement(layout, spec.first_step)
        self.facts = Facts(self.statement, self.courses)
        self.update = Update(layout, self.check_exchanged)
        self.loops = 0  # over loaders, in which steps were made
        # Of the job of the checkpoint that was loaded, until this worker goes on there.
        self._gatherings: int | None = None
        self._goes_on = False  # a loop or a step has begun
        self._came_back = False  # to a job that began at an earlier step
        self._buffers = KeptBuffers(module)
        self._advice = Advice(spec, self.courses, worker, sequence_number)
        self._spans = Spans(worker, trace, now)
        self._connect, self._trace, self._now = connect, trace, now
        self._connection: Connection | None = None
        self._line: Connection | None = None  # the same, also before this worker is in
        self._exchange: Exchange | None = None
        self._begun_at_s = 0.0
        self._pace = Pace()  # of full steps
        self._has_thin_batch = False  # the batch at hand is for a step that has closed without this worker
        self._decided_step = -1  # the step for which that was decided
        self._passes = Passes(layout.parameters)
        self.abandoned_steps = 0  # that a forward pass had begun, and another one begins again
        self._closer: weakref.finalize[..., Any] | None = None

    @property
    def step(self) -> int:
        """The step that is made next, or is being made."""
        return self.position.step

    @property
    def plan(self) -> Plan:
        """The plan of that step."""
        return self.courses.at(self.step).plan

    @property
    def in_step(self) -> bool:
        """A forward pass has begun a step whose gradient has not been exchanged."""
        return self.position.in_step

    @property
    def may_be_late(self) -> bool:
        """Steps may close without workers that are alive."""
        return self.spec.rule.may_be_late

    @property
    def failure(self) -> QGCError | None:
        """Why the job has ended on every rank, as far as this one has heard; None while it goes on."""
        return None if self._connection is None else self._connection.session.error

    def start_at(self, step: int, seed: int, plan: Plan, *, loops: int = 0, gatherings: int = 0) -> None:
        """Begin with another step than 0, as a checkpoint says.

        Args:
            loops: that are over.
            gatherings: that were made in the job of the checkpoint. They count only if this worker comes back to it.
        Raises:
            ConfigError: steps have been made already.
        """
        if self._connection is not None:
            raise ConfigError(
                "load_state_dict: expected a state that has made no step and no collective yet; load right after "
                "QGCState(...)"
            )
        self.spec = msgspec.structs.replace(self.spec, first_step=step, seed=seed, plan_digest=plan.digest())
        self.spec.validate(plan)
        self.courses = Courses(self.spec.rule, plan, step)
        self._advice.courses = self.facts.courses = self.courses
        self.statement.stated_step += step - self.step
        self.position, self._advice.first_step = Position(step), step
        self.rates = ArrivalRates(1.0 - plan.straggle_probs, len(self.layout.chunks))
        self.loops, self._gatherings = loops, gatherings

    # --- before a step ------------------------------------------------------------------------------------

    @property
    def batch_step(self) -> int:
        """The step for which a batch is asked for now.

        It is the next step, or the one after it if the batch is fetched between this one's forward and backward pass.
        """
        return self.step + self.awaits_backward

    def batch_sizes(self, batch_size: int, step: int, least: int = 1) -> Ints:
        """Return how many samples each worker's batches have in a step, [K] int64, at least one.

        Args:
            batch_size: the mean over all workers, as the user has chosen it.
            step: the step that they are for.
            least: samples that every worker's batches have; no more than `batch_size`.
        """
        return self.facts.batch_sizes(batch_size, step, least)

    def missed(self) -> bool:
        """Tell whether the step that a batch is asked for closes without this worker.

        The answer stays the same until that step has been made.

        A worker whose late payloads would be dropped joins a step that is under way only if it can still make it.
        """
        step = self.batch_step
        self._passes.batch()
        if self._decided_step != step:
            self._has_thin_batch = self._closes_without_us(step)
            self._decided_step = step
        return self._has_thin_batch

    def decide_again(self) -> None:
        """Forget the answer: a batch was handed out, and no step was made with it."""
        if not self.in_step:
            self._decided_step, self._has_thin_batch = -1, False

    @property
    def in_training_thread(self) -> bool:
        """Whoever asks is the thread that makes the steps, none that fetches batches ahead."""
        return self._passes.in_training_thread

    @property
    def awaits_backward(self) -> bool:
        """A forward pass has begun a step, and the backward pass that exchanges its gradient has not begun."""
        return self.position.phase in (Phase.BEGUN, Phase.THIN) and self._passes.awaits_backward

    def _closes_without_us(self, step: int) -> bool:
        if not self.may_be_late:  # only one that was lost, or has come back, lacks results that are there
            return self._connection is not None and self._connection.closed(step)
        connection, _ = self.joined()
        if connection.closed(step):
            return True
        patience_s = self.courses.wait_before_joining_s(step, connection.elapsed_s(step), self._pace.usual_s)
        return patience_s > 0.0 and connection.wait_closed(step, patience_s)

    # --- full and thin steps ------------------------------------------------------------------------------

    def begin(self, *, synced: bool = True) -> None:
        """Begin the step, unless that was done: a step may take several forward passes.

        If a batch was asked for since the last forward pass, and no backward pass has followed that, its step was
        abandoned, and is begun again: a loss that was NaN, an error that was caught.

        Args:
            synced: the backward pass will exchange gradients; False under no_sync().
        Raises:
            ConfigError: the last backward pass has left out parameters, or has failed half-way.
        """
        self._check_backward()
        if self.awaits_backward and self._passes.given_up:
            self.abandon()
            self.abandoned_steps += 1
        self._passes.forward(synced=synced)
        if self.in_step:
            return
        connection, exchange = self._enter_step()
        # With a thin batch for the step before (two steps per batch, say) an open step is computed on what there is.
        thin = self._has_thin_batch and connection.closed(self.step)
        self.position.go("begin thin" if thin else "begin")
        if thin:
            self._buffers.keep()
        exchange.begin(thin=thin)
        self._begun_at_s = self._now()
        self._spans.mark("begin", step=self.step, thin=thin)
        connection.begin(self.step, thin=thin, **self.facts.at(self._begun_at_s))

    def _enter_step(self) -> tuple[Connection, Exchange]:
        """Do what comes before each step, and return what `joined` does."""
        self._goes_on = True
        connection, exchange = self.joined()
        self._advice.before_forward(self.step)
        self._state_if_due()
        return connection, exchange

    def backward_begins(self) -> None:
        """A backward pass through DDP's outputs begins. Called by autograd."""
        if not self.in_step or self._passes.running:
            return
        self._advice.before_backward()
        self.joined()[1].backward_begins()
        self._passes.backward()

    def exchange(self, bucket: Any) -> torch.futures.Future[torch.Tensor]:
        """Take one of DDP's buckets; with the last one wait for the step's result, which is then in all of them."""
        try:
            connection, exchange = self.joined()
            if not self.in_step:
                self.begin()  # a backward pass whose forward ran in eval mode
            thin = self.position.phase is Phase.THIN
            scale = self.update.loss_scale()
            closed_without_us = connection.closed(self.step)
            future = exchange.take(bucket, self.step, scale)
            if exchange.gathered:
                self.position.go("gather")
                if exchange.not_finite:
                    self._advice.not_finite(self.step)
                if not thin:
                    self._pace.note(self._now() - self._begun_at_s)
                    self.counts.late_steps += closed_without_us
                # Every gradient is out, so waiting here delays nothing; and unlike DDP's own wait for the futures it
                # can be interrupted, and an error surfaces as itself and not as a failed cast of a future's value.
                waiting_since_s = self._now()
                exchange.finish(self.step, scale, self._note)
                self.counts.wait_s += self._now() - waiting_since_s
                if thin:
                    self.counts.thin_steps += 1
                    self._buffers.restore()
                    self._advice.thin_step(connection.session.inbox.newest - self.step)
                else:
                    self.counts.computed_steps += 1
                self._made()
            return future
        except Exception as error:
            self.tell_all(repr(error))
            if isinstance(error, QGCError):
                raise
            raise QGCError(f"worker {self.worker}, step {self.step}: the hook failed: {error!r}") from error

    def _made(self) -> None:
        """A step's result is in .grad."""
        self.position.go("exchange")
        self.facts.made(self._now())
        self._advice.step_made(self.counts, self._pace.usual_s)
        self._advice.after_backward()

    def abandon(self) -> None:
        """Give up the step that a forward pass has begun: this worker counts as late for it.

        The step's result is taken in the loop body that comes next, so this worker's loop needs one more to make as
        many steps as the others; `state.loader` sees to that.

        Raises:
            ConfigError: its backward pass has begun, and DDP is in the middle of its reduction.
        """
        self._check_backward()
        if self.in_step:
            self._spans.mark("abandon", step=self.step)
            self._buffers.restore()
            self.position.go("abandon")
        self.decide_again()

    def check_exchanged(self) -> None:
        """Raise ConfigError, here and on all ranks, if a step has begun whose gradient was not exchanged."""
        self._check_backward()
        if not self.in_step:
            return
        self._refuse(
            "a forward pass has begun the step, but its gradient was not exchanged before the update. Was the hook "
            "registered (model.register_comm_hook(state, qgc.qgc_hook))? Forward passes that are not trained on "
            "belong under torch.no_grad()"
        )

    def check_stepped(self, optimizer: torch.optim.Optimizer, *, exchanged: bool = True) -> None:
        """Check and remember an optimizer that is about to make a step with this replica's parameters.

        Args:
            exchanged: the step's gradient must have been exchanged by now.
        """
        if type(optimizer).__name__ == "ZeroRedundancyOptimizer" and self.may_be_late:
            self._refuse(
                "ZeroRedundancyOptimizer broadcasts parameters in each step, so that every rank waits for the slowest: "
                "use the optimizer that it wraps, or deadline_s=None"
            )
        if isinstance(optimizer, torch.optim.LBFGS) and self.may_be_late:
            self._refuse(
                "LBFGS makes as many passes per step as its rank's own losses ask for, so ranks would disagree about "
                "steps: use SGD, Adam or another optimizer that makes one, or deadline_s=None"
            )
        self.statement.watch(optimizer)
        if exchanged:
            self.check_exchanged()

    def _check_backward(self) -> None:
        if self._passes.running:
            self._refuse(
                "the last backward pass has raised an error half-way, and DDP cannot begin another one after that: let "
                "the error end the job, or catch what can fail (memory) in the forward pass"
            )
        if self._passes.left_out and self.in_step:
            missing = self.joined()[1].without_gradient()
            if not missing:
                self._refuse(
                    "a backward pass has ended, but its gradient was not exchanged. Was the hook registered "
                    "(model.register_comm_hook(state, qgc.qgc_hook))? Else a parameter is not in the loss"
                )
            self._refuse(
                f"expected a gradient of every parameter, got none of {', '.join(missing[:8])}"
                f"{' ...' if len(missing) > 8 else ''}: freeze it (requires_grad_(False)) before DDP(model), or let "
                "the loss depend on it in every step"
            )

    def _refuse(self, problem: str) -> None:
        self._passes.clear()
        self.tell_all(problem)
        raise ConfigError(f"worker {self.worker}, step {self.step}: {problem}")

    def tell_all(self, problem: str) -> None:
        """Make the job end on every rank, because of an error here; returns when all have heard of it, or soon."""
        if self.position.phase is Phase.LEFT:
            return
        line = self._dial()  # it may be an error from before the first step
        if line.session.error is None:
            self._spans.mark("fault", step=self.step, text=problem)
            line.send_fault(self.step, problem)
        else:
            logger.warning("worker %d: the job had ended before that: %s", self.worker, line.session.error)

    def second_scale(self, parameter: torch.Tensor) -> float | torch.Tensor:
        """Return what a parameter's gradient of the last step is to be multiplied with before Adam squares it."""
        if self._exchange is None or self.plan.second_track is None:
            return 1.0
        return self._exchange.flat.second_scale(self.layout.slot(parameter))

    def _note(self, result: ClosedRound) -> None:
        """Enter a result: into the counts, and into the same estimate of rates that the aggregators have."""
        self.counts.note(result.counts, chunks=len(self.layout.chunks))
        if self.courses.changes_at(result.step):
            self.rates.expect(result.chunk, *self.courses.rates_at(result.step))
        if not self.courses.waits_for_all(result.step):
            self.rates.update(result.chunk, result.counts, result.alive)

    # --- replayed steps -----------------------------------------------------------------------------------

    def take_missed(self) -> None:
        """Put the result of a step that closed without this worker into `.grad`; an update has to follow."""
        connection, exchange = self._enter_step()
        scale = self.update.loss_scale()
        self.position.go("replay")
        connection.begin(self.step, thin=True, **self.facts.at(self._now()))
        with self._spans("replay", step=self.step):
            exchange.receive(self.step, self._note)
            for p, slot in zip(self.layout.parameters, self.layout.slots):
                # In the parameter's own memory format, as autograd makes it: optimizers round differently over others.
                p.grad = exchange.flat.put(slot, torch.empty_like(p), scale)
        self.counts.replayed_steps += 1
        self._made()

    def replay(self) -> None:
        """Apply a step that closed without this worker by the bound update, as everybody else did."""
        update = self.update.call
        found = [p.grad for p in self.layout.parameters]
        self.take_missed()
        update()
        for p, gradient in zip(self.layout.parameters, found):
            p.grad = gradient  # as it was: whoever clears gradients after loading a batch still does

    # --- agreement ----------------------------------------------------------------------------------------

    def _state_if_due(self) -> None:
        """State what this replica is, before a step in front of which all do."""
        asked = self._connection is not None and self._connection.verify_asked(self.step)
        if self.statement.is_due(self.step, self.spec, asked=asked):
            self.state_now()

    def state_now(self) -> None:
        """State what this replica is, for all to be compared."""
        if self._connection is not None and self.spec.verify_every and self.step > self.statement.stated_step:
            self._spans.mark("hash", step=self.step)
            self._connection.send_hash(self.step, self.statement.parts(self.step))

    def loop_ended(self, *, owed: int) -> int:
        """Note that this worker has come to the end of a loop in which it made steps, and return the loop's number.

        Args:
            owed: batches that made no step, as far as this worker knows on it alone.
        """
        loop = self.loops
        if self._connection is not None:
            if not owed:
                self.state_now()
            self._connection.mark(loop, self.step, owed)
            self.loops += 1
        return loop

    def owes_step(self, loop: int) -> bool:
        """Wait until it is known whether others make the next step in a loop that has ended here; tell whether."""
        connection = self._connection
        return connection is not None and connection.loop_makes(loop, self.step, self.spec.join_timeout_s)

    def loop_ended_elsewhere(self) -> bool:
        """Tell whether others have left their loop before the next step, while this worker replayed steps.

        What ends a loop (`if state.step == n: break`) may stand in a loop body that has not run here. Waits until
        somebody has left the loop or begun the step, for a deadline at most.
        """
        connection, deadline_s = self._connection, self.courses.deadline_s(self.step)
        if connection is None or deadline_s is None:
            return False
        return connection.loop_ended_before(self.loops, self.step, deadline_s)

    # --- joining, leaving ---------------------------------------------------------------------------------

    def joined(self) -> tuple[Connection, Exchange]:
        """Return the connection and the exchange; join the job now if that has not been done."""
        if self._connection is None or self._exchange is None:
            connection = self._dial()
            connection.join(self.spec.join_timeout_s)
            self._connection = connection
            self._came_back = connection.spec.first_step != self.spec.first_step
            self.spec = connection.spec
            self._exchange = Exchange(
                self.layout, self.courses, connection, worker=self.worker, seed=self.spec.seed, spans=self._spans
            )
        if self._goes_on and self._gatherings is not None:
            # What it has called before that, all others have called before their first step, too: it got what they got.
            if self._came_back:
                self._connection.session.gathering.number = self._gatherings
            self._gatherings = None
        return self._connection, self._exchange

    def loop_begins(self) -> None:
        """Note that the loop over a loader begins: the first one goes on where the checkpoint was taken."""
        self._goes_on = True

    def _dial(self) -> Connection:
        if self._line is None:
            self._line = self._connect(self.spec, self.courses, self.step, self._trace)
            self._closer = weakref.finalize(self, self._line.close)  # if nobody closes it
        return self._line

    @property
    def gatherings(self) -> int:
        """Calls that all workers make together, so far in this job."""
        if self._gatherings is not None:
            return self._gatherings
        return 0 if self._connection is None else self._connection.session.gathering.number

    def made_collective(self) -> None:
        """Note that this worker meets the others outside of a step."""
        self._advice.own_collectives += 1

    def report(self) -> Report:
        """Return what this worker has done and seen so far."""
        session = None if self._connection is None else self._connection.session
        return self.counts.snapshot(self.rates.overall(), session)

    def close(self) -> None:
        """Leave the job: compare replicas a last time, then say goodbye; twice does no harm.

        Compared is what they were at the end of the last loop, if no step was made since: what is done to the model
        after that (the best checkpoint, an average, on rank 0 alone) is the user's own business.

        Raises:
            JobFailed: they differ, or another rank goes on with steps that this one does not make.
        """
        if self.position.phase is Phase.LEFT:
            return
        connection = self._connection
        try:
            # Not where an error is on its way already, not in the middle of a step, and not before the first one.
            between = self.step > self.spec.first_step and not self.in_step
            if connection is not None and between and sys.exc_info()[0] is None and self.spec.verify_every:
                self.state_now()
                connection.say_goodbye(self.step, self.spec.join_timeout_s)
        finally:
            self.position.go("leave")
            if self._closer is not None:
                self._closer()

    def __repr__(self) -> str:
        return f"Replica(worker {self.worker} of {self.spec.workers}, {self.position!r}, {self.layout!r})"
