"""Decode rules of the codes that torch_qgc is compared with. They take weights of any sign and balance.

Worker k sends Q(h_k), h_k = sum_n w_kn gbar_n / sum_n |w_kn|; a rule returns the coefficient of Q(h_k). Solving
for w on the rows W_S of those who are in, the coefficient is w_k sum_n |w_kn|.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torch_qgc.errors import PlanError
from torch_qgc.planner.checks import Floats, Received, Rule
from torch_qgc.planner.fields import PlanFields
from torch_qgc.planner.shares import dense_rows

__all__ = ["BASELINE_RULES", "dense_weights", "solve"]

# Rules that solve a system per round need dense rows, and time cubic in the workers: they are for smaller jobs.
_DENSE_WORKERS = 4096
_DENSE_ENTRIES = 1 << 26
# A sum of gradients counts as recovered if no partition is off by more than this fraction.
_EXACT = 1e-7


def dense_weights(plan: PlanFields, rule: str) -> Floats:
    """Return weights [K, C] as an array for a rule that solves a system per round.

    Raises:
        PlanError: more than 4096 workers.
    """
    if plan.num_workers > _DENSE_WORKERS:
        raise PlanError(f"expected at most {_DENSE_WORKERS} workers for {rule!r}, got {plan.num_workers}; use 'hajek'")
    return dense_rows(plan.weights, 0, plan.num_workers)


def _homogeneous(plan: PlanFields) -> Rule:
    """c_k = m_k / (1 - mean p): all workers are taken for equally reliable."""
    rate = 1.0 - float(plan.straggle_probs.mean())
    scaled = plan.shares / rate if rate > 0 else np.zeros_like(plan.shares)
    return lambda received: scaled * (received.arrived > 0)


def _arrival_count(plan: PlanFields) -> Rule:
    """c_k = m_k K / |S|, S the arrivals: they are scaled up to K workers."""
    scaled = plan.shares * plan.num_workers

    def rule(received: Received) -> Floats:
        return scaled * (received.arrived > 0) / max(float(np.sum(received.arrived)), 1.0)

    return rule


def _one_per_group(plan: PlanFields) -> Rule:
    """Take one arrival of every group of workers with the same data; a group without one is left out (ErasureHead)."""
    return _first_of_groups(plan, "one_per_group", all_or_nothing=False)


def _one_of_every_group(plan: PlanFields) -> Rule:
    """The same, but the round decodes to zero if a group has no arrival (Tandon et al.'s fractional repetition)."""
    return _first_of_groups(plan, "one_of_every_group", all_or_nothing=True)


def _first_of_groups(plan: PlanFields, name: str, *, all_or_nothing: bool) -> Rule:
    rows = dense_weights(plan, name)
    _, group = np.unique(rows.round(12), axis=0, return_inverse=True)
    group = group.reshape(-1)
    mass = np.bincount(group, weights=plan.shares)
    least_noise_first = np.argsort(plan.variance, kind="stable")

    def rule(received: Received) -> Floats:
        arrived = received.arrived
        present = least_noise_first[arrived[least_noise_first] > 0]
        groups, first = np.unique(group[present], return_index=True)
        coefficients = np.zeros(len(group))
        if all_or_nothing and len(groups) < len(mass):
            return coefficients
        chosen = present[first]
        coefficients[chosen] = mass[groups] / arrived[chosen]
        return coefficients

    return rule


def _least_squares(plan: PlanFields) -> Rule:
    """w = argmin ||W_S^T w - s||, the shortest one if there are several (Glasgow and Wootters' decoding)."""
    return _solver(plan, "least_squares", must_be_exact=False)


def _exact(plan: PlanFields) -> Rule:
    """w with W_S^T w = s, the shortest one; if there is none the round decodes to zero (Tandon et al.)."""
    return _solver(plan, "exact", must_be_exact=True)


def _solver(plan: PlanFields, name: str, *, must_be_exact: bool) -> Rule:
    rows = dense_weights(plan, name)
    target = plan.partition_fractions
    return lambda received: solve(rows, target, received.arrived, must_be_exact=must_be_exact)


def solve(rows: Floats, target: Floats, arrived: NDArray[Any], *, must_be_exact: bool) -> Floats:
    """Return the coefficients that turn the payloads of those who are in into the target, as nearly as they can.

    Args:
        rows: [K, C] weights.
        target: [C] sum of the columns' gradients that is wanted, or [m, C] several of them.
        arrived: [K] bool or counts.
        must_be_exact: all zeros if one of the targets is missed.
    Returns:
        [K] or [m, K], the coefficient of each contribution.
    """
    mass = np.abs(rows).sum(axis=1)
    coefficients = np.zeros((*target.shape[:-1], len(rows)))
    present = np.flatnonzero((arrived > 0) & (mass > 0))
    if present.size:
        system = rows[present].T
        found = np.linalg.lstsq(system, target.T, rcond=1e-12)[0]
        missed = float(np.abs(system @ found - target.T).max())
        if not must_be_exact or missed <= _EXACT * float(target.max()):
            coefficients[..., present] = found.T * mass[present] / arrived[present]
    return coefficients


BASELINE_RULES: dict[str, Callable[[PlanFields], Rule]] = {
    "homogeneous": _homogeneous,
    "arrival_count": _arrival_count,
    "one_per_group": _one_per_group,
    "one_of_every_group": _one_of_every_group,
    "least_squares": _least_squares,
    "exact": _exact,
}
