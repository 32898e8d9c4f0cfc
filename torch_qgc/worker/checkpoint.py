"""What a checkpoint holds of a job, and what of it a job with other workers can use."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from torch_qgc.errors import ConfigError
from torch_qgc.planner import Plan

__all__ = ["Checkpoint"]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A job's position: plain numbers and text, equal on all ranks.

    Step, seed and the loaders' positions carry over to any number of workers. The plan is the constructor's, always:
    it depends on who takes part. What was measured of the workers carries over to the same number of them.

    Args:
        step: the next step.
        seed: of the dither.
        rates: [K] contributions of each worker per round, as measured lately.
        loaders: position of each of the state's loaders, in the order in which they were made.
        plan: JSON, for the record: `Plan.from_json(checkpoint["plan"])`.
        peak_lr: the highest learning rate so far.
        loops: over loaders that are over.
        gatherings: calls that all workers make together, so far in this job.
    """

    step: int
    seed: int
    rates: list[float]
    loaders: list[dict[str, int]]
    plan: str
    peak_lr: float
    loops: int
    gatherings: int

    def to_dict(self) -> dict[str, Any]:
        """Return it as a dict that torch.save and torch.load(weights_only=True) take."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, state_dict: dict[str, Any]) -> Checkpoint:
        """Read what `to_dict` wrote.

        Raises:
            ConfigError: it is something else.
        """
        expected = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(state_dict, dict) or set(state_dict) != set(expected):
            got = sorted(map(str, state_dict)) if isinstance(state_dict, dict) else type(state_dict).__name__
            raise ConfigError(
                f"load_state_dict: expected what QGCState.state_dict() returned, a dict of {expected}, got {got}: "
                "was it the model's or the optimizer's?"
            )
        return cls(**state_dict)

    def informed(self, plan: Plan) -> Plan:
        """Return a plan with the measured rates as its prior of who misses how many rounds, if its workers are as many.

        Shares and bits stay as they are, so the loaders made from the plan still fit.
        """
        if len(self.rates) != plan.num_workers:
            return plan
        # Never certain to be late: a worker that was may come back with the restart.
        return dataclasses.replace(plan, straggle_probs=np.clip(1.0 - np.array(self.rates), 0.0, 0.99))
