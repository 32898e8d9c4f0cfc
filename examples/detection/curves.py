"""Curves over time and over steps."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

# Okabe and Ito's, told apart by colour-blind readers, too.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9")

Curve = Sequence[tuple[int, float, float]]  # step, seconds, value


def curves(panels: Mapping[str, Mapping[str, Curve]], path: Path) -> None:
    """Draw every job's curve against seconds and against steps.

    Args:
        panels: a row of two pictures for each quantity, by its name: the jobs' curves, by title.
        path: of the PNG.
    """
    figure = Figure(figsize=(10, 4 * len(panels)), layout="constrained")
    rows = figure.subplots(len(panels), 2, sharey="row", squeeze=False)
    for (quantity, jobs), (by_time, by_step) in zip(panels.items(), rows):
        for (title, curve), colour in zip(jobs.items(), COLOURS):
            steps, times_s, values = zip(*curve)
            by_time.plot(times_s, values, "o-", markersize=3, color=colour, label=title)
            by_step.plot(steps, values, "o-", markersize=3, color=colour)
        by_time.set(xlabel="seconds", ylabel=quantity, xlim=(0, None))
        by_step.set(xlabel="steps", xlim=(0, None))
        for axes in (by_time, by_step):
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        by_time.legend(frameon=False)
    figure.savefig(path, dpi=150)
