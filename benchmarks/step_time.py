"""Time a step without stragglers: torch_qgc against DDP's all-reduce, in one run, and say where the time goes.

    python benchmarks/step_time.py --steps 60 --rounds 5

Every job trains the same model on the same batches with K processes on this machine over gloo and loopback. Jobs take
turns (A B C A B C ...), each turn in fresh processes, so that a machine whose speed drifts does not favour one of them.
"""

from __future__ import annotations

import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import torchvision
import typer
from rich.console import Console
from rich.table import Table
from torch.nn.parallel import DistributedDataParallel

import torch_qgc as qgc
from torch_qgc.job.events import Event

JOBS = ["ddp", "ddp-bf16", "qgc-32", "qgc-4", "qgc-4-down8", "qgc-4-2agg"]
RESULTS = Path(__file__).parent / "results"
WARM_UP = 5  # steps


def attach(job: str, model: DistributedDataParallel, trace: Stretches) -> qgc.QGCState | None:
    """Register the job's communication hook."""
    if job == "ddp":
        return None
    if job == "ddp-bf16":
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

        model.register_comm_hook(None, bf16_compress_hook)
        return None
    words = job.split("-")
    state = qgc.QGCState(
        model,
        bits_per_coordinate=float(words[1]),
        downlink_bits=8 if "down8" in words else 32,
        aggregators=2 if "2agg" in words else 1,
        verify_every=0,
        trace=trace,
    )
    model.register_comm_hook(state, qgc.qgc_hook)
    return state


class Stretches:
    """Add up what a worker's trace says about the stretches of its steps, from a step on."""

    def __init__(self, first_step: int) -> None:
        self._first_step = first_step
        self.seconds: dict[str, float] = {}

    def __call__(self, event: Event) -> None:
        """Take an event."""
        if event.step is not None and event.step >= self._first_step and "duration_s" in event.detail:
            self.seconds[event.name] = self.seconds.get(event.name, 0.0) + event.detail["duration_s"]


def train(job: str, steps: int, batch_size: int, size: int, out: Path) -> None:
    """Run one job on this rank; rank 0 writes step times and the profile."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=UserWarning)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = DistributedDataParallel(torchvision.models.mobilenet_v3_small(num_classes=10), broadcast_buffers=False)
    stretches = Stretches(first_step=WARM_UP)
    state = attach(job, model, stretches)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images = torch.randn(batch_size, 3, size, size)
    labels = torch.randint(10, (batch_size,))
    times, compute = [], []
    for step in range(steps + WARM_UP):
        if step == WARM_UP:
            dist.barrier()
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        forward_done = time.perf_counter()
        loss.backward()
        optimizer.step()
        if step >= WARM_UP:
            times.append(time.perf_counter() - start)
            compute.append(forward_done - start)
    if dist.get_rank() == 0:
        parts = {label: value / steps for label, value in stretches.seconds.items()}
        parts["forward"] = statistics.mean(compute)
        sent = state.report().bytes_sent_per_step if state else float("nan")
        out.write_text(json.dumps({"times": times, "parts": parts, "bytes_sent": sent}))
    dist.barrier()
    if state is not None:
        state.close()
    dist.destroy_process_group()


def launch(job: str, workers: int, steps: int, batch_size: int, size: int) -> dict[str, Any]:
    """Run one job in fresh processes and return what rank 0 measured."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        arguments = [job, str(steps), str(batch_size), str(size), str(out)]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)]
        environment = dict(os.environ, OMP_NUM_THREADS="1")
        subprocess.run(
            [*command, __file__, "--rank-of", *arguments], env=environment, check=True, stderr=subprocess.DEVNULL
        )
        measured: dict[str, Any] = json.loads(out.read_text())
        return measured


def main(
    steps: Annotated[int, typer.Option(help="timed steps per turn")] = 60,
    rounds: Annotated[int, typer.Option(help="turns of each job")] = 5,
    workers: Annotated[int, typer.Option(help="processes")] = 4,
    batch_size: int = 4,
    size: Annotated[int, typer.Option(help="pixels")] = 96,
    jobs: Annotated[str, typer.Option(help="comma-separated")] = ",".join(JOBS),
) -> None:
    """Print and save medians, their spread over turns, and ratios to DDP of the same turn."""
    names = jobs.split(",")
    console = Console()
    medians: dict[str, list[float]] = {name: [] for name in names}
    parts: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    sent: dict[str, float] = {}
    for turn in range(rounds):
        for name in names:
            console.print(f"turn {turn + 1} of {rounds}: {name}", style="dim")
            measured = launch(name, workers, steps, batch_size, size)
            medians[name].append(statistics.median(measured["times"]))
            parts[name].append(measured["parts"])
            sent[name] = measured["bytes_sent"]
    hardware = f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}"
    command = f"python benchmarks/step_time.py --steps {steps} --rounds {rounds} --workers {workers} --jobs {jobs}"
    table = Table("job", "step, ms (median of turns)", "range", "ratio to ddp (median)", "range", "MiB sent per step")
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / "step_time.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["job", "turn", "median_step_s", "ratio_to_ddp", "bytes_sent_per_step", "hardware", "command"])
        for name in names:
            ratios = [mine / base for mine, base in zip(medians[name], medians[names[0]])]
            for turn, (value, ratio) in enumerate(zip(medians[name], ratios)):
                writer.writerow([name, turn, f"{value:.5f}", f"{ratio:.4f}", f"{sent[name]:.0f}", hardware, command])
            table.add_row(
                name,
                f"{statistics.median(medians[name]) * 1e3:.1f}",
                f"{min(medians[name]) * 1e3:.1f}-{max(medians[name]) * 1e3:.1f}",
                f"{statistics.median(ratios):.2f}",
                f"{min(ratios):.2f}-{max(ratios):.2f}",
                f"{sent[name] / 2**20:.2f}",
            )
    console.print(table)
    where = Table("where the time of rank 0's step goes, ms", *names)
    labels = dict.fromkeys(label for turns in parts.values() for turn in turns for label in turn)
    for label in labels:
        cells = [statistics.median([turn[label] for turn in parts[n]]) if label in parts[n][0] else None for n in names]
        where.add_row(label, *["" if cell is None else f"{cell * 1e3:.1f}" for cell in cells])
    console.print(where)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank-of"]:
        name, steps_, batch, pixels, path = sys.argv[2:]
        train(name, int(steps_), int(batch), int(pixels), Path(path))
    else:
        typer.run(main)
