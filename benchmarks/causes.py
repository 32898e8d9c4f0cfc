"""One picture per cause of slowness: who computes when while all wait, and after the job has chosen a lever.

    python benchmarks/causes.py        docs/pictures/cause_*.png, from simulated machines

The job's own rules close the steps and choose the plans; only the machines and the clock are simulated.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from torch_qgc.job.events import Event
from torch_qgc.job.steering import Steering
from torch_qgc.planner import Plan, make_plan
from torch_qgc.protocol.contract import ClosingRule
from torch_qgc.simulator import Machines
from torch_qgc.simulator.arrivals import JobRounds
from torch_qgc.simulator.delays import DelaySource
from torch_qgc.simulator.machines import Demand

PICTURES = Path(__file__).resolve().parents[1] / "docs" / "pictures"
WORKERS, NUMEL, BATCH_SIZE = 4, 1 << 20, 32
STEPS = 200  # of each job; some of the second half are drawn
SHOWN_S, BEFORE_S = 12.0, 3.0
DEMAND = Demand(up=(NUMEL,), down=(NUMEL,), downlink_bits=8, batch_size=BATCH_SIZE, moves=True)
COLOURS = {"in time": "tab:blue", "folded": "tab:orange", "dropped": "tab:red"}


@dataclass(frozen=True, kw_only=True)
class Cause:
    """Why the last of four workers is slow, or all of them are."""

    title: str
    machines: Machines


def _last(value: float, others: float) -> tuple[float, ...]:
    return (others,) * (WORKERS - 1) + (value,)


CAUSES = {
    "processor": Cause(
        title="worker 3 has a processor that is four times slower",
        machines=Machines(workers=WORKERS, batch_s=_last(4.0, 1.0), fixed_s=0.1, jitter=0.05),
    ),
    "link": Cause(
        title="worker 3 has a slow link: it would send an fp32 gradient for 8 s",
        machines=Machines(workers=WORKERS, fixed_s=0.1, jitter=0.05, up_s=_last(8.0, 0.1), down_s=_last(1.0, 0.1)),
    ),
    "pauses": Cause(
        title="anybody pauses, for 6 s in 4 % of the steps",
        machines=Machines(workers=WORKERS, fixed_s=0.1, jitter=0.05, pause_chance=0.04, pause_s=6.0),
    ),
}


def events_of(machines: Machines, *, auto: bool) -> tuple[list[Event], Plan, float | None]:
    """Run a job; return its events, and the plan and the deadline that it ends with."""
    plan = make_plan([0.05] * WORKERS, decoder="annealed")
    rule = ClosingRule(deadline_s="auto" if auto else None, warmup_steps=2)
    steering = Steering(WORKERS, NUMEL, every=50, auto_deadline=True)
    events: list[Event] = []
    rounds = JobRounds(
        DelaySource(machines, WORKERS, seed=3),
        rule,
        np.ones(WORKERS, dtype=np.bool_),
        plan,
        demand=DEMAND,
        log_steps=256,
        steering=steering if auto else None,
        trace=events.append,
    )
    for step in range(STEPS):
        rounds.close(step)
    newest = rounds.courses.newest
    return events, newest.plan, newest.deadline_s


def draw(axes: Axes, events: list[Event]) -> None:
    """Draw each worker's steps as bars, from BEGIN to the arrival of the payload, and steps' ends as lines.

    What is shown has the longest bar of the second half in it.
    """
    closes = [event.time_s for event in events if event.name == "close"]
    arrived = {(e.worker, e.step): (e.time_s, e.detail["fate"]) for e in events if e.name == "arrive"}
    bars = [
        (event.worker, event.time_s, *arrived[event.worker, event.step])
        for event in events
        if event.name == "begin" and (event.worker, event.step) in arrived
    ]
    inside = [bar for bar in bars if closes[-1] / 2 < bar[1] < closes[-1] - SHOWN_S]
    start_s = max(inside, key=lambda bar: bar[2] - bar[1])[1] - BEFORE_S
    for worker, from_s, until_s, fate in bars:
        if until_s > start_s and from_s < start_s + SHOWN_S:
            left = from_s - start_s
            axes.barh(worker, until_s - from_s, left=left, height=0.7, color=COLOURS[fate], edgecolor="white")
    for closed_s in closes:
        if start_s <= closed_s <= start_s + SHOWN_S:
            axes.axvline(closed_s - start_s, color="0.4", linewidth=0.7)
    axes.set(xlim=(0.0, SHOWN_S), yticks=range(WORKERS), ylabel="worker")
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)


def picture(cause: Cause, path: Path) -> None:
    """Draw a job that waits for all above one that chooses."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    waiting, _, _ = events_of(cause.machines, auto=False)
    draw(above, waiting)
    choosing, plan, deadline_s = events_of(cause.machines, auto=True)
    draw(below, choosing)
    batches, bits = " ".join(f"{b:.2f}" for b in plan.batches), " ".join(map(str, plan.bits))
    closing = "" if deadline_s is None else f", deadline {deadline_s:.1f} s"
    above.set_title(f"{cause.title}: all wait", fontsize=10)
    below.set_title(f'deadline_s="auto": batches [{batches}], bits [{bits}]{closing}', fontsize=10)
    below.set_xlabel("seconds; lines: a step closes; orange: a payload that enters a later step")
    figure.savefig(path, dpi=130)


def main() -> None:
    """Draw all pictures."""
    for name, cause in CAUSES.items():
        path = PICTURES / f"cause_{name}.png"
        picture(cause, path)
        print(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


if __name__ == "__main__":
    sys.exit(main())
