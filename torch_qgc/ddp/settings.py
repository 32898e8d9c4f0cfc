"""Bounds of a job, and the plan it takes if it is given none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch_qgc.errors import ConfigError
from torch_qgc.planner import Plan, make_plan

__all__ = ["Limits", "choose_plan"]


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
