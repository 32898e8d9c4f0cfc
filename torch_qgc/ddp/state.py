"""QGCState and qgc_hook: what DDP calls instead of its all-reduce."""

# No `from __future__ import annotations` here: DDP inspects the hook's annotations and refuses strings.
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist

from torch_qgc.ddp.forward import Forward
from torch_qgc.ddp.loader import CodedLoader, make_loader
from torch_qgc.ddp.network import Network, start_aggregators
from torch_qgc.ddp.numbers import check_sampler, find_numbers
from torch_qgc.ddp.optim import make_coded, watch_optimizers
from torch_qgc.ddp.rendezvous import agree, check_model, check_step, exchanged_parameters, usable_deadline
from torch_qgc.ddp.settings import Limits, choose_plan, closing_rule, job_spec
from torch_qgc.ddp.thin import first_samples
from torch_qgc.ddp.thinner import FollowedLoader, Slice, Thinner
from torch_qgc.job.courses import Courses
from torch_qgc.job.events import Trace, silent
from torch_qgc.planner import Plan
from torch_qgc.planner.options import DEFAULT_BITS_PER_COORDINATE
from torch_qgc.protocol.contract import JobSpec
from torch_qgc.worker.advice import sequence_number_of
from torch_qgc.worker.checkpoint import Checkpoint
from torch_qgc.worker.collectives import Collectives
from torch_qgc.worker.connection import Connection
from torch_qgc.worker.ending import at_the_end
from torch_qgc.worker.ghost import Ghost
from torch_qgc.worker.layout import Layout
from torch_qgc.worker.position import Phase
from torch_qgc.worker.replica import Replica
from torch_qgc.worker.report import Report
from torch_qgc.worker.session import Session
from torch_qgc.worker.sockets import SocketCarrier
from torch_qgc.worker.statement import Verifiable

__all__ = ["QGCState", "attach", "qgc_hook"]

#: Seconds for which workers wait for each other in a collective: as long as torch's own do with gloo.
_COLLECTIVE_S = 1_800.0


