"""QGCState and qgc_hook: what DDP calls instead of its all-reduce."""

# No `from __future__ import annotations` here: DDP inspects the hook's annotations and refuses strings.
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch._compile import _disable_dynamo  # torch.compiler.disable would import the compiler

from torch_qgc.ddp.loader import CodedLoader, looping, make_loader
from torch_qgc.ddp.rendezvous import Network, check_model, check_step, start_aggregators
from torch_qgc.ddp.settings import Limits, Settings, choose_plan
from torch_qgc.errors import ConfigError
from torch_qgc.job.rounds import ClosingRule
from torch_qgc.planner import Plan
from torch_qgc.worker.checkpoint import Checkpoint
from torch_qgc.worker.layout import Layout
from torch_qgc.worker.replica import Steps
from torch_qgc.worker.report import Report

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
        settings = Settings(
            workers=self.workers,
            plan=self.plan,
            rule=self.rule,
            downlink_bits=downlink_bits,
            aggregators=aggregators,
            verify_every=verify_every,
            limits=limits,
        )
        self.layout = Layout(self.model.module.named_parameters(), chunk_numel=limits.chunk_numel)
        endpoints, children = start_aggregators(self.process_group, aggregators, network)
        self._steps = Steps(self.layout, settings, rank=self.rank, seed=seed, endpoints=endpoints, children=children)
        self._loaders: list[CodedLoader] = []
        self._positions: list[dict[str, int]] = []  # from a checkpoint, of loaders that are still to be made
        self._frozen = [p for p in self.model.module.parameters() if not p.requires_grad]
        self._prehook = self.model.register_forward_pre_hook(_begin_step(weakref.ref(self)))

    # --- the user's side --------------------------------------------------------------------------------

    def loader(self, dataset: Any, batch_size: int = 1, **kwargs: Any) -> CodedLoader:
        """Make the loader that replaces DataLoader and DistributedSampler; see `torch_qgc.ddp.loader.make_loader`."""
        loader = make_loader(self, dataset, batch_size=batch_size, **kwargs)
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
        return self._steps.update.call

    @update.setter
    def update(self, call: Callable[[], Any]) -> None:
        self._steps.update.set(call)

    @property
    def has_update(self) -> bool:
        """There is an update."""
        return self._steps.update.known

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
        self._steps.update.bind(optimizer, scheduler=scheduler, max_grad_norm=max_grad_norm, scaler=scaler)

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Let a coded optimizer be the update, unless there are several or one is bound. Called by coded optimizers."""
        self._steps.update.attach(optimizer)

    @property
    def scaler(self) -> Any:
        """The GradScaler of the update, None without one. Set it where `state.update` is a function that uses one."""
        return self._steps.update.scaler

    @scaler.setter
    def scaler(self, scaler: Any) -> None:
        self._steps.update.scaler = scaler

    def request_second_track(self) -> bool:
        """Ask for the second track (before the first step); tell whether the job will have one.

        It needs a plan with `second_track`; a deadline, since where all arrive both tracks are the same; and
        `downlink_bits=32`, since tracks rounded apart give Adam a gradient over a denominator of zero here and there.
        """
        return self._steps.request_second_track()

    def second_track(self, parameter: torch.Tensor) -> torch.Tensor | None:
        """Return the second track of a parameter's gradient, fp32 in its shape; None if the job has one track."""
        return self._steps.second_track(parameter)

    def scale_second_track(self, factor: torch.Tensor | float) -> None:
        """Multiply the second track: for an update of one's own that has clipped the gradients by a factor."""
        self._steps.scale_second_track(factor)

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
        return self._steps.report()

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must hold, the same on every rank: see `torch_qgc.worker.checkpoint.Checkpoint`."""
        return Checkpoint(
            step=self.step,
            seed=self._steps.seed,
            rates=self._steps.counts.rates.tolist(),
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
        self._steps.start_at(found.step, found.seed, plan)
        self.plan = plan
        self._positions = list(found.loaders)
        for loader in self._loaders[: len(self._positions)]:
            loader.load_state_dict(self._positions.pop(0))

    def close(self) -> None:
        """Leave the job, and end the aggregators this rank started. Called at exit, too; twice does no harm."""
        self._prehook.remove()
        self._steps.close()

    # --- one step: what DDP, the loader and coded optimizers call ------------------------------------------

    @property
    def step(self) -> int:
        """The step that this replica makes next, or is in."""
        return self._steps.step

    @property
    def in_step(self) -> bool:
        """A forward pass has begun a step whose backward pass has not finished it."""
        return self._steps.in_step

    def begin(self) -> None:
        """Announce the step in which this worker now computes. Called by DDP's forward pass."""
        if not self.in_step:
            check_step(self.model, self.layout, self._frozen)
            self._check_loops()
        self._steps.begin()

    def take_bucket(self, bucket: Any) -> torch.futures.Future[torch.Tensor]:
        """Gather a bucket, send the chunks it completes, and return the future of its decoded gradient."""
        if not self.in_step:
            self.begin()  # a backward pass whose forward ran in eval mode
        return self._steps.take_bucket(bucket)

    def check_exchanged(self) -> None:
        """Raise ConfigError if a step has begun whose gradient was not exchanged. Called before an update."""
        self._steps.check_exchanged()

    @property
    def may_be_late(self) -> bool:
        """Steps may close without this worker."""
        return self.rule.deadline_s is not None

    def check_replayable(self) -> None:
        """Raise ConfigError if this worker may have to replay steps and does not know the update."""
        if self.may_be_late:
            _ = self.update

    def catch_up(self, end_step: int) -> None:
        """Replay the steps below end_step that closed without this worker. Called by CodedLoader between steps."""
        self._steps.catch_up(end_step)

    def missed(self) -> bool:
        """Tell whether the current step closes without this worker. Called by loops that replay by themselves."""
        return self._steps.missed()

    def take_missed(self) -> None:
        """Put the results of a missed step into .grad; the caller's own update follows."""
        self._steps.take_missed()

    def await_step(self, end_step: int) -> None:
        """Replay the steps below end_step, waiting for them to close. Called by CodedLoader for several states."""
        self._steps.await_step(end_step)

    def _check_loops(self) -> None:
        for loader in looping():
            if self not in loader.states and any(state.may_be_late for state in loader.states):
                raise ConfigError(
                    f"worker {self.rank}, step {self.step}: a model makes steps in the loop over the loader of another "
                    "state, whose late worker would leave this model's steps out: name it there, "
                    "state.loader(..., together=[this_state]), or use deadline_s=None in both"
                )


def qgc_hook(state: QGCState, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:  # type: ignore[name-defined]
    """Replace DDP's all-reduce by quantized gradient coding: `ddp_model.register_comm_hook(state, qgc_hook)`.

    1. Copy the bucket's gradients to their places in the flat gradient.
    2. Encode every chunk that is complete now, with this worker's bits, and send it.
    3. After the last bucket wait for the closed rounds; they hold the unbiased decoded mean gradient.
    4. Copy it into the buckets and complete their futures.
    """
    return state.take_bucket(bucket)


def _begin_step(state: "weakref.ref[QGCState]") -> Callable[[torch.nn.Module, Any], None]:
    @_disable_dynamo  # torch.compile(ddp) has nothing to find in here
    def pre_forward(module: torch.nn.Module, args: Any) -> None:
        alive = state()
        if alive is not None and module.training and torch.is_grad_enabled():
            alive.begin()

    return pre_forward
