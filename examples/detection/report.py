"""The demo's numbers: one table, for the terminal and for report.md."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from common.closing import agreement, mebibytes
from common.result import JobResult
from rich.table import Table

from detection.settings import Settings


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A job's result and how good its models are.

    Fields:
        curve: (step, seconds, validation loss) along the way.
        loss_equal_time, ap50_equal_time: when the fastest job had ended.
    """

    result: JobResult
    title: str
    curve: Sequence[tuple[int, float, float]]
    ap50: float
    ap50_slow: float
    loss_equal_time: float
    ap50_equal_time: float


def at_time(curve: Sequence[tuple[int, float, float]], time_s: float) -> float:
    """Return the loss at a time, between two points of the curve by interpolation; nan before the first."""
    _, times_s, losses = zip(*curve)
    return float(np.interp(time_s, times_s, losses, left=math.nan))


def rows(outcomes: Sequence[Outcome], slow_names: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Return the table's rows: what it is, and its value for each job."""
    slow = f"AP50, slow worker's own ({', '.join(slow_names)})" if slow_names else "AP50, slow worker's own"
    return [
        (name, [text(outcome) for outcome in outcomes])
        for name, text in {
            "wall time": lambda o: f"{o.result.wall_s:.0f} s",
            "time per step": lambda o: f"{1000 * o.result.wall_s / o.result.steps:.0f} ms",
            "steps": lambda o: str(o.result.steps),
            "steps computed, by worker": lambda o: _percent(r.computed_steps / r.steps for r in o.result.ranks),
            "gradients used per step, by worker": lambda o: _percent(o.result.contributions),
            "bytes sent per worker and step": _bytes_sent,
            "validation loss at the end": lambda o: f"{o.curve[-1][2]:.2f}",
            "validation loss at equal time": lambda o: f"{o.loss_equal_time:.2f}",
            "AP50 at equal time": lambda o: f"{o.ap50_equal_time:.3f}",
            "AP50": lambda o: f"{o.ap50:.3f}",
            slow: lambda o: "–" if math.isnan(o.ap50_slow) else f"{o.ap50_slow:.3f}",
            "parameters of all workers": lambda o: agreement(o.result),
        }.items()
    ]


def _percent(values) -> str:
    return " ".join(f"{100 * value:.0f}" for value in values) + " %"


def _bytes_sent(outcome: Outcome) -> str:
    sent = outcome.result.sent_bytes_per_step
    return f"{mebibytes(sent)} ({sent / outcome.result.fp32_bytes:.2f} x fp32)"


def table(outcomes: Sequence[Outcome], slow_names: Sequence[str]) -> Table:
    """Return the table for the terminal."""
    shown = Table(title="The same data, seeds and delays")
    shown.add_column("")
    for outcome in outcomes:
        shown.add_column(outcome.title, justify="right")
    for name, values in rows(outcomes, slow_names):
        shown.add_row(name, *values)
    return shown


def markdown(outcomes: Sequence[Outcome], s: Settings, slow_names: Sequence[str]) -> str:
    """Return the text of report.md."""
    head = ["", *(outcome.title for outcome in outcomes)]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * len(outcomes)]
    lines += [f"| {name} | " + " | ".join(values) + " |" for name, values in rows(outcomes, slow_names)]
    held = {
        "local": "every worker trains on its own images",
        "shuffled": "images are spread over the workers at random",
    }[s.placement]
    return f"""# A detector trained on unequal workers

SSDLite with MobileNetV3-{s.backbone} at {s.size} px, {s.workers} processes on this machine,
{s.batch_size} images per worker and step, Adam; {held}. Seconds by which each worker is delayed in a
step (shifted exponential; the same draws for every job): {s.delays}.
Steps of the coded jobs close after {s.deadline_s:g} s.

{chr(10).join(lines)}

- Validation loss: mean over the same validation images for every job; computed afterwards from models kept
  along the way, so it costs the jobs no time. "Equal time" is when the fastest job had ended. The learning
  rate falls over the steps of a job, so a job that has made fewer steps by then is at a higher rate, too.
- Gradients used: how many of a worker's gradients entered an update, per step. A late gradient that is
  folded into a later step counts there.
- Bytes sent: by the coded jobs as counted, headers included; for DDP those of a ring all-reduce, computed.

![validation loss against time](loss_vs_time.png)
![detections](detections.png)
"""
