"""Tables on stdout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from rich.console import Console
from rich.table import Table

from torch_qgc.cli.comparison import Row
from torch_qgc.cli.delays import Lateness
from torch_qgc.planner import Plan
from torch_qgc.planner.shares import error_factors

__all__ = ["make_table", "print_comparison", "print_facts", "print_plan"]

_ROWS_SHOWN = 32


def print_plan(plan: Plan, late: Lateness) -> None:
    """Print a row per worker, and what holds for all of them."""
    batch = ["batch"] if np.any(plan.batches != 1.0) else []
    at = "" if late.deadline_s is None else f", deadline {late.deadline_s:.4g} s"
    at += "" if late.speedup is None else f" ({late.speedup:.2f} times as fast as waiting for all)"
    table = make_table(
        f"{plan.num_workers} workers, {plan.spent_bits:g} bits per coordinate in all, load {plan.load:.3g}, "
        f"{plan.decoder}{at}",
        ("worker", "late", "bits", *batch, "share", "coefficient", "utility"),
    )
    coefficients = plan.coefficients(np.ones(plan.num_workers, dtype=bool))
    utility = 1.0 / error_factors(plan.straggle_probs, plan.variance)
    for k in range(min(plan.num_workers, _ROWS_SHOWN)):
        table.add_row(
            str(k),
            f"{plan.straggle_probs[k]:.4g}",
            str(plan.bits[k]),
            *(f"{plan.batches[k]:.3g}" for _ in batch),
            f"{plan.shares[k]:.4f}",
            f"{coefficients[k]:.4f}",
            f"{utility[k]:.4g}",
        )
    if plan.num_workers > _ROWS_SHOWN:
        table.caption = f"and {plan.num_workers - _ROWS_SHOWN} more workers: see --out or --json"
    Console().print(table)


def print_comparison(rows: Sequence[Row]) -> None:
    """Print the error of the plan beside that of other schemes."""
    table = make_table(
        "error of a round, E||decoded - g||² / ||g||²; bias counts in it",
        ("scheme", "bits", "load", "equal gradients", "orthogonal", "of it bias"),
    )
    for row in rows:
        numbers = (row.residual, row.residual_orthogonal, row.bias_orthogonal)
        table.add_row(
            row.name, f"{row.bits:g}", f"{row.load:.3g}", *(f"{x:.3g}" if x > 1e-12 else "0" for x in numbers)
        )
    Console().print(table)


def print_facts(facts: Mapping[str, str]) -> None:
    """Print names and values."""
    table = make_table("torch_qgc on this machine", ("what", "found"))
    table.columns[1].justify = "left"
    for name, value in facts.items():
        table.add_row(name, value)
    Console().print(table)


def make_table(title: str, columns: Sequence[str]) -> Table:
    """Return an empty table: the first column of words, the others of numbers."""
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    return table
