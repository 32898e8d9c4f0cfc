"""The demo's numbers: one table per panel, for the terminal and for report.md."""

import math
from collections.abc import Sequence

from common import result

from detection.comparison import Outcome
from detection.settings import CAUSES, PANELS, Settings

LEVELS = (0.3, 0.5)  # of AP50, that the table says the times of


def rows(outcomes: Sequence[Outcome], slow_names: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Return the table's rows: what it is, and its value for each job."""
    slow = f"AP50 at the end, slow workers' own ({', '.join(slow_names)})"
    reached = {f"seconds to AP50 {level:g}": lambda o, at=level: _seconds(o.seconds_to(at)) for level in LEVELS}
    texts = reached | {
        "AP50 at the end": lambda o: f"{o.points[-1].ap50:.3f}",
        slow: lambda o: f"{o.points[-1].ap50_slow:.3f}",
    }
    return [
        *((name, [text(outcome) for outcome in outcomes]) for name, text in texts.items()),
        *result.rows([outcome.result for outcome in outcomes]),
    ]


def _seconds(value: float) -> str:
    return "not reached" if math.isinf(value) else f"{value:.0f}"


def markdown(panels: dict[str, Sequence[Outcome]], s: Settings, slow_names: Sequence[str]) -> str:
    """Return the text of report.md."""
    parts = []
    for panel, outcomes in panels.items():
        head = ["", *(outcome.title for outcome in outcomes)]
        lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * len(outcomes)]
        lines += [f"| {name} | " + " | ".join(values) + " |" for name, values in rows(outcomes, slow_names)]
        parts += [f"## {PANELS[panel].capitalize()}", "", *lines, "", f"![AP50 against time]({panel}_curves.png)", ""]
        parts += [f"![detections]({panel}_detections.png)", ""]
    return f"""# A detector trained on unequal workers

SSDLite with MobileNetV3-{s.backbone} at {s.size} px, {s.batch_size} images per worker and step on average, Adam. Every
job trains for {s.seconds:g} s, and its learning rate follows the time. The four workers are {", ".join(CAUSES)};
the one that pauses is stopped for {s.stop_s:g} s in the middle as well. These are single runs.

{chr(10).join(parts)}
- All models are judged by the same images after the jobs, with BatchNorm's statistics gathered anew from images of all
  workers; what a job waits for is on its clock, judging is not.
- Gradients used: how many of a worker's gradients entered an update, per step. A late gradient that is folded into a
  later step counts there.
- Bytes sent: by the coded jobs as counted, headers included; for DDP those of a ring all-reduce, computed.
"""
