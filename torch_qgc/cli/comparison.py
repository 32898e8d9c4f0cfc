"""The error of a plan, and of the other schemes at the same bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from torch_qgc import schemes
from torch_qgc.errors import PlanError
from torch_qgc.planner import Plan, PlanOptions
from torch_qgc.planner.checks import Floats
from torch_qgc.planner.rules import FIXED

__all__ = ["Budget", "Row", "compare"]

_ENUMERATED_WORKERS = 10
_DRAWN_PATTERNS = 2000
_MOST_WORKERS = 64  # with more, decoders that solve a system per round take too long

_SCHEMES: dict[str, tuple[Callable[..., Plan], dict[str, Any]]] = {
    "osgc": (schemes.osgc, {}),
    "is_sgd": (schemes.is_sgd, {}),
    "is_sgd, by count": (schemes.is_sgd, {"decode": "count"}),
    "is_sgd, unbiased": (schemes.is_sgd, {"decode": "unbiased"}),
    "bgc": (schemes.bgc, {}),
    "sgc": (schemes.sgc, {}),
    "erasurehead": (schemes.erasurehead, {"decode": "average"}),
    "optimal_decoding": (schemes.optimal_decoding, {}),
    "expander": (schemes.expander, {}),
    "fractional_repetition": (schemes.fractional_repetition, {"decode": "average"}),
    "cyclic_mds": (schemes.cyclic_mds, {}),
    "1-bit sgc": (schemes.one_bit_sgc, {}),
}


class Budget(TypedDict):
    """The arguments of `make_plan`, and of every scheme, that say how many bits and partitions there are."""

    bits_per_coordinate: float | None
    bit_budget: int | None
    num_partitions: int | None


@dataclass(frozen=True)
class Row:
    """One scheme: bits per coordinate over all workers, load, and error.

    Attributes:
        residual: relative error of a round if all partitions have the same gradient.
        residual_orthogonal: relative error of a round if the gradients of different partitions are orthogonal.
        bias_orthogonal: the part of the latter that is bias.
    """

    name: str
    bits: float
    load: float
    residual: float
    residual_orthogonal: float
    bias_orthogonal: float


def compare(plan: Plan, budget: Budget, options: PlanOptions) -> list[Row]:
    """Return the plan's row, then those of all schemes that exist for as many workers and bits.

    Random codes are drawn once, with seed 0. Beyond 64 workers there is the plan's row alone, and not even that if its
    coefficients depend on who else arrives.

    Args:
        plan: from `make_plan`.
        budget: what the plan was made from; all schemes get the same.
        options: those of the plan; norm, variance and batch noise hold for all schemes.
    """
    if plan.num_workers > _MOST_WORKERS:
        return [_row("qgc", plan, plan.variance)] if plan.decoder in FIXED else []
    rows = []
    eta = options.batch_noise(plan.num_workers)
    told = {"norm": options.norm, "variance": options.variance, **budget}
    for name, (make, how) in _SCHEMES.items():
        try:
            other = make(plan.straggle_probs, **told, **how)
        except PlanError:
            continue  # no such code for this number of workers, partitions or bits
        rows.append(_row(name, other, other.variance * (1.0 + eta) + eta))
    return [_row("qgc", plan, plan.variance), *sorted(rows, key=lambda row: row.residual)]


def _row(name: str, plan: Plan, variance: Floats) -> Row:
    few = plan.num_workers <= _ENUMERATED_WORKERS or plan.decoder in FIXED
    masks: Literal["exact"] | int = "exact" if few else _DRAWN_PATTERNS
    aligned = schemes.round_error(plan, "aligned", masks, variance=variance)
    orthogonal = schemes.round_error(plan, "orthogonal", masks, variance=variance)
    return Row(name, plan.spent_bits, plan.load, aligned.total, orthogonal.total, orthogonal.bias)
