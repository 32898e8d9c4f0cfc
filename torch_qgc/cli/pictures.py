"""Pictures of plans. They need matplotlib, which the extra `torch_qgc[bench]` installs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, get_args

import numpy as np
from numpy.typing import ArrayLike

from torch_qgc.errors import PlanError
from torch_qgc.planner import Plan, PlanOptions, make_plan
from torch_qgc.planner.bits import Method

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["budget_picture", "figure", "plan_picture", "save", "shares_picture"]

_BITS_SHOWN = range(2, 9)
_MOST_WORKERS = 100  # with more, running all allocators at all budgets takes too long for a picture


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


def figure(columns: int) -> tuple[Figure, list[Axes]]:
    """Return a figure and its axes, from left to right."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("expected matplotlib for pictures, got none: pip install 'torch_qgc[bench]'") from error
    picture = Figure(figsize=(4.8 * columns, 3.4), layout="constrained")
    return picture, list(picture.subplots(1, columns, squeeze=False)[0])


def save(picture: Figure, path: Path) -> None:
    """Write a figure to a file."""
    known = picture.canvas.get_supported_filetypes()
    if path.suffix.lstrip(".") not in known:
        raise PlanError(f"{path}: expected a name that ends in one of {', '.join(sorted(known))}, got {path.suffix!r}")
    picture.savefig(path, dpi=110)


def shares_picture(axes: Axes, plan: Plan) -> None:
    """Draw shares as bars, and bits above them."""
    workers = np.arange(plan.num_workers)
    axes.bar(workers, plan.shares, color="#4c78a8", label="share")
    axes.set(xlabel="worker", ylabel="share of the data")
    bits = axes.twinx()
    bits.plot(workers, plan.bits, "o", color="#f58518", label="bits")
    bits.set(ylabel="bits per coordinate", ylim=(0, max(int(plan.bits.max()), 1) * 1.1))
    bits.yaxis.label.set_color("#f58518")
    axes.yaxis.label.set_color("#4c78a8")


def budget_picture(axes: Axes, straggle_probs: ArrayLike, options: PlanOptions, num_partitions: int) -> None:
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
