"""QGCState and qgc_hook: what DDP calls instead of its all-reduce."""

# No `from __future__ import annotations` here: DDP inspects the hook's annotations and refuses strings.
import statistics
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist

from torch_qgc.data import CodedLoader, make_loader
from torch_qgc.errors import ConfigError, QGCError
from torch_qgc.gradients import FlatGradient
from torch_qgc.kernels import derive_key
from torch_qgc.layout import Layout, Slot
from torch_qgc.planner import Plan
from torch_qgc.rendezvous import Network, check_model, start_aggregators
from torch_qgc.report import Report
from torch_qgc.rounds import ClosingRule
from torch_qgc.serve import AggregatorProcess
from torch_qgc.settings import Limits, Settings, choose_plan
from torch_qgc.worker import Worker

__all__ = ["QGCState", "qgc_hook"]


class QGCState:
    """The state of `qgc_hook`: one worker's part in a quantized gradient coding job.

    Made on every rank at once (it communicates), after DDP:

        state = QGCState(ddp_model, bits_per_coordinate=4, deadline_s=0.5)
        ddp_model.register_comm_hook(state, qgc_hook)

    Args:
        model: a DistributedDataParallel model; its ranks are the workers.
        plan: who answers for which data, with how many bits; made from the next two if None.
        straggle_probs: [K] how often each worker will be late, as a prior: the running job measures it. None: 0.05.
        bits_per_coordinate: average over workers, 2..16, or 32 for no quantization.
        deadline_s: seconds after a step's first BEGIN at which it closes; None waits for all, as DDP does.
        late: "fold" lets late payloads enter the open round, "drop" discards them as in Song & Choi.
        warmup_steps: that many first steps wait for all; at least 2, since DDP rebuilds its buckets there.
        quorum: a step is never closed on fewer arrivals; None: half of the workers.
        downlink_bits: 32 sends results as fp32; 2..16 encodes them as well (unbiased), 8 being nearly free of noise.
        aggregators: how many share the chunks; more balance the traffic (aggregator i runs on rank i mod K).
        seed: of the codec's random numbers.
        verify_every: steps between comparisons of all replicas' parameters; 0 never compares.
        limits, network: bounds, and how the aggregators are reached.
        process_group: the workers; DDP's own if None.
    Raises:
        ConfigError: something that cannot work, with the remedy.
    """

    def __init__(
        self,
        model: torch.nn.parallel.DistributedDataParallel,
        *,
        plan: Plan | None = None,
        straggle_probs: Sequence[float] | None = None,
        bits_per_coordinate: float = 4,
        deadline_s: float | None = None,
        late: Literal["fold", "drop"] = "fold",
        warmup_steps: int = 3,
        quorum: int | None = None,
        downlink_bits: int = 32,
        aggregators: int = 1,
        seed: int = 0,
        verify_every: int = 50,
        limits: Limits = Limits(),
        network: Network = Network(),
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.model = check_model(model)
        self.process_group = process_group if process_group is not None else model.process_group
        self.rank, self.workers = dist.get_rank(self.process_group), dist.get_world_size(self.process_group)
        self.plan = choose_plan(plan, self.workers, straggle_probs, bits_per_coordinate)
        self.rule = ClosingRule(
            deadline_s=deadline_s,
            late=late,
            warmup_steps=warmup_steps,
            quorum=quorum if quorum is not None else max(1, self.workers // 2),
            max_staleness=limits.max_staleness,
        )
        self._settings = Settings(
            workers=self.workers,
            plan=self.plan,
            rule=self.rule,
            downlink_bits=downlink_bits,
            aggregators=aggregators,
            verify_every=verify_every,
            limits=limits,
        )
        self.layout = Layout(self.model.module.named_parameters(), chunk_numel=limits.chunk_numel)
        self.step = self._first_step = 0
        self._counts = Report(workers=self.workers, numel=self.layout.numel)
        self._seed = seed
        self._second_track = False
        self._update: Callable[[], Any] | None = None
        self._begun_at: float | None = None
        self._hashed_step = 0
        self._own_times_s: deque[float] = deque(maxlen=16)  # BEGIN to last push, of the newest computed steps
        self._pending: list[
            tuple[torch.futures.Future[torch.Tensor], torch.Tensor, list[tuple[Slot, torch.Tensor]]]
        ] = []
        self._worker: Worker | None = None
        self._flat: FlatGradient | None = None
        self._endpoints, self._children = start_aggregators(self.process_group, aggregators, network)
        self._prehook = self.model.register_forward_pre_hook(_begin_step(weakref.ref(self)))
        self._closer = weakref.finalize(self, _close, (self._worker, self._children))  # also at interpreter exit

    # --- the user's side --------------------------------------------------------------------------------

    def loader(self, dataset: Any, batch_size: int = 1, **kwargs: Any) -> CodedLoader:
        """Make the loader that replaces DataLoader and DistributedSampler; see `torch_qgc.data.make_loader`."""
        return make_loader(self, dataset, batch_size=batch_size, **kwargs)

    @property
    def update(self) -> Callable[[], Any]:
        """The user's way from gradients to new parameters, a call without arguments; the same on every rank.

        Raises:
            ConfigError: none was set.
        """
        if self._update is None:
            raise ConfigError(
                "a late worker replays steps, and must know how gradients become parameters: CodedSGD or CodedAdam, or "
                "state.bind(optimizer, scheduler=..., max_grad_norm=...), or state.update = a function of no arguments"
            )
        return self._update

    @update.setter
    def update(self, call: Callable[[], Any]) -> None:
        self._update = call

    @property
    def has_update(self) -> bool:
        """An update is bound."""
        return self._update is not None

    def bind(
        self, optimizer: torch.optim.Optimizer, *, scheduler: Any = None, max_grad_norm: float | None = None
    ) -> None:
        """Make `state.update` clip, step the optimizer, step the scheduler and clear the gradients, in this order."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]

        def update() -> None:
            if max_grad_norm is not None:
                norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
                self._scale_second_track(torch.clamp(max_grad_norm / (norm + 1e-6), max=1.0))  # as torch scales
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            optimizer.zero_grad()

        self._update = update

    def request_second_track(self) -> bool:
        """Ask for the second track (before the first step); tell whether the job will have one.

        It needs a plan with `second_track`, and a deadline: where all arrive both tracks are the same.
        """
        if self._worker is not None and not self._second_track:
            raise ConfigError("the second track must be asked for before the first step: make CodedAdam earlier")
        self._second_track = self.plan.second_track is not None and self.rule.deadline_s is not None
        return self._second_track

    def second_track(self, parameter: torch.Tensor) -> torch.Tensor | None:
        """Return the second track of a parameter's gradient, fp32 in its shape; None if the job has one track."""
        if self._flat is None or len(self._flat.tracks) < 2:
            return None
        return self._flat.view(self.layout.slot(parameter), 1)

    def _scale_second_track(self, factor: torch.Tensor) -> None:
        if self._flat is not None:
            for track in self._flat.tracks[1:]:
                track.mul_(factor)

    @torch.no_grad()
    def sync_buffers(self) -> None:
        """Average floating-point buffers (BatchNorm's statistics) over all ranks; others are rank 0's. Collective."""
        for buffer in self.model.module.buffers():
            if buffer.is_floating_point():
                dist.all_reduce(buffer, group=self.process_group)
                buffer.div_(self.workers)
            else:
                dist.broadcast(buffer, dist.get_global_rank(self.process_group, 0), group=self.process_group)

    def report(self) -> Report:
        """Return what this worker has done and seen so far."""
        if self._worker is not None:
            self._counts.bytes_sent = self._worker.bytes_sent
            self._counts.bytes_received = self._worker.bytes_received
            self._counts.rejections = tuple(self._worker.rejections)
        return self._counts.snapshot()

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must hold to go on: the step and the plan."""
        return {"step": self.step, "plan": self.plan.to_json(), "seed": self._seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint; before the first step, on every rank.

        Raises:
            ConfigError: steps have been made already.
        """
        if self._worker is not None:
            raise ConfigError(
                "load_state_dict: expected a state that has made no step yet; load right after QGCState(...)"
            )
        self.step = self._first_step = self._hashed_step = int(state_dict["step"])
        self._seed = int(state_dict["seed"])

    def close(self) -> None:
        """Leave the job, and end the aggregators this rank started. Called at exit, too; twice does no harm."""
        self._prehook.remove()
        self._closer()

    # --- one step ---------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Announce the step in which this worker now computes. Called by DDP's forward pass."""
        if self._begun_at is not None:
            return
        worker = self._joined()
        self._verify()
        self._begun_at = time.monotonic()
        worker.begin(self.step)

    def take_bucket(self, bucket: Any) -> torch.futures.Future[torch.Tensor]:
        """Gather a bucket, send the chunks it completes, and return the future of its decoded gradient."""
        if not isinstance(bucket, dist.GradBucket):  # type: ignore[attr-defined]
            raise ConfigError(
                f"expected a GradBucket, got {type(bucket).__name__}: DDP compiled with the python_reducer cannot be "
                "used; set torch._dynamo.config.optimize_ddp = True"
            )
        try:
            return self._take_bucket(bucket)
        except Exception as error:
            if self._worker is not None:
                self._worker.send_fault(self.step, repr(error))
            if isinstance(error, QGCError):
                raise
            raise QGCError(f"worker {self.rank}, step {self.step}: the hook failed: {error!r}") from error

    def _take_bucket(self, bucket: Any) -> torch.futures.Future[torch.Tensor]:
        self.begin()  # a backward pass whose forward ran in eval mode
        worker, flat = self._joined(), self._flat
        assert flat is not None
        buffer = bucket.buffer()
        if buffer.is_sparse:
            raise ConfigError("expected dense gradients, got a sparse one: use Embedding(..., sparse=False)")
        slots = [self.layout.slot(p) for p in bucket.parameters()]
        places = [(slot, slot.as_in_bucket(g)) for slot, g in zip(slots, bucket.gradients())]
        bits = int(self.plan.bits[self.rank])
        key = derive_key(self._seed, self.step, self.rank)
        closed_without_us = worker.closed(self.step)
        for slot, gradient in places:
            for chunk in flat.gather(slot, gradient):
                payload = flat.encode(chunk, bits, key=key, norm=self.plan.norm)
                worker.push(self.step, chunk.index, bits, payload)
        devices = [buffer.device] if buffer.device.type == "cuda" else []
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future(devices=devices)
        self._pending.append((future, buffer, places))
        if flat.gathered:
            assert self._begun_at is not None
            self._own_times_s.append(time.monotonic() - self._begun_at)
            self._counts.late_steps += closed_without_us
            # Every gradient is out, so waiting here delays nothing; and unlike DDP's own wait for the futures it can
            # be interrupted, and an error surfaces as itself and not as a failed cast of a future's value.
            self._finish()
        return future

    def _finish(self) -> None:
        """Wait for the step's results, and hand them to DDP."""
        assert self._flat is not None
        waiting_since = time.monotonic()
        self._receive()
        self._counts.wait_s += time.monotonic() - waiting_since
        for future, buffer, places in self._pending:
            for slot, gradient in places:
                gradient.copy_(self._flat.view(slot))
            future.set_result(buffer)
        self._pending.clear()
        self._flat.reset()
        self._begun_at = None
        self._counts.computed_steps += 1

    def _receive(self) -> None:
        """Take the results of `self.step` into the tracks; then this step is done."""
        assert self._flat is not None
        counts = np.zeros(self.workers)
        for result in self._joined().results(self.step):
            self._flat.decode(result)
            counts += result.contributions
        self._counts.contribution_sums += counts / len(self.layout.chunks)
        self._counts.steps += 1
        self.step += 1

    # --- steps that closed without us -------------------------------------------------------------------

    @property
    def in_step(self) -> bool:
        """A forward pass has begun a step whose backward pass has not finished it."""
        return self._begun_at is not None

    def check_replayable(self) -> None:
        """Raise ConfigError if this worker may have to replay steps and does not know the update."""
        if self.rule.deadline_s is not None:
            _ = self.update

    def catch_up(self, end_step: int) -> None:
        """Replay the steps below end_step that closed without this worker. Called by CodedLoader between steps.

        A worker whose late payloads would be dropped joins a step that is under way only if it can still make it.
        """
        worker = self._joined()
        while self.step < end_step:
            if not worker.closed(self.step):
                usual_s = statistics.median(self._own_times_s) if self._own_times_s else None
                elapsed_s = worker.elapsed_s(self.step)
                patience_s = self.rule.wait_before_joining_s(self.step - self._first_step, elapsed_s, usual_s)
                if patience_s == 0.0 or not worker.wait_closed(self.step, patience_s):
                    return
            self._replay()

    def _replay(self) -> None:
        """Apply a closed step as everybody else did: its results into .grad, then the user's update."""
        self._verify()
        update = self.update
        self._receive()
        assert self._flat is not None
        found = [p.grad for p in self.layout.parameters]
        for p, slot in zip(self.layout.parameters, self.layout.slots):
            # In the parameter's own memory format, as autograd makes it: optimizers round differently over others.
            p.grad = torch.empty_like(p).copy_(self._flat.view(slot))
        update()
        for p, gradient in zip(self.layout.parameters, found):
            p.grad = gradient  # as it was: whoever clears gradients after loading a batch still does
        self._counts.replayed_steps += 1

    # --- joining, agreement, leaving --------------------------------------------------------------------

    def _joined(self) -> Worker:
        if self._worker is None:
            limits, tracks = self._settings.limits, 2 if self._second_track else 1
            spec = self._settings.job_spec(
                self.layout, first_step=self.step, seed=self._seed, tracks=tracks, aggregators=len(self._endpoints)
            )
            self._flat = FlatGradient(self.layout, tracks=tracks)
            self._worker = Worker(
                self._endpoints,
                spec,
                self.rank,
                self.plan.to_json(),
                first_step=self.step,
                inbox_bytes=limits.inbox_bytes,
                silence_s=limits.silence_s,
            )
            self._closer.detach()
            self._closer = weakref.finalize(self, _close, (self._worker, self._children))
            self._worker.join(limits.join_timeout_s)
        return self._worker

    def _verify(self) -> None:
        every = self._settings.verify_every
        if every and self.step % every == 0 and self.step > self._hashed_step:
            self._hashed_step = self.step
            self._joined().send_hash(self.step, self.layout.parameter_digest())


def qgc_hook(state: QGCState, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:  # type: ignore[name-defined]
    """Replace DDP's all-reduce by quantized gradient coding: `ddp_model.register_comm_hook(state, qgc_hook)`.

    1. Copy the bucket's gradients to their places in the flat gradient.
    2. Encode every chunk that is complete now, with this worker's bits, and send it.
    3. After the last bucket wait for the closed rounds; they hold the unbiased decoded mean gradient.
    4. Copy it into the buckets and complete their futures.
    """
    return state.take_bucket(bucket)


def _begin_step(state: "weakref.ref[QGCState]") -> Callable[[torch.nn.Module, Any], None]:
    def pre_forward(module: torch.nn.Module, args: Any) -> None:
        alive = state()
        if alive is not None and module.training and torch.is_grad_enabled():
            alive.begin()

    return pre_forward


def _close(handles: tuple[Worker | None, list[AggregatorProcess]]) -> None:
    worker, children = handles
    if worker is not None:
        worker.close()
    for child in children:
        child.stop(timeout_s=30.0 if worker is not None else 0.0)
