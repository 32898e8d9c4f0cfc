"""Which plans a job can train with: others are for comparisons and for the simulator."""

from __future__ import annotations

import numpy as np

from torch_qgc.errors import PlanError
from torch_qgc.planner import rules
from torch_qgc.planner.checks import Received
from torch_qgc.planner.fields import PlanFields
from torch_qgc.planner.shares import stored_entries

__all__ = ["check"]


def check(plan: PlanFields) -> None:
    """Check that workers can draw samples by this plan and that what they send can be decoded.

    Raises:
        PlanError: stochastic signs, data at a worker that sends nothing, gradients to be subtracted, coefficients that
            are not finite, or a second track that is not a multiple of the first.
    """
    signs = np.flatnonzero(plan.bits == 1)
    if signs.size:
        raise PlanError(
            f"bits: expected 0, 2 .. 16 or 32 to train with, got 1 for worker {signs[0]}: stochastic signs are for "
            "comparisons, train with a plan of make_plan"
        )
    mute = np.flatnonzero((plan.bits == 0) & (plan.shares > 0))
    if mute.size:
        raise PlanError(
            f"bits: expected at least 2 for a worker with data, got 0 for worker {mute[0]} with share "
            f"{plan.shares[mute[0]]:.4g}: give it bits, or its data to others"
        )
    least = float(stored_entries(plan.weights).min(initial=0.0))
    if least < 0:
        raise PlanError(
            f"weights: expected entries >= 0 to draw samples by, got {least:.3g}: codes that subtract gradients are "
            "for comparisons, train with a plan of make_plan"
        )
    rules.second_scale(plan)  # refuses tracks that are no multiples of each other
    everybody = np.ones(plan.num_workers, dtype=bool)
    corrected = rules.corrected_shares(plan.shares, 1.0 - plan.straggle_probs)
    coefficients = rules.RULES[plan.decoder](plan)(Received(everybody, corrected, 1.0))
    infinite = np.flatnonzero(~np.isfinite(coefficients))
    if infinite.size:
        raise PlanError(
            f"coefficients: expected finite numbers, got {coefficients[infinite[0]]} for worker {infinite[0]}: scale "
            "weights so that shares sum to 1"
        )