class QGCState:
    """The state of `qgc_hook`: one worker's part in a quantized gradient coding job.

    Made on every rank at once (it communicates), after DDP:

        state = QGCState(ddp_model, bits_per_coordinate=4, deadline_s=0.5)
        ddp_model.register_comm_hook(state, qgc_hook)

    Args:
        model: a DistributedDataParallel model; its ranks are the workers, unless their numbers are given.
        plan: who answers for which data, with how many bits; made from the next two if None.
        straggle_probs: [K] how often each worker will be late, as a prior: the running job measures it. None: 0.05.
        bits_per_coordinate: average over workers, 2..16, or 32 for no quantization.
        deadline_s: seconds after a step's first BEGIN at which it closes; None waits for all, as DDP does. "auto"
            waits for all until it is known how long the workers take, then closes steps when that reaches a given loss
            soonest; if nothing is gained by it, steps go on waiting for all.
        late: "fold" lets late payloads enter the open round, "drop" discards them as in Song & Choi.
        warmup_steps: that many first steps wait for all; at least 2, since DDP rebuilds its buckets there.
        quorum: a step is never closed on fewer arrivals; None: half of the workers.
        on_loss: what happens when a worker dies. "continue" spreads its share of the data over the others, with a
            warning on each of them: losing one worker need not cost the work of all. "fail" ends the job on every rank,
            as DDP does.
        downlink_bits: 32 sends results as fp32; 2..16 encodes them as well (unbiased). At 8 the noise that this adds is
            about 1/300 of the noise of a 4-bit uplink.
        aggregators: how many share the chunks; more balance the traffic (aggregator i runs on rank i mod K). None: as
            many as run already, or 1.
        seed: of the codec's random numbers.
        replan_every: steps between two looks at why workers are slow, after which batches (of `state.loader`), bits
            and an "auto" deadline are chosen anew, also sooner if a worker changes, is lost or comes; 0: never; None:
            50 with an "auto" deadline, else 0.
        control_variates: let what a worker usually sends stand in for it while it is late: still unbiased, and steadier
            where anybody pauses at random, above all with SGD and momentum (docs/tuning.md). The aggregators keep 4
            bytes per worker and parameter for it.
        verify_every: steps between comparisons of all replicas' parameters; 0 never compares.
        limits, network: bounds, and how the aggregators are reached.
        process_group: the workers; DDP's own if None.
        worker, workers: this worker's number, and how many there are, for jobs without a common process group: DDP then
            has one of this worker alone, so that a worker can end and come back while the others go on, and the
            aggregators run already (`Network(endpoints=..., key_file=...)`). None: what the environment variables
            QGC_WORKER and QGC_WORKERS say, which `qgc run` sets, or else the process group. See docs/launching.md.
        ghost: in steps that have closed without this worker, hand out what the model has returned for an earlier such
            batch instead of running it. A worker catches up several times faster (benchmarks/thin.py); what the loop
            computes from the outputs, such as a loss that is printed, is then of another batch, and side effects of the
            model's forward pass do not happen. For workers that are many times slower than the others.
        trace: is called with every `torch_qgc.job.events.Event` of this worker's steps.
    Attributes:
        rank, workers: this worker's number, and how many there are, however the script was started. The rank of the
            process group is another one, always 0, where numbers are given.
        replica: what DDP, the loader, the optimizers and Lightning are handed; not part of the user's interface.
    Raises:
        ConfigError: something that cannot work, with the remedy; on every rank if it happens on one.
    """

    def __init__(
        self,
        model: torch.nn.parallel.DistributedDataParallel,
        *,
        plan: Plan | None = None,
        straggle_probs: Sequence[float] | None = None,
        bits_per_coordinate: float = DEFAULT_BITS_PER_COORDINATE,
        deadline_s: float | Literal["auto"] | None = "auto",
        late: Literal["fold", "drop"] = "fold",
        warmup_steps: int = 3,
        quorum: int | None = None,
        on_loss: Literal["continue", "fail"] = "continue",
        downlink_bits: int = 32,
        aggregators: int | None = None,
        seed: int = 0,
        verify_every: int = 50,
        replan_every: int | None = None,
        control_variates: bool = False,
        limits: Limits = Limits(),
        network: Network = Network(),
        process_group: dist.ProcessGroup | None = None,
        worker: int | None = None,
        workers: int | None = None,
        ghost: bool = False,
        trace: Trace = silent,
    ) -> None:
        group = process_group if process_group is not None else getattr(model, "process_group", None)
        with agree(group):
            self._model = check_model(model)
            replans = replan_every if replan_every is not None else 50 * (deadline_s == "auto")
            deadline_s = usable_deadline(self._model, deadline_s)
            self._group: dist.ProcessGroup = group  # type: ignore[assignment]  # check_model has seen that it is one
            self._numbers = numbers = find_numbers(self._model.module, self._group, worker, workers)
            self.rank, self.workers, _ = numbers
            network = network.completed()
            plan = choose_plan(plan, self.workers, straggle_probs, bits_per_coordinate)
            rule = closing_rule(
                workers=self.workers,
                deadline_s=deadline_s,
                late=late,
                warmup_steps=warmup_steps,
                quorum=quorum,
                on_loss=on_loss,
                limits=limits,
            )
            layout = Layout(exchanged_parameters(self._model), chunk_numel=limits.chunk_numel)
            spec = job_spec(
                layout,
                plan,
                rule,
                workers=self.workers,
                seed=seed,
                aggregators=aggregators if aggregators is not None else max(1, len(network.endpoints)),
                downlink_bits=downlink_bits,
                verify_every=verify_every,
                replan_every=replans,
                control_variates=control_variates,
                limits=limits,
                one_group=not numbers.given,
            )
        reached = start_aggregators(self._group, numbers, network, spec, plan)
        # Whatever is finalized at the interpreter's exit goes in reverse order: first the replica leaves the job.
        sessions: list[Session] = []  # this worker's, once it has asked to come in
        self._stop_children = weakref.finalize(self, _stop, reached.children, sessions)

        def connect(spec: JobSpec, courses: Courses, first_step: int, trace: Trace) -> Connection:
            for child in reached.children:
                child.announce(spec, courses.at(spec.first_step).plan)
            session = Session(
                reached.endpoints,
                spec,
                numbers.worker,
                courses,
                first_step=first_step,
                inbox_bytes=limits.inbox_bytes,
                silence_s=limits.silence_s,
                trace=trace,
            )
            sessions.append(session)
            return Connection(session, SocketCarrier(session, reached.passes))

        self.replica = Replica(
            self._model.module,
            layout,
            plan,
            spec,
            worker=self.rank,
            connect=connect,
            sequence_number=lambda: None if numbers.given else sequence_number_of(group),
            trace=trace,
        )
        self._collectives = Collectives(self.replica)
        if numbers.given:  # no process group has made the models equal: compare them before the first step, too
            self.replica.statement.stated_step -= 1
        self._ghost = Ghost(self._model.module, layout.parameters) if ghost else None
        self._thinner = Thinner(self.replica)
        self._loaders: list[CodedLoader] = []
        self._positions: list[dict[str, int]] = []  # from a checkpoint, of loaders that are still to be made
        exchanged = set(layout.parameters)
        self._others = [(p, p.requires_grad) for p in self._model.module.parameters() if p not in exchanged]
        forward = Forward(self)
        self._hooks = [
            self._model.register_forward_pre_hook(forward.before),
            self._model.register_forward_hook(forward.after),
        ]
        watch_optimizers(self.replica)
        at_the_end(self.replica, alone=numbers.given and on_loss == "continue")

    @property
    def plan(self) -> Plan:
        """The plan of the step that this replica makes next, or is in."""
        return self.replica.plan

    @property
    def step(self) -> int:
        """The step that this replica makes next, or is in."""
        return self.replica.step

    def loader(self, dataset: Any, batch_size: int = 1, **kwargs: Any) -> CodedLoader:
        """Make the loader that replaces DataLoader and DistributedSampler; see `torch_qgc.ddp.loader.make_loader`."""
        loader = make_loader(self.replica, dataset, batch_size=batch_size, **kwargs)
        if self._positions:
            loader.load_state_dict(self._positions.pop(0))
        self._loaders.append(loader)
        return loader

    def follow(self, loader: Any, *, thin: int = 2, slice: Slice | None = None) -> FollowedLoader:
        """Wrap a loader of your own: its batches are thin for steps that have closed without this worker.

        Every rank's loader must give equally many batches. The plan's shares weigh what the ranks send, whatever data
        they draw: with equal shares (`make_plan([p] * K)`) each rank's batches count alike.

        Args:
            loader: anything that can be iterated over: a DataLoader, several that are zipped, a stream.
            thin: samples of a thin batch.
            slice: (batch, samples) -> the batch with that many samples, for batches of your own type.
        """
        check_sampler(loader, self._numbers)
        size = getattr(loader, "batch_size", None)
        return FollowedLoader(loader, Thinner(self.replica, thin, slice, size if isinstance(size, int) else None))

    def thin(self, batch: Any, samples: int = 2, slice: Slice | None = None) -> Any:
        """Return the batch, or its first samples if the step that comes next has closed without this worker.

        For loops without a loader, once per step: `x, y = state.thin(get_batch())`.
        """
        if not self._thinner.closed_without_us():
            return batch
        return self._thinner.thin(batch) if slice is None and samples == 2 else (slice or first_samples)(batch, samples)

    def skip_step(self) -> None:
        """Give up the step that a forward pass of this rank alone has begun: it counts as late for it.

        `state.loader` and `state.follow` notice a batch that makes no step, and hand out one more at the end. Loops
        without them call this, and make one more step than they have batches.
        """
        self.replica.abandon()

    def verify_also(self, *what: Verifiable, **named: Verifiable) -> None:
        """Compare more than parameters and hyperparameters over the ranks, whenever these are compared.

        Args:
            what, named: modules (their parameters), tensors, numbers, lists or mappings of these, or calls that return
                them: `state.verify_also(ema=ema_model)`.
        """
        for i, each in enumerate(what):
            self.replica.statement.add(f"{type(each).__name__}{i or ''}", each)
        for name, each in named.items():
            self.replica.statement.add(name, each)

    @property
    def update(self) -> Callable[[], Any]:
        """The user's way from gradients to new parameters, a call without arguments; the same on every rank.

        Raises:
            ConfigError: none was set.
        """
        return self.replica.update.call

    @update.setter
    def update(self, call: Callable[[], Any]) -> None:
        self.replica.update.set(call)

    def bind(
        self,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        *,
        scheduler: Any = None,
        max_grad_norm: float | None = None,
        scaler: Any = None,
        before: Callable[[int], Any] | None = None,
        after: Callable[[int], Any] | None = None,
    ) -> None:
        """Say what the whole update is, so that steps that closed without this worker need not run the loop body.

        `state.update()` then unscales, clips, steps, schedules and clears the gradients, in this order, and is to be
        called in the place of all these. Use it where a worker falls far behind, or where a thin step is not much
        cheaper than a full one. torch's SGD, Adam and AdamW become coded ones, in place.

        Args:
            optimizer: torch's or a coded one, or a list of them; clipping takes the norm over all of them.
            scheduler: stepped once per update; one or a list.
            max_grad_norm: as of torch.nn.utils.clip_grad_norm_.
            scaler: torch.amp.GradScaler. A step is skipped if the decoded gradient is not finite: alike everywhere.
            before, after: called with the number of the step, before and after all of this: for a learning rate that
                is set by hand, an average of the model, counters.
        """
        listed = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer)
        for one in listed:
            make_coded(one, self.replica)
        self.replica.update.bind(
            listed,
            scheduler=scheduler,
            max_grad_norm=max_grad_norm,
            scaler=scaler,
            before=before,
            after=after,
            step=lambda: self.step - 1,
        )

    @property
    def scaler(self) -> Any:
        """The GradScaler of the update, None without one. Set it where `state.update` is a function that uses one."""
        return self.replica.update.scaler

    @scaler.setter
    def scaler(self, scaler: Any) -> None:
        self.replica.update.scaler = scaler

    def all_gather(self, obj: Any, *, timeout_s: float = _COLLECTIVE_S) -> dict[int, Any]:
        """Return every worker's object, by the worker's number: of all that are in the job when the last one calls.

        Collective, over the aggregator: all ranks call it, as often and in the same order as `barrier` and
        `sync_buffers`. It waits for all that are alive, also for a late one, which calls it when its thin steps have
        brought it there; so calling it every n-th step costs less than in every step. A worker that was lost or has
        left is not waited for, and is not in the result. It is a dict since numbers would be lost in a list; the order
        is that of the workers and the same on all ranks, so `min(result)` elects one that all agree on.

        A rank that has raised ends the job, as ever. With `state.bind`, call it outside of the loop body, which does
        not run for replayed steps. Before the first step it joins the job.

        Args:
            obj: None, bool, int (64 bits), float, str, bytes, tensors, numpy arrays, and lists, tuples and dicts of
                these (keys: str or int); at most `Limits(log_bytes=...)` / workers bytes. Nothing is pickled. Tuples
                come back as lists, tensors on the CPU.
            timeout_s: how long to wait for the others.
        Raises:
            ConfigError: obj is something else, or too large.
            CollectiveFailed: a worker has not called in time, or has called something else; names it.
            JobFailed: the job has ended.
        """
        return self._collectives.all_gather(obj, timeout_s)

    def barrier(self, *, timeout_s: float = _COLLECTIVE_S) -> None:
        """Wait until every worker that is alive has called this; see `all_gather`."""
        self._collectives.barrier(timeout_s)

    def sync_buffers(self, *, timeout_s: float = _COLLECTIVE_S) -> None:
        """Average floating-point buffers (BatchNorm's statistics) over all workers in the job; see `all_gather`.

        Others, such as counters, become the lowest worker's. Afterwards all are equal, bit for bit. Buffers that are
        equal already do not travel.

        A rank that has computed few steps has statistics that still remember what they began with, so it weighs as its
        steps do, up to those that such an average remembers; beyond, all ranks weigh alike, whose data differ.
        """
        self._collectives.sync_buffers(self._model.module, timeout_s)

    def report(self) -> Report:
        """Return what this worker has done and seen so far."""
        return self.replica.report()

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must hold, the same on every rank: see `torch_qgc.worker.checkpoint.Checkpoint`."""
        return Checkpoint(
            step=self.step,
            seed=self.replica.spec.seed,
            rates=self.replica.rates.overall().tolist(),
            loaders=[loader.state_dict() for loader in self._loaders],
            plan=self.plan.to_json(),
            peak_lr=self.replica.facts.thermometer.peak,
            # A loop of which nothing is left does not count where the checkpoint is loaded, as it makes no step there.
            loops=self.replica.loops + any(loader.at_its_end for loader in self._loaders),
            gatherings=self.replica.gatherings,
        ).to_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint: before the first step, on every rank, before or after `state.loader`.

        A worker that was started again, alone, comes back to the running job with a checkpoint of it, of whatever step
        the job's log still reaches back to: see docs/launching.md.

        Raises:
            ConfigError: steps have been made already, or it is no checkpoint of a QGCState.
        """
        found = Checkpoint.from_dict(state_dict)
        plan = found.informed(self.plan)
        self.replica.start_at(found.step, found.seed, plan, loops=found.loops, gatherings=found.gatherings)
        self.replica.facts.thermometer.peak = found.peak_lr
        self._positions = list(found.loaders)
        for loader in self._loaders[: len(self._positions)]:
            loader.load_state_dict(self._positions.pop(0))

    def close(self) -> None:
        """Compare replicas a last time, leave the job, and end the aggregators this rank started.

        Called at exit, too; twice does no harm.

        Raises:
            JobFailed: replicas differ, or other ranks go on with steps that this one does not make.
        """
        for hook in self._hooks:
            hook.remove()
        try:
            self.replica.close()
        finally:
            self._stop_children()

    def begin(self) -> None:
        """Begin a step. Called by DDP's forward pass."""
        if not self.replica.in_step:
            check_step(self._model, self.replica.layout, self._others)
        self.replica.begin(synced=self._model.require_backward_grad_sync)
        if self._ghost is not None:
            self._ghost.end()  # of a forward pass that has raised
            if self.replica.position.phase is Phase.THIN:
                self._ghost.begin()

    def forward_ended(self) -> None:
        """Note the end of a forward pass. Called by DDP's forward pass."""
        if self._ghost is not None:
            self._ghost.end()

    def __reduce__(self) -> tuple[Any, ...]:
        return _no_state, ()  # a copy of the model takes no part in the job

    def __repr__(self) -> str:
        replica = self.replica
        deadline_s, late = replica.courses.deadline_s(self.step), replica.spec.rule.late
        closes = "waits for all" if deadline_s is None else f"closes after {deadline_s:g} s ({late})"
        return (
            f"QGCState(worker {self.rank} of {self.workers}, {replica.position!r}, "
            f"{int(self.plan.bits[self.rank])} bits up and {replica.spec.downlink_bits} down, {closes}, "
            f"{replica.layout!r})"
        )


