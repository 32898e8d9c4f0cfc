"""Pictures of plans. They need matplotlib, which the extra `torch_qgc[bench]` brings."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np

from torch_qgc.errors import PlanError
from torch_qgc.planner import Plan, PlanOptions, make_plan
from torch_qgc.planner.bits import Method

__all__ = ["budget_picture", "figure", "plan_picture", "save", "shares_picture"]

_BITS_SHOWN = range(2, 9)
_MOST_WORKERS = 100  # for which all allocators run at all budgets in a moment


def plan_picture(plan: Plan, path: Path, options: PlanOptions) -> None:
    """Save shares and bits per worker, and the residual of every allocator against the budget.

    Raises:
        ImportError: no matplotlib.
        PlanError: a suffix that is no picture format.
    """
    picture, (left, right) = figure(2)
    shares_picture(left, plan)
    if plan.num_workers <= _MOST_WORKERS:
        budget_picture(right, plan.straggle_probs, options, plan.num_partitions)
    else:
        right.set_axis_off()
    save(picture, path)


def figure(columns: int) -> tuple[Any, Any]:
    """Return a figure and its axes, side by side."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("expected matplotlib for pictures, got none: pip install 'torch_qgc[bench]'") from error
    picture = Figure(figsize=(4.8 * columns, 3.4), layout="constrained")
    return picture, picture.subplots(1, columns)


def save(picture: Any, path: Path) -> None:
    """Write a figure to a file."""
    known = picture.canvas.get_supported_filetypes()
    if path.suffix.lstrip(".") not in known:
        raise PlanError(f"{path}: expected a name that ends in one of {', '.join(sorted(known))}, got {path.suffix!r}")
    picture.savefig(path, dpi=110)


def shares_picture(axes: Any, plan: Plan) -> None:
    """Draw shares as bars, and bits above them."""
    workers = np.arange(plan.num_workers)
    axes.bar(workers, plan.shares, color="#4c78a8", label="share")
    axes.set(xlabel="worker", ylabel="share of the data")
    bits = axes.twinx()
    bits.plot(workers, plan.bits, "o", color="#f58518", label="bits")
    bits.set(ylabel="bits per coordinate", ylim=(0, max(int(plan.bits.max()), 1) * 1.1))
    bits.yaxis.label.set_color("#f58518")
    axes.yaxis.label.set_color("#4c78a8")


def budget_picture(axes: Any, straggle_probs: Any, options: PlanOptions, num_partitions: int) -> None:
    """Draw the residual of every allocator against the mean bits, as Song & Choi do in their Fig. 1."""
    styles = dict(zip(get_args(Method), ("-", ":", "--", "x", "+", ".")))
    for method, style in styles.items():
        plans = [
            make_plan(
                straggle_probs, bits_per_coordinate=b, num_partitions=num_partitions, options=options, allocator=method
            )
            for b in _BITS_SHOWN
        ]
        axes.semilogy(list(_BITS_SHOWN), [plan.residual_bound for plan in plans], style, label=method.replace("_", " "))
    axes.set(xlabel="bits per coordinate, mean over workers", ylabel="residual")
    axes.legend(fontsize="small")
