"""Who contributes how often, in Lightning's logger and progress bar."""

from __future__ import annotations

from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from numpy.typing import NDArray

from torch_qgc.ddp.state import QGCState

__all__ = ["QGCMonitor"]


class QGCMonitor(Callback):
    """Log what the job does every `Trainer(log_every_n_steps)` steps; the strategy adds it.

    Logged, as rank 0 sees it and without any communication:

    - `qgc/arrival_rate/worker<k>`: payloads of worker k per round, lately.
    - `qgc/bits/worker<k>`: its bits per coordinate.
    - `qgc/deadline_s`: after which a step closes; left out if steps wait for all.
    - `qgc/replayed_steps`, `qgc/late_steps`: of this rank, since the job began.

    In the progress bar: `slowest`, the worker with the lowest arrival rate, and `arrives`, that rate.
    """

    def __init__(self, state: QGCState) -> None:
        self._state = state
        self._logged_step = 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Log, if a step was made after which Lightning logs."""
        step, every = trainer.global_step, trainer.log_every_n_steps or 50  # type: ignore[attr-defined]
        if step % every or step == self._logged_step or trainer.barebones:
            return
        self._logged_step = step
        rates = self._rates()
        pl_module.log_dict(self.metrics(), on_step=True, on_epoch=False)
        bar = {"slowest": float(rates.argmin()), "arrives": float(rates.min())}
        pl_module.log_dict(bar, prog_bar=True, logger=False, on_step=True, on_epoch=False)

    def metrics(self) -> dict[str, float]:
        """Return what is logged."""
        state, report = self._state, self._state.report()
        found = {f"arrival_rate/worker{k}": rate for k, rate in enumerate(self._rates())}
        found |= {f"bits/worker{k}": bits for k, bits in enumerate(state.plan.bits)}
        deadline_s = state.replica.spec.rule.deadline_s
        if deadline_s is not None:
            found["deadline_s"] = deadline_s
        found |= {"replayed_steps": report.replayed_steps, "late_steps": report.late_steps}
        return {f"qgc/{name}": float(value) for name, value in found.items()}

    def _rates(self) -> NDArray[np.float64]:
        report = self._state.report()
        return report.contributions if self._state.replica.spec.rule.deadline_s is None else report.rates
