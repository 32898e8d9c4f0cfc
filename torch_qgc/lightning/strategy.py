"""QGCStrategy: Lightning's DDPStrategy, with steps that close at a deadline and late ranks that replay.

A rank that missed a step still goes through Lightning's loop for it, with the forward and backward pass replaced by the
step's result. So clipping, hooks, the optimizer, schedulers, counters, callbacks, validation and checkpoints are the
very same code on every rank, in the same order, and their collectives line up. A replayed step costs the update only.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.strategies.registry import _StrategyRegistry
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch import Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning_utilities.core.apply_func import apply_to_collection
from torch.nn.parallel import DistributedDataParallel

from torch_qgc.ddp.numbers import check_framework
from torch_qgc.ddp.optim import make_coded
from torch_qgc.ddp.state import QGCState, qgc_hook
from torch_qgc.errors import ConfigError, QGCError
from torch_qgc.lightning.checks import check_trainer
from torch_qgc.lightning.loader import ReplayingLoader, Turn, code_sampling
from torch_qgc.lightning.loops import agree_on_monitored, obey_own_signals
from torch_qgc.lightning.monitor import QGCMonitor
from torch_qgc.lightning.times import StepTimes

__all__ = ["QGCStrategy"]

_STATE_OPTIONS = frozenset(inspect.signature(QGCState.__init__).parameters) - {"self", "model", "process_group"}
_CHECKPOINT_KEY = "torch_qgc"


class QGCStrategy(DDPStrategy):
    """Train with DDP and quantized gradient coding: `Trainer(strategy=QGCStrategy(deadline_s=0.5))`.

    Args:
        partitions: N lists of sample indices, one per partition of the plan, for data that cannot move.
        **kwargs: QGCState's keyword arguments (`bits_per_coordinate`, `deadline_s`, ...); all others are DDPStrategy's.
    Attributes:
        state: the QGCState of the current or last fit, None before.
    Raises:
        ConfigError: something that cannot work, with the remedy.
    """

    def __init__(self, *, partitions: Sequence[Sequence[int]] | None = None, **kwargs: Any) -> None:
        for name in ("ddp_comm_state", "ddp_comm_hook", "ddp_comm_wrapper", "model_averaging_period"):
            if kwargs.get(name) is not None:
                raise ConfigError(f"got {name}: this strategy is DDP's one communication hook; leave it out")
        self._state_options = {name: kwargs.pop(name) for name in _STATE_OPTIONS & kwargs.keys()}
        self._partitions = partitions
        kwargs.setdefault("broadcast_buffers", False)  # they are averaged when somebody looks at them
        super().__init__(**kwargs)
        self.state: QGCState | None = None
        self._fits = 0
        self._turn: Turn | None = None
        self._times: StepTimes | None = None
        self._last_output: Any = None
        self._computing = False

    @classmethod
    def register_strategies(cls, strategy_registry: _StrategyRegistry) -> None:
        """Register "qgc", and "qgc_spawn", "qgc_fork", "qgc_notebook" as Lightning does for DDP."""
        for name, method in (("qgc", "popen"), ("qgc_spawn", "spawn"), ("qgc_fork", "fork"), ("qgc_notebook", "fork")):
            description = f"quantized gradient coding over DDP, start method {method!r}"
            strategy_registry.register(name, cls, description=description, override=True, start_method=method)

    @property
    def _waits_for_all(self) -> bool:
        return self._state_options.get("deadline_s", "auto") is None

    @property
    def _training(self) -> bool:
        return isinstance(self.model, DistributedDataParallel)

    # --- setting up -------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer) -> None:
        """Wrap the model, make the state and the optimizers; all ranks at once."""
        if trainer.state.fn == TrainerFn.FITTING:
            check_trainer(trainer, may_be_late=not self._waits_for_all)
            if not self._waits_for_all:
                obey_own_signals(trainer)
        super().setup(trainer)
        if self._training:
            assert self.state is not None
            assert self._times is not None
            others = [c for c in trainer.callbacks if not isinstance(c, QGCMonitor)]  # type: ignore[attr-defined]
            trainer.callbacks = [QGCMonitor(self.state, self._times), *others]  # type: ignore[attr-defined]
            agree_on_monitored(trainer)
            self.state.scaler = getattr(self.precision_plugin, "scaler", None)  # of precision="16-mixed"

    def _register_ddp_hooks(self) -> None:
        self.state = QGCState(self.model, **self._state_options)  # type: ignore[arg-type]
        check_framework("QGCStrategy", self.state.workers)
        self._fits += 1
        store = torch.distributed.distributed_c10d._get_default_store()
        self._times = StepTimes(store, self.state.rank, self.state.workers, name=f"fit{self._fits}")
        self._turn = Turn(self.state.replica, self._times)
        self.model.register_comm_hook(self.state, qgc_hook)  # type: ignore[union-attr,operator]

    def setup_optimizers(self, trainer: Trainer) -> None:
        """Make SGD, Adam and AdamW coded ones; keep others."""
        super().setup_optimizers(trainer)
        assert self.state is not None
        for optimizer in self.optimizers:
            inner = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
            make_coded(inner, self.state.replica)
        self.optimizers = self.optimizers  # anew, since Lightning's wrappers imitate the class
        if not self._waits_for_all and any(
            c.reduce_on_plateau and c.interval == "step" for c in self.lr_scheduler_configs
        ):
            raise ConfigError(
                "ReduceLROnPlateau in each step follows its rank's own batches, and a rank that replays has none: use "
                "interval='epoch'"
            )

    def process_dataloader(self, dataloader: object) -> object:
        """Replace the training loader's sampling by the plan's; leave the loaders of validation and test."""
        trainer = self.lightning_module.trainer  # type: ignore[union-attr]
        if not (self._training and trainer.training):
            return dataloader
        assert self._turn is not None
        assert self.state is not None
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0))  # seed_everything's, as for Lightning's own sampler
        loader = code_sampling(self.state.replica, dataloader, partitions=self._partitions, seed=seed)
        self._check_lengths(loader)
        return ReplayingLoader(loader, self._turn)

    def _check_lengths(self, loader: Any) -> None:
        found: list[int | None] = [None] * self.world_size
        torch.distributed.all_gather_object(found, sized_len(loader))
        if None in found or len(set(found)) > 1:
            raise ConfigError(
                f"expected a training loader with equally many batches on every rank, got {found}: ranks count steps "
                "alike; give the loader a length (__len__), or let the plan share the data (a map-style data set and "
                "use_distributed_sampler=True)"
            )

    # --- one step ---------------------------------------------------------------------------------------

    @property
    def replays(self) -> bool:
        """The batch at hand belongs to a step that this rank replays: training_step is not run for it, hooks are."""
        return self._turn is not None and self._turn.replays

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's training_step; in a replayed step return what the last one returned."""
        if self.replays:
            return self._last_output
        self._begin()
        self._computing = True
        try:
            output = super().training_step(*args, **kwargs)
        finally:
            self._computing = False
        self._last_output = apply_to_collection(output, torch.Tensor, torch.Tensor.detach)
        return output

    def _begin(self) -> None:
        """Begin a step, unless that was done: Lightning leaves DDP's wrapper in eval mode after a validation."""
        if self._training and self.state is not None:
            self.state.begin()

    def backward(self, closure_loss: torch.Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run the backward pass; in a replayed step take its result instead. Hooks are called in both."""
        if not self.replays:
            self._begin()  # manual optimization may make several steps after one forward pass
            return super().backward(closure_loss, optimizer, *args, **kwargs)
        assert self.state is not None
        assert self.lightning_module is not None
        loss = self.precision_plugin.pre_backward(closure_loss, self.lightning_module)
        if self.model.require_backward_grad_sync:  # type: ignore[union-attr]  # the last batch of an accumulated step
            self.state.replica.take_missed()
        return self.precision_plugin.post_backward(loss, self.lightning_module)

    def optimizer_step(self, optimizer: Any, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """Make one step, and check that the optimizer made one pass for it."""
        assert self.state is not None
        before = self.state.step
        output = super().optimizer_step(optimizer, closure, model, **kwargs)
        passes = self.state.step - before
        if passes and self._times is not None:
            self._times.end(self.state.replica.counts.wait_s)
        if self.lightning_module.automatic_optimization and passes != 1:  # type: ignore[union-attr]
            raise ConfigError(
                f"{type(optimizer).__name__} made {passes} passes in one step (it calls its closure that often): a "
                "step is one exchange of gradients; use an optimizer that makes one pass"
            )
        return output

    @contextmanager
    def _alone(self, what: str) -> Iterator[None]:
        """Refuse a collective inside training_step: others would wait for it, or may be replaying and never come.

        Elsewhere, where a collective fails because the job has ended on another rank, say why that was.
        """
        if self._computing and not self._waits_for_all:
            raise ConfigError(
                f"{what} in training_step waits for every rank in each step, and a rank that replays a step does not "
                "run it: log without sync_dist, or with on_step=False, on_epoch=True, reduced at the epoch's end"
            )
        try:
            yield
        except RuntimeError as error:
            failure = None if self.state is None else self.state.replica.failure
            if failure is None or isinstance(error, QGCError):
                raise
            raise type(failure)(*failure.args) from error

    def reduce(self, *args: Any, **kwargs: Any) -> Any:
        """Reduce over ranks; not inside training_step."""
        with self._alone("self.log(..., sync_dist=True)"):
            return super().reduce(*args, **kwargs)

    def all_gather(self, *args: Any, **kwargs: Any) -> Any:
        """Gather from ranks; not inside training_step."""
        with self._alone("self.all_gather"):
            return super().all_gather(*args, **kwargs)

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Wait for all ranks; not inside training_step."""
        with self._alone("a barrier"):
            super().barrier(*args, **kwargs)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Send an object to all ranks; not inside training_step."""
        with self._alone("a broadcast"):
            return super().broadcast(obj, src)

    # --- where ranks meet -------------------------------------------------------------------------------

    def sync_buffers(self) -> None:
        """Average BatchNorm's statistics over the ranks, while a fit runs."""
        interrupted = self.lightning_module.trainer.state.status == TrainerStatus.INTERRUPTED  # type: ignore[union-attr]
        if self._training and self.state is not None and not interrupted:  # then there is nobody to meet
            self.state.sync_buffers()

    def on_validation_start(self) -> None:
        """Let every rank validate with the same buffers."""
        self.sync_buffers()

    def on_train_end(self) -> None:
        """Wait until late ranks have replayed the last step: the aggregators end with the job."""
        self.sync_buffers()
        if self.state is None:
            self.barrier("train_end")
        else:
            self.state.barrier()  # goes on without a rank that has died

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the model's state for a checkpoint, buffers averaged."""
        self.sync_buffers()
        return super().lightning_module_state_dict()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Add the step and the plan to the checkpoint and save it."""
        if self._training and self.state is not None:
            checkpoint[_CHECKPOINT_KEY] = self.state.state_dict()
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; one of plain DDP starts at step 0."""
        super().load_optimizer_state_dict(checkpoint)
        if self.state is not None and self.state.step == 0 and _CHECKPOINT_KEY in checkpoint:
            self.state.load_state_dict(checkpoint[_CHECKPOINT_KEY])

    def teardown(self) -> None:
        """Leave the job; `state.report()` can still be read."""
        self._last_output = None
        try:
            if self.state is not None:
                self.state.close()
        finally:
            super().teardown()
