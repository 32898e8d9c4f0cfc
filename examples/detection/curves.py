"""How good every job's model is over time, and how many steps it has made."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from detection.comparison import Outcome

# Okabe and Ito's, told apart by colour-blind readers, too.
COLOURS = ("#0072B2", "#E69F00", "#56B4E9", "#CC79A7", "#009E73", "#D55E00", "#999999")


def curves(outcomes: Sequence[Outcome], path: Path) -> None:
    """Draw AP50 and steps against seconds; the seconds in which a worker was stopped are grey."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    quality, progress = figure.subplots(1, 2)
    s = outcomes[0].settings
    for outcome, colour in zip(outcomes, COLOURS):
        times_s = [0.0, *(point.time_s for point in outcome.points)]
        quality.plot(
            times_s, [0.0, *(p.ap50 for p in outcome.points)], "o-", markersize=3, color=colour, label=outcome.title
        )
        made = outcome.result.made
        progress.plot([at / s.pace for _, at in made], [step for step, _ in made], color=colour)
    for axes, quantity in ((quality, "AP50"), (progress, "steps")):
        axes.axvspan(s.seconds / 2, s.seconds / 2 + s.stop_s, color="0.88", zorder=0)
        axes.set(xlabel="seconds (grey: one worker is stopped)", ylabel=quantity, xlim=(0, None), ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    quality.legend(frameon=False)
    figure.savefig(path, dpi=150)
