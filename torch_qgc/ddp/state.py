"""QGCState and qgc_hook: what DDP calls instead of its all-reduce."""

# No `from __future__ import annotations` here: DDP inspects the hook's annotations and refuses strings.
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch._compile import _disable_dynamo  # torch.compiler.disable would import the compiler

from torch_qgc.ddp.loader import CodedLoader, looping, make_loader
from torch_qgc.ddp.rendezvous import Network, agree, check_model, check_step, start_aggregators
from torch_qgc.ddp.settings import Limits, choose_plan
from torch_qgc.errors import ConfigError
from torch_qgc.job.events import Trace, silent
from torch_qgc.planner import Plan
from torch_qgc.protocol.contract import ClosingRule, JobSpec
from torch_qgc.worker.checkpoint import Checkpoint
from torch_qgc.worker.connection import Connection
from torch_qgc.worker.layout import Layout
from torch_qgc.worker.replica import Replica
from torch_qgc.worker.report import Report
from torch_qgc.worker.session import Session
from torch_qgc.worker.sockets import SocketCarrier

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
        on_loss: what happens when a worker dies. "continue" spreads its share of the data over the others, with a
            warning on each of them: losing one worker need not cost the work of all. "fail" ends the job on every rank,
            as DDP does.
        downlink_bits: 32 sends results as fp32; 2..16 encodes them as well (unbiased). At 8 the noise that this adds is
            about 1/300 of the noise of a 4-bit uplink.
        aggregators: how many share the chunks; more balance the traffic (aggregator i runs on rank i mod K).
        seed: of the codec's random numbers.
        verify_every: steps between comparisons of all replicas' parameters; 0 never compares.
        limits, network: bounds, and how the aggregators are reached.
        process_group: the workers; DDP's own if None.
        trace: is called with every `torch_qgc.job.events.Event` of this worker's steps.
    Attributes:
        rank, workers: this worker's number, and how many there are.
        plan: the plan of the job.
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
        bits_per_coordinate: float = 4,
        deadline_s: float | None = None,
        late: Literal["fold", "drop"] = "fold",
        warmup_steps: int = 3,
        quorum: int | None = None,
        on_loss: Literal["continue", "fail"] = "continue",
        downlink_bits: int = 32,
        aggregators: int = 1,
        seed: int = 0,
        verify_every: int = 50,
        limits: Limits = Limits(),
        network: Network = Network(),
        process_group: dist.ProcessGroup | None = None,
        trace: Trace = silent,
    ) -> None:
        group = process_group if process_group is not None else getattr(model, "process_group", None)
        with agree(group):
            self._model = check_model(model)
            self._group: dist.ProcessGroup = group  # type: ignore[assignment]  # check_model has seen that it is one
            self.rank, self.workers = dist.get_rank(group), dist.get_world_size(group)
            self.plan = choose_plan(plan, self.workers, straggle_probs, bits_per_coordinate)
            if warmup_steps < 2:
                raise ConfigError(
                    f"warmup_steps: expected at least 2 (DDP rebuilds its buckets then), got {warmup_steps}"
                )
            rule = ClosingRule(
                deadline_s=deadline_s,
                late=late,
                warmup_steps=warmup_steps,
                quorum=quorum if quorum is not None else max(1, self.workers // 2),
                max_staleness=limits.max_staleness,
                on_loss=on_loss,
            )
            layout = Layout(self._model.module.named_parameters(), chunk_numel=limits.chunk_numel)
            spec = JobSpec(
                workers=self.workers,
                numel=layout.numel,
                chunk_numel=layout.chunk_numel,
                layout_digest=layout.digest,
                plan_digest=self.plan.digest(),
                first_step=0,
                seed=seed,
                aggregators=aggregators,
                downlink_bits=downlink_bits,
                rule=rule,
                verify_every=verify_every,
                log_steps=limits.log_steps,
                log_bytes=limits.log_bytes,
                join_timeout_s=limits.join_timeout_s,
            )
            spec.validate(self.plan)
        endpoints, children = start_aggregators(group, aggregators, network)
        # Whatever is finalized at the interpreter's exit goes in reverse order: first the replica leaves the job.
        sessions: list[Session] = []  # this worker's, once it has asked to come in
        self._stop_children = weakref.finalize(self, _stop, children, sessions)

        def connect(spec: JobSpec, plan: Plan, first_step: int, trace: Trace) -> Connection:
            session = Session(
                endpoints,
                spec,
                dist.get_rank(group),
                plan.to_json(),
                first_step=first_step,
                inbox_bytes=limits.inbox_bytes,
                silence_s=limits.silence_s,
                trace=trace,
            )
            sessions.append(session)
            return Connection(session, SocketCarrier(session))

        self.replica = Replica(layout, self.plan, spec, worker=self.rank, connect=connect, trace=trace)
        self._loaders: list[CodedLoader] = []
        self._positions: list[dict[str, int]] = []  # from a checkpoint, of loaders that are still to be made
        self._frozen = [p for p in self._model.module.parameters() if not p.requires_grad]
        self._prehook = self._model.register_forward_pre_hook(_begin_step(weakref.ref(self)))

    @property
    def step(self) -> int:
        """The step that this replica makes next, or is in."""
        return self.replica.step

    def loader(
        self, dataset: Any, batch_size: int = 1, *, together: Sequence["QGCState"] = (), **kwargs: Any
    ) -> CodedLoader:
        """Make the loader that replaces DataLoader and DistributedSampler; see `torch_qgc.ddp.loader.make_loader`.

        Args:
            together: the states of other models that make as many steps in the same loop.
        """
        others = [state.replica for state in together]
        loader = make_loader(self.replica, dataset, batch_size=batch_size, together=others, **kwargs)
        if self._positions:
            loader.load_state_dict(self._positions.pop(0))
        self._loaders.append(loader)
        return loader

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
    ) -> None:
        """Make `state.update` unscale, clip, step, schedule and clear the gradients, in this order.

        Args:
            optimizer: torch's or a coded one, or a list of them; clipping takes the norm over all of them.
            scheduler: stepped once per update; one or a list.
            max_grad_norm: as of torch.nn.utils.clip_grad_norm_.
            scaler: torch.amp.GradScaler. A step is skipped if the decoded gradient is not finite: alike everywhere.
        """
        self.replica.update.bind(optimizer, scheduler=scheduler, max_grad_norm=max_grad_norm, scaler=scaler)

    @property
    def scaler(self) -> Any:
        """The GradScaler of the update, None without one. Set it where `state.update` is a function that uses one."""
        return self.replica.update.scaler

    @scaler.setter
    def scaler(self, scaler: Any) -> None:
        self.replica.update.scaler = scaler

    @torch.no_grad()
    def sync_buffers(self) -> None:
        """Average floating-point buffers (BatchNorm's statistics) over all ranks; others are rank 0's. Collective."""
        for buffer in self._model.module.buffers():
            if buffer.is_floating_point():
                dist.all_reduce(buffer, group=self._group)
                buffer.div_(self.workers)
            else:
                dist.broadcast(buffer, dist.get_global_rank(self._group, 0), group=self._group)

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
        ).to_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint: before the first step, on every rank, before or after `state.loader`.

        Raises:
            ConfigError: steps have been made already, or it is no checkpoint of a QGCState.
        """
        found = Checkpoint.from_dict(state_dict)
        plan = found.informed(self.plan)
        self.replica.start_at(found.step, found.seed, plan)
        self.plan = plan
        self._positions = list(found.loaders)
        for loader in self._loaders[: len(self._positions)]:
            loader.load_state_dict(self._positions.pop(0))

    def close(self) -> None:
        """Leave the job, and end the aggregators this rank started. Called at exit, too; twice does no harm."""
        self._prehook.remove()
        self.replica.close()
        self._stop_children()

    def _begin(self) -> None:
        """Announce the step in which this worker now computes."""
        replica = self.replica
        if not replica.in_step:
            check_step(self._model, replica.layout, self._frozen)
            self._check_loops()
        replica.begin()

    def _check_loops(self) -> None:
        for loader in looping():
            if self.replica not in loader.replicas and any(other.may_be_late for other in loader.replicas):
                raise ConfigError(
                    f"worker {self.rank}, step {self.step}: a model makes steps in the loop over the loader of another "
                    "state, whose late worker would leave this model's steps out: name it there, "
                    "state.loader(..., together=[this_state]), or use deadline_s=None in both"
                )

    def __repr__(self) -> str:
        rule, replica = self.replica.spec.rule, self.replica
        closes = "waits for all" if rule.deadline_s is None else f"closes after {rule.deadline_s:g} s ({rule.late})"
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
    """
    return state.replica.exchange(bucket)


def _begin_step(state: "weakref.ref[QGCState]") -> Callable[[torch.nn.Module, Any], None]:
    @_disable_dynamo  # torch.compile(ddp) has nothing to find in here
    def pre_forward(module: torch.nn.Module, args: Any) -> None:
        alive = state()
        if alive is not None and module.training and torch.is_grad_enabled():
            alive._begin()

    return pre_forward


def _stop(children: list[Any], sessions: list[Session]) -> None:
    """Let the aggregators come to the end of the job; one that this worker never was in they would wait for in vain."""
    joined = any(session.welcomed for session in sessions)
    for child in children:
        child.stop(timeout_s=30.0 if joined else 0.0)