def qgc_hook(state: QGCState, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:  # type: ignore[name-defined]
    """Replace DDP's all-reduce by quantized gradient coding: `ddp_model.register_comm_hook(state, qgc_hook)`.

    1. Copy the bucket's gradients to their places in the flat gradient.
    2. Encode every chunk that is complete now, with this worker's bits, and send it.
    3. After the last bucket wait for the closed rounds; they hold the unbiased decoded mean gradient.
    4. Copy it into the buckets and complete their futures.

    In a step that has closed without this worker nothing is encoded or sent.
    """
    return state.replica.exchange(bucket)


def _no_state() -> None:
    return None


def _stop(children: list[Any], sessions: list[Session]) -> None:
    """Let the aggregators come to the end of the job, which is as long as others move on; or end them at once.

    At once where the job has failed, or this worker never was in it.
    """
    goes_on = any(session.welcomed and session.error is None for session in sessions)
    for child in children:
        child.stop(timeout_s=None if goes_on else 0.0)


def attach(model: torch.nn.parallel.DistributedDataParallel, **options: Any) -> QGCState:
    """Make the state of a DDP model and register the hook: for frameworks that wrap the model themselves.

        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        state = torch_qgc.attach(model, deadline_s=0.5)
        loader = state.follow(loader)

    Args:
        model: a DistributedDataParallel model.
        **options: QGCState's.
    """
    state = QGCState(model, **options)
    model.register_comm_hook(state, qgc_hook)
    return state
