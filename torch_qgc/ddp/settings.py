"""Bounds and agreements of a job: what is not about the model and not about the plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch_qgc.errors import ConfigError
from torch_qgc.job.rounds import ClosingRule
from torch_qgc.planner import Plan, make_plan
from torch_qgc.protocol.messages import JobSpec
from torch_qgc.worker.layout import Layout

__all__ = ["Limits", "Settings", "choose_plan"]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds on memory and patience.

    Args:
        chunk_numel: coordinates per chunk (a multiple of 512). Smaller: more overlap, more overhead.
        max_staleness: how many steps old a late payload may be to be folded.
        log_steps, log_bytes: closed steps an aggregator keeps for late workers; whichever is less. A worker that
            is about to fall off the log is waited for.
        inbox_bytes: results a late worker keeps unread; what does not fit is asked for again.
        join_timeout_s: how long the first step waits for workers.
        silence_s: an aggregator that is silent for that long is gone.
    """

    chunk_numel: int = 1 << 20
    max_staleness: int = 8
    log_steps: int = 256
    log_bytes: int = 512 << 20
    inbox_bytes: int = 512 << 20
    join_timeout_s: float = 300.0
    silence_s: float = 30.0


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What QGCState was asked for, checked.

    Raises:
        ConfigError: a value out of range, or a plan for another number of workers.
    """

    workers: int
    plan: Plan
    rule: ClosingRule
    downlink_bits: int
    aggregators: int
    verify_every: int
    limits: Limits

    def __post_init__(self) -> None:
        if self.plan.num_workers != self.workers:
            raise ConfigError(
                f"plan: expected one for {self.workers} workers (the process group's size), got one for "
                f"{self.plan.num_workers}: make_plan needs one straggle probability per rank"
            )
        if self.rule.warmup_steps < 2:
            raise ConfigError(
                f"warmup_steps: expected at least 2 (DDP rebuilds its buckets then), got {self.rule.warmup_steps}"
            )
        if self.downlink_bits != 32 and not 2 <= self.downlink_bits <= 16:
            raise ConfigError(f"downlink_bits: expected 2..16, or 32 for fp32, got {self.downlink_bits}")
        if not 1 <= self.aggregators <= self.workers:
            raise ConfigError(
                f"aggregators: expected 1..{self.workers} (one per worker at most), got {self.aggregators}"
            )
        if self.verify_every < 0:
            raise ConfigError(f"verify_every: expected a number of steps, or 0 for never, got {self.verify_every}")

    def job_spec(self, layout: Layout, *, first_step: int, seed: int, tracks: int, aggregators: int) -> JobSpec:
        """Return what all workers and aggregators of this job must agree on."""
        return JobSpec(
            workers=self.workers,
            numel=layout.numel,
            chunk_numel=layout.chunk_numel,
            layout_digest=layout.digest,
            plan_digest=self.plan.digest(),
            first_step=first_step,
            seed=seed,
            aggregators=aggregators,
            tracks=2 if tracks == 2 else 1,
            downlink_bits=self.downlink_bits,
            deadline_s=self.rule.deadline_s,
            warmup_steps=self.rule.warmup_steps,
            quorum=self.rule.quorum,
            late=self.rule.late,
            max_staleness=self.rule.max_staleness,
            verify_every=self.verify_every,
            log_steps=self.limits.log_steps,
            log_bytes=self.limits.log_bytes,
            join_timeout_s=self.limits.join_timeout_s,
        )


def choose_plan(
    plan: Plan | None, workers: int, straggle_probs: Sequence[float] | None, bits_per_coordinate: float
) -> Plan:
    """Return the plan, or make one from straggle probabilities: noise-aware, with a second track for Adam.

    Raises:
        ConfigError: a plan and straggle probabilities.
    """
    if plan is None:
        probs = [0.05] * workers if straggle_probs is None else list(straggle_probs)
        return make_plan(probs, bits_per_coordinate=bits_per_coordinate, noise_ratio=1.0, second_track="hajek")
    if straggle_probs is not None:
        raise ConfigError("expected a plan or straggle_probs, got both: the plan already holds them")
    return plan
