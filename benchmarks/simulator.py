"""What a simulated step costs for each worker, beside the gradient that it computes.

    python benchmarks/simulator.py --steps 5 --rounds 3

"batches": every worker draws 8 samples (task `text` of examples/simulation, 16,900 coordinates); "partitions": the
gradients of all partitions, one per worker, each computed once (least squares in 1,000 dimensions); "job": batches
under the rules of a running job, late payloads folded. Times are CPU times of one thread; the ratio is to what was
spent on gradients.
"""

from __future__ import annotations

import csv
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from torch_qgc.planner import make_plan
from torch_qgc.planner.delays import ShiftedExponential
from torch_qgc.protocol.contract import ClosingRule
from torch_qgc.simulator import Experiment, Task
from torch_qgc.simulator.gradients import Gradients
from torch_qgc.simulator.trajectory import Trajectory

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from simulation.tasks import least_squares, text

RESULTS = Path(__file__).parent / "results"
SIZES = (10, 100, 1000)
FIELDS = [
    "mode",
    "workers",
    "coordinates",
    "round",
    "step_cpu_s",
    "worker_step_cpu_ms",
    "ratio_to_gradients",
    "hardware",
]
FIELDS += ["command"]


def experiment(mode: str, workers: int, task: Task, steps: int) -> Experiment:
    """Return workers of which a fifth is late on average, at four bits."""
    late = np.random.default_rng(0).uniform(0.05, 0.35, workers)
    timing: dict[str, Any] = {"deadline_s": 2.0}
    if mode == "job":
        timing = {"rule": ClosingRule(deadline_s=2.0, warmup_steps=0, quorum=workers // 2)}
    return Experiment(
        model=task.model,
        loss=task.loss,
        dataset=task.dataset,
        schemes={"qgc": make_plan(late)},
        delays=ShiftedExponential(mu=-np.log(late)),
        steps=steps,
        lr=0.1,
        batch_size=None if mode == "partitions" else 8,
        **timing,
    )


class Clock:
    """CPU time of this process, and how much of it was spent on gradients."""

    def __init__(self) -> None:
        self.gradients_s = 0.0
        self._mean = Gradients.mean

    def __enter__(self) -> Clock:
        def timed(*arguments: Any) -> float:
            start = time.process_time()
            loss = self._mean(*arguments)
            self.gradients_s += time.process_time() - start
            return loss

        Gradients.mean = timed  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        Gradients.mean = self._mean  # type: ignore[method-assign]


def measured(mode: str, workers: int, task: Task, steps: int) -> tuple[float, float]:
    """Return CPU seconds of a step, and their ratio to what its gradients take; a first step fills caches."""
    chosen = experiment(mode, workers, task, steps + 1)
    trajectory = Trajectory(chosen, chosen.schemes["qgc"], 0)
    trajectory.advance()
    with Clock() as clock:
        start = time.process_time()
        while not trajectory.done:
            trajectory.advance()
        total = time.process_time() - start
    return total / steps, total / clock.gradients_s


def main(
    steps: Annotated[int, typer.Option(help="timed per round")] = 5,
    rounds: Annotated[int, typer.Option(help="of everything, in turn")] = 3,
) -> None:
    """Measure, write benchmarks/results/simulator.csv, and print medians."""
    torch.set_num_threads(1)
    tasks = {"batches": text(samples=20_000), "job": text(samples=20_000)}
    tasks["partitions"] = least_squares(samples=4000, features=1000)
    hardware = f"{platform.machine()}, {os.cpu_count()} shared cores, torch {torch.__version__}"
    rows: list[dict[str, Any]] = []
    for turn in range(rounds):
        for mode, task in tasks.items():
            for workers in SIZES:
                seconds, ratio = measured(mode, workers, task, steps)
                rows.append(
                    {
                        "mode": mode,
                        "workers": workers,
                        "coordinates": sum(p.numel() for p in task.model.parameters()),
                        "round": turn,
                        "step_cpu_s": f"{seconds:.5f}",
                        "worker_step_cpu_ms": f"{1e3 * seconds / workers:.4f}",
                        "ratio_to_gradients": f"{ratio:.3f}",
                        "hardware": hardware,
                        "command": "python " + " ".join([os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
                    }
                )
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / "simulator.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    table = Table("mode", "workers", "CPU ms per worker and step", "over its gradients alone")
    for mode in tasks:
        for workers in SIZES:
            chosen = [row for row in rows if row["mode"] == mode and row["workers"] == workers]
            cost, ratio = (
                statistics.median(float(row[name]) for row in chosen)
                for name in ("worker_step_cpu_ms", "ratio_to_gradients")
            )
            table.add_row(mode, str(workers), f"{cost:.3f}", f"{ratio:.2f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
