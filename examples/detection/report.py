"""The demo's numbers: one table, for the terminal and for report.md."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from common import result
from common.result import Result

from detection.settings import Settings


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A job's result and how good its models are.

    Fields:
        curve: (step, seconds, validation loss) along the way.
        loss_equal_time, ap50_equal_time: when the fastest job had ended.
    """

    result: Result
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
        *result.rows([outcome.result for outcome in outcomes]),
        *(
            (name, [text(outcome) for outcome in outcomes])
            for name, text in {
                "validation loss at the end": lambda o: f"{o.curve[-1][2]:.2f}",
                "validation loss at equal time": lambda o: f"{o.loss_equal_time:.2f}",
                "AP50 at equal time": lambda o: f"{o.ap50_equal_time:.3f}",
                "AP50": lambda o: f"{o.ap50:.3f}",
                slow: lambda o: "–" if math.isnan(o.ap50_slow) else f"{o.ap50_slow:.3f}",
            }.items()
        ),
    ]


def markdown(outcomes: Sequence[Outcome], s: Settings, slow_names: Sequence[str]) -> str:
    """Return the text of report.md."""
    head = ["", *(outcome.result.title for outcome in outcomes)]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * len(outcomes)]
    lines += [f"| {name} | " + " | ".join(values) + " |" for name, values in rows(outcomes, slow_names)]
    held = {
        "local": "every worker trains on its own images",
        "shuffled": "images are spread over the workers at random",
    }[s.placement]
    delays = ", ".join(f"{shift:.2f} + Exp({wait:.2f})" for shift, wait in zip(s.delays.shift_s, s.delays.wait_s))
    return f"""# A detector trained on unequal workers

SSDLite with MobileNetV3-{s.backbone} at {s.size} px, {s.workers} processes on this machine,
{s.batch_size} images per worker and step, Adam; {held}. Seconds by which each worker is delayed in a
step (shifted exponential; the same draws for every job): {delays}.
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
