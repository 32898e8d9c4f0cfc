"""The steps of a job as one replica makes them: computed with the others, or replayed when they closed without it."""

from __future__ import annotations

import dataclasses
import statistics
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from torch_qgc.aggregator.process import AggregatorProcess
from torch_qgc.ddp.settings import Settings
from torch_qgc.errors import ConfigError, QGCError
from torch_qgc.planner import Plan
from torch_qgc.worker.connection import Worker
from torch_qgc.worker.exchange import Exchange
from torch_qgc.worker.layout import Layout
from torch_qgc.worker.report import Report
from torch_qgc.worker.update import Update

__all__ = ["Steps"]


class Steps:
    """This replica's way through the job, one step after the other. It joins the job with its first step.

    Args:
        layout: where parameters and chunks lie.
        settings: what the job is.
        rank: this worker's number.
        seed: of the dither.
        endpoints: where the aggregators are.
        children: the aggregators that this process has started, and ends.
    """

    def __init__(
        self,
        layout: Layout,
        settings: Settings,
        *,
        rank: int,
        seed: int,
        endpoints: Sequence[str],
        children: list[AggregatorProcess],
    ) -> None:
        self.layout, self.settings, self.rank, self.seed = layout, settings, rank, seed
        self.step = self._first_step = self._hashed_step = 0
        self.counts = Report(workers=settings.workers, numel=layout.numel, rates=1.0 - settings.plan.straggle_probs)
        self.update = Update(layout, self.scale_second_track, self.check_exchanged)
        self._exchange: Exchange | None = None
        self._two_tracks = False
        self._endpoints, self._children = endpoints, children
        self._closer = weakref.finalize(self, _close, None, children)  # also at interpreter exit

    def start_at(self, step: int, seed: int, plan: Plan) -> None:
        """Begin with another step than 0, as a checkpoint says.

        Raises:
            ConfigError: steps have been made already.
        """
        if self._exchange is not None:
            raise ConfigError(
                "load_state_dict: expected a state that has made no step yet; load right after QGCState(...)"
            )
        self.step = self._first_step = self._hashed_step = step
        self.seed = seed
        self.settings = dataclasses.replace(self.settings, plan=plan)
        self.counts.rates = 1.0 - plan.straggle_probs

    def close(self) -> None:
        """Leave the job, and end the aggregators this process started; twice does no harm."""
        self._closer()

    # --- the second track -------------------------------------------------------------------------------

    def request_second_track(self) -> bool:
        """Ask for the second track, before the first step; tell whether the job will have one."""
        if self._exchange is not None and not self._two_tracks:
            raise ConfigError("the second track must be asked for before the first step: make CodedAdam earlier")
        plan, deadline_s = self.settings.plan, self.settings.rule.deadline_s
        # Rounded apart on the way down, tracks would give Adam a gradient over a denominator of zero here and there.
        exact = self.settings.downlink_bits == 32
        self._two_tracks = plan.second_track is not None and deadline_s is not None and exact
        return self._two_tracks

    def second_track(self, parameter: torch.Tensor) -> torch.Tensor | None:
        """Return the second track of a parameter's gradient, fp32 in its shape; None if there is one track."""
        if self._exchange is None or not self._two_tracks:
            return None
        return self._exchange.flat.view(self.layout.slot(parameter), 1)

    def scale_second_track(self, factor: torch.Tensor | float) -> None:
        """Multiply the second track."""
        if self._exchange is not None:
            for track in self._exchange.flat.tracks[1:]:
                track.mul_(factor)

    # --- computed steps ---------------------------------------------------------------------------------

    @property
    def in_step(self) -> bool:
        """A forward pass has begun a step whose backward pass has not finished it."""
        return self._exchange is not None and self._exchange.in_step

    def begin(self) -> None:
        """Announce the step in which this worker now computes, unless it has: a step may take several forward passes.

        Raises:
            ConfigError: the last backward pass has left out parameters.
        """
        exchange = self.joined()
        if exchange.half_way:
            self.check_exchanged()
        if exchange.in_step:
            return
        self._verify()
        exchange.begin(self.step)

    def take_bucket(self, bucket: Any) -> torch.futures.Future[torch.Tensor]:
        """Gather a bucket, send the chunks it completes, and return the future of its decoded gradient."""
        if not isinstance(bucket, dist.GradBucket):  # type: ignore[attr-defined]
            raise ConfigError(
                f"expected a GradBucket, got {type(bucket).__name__}: DDP compiled with the python_reducer cannot be "
                "used; set torch._dynamo.config.optimize_ddp = True"
            )
        try:
            exchange, scale = self.joined(), self.update.loss_scale()
            future, last = exchange.take(bucket, self.step, scale)
            if last:
                # Every gradient is out, so waiting here delays nothing; and unlike DDP's own wait for the futures it
                # can be interrupted, and an error surfaces as itself and not as a failed cast of a future's value.
                self._made(exchange.finish(self.step, scale))
            return future
        except Exception as error:
            if self._exchange is not None:
                self._exchange.worker.send_fault(self.step, repr(error))
            if isinstance(error, QGCError):
                raise
            raise QGCError(f"worker {self.rank}, step {self.step}: the hook failed: {error!r}") from error

    def check_exchanged(self) -> None:
        """Raise ConfigError, here and on all ranks, if a step has begun whose gradient was not exchanged."""
        if not self.in_step:
            return
        missing, worker = self.joined().without_gradient(), self.joined().worker
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
        worker.send_fault(self.step, problem)
        raise ConfigError(f"worker {self.rank}, step {self.step}: {problem}")

    def _made(self, contributions: NDArray[np.float64]) -> None:
        waited = self.settings.rule.waits_for_all(self.step - self._first_step)
        self.counts.note(contributions, waited_for_all=waited)
        self.step += 1

    # --- steps that closed without us -------------------------------------------------------------------

    def missed(self) -> bool:
        """Tell whether the next step closes without this worker: then it is replayed, else computed.

        A worker whose late payloads would be dropped joins a step that is under way only if it can still make it.
        """
        exchange, rule = self.joined(), self.settings.rule
        if exchange.worker.closed(self.step):
            return True
        usual_s = statistics.median(exchange.own_times_s) if exchange.own_times_s else None
        elapsed_s = exchange.worker.elapsed_s(self.step)
        patience_s = rule.wait_before_joining_s(self.step - self._first_step, elapsed_s, usual_s)
        return patience_s > 0.0 and exchange.worker.wait_closed(self.step, patience_s)

    def take_missed(self) -> None:
        """Put the result of a step that closed without this worker into `.grad`; an update has to follow."""
        self._verify()
        exchange, scale = self.joined(), self.update.loss_scale()
        self._made(exchange.receive(self.step))
        for p, slot in zip(self.layout.parameters, self.layout.slots):
            # In the parameter's own memory format, as autograd makes it: optimizers round differently over others.
            p.grad = exchange.flat.put(slot, torch.empty_like(p), scale)
        self.counts.replayed_steps += 1

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
            if not self.joined().worker.wait_closed(self.step, self.settings.limits.silence_s):
                raise ConfigError(
                    f"worker {self.rank}: expected every state of the loop to make as many steps, but one has made "
                    f"{self.step} where another has made {end_step}, and nobody makes the next: "
                    "models that step at different rates need deadline_s=None"
                )
            self.replay()

    # --- joining, agreement -----------------------------------------------------------------------------

    def joined(self) -> Exchange:
        """Return the exchange with the aggregators, which this worker joins now if it has not."""
        if self._exchange is None:
            limits, tracks = self.settings.limits, 2 if self._two_tracks else 1
            worker = Worker(
                self._endpoints,
                self.settings.job_spec(
                    self.layout,
                    first_step=self.step,
                    seed=self.seed,
                    tracks=tracks,
                    aggregators=len(self._endpoints),
                ),
                self.rank,
                self.settings.plan.to_json(),
                first_step=self.step,
                inbox_bytes=limits.inbox_bytes,
                silence_s=limits.silence_s,
            )
            self._closer.detach()
            self._closer = weakref.finalize(self, _close, worker, self._children)
            worker.join(limits.join_timeout_s)
            self._exchange = Exchange(
                self.layout,
                self.settings.plan,
                worker,
                rank=self.rank,
                tracks=tracks,
                seed=self.seed,
                counts=self.counts,
            )
        return self._exchange

    def report(self) -> Report:
        """Return what this worker has done and seen so far."""
        if self._exchange is not None:
            worker = self._exchange.worker
            self.counts.bytes_sent, self.counts.bytes_received = worker.bytes_sent, worker.bytes_received
            self.counts.rejections = tuple(worker.rejections)
        return self.counts.snapshot()

    def _verify(self) -> None:
        every = self.settings.verify_every
        if every and self.step % every == 0 and self.step > self._hashed_step:
            self._hashed_step = self.step
            self.joined().worker.send_hash(self.step, self.layout.parameter_digest())


def _close(worker: Worker | None, children: list[AggregatorProcess]) -> None:
    if worker is not None:
        worker.close()
    for child in children:
        child.stop(timeout_s=30.0 if worker is not None else 0.0)
