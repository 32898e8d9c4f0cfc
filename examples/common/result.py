"""What a job has to say when it is over: its ranks' counts, the plan, and the time that waiting would have cost."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import nn

import torch_qgc as qgc
from common.journal import Journal, parameter_hash


@dataclass(kw_only=True)
class RankResult:
    """What a rank has to say after its job.

    Fields:
        steps, computed_steps: steps applied, and those it computed a gradient for; it replayed the rest.
        missed: fraction of the steps that closed without its gradient of that step; counted since a resume.
    """

    wall_s: float
    steps: int
    computed_steps: int
    bytes_sent_per_step: float
    parameter_hash: str
    missed: float = 0.0
    bytes_received_per_step: float = 0.0


@dataclass(kw_only=True)
class JobResult:
    """What a job has to say.

    Fields:
        numel: parameters of the model.
        contributions: payloads per step that entered the update, by worker.
        plan: the plan as it prints; empty without one.
        deadline_s: seconds after which its steps close; None waits for all.
        waiting_s: what the same steps would have taken had each waited for its slowest worker; None: each did.
        metrics: what the last evaluation found, by name.
    """

    job: str
    numel: int
    ranks: list[RankResult]
    contributions: list[float]
    plan: str = ""
    deadline_s: float | None = None
    waiting_s: float | None = None
    metrics: dict[str, float] | None = None

    @property
    def wall_s(self) -> float:
        """Seconds until the last rank had made all steps."""
        return max(rank.wall_s for rank in self.ranks)

    @property
    def steps(self) -> int:
        """Updates of the parameters."""
        return self.ranks[0].steps

    @property
    def sent_bytes_per_step(self) -> float:
        """Bytes that a rank sent per step, the mean over ranks."""
        return float(np.mean([rank.bytes_sent_per_step for rank in self.ranks]))

    @property
    def received_bytes_per_step(self) -> float:
        """Bytes that a rank received per step, the mean over ranks."""
        return float(np.mean([rank.bytes_received_per_step for rank in self.ranks]))

    @property
    def fp32_bytes(self) -> int:
        """Bytes of the gradient in fp32."""
        return 4 * self.numel

    def save(self, folder: Path) -> None:
        """Write result.json."""
        (folder / "result.json").write_text(json.dumps(asdict(self), indent=2))

    @classmethod
    def load(cls, folder: Path) -> "JobResult":
        """Read what `save` wrote."""
        fields = json.loads((folder / "result.json").read_text())
        return cls(**fields | {"ranks": [RankResult(**rank) for rank in fields["ranks"]]})


def ring_bytes(numel: float, *, workers: int, bytes_per_coordinate: float = 4.0) -> float:
    """Return what each worker sends, and receives, in a ring all-reduce; gloo does not count its bytes."""
    return 2 * (workers - 1) / workers * bytes_per_coordinate * numel


def collect(
    job: str,
    model: nn.Module,
    journal: Journal,
    wall_s: float,
    *,
    state: qgc.QGCState | None,
    bytes_per_step: float | None = None,
    metrics: dict[str, float] | None = None,
) -> JobResult:
    """Gather what the ranks have to say. A collective; every rank gets the result.

    Args:
        wall_s: seconds this rank took for its steps.
        state: of a coded job; None for one that waits for all.
        bytes_per_step: sent (and received) by a rank of a job without state; None: those of DDP's fp32 ring.
    """
    workers = dist.get_world_size()
    numel = sum(p.numel() for p in model.parameters())
    report = state.report() if state else None
    ring = ring_bytes(numel, workers=workers) if bytes_per_step is None else bytes_per_step
    mine = RankResult(
        wall_s=wall_s,
        steps=state.step if state else journal.step,
        computed_steps=journal.computed,
        bytes_sent_per_step=report.bytes_sent_per_step if report else ring,
        parameter_hash=parameter_hash(model),
        missed=(report.late_steps + report.replayed_steps) / max(report.steps, 1) if report else 0.0,
        bytes_received_per_step=report.bytes_received / max(report.steps, 1) if report else ring,
    )
    gathered: list[Any] = [None] * workers
    dist.all_gather_object(gathered, (mine, journal.busy_s))
    ranks, busy_s = zip(*gathered)
    return JobResult(
        job=job,
        numel=numel,
        ranks=list(ranks),
        contributions=report.contributions.tolist() if report else [1.0] * workers,
        plan=str(state.plan) if state else "",
        deadline_s=state.rule.deadline_s if state else None,
        waiting_s=waiting_s(busy_s, range(1, mine.steps + 1)) if state else None,
        metrics=metrics,
    )


def waiting_s(busy_s: Sequence[Mapping[int, float]], steps: Sequence[int]) -> float:
    """Estimate how long the steps would have taken had each waited for its slowest worker.

        sum over steps of max over workers of the worker's own seconds

    A step that a worker did not compute counts with the mean of those it did. Communication is not counted, so
    a job that waits takes rather longer.

    Args:
        busy_s: for each worker, its seconds by step, without those in which it waited for others.
        steps: the steps' numbers.
    """
    means = [float(np.mean(list(own.values()))) if own else 0.0 for own in busy_s]
    return float(sum(max(own.get(step, mean) for own, mean in zip(busy_s, means)) for step in steps))
