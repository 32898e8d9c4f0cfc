"""Check that the fields of a plan agree with each other."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from torch_qgc.errors import PlanError
from torch_qgc.planner import rules, shares
from torch_qgc.planner.fields import PlanFields

__all__ = ["check"]


def check(plan: PlanFields) -> None:
    """Check everything that fields promise about each other.

    Raises:
        PlanError: anything inconsistent.
    """
    _check_names(plan)
    if plan.bit_budget is not None:
        if not isinstance(plan.bit_budget, int):
            raise PlanError(f"bit_budget: expected a whole number or None, got {plan.bit_budget!r}")
        if plan.spent_bits > plan.bit_budget:
            raise PlanError(f"bits: expected at most {plan.bit_budget} bits over all workers, got {plan.spent_bits:g}")
    _ = plan.partition_fractions  # refuses sizes that are not positive and finite
    balanced = not rules.BALANCED.isdisjoint({plan.decoder, plan.second_track})
    if balanced:
        _check_shares(plan)
    if balanced and not np.all(shares.stored_entries(plan.weights) >= 0):
        raise PlanError("weights: expected entries >= 0 (they are sampling probabilities), got a negative one or NaN")
    _check_rows(plan)
    if balanced:
        _check_columns(plan)


def _check_names(plan: PlanFields) -> None:
    if plan.decoder not in rules.RULES:
        raise PlanError(f"decoder: expected one of {', '.join(rules.DECODERS)}, got {plan.decoder!r}")
    if plan.second_track is not None and plan.second_track not in rules.SECOND_TRACKS:
        raise PlanError(
            f"second_track: expected None or one of {', '.join(rules.SECOND_TRACKS)}, got {plan.second_track!r}"
        )
    if plan.norm not in ("max", "l2"):
        raise PlanError(f"norm: expected 'max' or 'l2', got {plan.norm!r}")
    if not 1.0 <= plan.burst < math.inf:
        raise PlanError(
            f"burst: expected a finite number >= 1, got {plan.burst}: below 1 even workers that are in every round "
            "would count too little; without a bound take decoder 'unbiased'"
        )
    if not 0.0 < plan.second_track_alpha < math.inf:
        raise PlanError(f"second_track_alpha: expected a finite weight > 0, got {plan.second_track_alpha}")
    if not 0.0 <= plan.gradient_correlation <= 1.0:
        raise PlanError(f"gradient_correlation: expected a number in [0, 1], got {plan.gradient_correlation}")


def _check_shares(plan: PlanFields) -> None:
    if abs(float(plan.shares.sum()) - 1.0) > 1e-9:
        raise PlanError(f"shares: expected sum 1, got {float(plan.shares.sum())!r}; divide them by their sum")
    mute = np.flatnonzero((plan.shares > 0) & ((plan.straggle_probs >= 1.0) | np.isinf(plan.variance)))
    if mute.size:
        raise PlanError(
            f"shares: expected share 0 for a worker that never arrives or sends no bits, got "
            f"{plan.shares[mute[0]]:.4g} for worker {mute[0]}: its data would be missing"
        )


def _check_rows(plan: PlanFields) -> None:
    """Check sum_n |w_kn| = N m_k."""
    if not np.all(np.isfinite(shares.stored_entries(plan.weights))):
        raise PlanError("weights: expected finite entries, got others")
    n = plan.num_partitions
    magnitudes: Any = abs(plan.weights)
    gap = np.asarray(magnitudes.sum(axis=1)) - n * plan.shares
    worst = int(np.argmax(np.abs(gap)))
    if abs(gap[worst]) > 1e-9 * n:
        raise PlanError(
            f"weights: expected rows whose magnitudes sum to N m_k, got row of worker {worst} off by "
            f"{gap[worst]:.3g} (see torch_qgc.planner.segment_weights)"
        )


def _check_columns(plan: PlanFields) -> None:
    """Check sum_k a_kn = s_n: else no coefficients make the gradient unbiased."""
    n = plan.num_partitions
    gap = np.asarray(plan.weights.sum(axis=0)) - n * plan.partition_fractions
    worst = int(np.argmax(np.abs(gap)))
    if abs(gap[worst]) > 1e-9 * n:
        raise PlanError(
            f"weights: expected columns to sum to N s_n, got column of partition {worst} off by "
            f"{gap[worst]:.3g} (see torch_qgc.planner.segment_weights)"
        )
