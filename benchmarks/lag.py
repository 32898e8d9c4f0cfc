"""How far a slow worker falls behind, and whether it catches up: thin steps, ghosts and fast replay in real jobs.

    python benchmarks/lag.py

Four processes train over gloo and loopback; steps close after 1.3 times an ordinary forward and backward pass. While
the job makes 100 of its steps, the last process is slow: after each of its own steps it sleeps in proportion to what
the step took, waiting for results aside, so that a full step takes it a given number of deadlines. Before and after
that it is as fast as the others. The log keeps 32 steps. One run each.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torchvision
import typer
from rich.console import Console
from rich.table import Table
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel

import torch_qgc as qgc
from torch_qgc.job.events import Event
from torch_qgc.worker.report import Report

RESULTS = Path(__file__).parent / "results" / "lag.csv"
RANKS, BATCH, LOG_STEPS = 4, 16, 32
SLOW_FROM, SLOW_UNTIL, STEPS = 15, 115, 165  # steps of the job
CASES = [("MobileNetV3-Small", 2), ("MobileNetV3-Small", 5), ("MobileNetV3-Small", 10), ("GPT-2 2x128", 5)]
WAYS = ["thin", "ghost", "fast replay"]
FIELDS = [
    "model",
    "slowdown",
    "way",
    "step",
    "kind",
    "newest",
    "deadline_s",
    "busy_s",
    "took_s",
    "time_s",
    "hardware",
    "command",
]


def mobilenet() -> tuple[torch.nn.Module, torch.Tensor, Callable[[Any, torch.Tensor], torch.Tensor]]:
    """MobileNetV3-Small on 64 pixels: the module, a sample, and the loss of (model, batch)."""
    module = torchvision.models.mobilenet_v3_small(num_classes=10)
    return module, torch.randn(3, 64, 64), lambda model, x: model(x).square().mean()


def gpt2() -> tuple[torch.nn.Module, torch.Tensor, Callable[[Any, torch.Tensor], torch.Tensor]]:
    """GPT-2 with 2 layers of width 128 on 64 tokens."""
    sizes = {"n_layer": 2, "n_embd": 128, "n_head": 4, "vocab_size": 256, "n_positions": 64}
    config = GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)
    return GPT2LMHeadModel(config), torch.randint(256, (64,)), lambda model, x: model(input_ids=x, labels=x).loss


MODELS = {"MobileNetV3-Small": mobilenet, "GPT-2 2x128": gpt2}


class Repeated(Dataset[torch.Tensor]):
    """One sample, as often as the job asks for one."""

    def __init__(self, sample: torch.Tensor) -> None:
        self.sample = sample

    def __len__(self) -> int:
        return STEPS * BATCH * RANKS

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.sample


class Course:
    """Where the job is, and what this worker's steps take; slows it down while the job is in some of its steps.

    Args:
        deadline_s: of the job's steps.
        slowdown: deadlines that a full step is to take while this worker is slow; 0: it is never slow.
    """

    def __init__(self, deadline_s: float, slowdown: float) -> None:
        self._deadline_s, self._full_s = deadline_s, slowdown * deadline_s
        self.newest = -1  # step of which a result has come
        self.rows: list[dict[str, Any]] = []
        self._counts = {"computed": 0, "thin": 0, "replayed": 0}
        self._since_s = self._begun_s = time.perf_counter()
        self._waited_s = 0.0

    def note(self, event: Event) -> None:
        """Take an event of the job."""
        if event.name == "result" and event.step is not None:
            self.newest = max(self.newest, event.step)

    def step_made(self, report: Report) -> None:
        """Enter a step of this worker, and make it last."""
        waited_s = report.wait_s - self._waited_s
        busy_s = time.perf_counter() - self._since_s - waited_s
        if SLOW_FROM <= self.newest < SLOW_UNTIL:
            usual_s = statistics.median(row["busy_s"] for row in self.rows if row["kind"] == "computed")
            time.sleep(max(self._full_s / usual_s - 1.0, 0.0) * busy_s)
        counts = {"computed": report.computed_steps, "thin": report.thin_steps, "replayed": report.replayed_steps}
        (kind,) = [name for name, count in counts.items() if count > self._counts[name]]
        now_s = time.perf_counter()
        times = {"took_s": now_s - self._since_s - waited_s, "time_s": now_s - self._begun_s}
        row = {"step": report.steps - 1, "kind": kind, "newest": self.newest, "deadline_s": self._deadline_s}
        self.rows.append({**row, "busy_s": busy_s, **times})
        self._counts, self._since_s, self._waited_s = counts, now_s, report.wait_s


def usual_s(loss: Callable[[], torch.Tensor]) -> float:
    """Return how long a forward and backward pass usually takes while all ranks make some."""
    seconds = []
    for _ in range(8):
        start = time.perf_counter()
        loss().backward()
        seconds.append(time.perf_counter() - start)
    usual = torch.tensor(statistics.median(seconds[2:]))
    dist.all_reduce(usual)
    return float(usual) / RANKS


def train(name: str, slowdown: float, way: str) -> list[dict[str, Any]]:
    """Make a job's steps on this rank; return this rank's course."""
    torch.manual_seed(0)
    module, sample, loss = MODELS[name]()
    deadline_s = 1.3 * usual_s(lambda: loss(module, sample.expand(BATCH, *sample.shape)))
    model = DistributedDataParallel(module)
    course = Course(deadline_s, slowdown if dist.get_rank() == RANKS - 1 else 0.0)
    limits, ghost = qgc.Limits(log_steps=LOG_STEPS), way == "ghost"
    state = qgc.QGCState(model, deadline_s=deadline_s, limits=limits, verify_every=0, ghost=ghost, trace=course.note)
    model.register_comm_hook(state, qgc.qgc_hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    if way == "fast replay":
        state.bind(optimizer, after=lambda _: course.step_made(state.report()))
    for x in state.loader(Repeated(sample), batch_size=BATCH):
        loss(model, x).backward()
        if way == "fast replay":
            state.update()
        else:
            optimizer.step()
            optimizer.zero_grad()
            course.step_made(state.report())
    state.close()
    return course.rows


def run_all(out: Path) -> None:
    """Run all jobs on this rank; the slow one writes a line for each of its steps."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=UserWarning)
    dist.init_process_group("gloo")
    for name, slowdown in CASES:
        for way in WAYS:
            rows = train(name, slowdown, way)
            if dist.get_rank() == RANKS - 1:
                with out.open("a") as file:
                    for row in rows:
                        print(json.dumps({"model": name, "slowdown": slowdown, "way": way, **row}), file=file)
            dist.barrier()
    dist.destroy_process_group()


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """Return what a run shows, beside what is expected of its times (docs/runtime.md)."""
    slow = [row for row in rows if SLOW_FROM <= row["newest"] < SLOW_UNTIL]
    first, last = slow[0], slow[-1]
    steps = last["newest"] - first["newest"]
    full = [row["took_s"] for row in slow if row["kind"] == "computed"]
    missed = [row["took_s"] for row in slow if row["kind"] != "computed"]
    full_s = statistics.median(full)
    f = statistics.median(missed) / full_s
    pace_s = (last["time_s"] - first["time_s"]) / steps
    s = full_s / pace_s
    lags = [row["newest"] - row["step"] for row in slow]
    at_the_end = statistics.median(lags[-10:])
    again = next((row["newest"] for row in rows if row["newest"] >= SLOW_UNTIL and row["newest"] <= row["step"]), None)
    return [
        f"{f:.2f}",
        f"{s:.1f}",
        f"1 of {s * (1 - f) / (1 - f * s):.1f}" if f * s < 1 else "none",
        f"1 of {steps / len(full):.1f}",
        f"{at_the_end:.0f}, at most {max(lags)}",
        f"{pace_s / first['deadline_s']:.1f} deadlines",
        "not" if again is None else f"after {again - SLOW_UNTIL} steps",
    ]


def main() -> None:
    """Run, save and print."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.jsonl"
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
        environment = dict(os.environ, OMP_NUM_THREADS="1")
        subprocess.run([*torchrun, __file__, "--rank-of", str(out)], env=environment, check=True)
        rows = [json.loads(line) for line in out.read_text().splitlines()]
    hardware = f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}"
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        for row in rows:
            times = {name: f"{value:.4f}" for name, value in row.items() if name.endswith("_s")}
            writer.writerow({**row, **times, "hardware": hardware, "command": "python benchmarks/lag.py"})
    heads = ["a missed step, of a full one", "slower than the job", "expected to contribute to", "contributed to"]
    table = Table(
        "model", "slowed down", "way", *heads, "steps behind at the end", "the job's step", "caught up when fast again"
    )
    for name, slowdown in CASES:
        for way in WAYS:
            run = [row for row in rows if (row["model"], row["slowdown"], row["way"]) == (name, slowdown, way)]
            table.add_row(name, f"{slowdown}x", way, *summary(run))
    Console(width=180).print(table)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank-of"]:
        run_all(Path(sys.argv[2]))
    else:
        typer.run(main)
