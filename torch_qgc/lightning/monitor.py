"""Who contributes how often and who is slow, in Lightning's logger and progress bar; and where epochs end."""

from __future__ import annotations

from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from numpy.typing import NDArray

from torch_qgc.ddp.state import QGCState
from torch_qgc.lightning.times import StepTimes

__all__ = ["QGCMonitor"]


class QGCMonitor(Callback):
    """Log what the job does every `Trainer(log_every_n_steps)` steps; the strategy adds it.

    Logged, as rank 0 sees it and without waiting for anybody:

    - `qgc/step_s/worker<k>`: seconds that a step takes worker k itself, the median of its newest ones.
    - `qgc/arrival_rate/worker<k>`: payloads of worker k per round, lately.
    - `qgc/bits/worker<k>`: its bits per coordinate.
    - `qgc/deadline_s`: after which a step closes; left out if steps wait for all.
    - `qgc/replayed_steps`, `qgc/late_steps`: of this rank, since the job began.

    In the progress bar: `slowest`, the worker whose own steps take longest, `step_s`, how long, and `arrives`, its
    payloads per round.

    It also tells the job when an epoch ends, so that ranks whose epochs end at different steps hear of it.

    Args:
        state: of the job.
        times: of its workers.
    """

    def __init__(self, state: QGCState, times: StepTimes) -> None:
        self._state, self._times = state, times
        self._logged_step = 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Log, if a step was made after which Lightning logs."""
        step, every = trainer.global_step, trainer.log_every_n_steps or 50  # type: ignore[attr-defined]
        if step % every or step == self._logged_step or trainer.barebones:
            return
        self._logged_step = step
        seconds = self._times.exchange()
        pl_module.log_dict(self.metrics(seconds), on_step=True, on_epoch=False)
        if not np.isnan(seconds).all():
            slowest = int(np.nanargmax(seconds))
            bar = {"slowest": float(slowest), "step_s": float(seconds[slowest]), "arrives": self._rates()[slowest]}
            pl_module.log_dict(bar, prog_bar=True, logger=False, on_step=True, on_epoch=False)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell the job where this rank's epoch has ended."""
        self._state.replica.loop_ended(owed=0)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let the job end on every rank, before other callbacks meet (to save a checkpoint, say)."""
        self._state.replica.tell_all(repr(exception))

    def metrics(self, seconds: NDArray[np.float64]) -> dict[str, float]:
        """Return what is logged, given the seconds that each worker's step takes."""
        state, report = self._state, self._state.report()
        found = {f"step_s/worker{k}": value for k, value in enumerate(seconds) if not np.isnan(value)}
        found |= {f"arrival_rate/worker{k}": rate for k, rate in enumerate(self._rates())}
        found |= {f"bits/worker{k}": bits for k, bits in enumerate(state.plan.bits)}
        deadline_s = state.replica.courses.deadline_s(state.step)
        if deadline_s is not None:
            found["deadline_s"] = deadline_s
        found |= {"replayed_steps": report.replayed_steps, "late_steps": report.late_steps}
        return {f"qgc/{name}": float(value) for name, value in found.items()}

    def _rates(self) -> list[float]:
        report = self._state.report()
        waits = self._state.replica.courses.waits_for_all(self._state.step)
        return [float(rate) for rate in (report.contributions if waits else report.rates)]
