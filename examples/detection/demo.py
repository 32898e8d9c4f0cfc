"""The demo: some jobs live, one seed, with a table, pictures and a report."""

import csv
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import torch
from common import result
from rich.console import Console
from torch import nn

from detection import comparison, curves, evaluation, plots, report
from detection.comparison import VAL_IMAGES, Outcome
from detection.data import CocoImages
from detection.settings import Settings

#: What is trained by default: ours and the two strongest of the others, which the benchmark has found.
JOBS = ("fast", "arrivals", "qgc")
PANELS = ("moves",)
TUNED = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "demo_lr.csv"
PICTURED = 4


def tuned_lr(panel: str, job: str) -> float:
    """Return the learning rate that did best for a job when three were tried, or the default."""
    if not TUNED.exists():
        return Settings.lr
    with TUNED.open(newline="") as file:
        tried = [row for row in csv.DictReader(file) if (row["panel"], row["job"]) == (panel, job)]
    return float(max(tried, key=lambda row: float(row["ap50"]))["lr"]) if tried else Settings.lr


def run(script: Path, chosen: Sequence[Settings], folder: Path, console: Console) -> None:
    """Train the jobs, judge all, and write tables, pictures and the report to `folder`."""
    done = [(s, comparison.run(script, s, console, title=f"{s.variant.title} ({s.panel})")) for s in chosen]
    outcomes = comparison.judge(done, console)
    shared = chosen[0]
    data, val = CocoImages(shared.data, "train"), CocoImages(shared.data, "val", limit=VAL_IMAGES)
    slow_names = [val.categories[label - 1] for label in comparison.slow_labels(data, shared)]
    panels: dict[str, Sequence[Outcome]] = {}
    for panel, group in groupby(outcomes, key=lambda outcome: outcome.settings.panel):
        panels[panel] = found = list(group)
        curves.curves(found, folder / f"{panel}_curves.png")
        plots.detections(
            {o.title: _model(o, data) for o in found}, val, folder / f"{panel}_detections.png", count=PICTURED
        )
        result.show([o.result for o in found], console, report.rows(found, slow_names))
    (folder / "report.md").write_text(report.markdown(panels, shared, slow_names))
    console.print(f"Pictures and report: {folder}")


def _model(outcome: Outcome, data: CocoImages) -> nn.Module:
    s = outcome.settings
    last = torch.load(evaluation.snapshots(s.folder)[-1], weights_only=True)
    return comparison.load(s, last["model"], data)
