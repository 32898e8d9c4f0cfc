"""The closing report of an example: the plan, who was late how often, bytes against fp32, time against waiting."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from common.result import JobResult


def show(result: JobResult, console: Console) -> None:
    """Print the closing report of one job."""
    if result.plan:
        console.print("The plan", style="bold")
        console.print(result.plan, highlight=False, soft_wrap=True)
        closes = f"after {result.deadline_s:.3g} s" if result.deadline_s else "when all are in"
        console.print(f"Steps close {closes}.", highlight=False)
    table = Table(title=f"Workers, over {result.steps} steps", title_justify="left")
    for column in ("worker", "late", "computed", "replayed", "used per step", "sent per step", "received per step"):
        table.add_column(column, justify="right")
    for number, (rank, used) in enumerate(zip(result.ranks, result.contributions)):
        table.add_row(
            str(number),
            f"{rank.missed:.0%}",
            str(rank.computed_steps),
            str(rank.steps - rank.computed_steps),
            f"{used:.2f}",
            mebibytes(rank.bytes_sent_per_step),
            mebibytes(rank.bytes_received_per_step),
        )
    console.print(table)
    for line in summary(result):
        console.print(line, highlight=False)


def summary(result: JobResult) -> list[str]:
    """Return the report's last lines: bytes, time, metrics and whether the replicas agree."""
    sent = result.sent_bytes_per_step
    lines = [
        f"Sent per worker and step: {mebibytes(sent)}, {sent / result.fp32_bytes:.3f} of the gradient in fp32 "
        f"({mebibytes(result.fp32_bytes)})"
    ]
    per_step_s = result.wall_s / max(result.steps, 1)
    took = f"Time: {result.wall_s:.1f} s, {per_step_s:.3f} s per step"
    if result.waiting_s is None:
        lines.append(f"{took}; every step waited for its slowest worker")
    else:
        saved_s = result.waiting_s - result.wall_s
        lines.append(
            f"{took}; {abs(saved_s):.1f} s {'saved' if saved_s >= 0 else 'lost'} against waiting for all, which would "
            f"have taken {result.waiting_s:.1f} s at least (the slowest worker's own seconds, summed over the steps)"
        )
    if result.metrics:
        lines.append("Validation: " + ", ".join(f"{name} {value:.3f}" for name, value in result.metrics.items()))
    return [*lines, f"Parameters of all workers: {agreement(result)}"]


def mebibytes(count: float) -> str:
    """Format bytes."""
    return f"{count / 2**20:.2f} MiB"


def agreement(result: JobResult) -> str:
    """Say whether the workers' parameters are bit-identical: their hash, or the hashes that differ."""
    hashes = sorted({rank.parameter_hash for rank in result.ranks})
    return f"{hashes[0]}, equal" if len(hashes) == 1 else f"DIFFER: {' '.join(hashes)}"


def comparison(results: Mapping[str, JobResult]) -> Table:
    """Return a table of jobs that trained the same model in different ways, by title."""
    table = Table(title="The same model, data, seeds and delays")
    table.add_column("")
    for title in results:
        table.add_column(title, justify="right")
    for name, values in comparison_rows(list(results.values())):
        table.add_row(name, *values)
    return table


def comparison_rows(results: Sequence[JobResult]) -> list[tuple[str, list[str]]]:
    """Return the rows of `comparison`: what it is, and its value for each job."""
    names = list((results[0].metrics or {}) if results else {})
    rows = [
        ("time per step", [f"{1000 * r.wall_s / r.steps:.0f} ms" for r in results]),
        ("wall time", [f"{r.wall_s:.0f} s" for r in results]),
        ("sent per worker and step", [mebibytes(r.sent_bytes_per_step) for r in results]),
        ("received per worker and step", [mebibytes(r.received_bytes_per_step) for r in results]),
        ("steps missed, by worker", [" ".join(f"{100 * k.missed:.0f}" for k in r.ranks) + " %" for r in results]),
    ]
    rows += [(f"final {name}", [f"{(r.metrics or {})[name]:.3f}" for r in results]) for name in names]
    return [*rows, ("parameters of all workers", [agreement(r) for r in results])]


def write_csv(results: Mapping[str, JobResult], path: Path) -> None:
    """Write a comparison as numbers: a line per job."""
    rows = [
        {
            "way": title,
            "workers": len(result.ranks),
            "steps": result.steps,
            "wall_s": round(result.wall_s, 3),
            "step_s": round(result.wall_s / result.steps, 4),
            "sent_bytes_per_step": round(result.sent_bytes_per_step),
            "received_bytes_per_step": round(result.received_bytes_per_step),
            "fp32_bytes": result.fp32_bytes,
            "missed": " ".join(f"{rank.missed:.3f}" for rank in result.ranks),
        }
        | {name: round(value, 5) for name, value in (result.metrics or {}).items()}
        for title, result in results.items()
    ]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
