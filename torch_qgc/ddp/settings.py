"""From the arguments of QGCState to what a job agrees on: bounds, plan, closing rule, contract."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch_qgc.errors import ConfigError
from torch_qgc.planner import Plan, make_plan
from torch_qgc.protocol.contract import ClosingRule, JobSpec
from torch_qgc.worker.layout import Layout

__all__ = ["UNKNOWN_LATE", "Limits", "choose_plan", "closing_rule", "job_spec"]

#: The chance to miss a round of a worker of which nothing is known yet.
UNKNOWN_LATE = 0.05


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds on memory and patience.

    Args:
        chunk_numel: coordinates per chunk (a multiple of 512). Smaller: more overlap, more overhead.
        max_staleness: how many steps old a late payload may be to be folded.
        log_steps, log_bytes: closed steps an aggregator keeps for late workers; whichever is less. A worker that
            is about to fall off the log is waited for.
        inbox_bytes: results a late worker keeps unread; what does not fit is asked for again.
        most_batch: the largest batch of a worker, in units of `batch_size`, that new plans may give it: it must fit
            into its memory. More: fast workers can make up for slower ones.
        join_timeout_s: how long the first step waits for workers.
        away_s: how long a worker whose connection is gone may take to come back before it counts as lost. A killed
            process costs steps that wait for all that long, once.
        stall_timeout_s: a worker that the others wait for counts as lost when its training thread gives no sign of
            life for that long. Longer than anything that a single rank does between two steps, such as an evaluation.
        silence_s: an aggregator that is silent for that long is gone.
    """

    chunk_numel: int = 1 << 20
    max_staleness: int = 32
    log_steps: int = 256
    log_bytes: int = 512 << 20
    inbox_bytes: int = 512 << 20
    most_batch: float = 2.0
    join_timeout_s: float = 300.0
    away_s: float = 3.0
    stall_timeout_s: float = 600.0
    silence_s: float = 30.0


def choose_plan(
    plan: Plan | None, workers: int, straggle_probs: Sequence[float] | None, bits_per_coordinate: float
) -> Plan:
    """Return the plan, or make one from straggle probabilities.

    Raises:
        ConfigError: a plan and straggle probabilities.
    """
    if plan is None:
        probs = [UNKNOWN_LATE] * workers if straggle_probs is None else list(straggle_probs)
        return make_plan(probs, bits_per_coordinate=bits_per_coordinate, decoder="annealed")
    if straggle_probs is not None:
        raise ConfigError("expected a plan or straggle_probs, got both: the plan already holds them")
    return plan


def closing_rule(
    *,
    workers: int,
    deadline_s: float | Literal["auto"] | None,
    late: Literal["fold", "drop"],
    warmup_steps: int,
    quorum: int | None,
    on_loss: Literal["continue", "fail"],
    limits: Limits,
) -> ClosingRule:
    """Return the rule of a DDP job; see `QGCState`.

    Raises:
        ConfigError: a value out of range.
    """
    if warmup_steps < 2:
        raise ConfigError(f"warmup_steps: expected at least 2 (DDP rebuilds its buckets then), got {warmup_steps}")
    return ClosingRule(
        deadline_s=deadline_s,
        late=late,
        warmup_steps=warmup_steps,
        quorum=quorum if quorum is not None else max(1, workers // 2),
        max_staleness=limits.max_staleness,
        on_loss=on_loss,
    )


def job_spec(
    layout: Layout,
    plan: Plan,
    rule: ClosingRule,
    *,
    workers: int,
    seed: int,
    aggregators: int,
    downlink_bits: int,
    verify_every: int,
    replan_every: int,
    control_variates: bool,
    limits: Limits,
    one_group: bool,
) -> JobSpec:
    """Return what all workers and aggregators of a DDP job must agree on, validated.

    Raises:
        ConfigError: values that cannot be, or contradict each other.
    """
    spec = JobSpec(
        workers=workers,
        numel=layout.numel,
        chunk_numel=layout.chunk_numel,
        layout_digest=layout.digest,
        plan_digest=plan.digest(),
        first_step=0,
        seed=seed,
        aggregators=aggregators,
        downlink_bits=downlink_bits,
        rule=rule,
        verify_every=verify_every,
        replan_every=replan_every,
        control_variates=control_variates,
        most_batch=limits.most_batch,
        log_steps=limits.log_steps,
        log_bytes=limits.log_bytes,
        join_timeout_s=limits.join_timeout_s,
        away_s=limits.away_s,
        stall_timeout_s=limits.stall_timeout_s,
        one_group=one_group,
    )
    spec.validate(plan)
    return spec
