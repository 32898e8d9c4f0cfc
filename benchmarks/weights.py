"""Which weight a late payload should have: decoders against each other at equal virtual time, on the simulator.

    python benchmarks/weights.py --seeds 5

Five workers hold two digits each. Every job trains the same small network on 4,000 digits for the same virtual time, at
a learning rate that is constant or falls to zero along a cosine. "waiting" waits for all workers in every step. The
others close at a deadline and fold late payloads in, with these weights: "unbiased" m / r, "annealed" m min(1 / r,
burst / theta), "uncorrected" m. Each takes the best of its learning rates, by the loss at the end. The table shows the
ratio of that loss to the loss of "unbiased", run by run with the same seed.
"""

from __future__ import annotations

import csv
import math
import os
import sys
from collections import defaultdict
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from scipy import stats
from torch.utils.data import TensorDataset

from torch_qgc.planner import make_plan
from torch_qgc.protocol.contract import ClosingRule
from torch_qgc.simulator import IDEAL, Trace, simulate
from torch_qgc.simulator.arrivals import JobRounds
from torch_qgc.simulator.delays import DelaySource
from torch_qgc.simulator.machines import Demand

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from common import digits

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
WORKERS, BATCH, SLOW = 5, 16, 4
DEADLINE_S = 1.5


def _jitter(rng: np.random.Generator, *size: int) -> np.ndarray:
    return np.exp(0.1 * rng.standard_normal(size))


def _slow_processor(rng: np.random.Generator, n: int) -> np.ndarray:
    table = _jitter(rng, n, WORKERS)
    table[:, SLOW] *= 10.0
    return table


def _all_pause(rng: np.random.Generator, n: int) -> np.ndarray:
    return _jitter(rng, n, WORKERS) + 8.0 * (rng.random((n, WORKERS)) < 0.05)


# Seconds [steps, K] of every worker's steps: 1, give or take a tenth, and what is slow about it.
SETTINGS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "one worker 10 times slower": _slow_processor,
    "all pause 8 s in 5 % of steps": _all_pause,
}
DECODERS: dict[str, dict[str, Any]] = {
    "unbiased": {"decoder": "unbiased"},
    "annealed, burst 1": {"decoder": "annealed"},
    "annealed, burst 2": {"decoder": "annealed", "burst": 2.0},
    "uncorrected": {"decoder": "uncorrected"},
}
JOBS = ("waiting", *DECODERS)
RATES = {"adam": (5e-3, 1e-2, 2e-2), "sgd": (0.02, 0.05, 0.12)}
CASE = ("setting", "optimizer", "schedule")
FIELDS = [
    *CASE,
    "job",
    "lr",
    "seed",
    "steps",
    "rate",
    "loss_at_a_third",
    "loss",
    "accuracy",
    "slow_accuracy",
    "command",
]


def task() -> tuple[dict[str, Any], list[np.ndarray]]:
    """Return model, loss, data and evaluation, and who holds which digits."""
    train, held_out = (_small(part) for part in digits.datasets(ROOT / "data"))
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(196, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
    own = [np.flatnonzero(train.tensors[1].numpy() // 2 == k) for k in range(WORKERS)]
    slow = held_out.tensors[1] // 2 == SLOW

    def loss(m: torch.nn.Module, batch: Any) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(m(batch[0]), batch[1])

    def evaluate(m: torch.nn.Module) -> dict[str, float]:
        right = m(held_out.tensors[0]).argmax(1) == held_out.tensors[1]
        return {
            "loss": loss(m, train.tensors).item(),
            "accuracy": right.float().mean().item(),
            "slow": right[slow].float().mean().item(),
        }

    return {"model": model, "loss": loss, "dataset": train, "evaluate": evaluate}, own


def _small(part: TensorDataset) -> TensorDataset:
    images, labels = part.tensors
    return TensorDataset(torch.nn.functional.avg_pool2d(images, 2).flatten(1), labels)


def steps_within(horizon_s: float, table: np.ndarray, rule: ClosingRule, plan: Any) -> int:
    """Return how many steps a job closes in that time: the clock does not depend on what is computed."""
    delays, demand = DelaySource(table, WORKERS, 0), Demand((1,), (1,), 32)
    clock = JobRounds(delays, rule, np.ones(WORKERS, dtype=bool), plan, demand=demand, log_steps=512)
    step = 0
    while clock.close(step).closed_at_s <= horizon_s:
        step += 1
    return max(step, 1)


def run(
    job: str, setting: str, optimizer: str, schedule: str, lr: float, seed: int, rounds: int, of: Any
) -> dict[str, Any]:
    """Train one job for as long as waiting for everybody takes for so many rounds; return a row of the table."""
    named, own = of
    table = SETTINGS[setting](np.random.default_rng([seed, 0xDE]), 40 * rounds)
    horizon_s = float(table[:rounds].max(axis=1).sum())
    plan = make_plan(
        np.full(WORKERS, 0.05), bits_per_coordinate=32, placement=np.eye(WORKERS, dtype=bool), **DECODERS.get(job, {})
    )
    rule = ClosingRule(deadline_s=DEADLINE_S, quorum=2, max_staleness=64)
    steps = rounds if job == "waiting" else steps_within(horizon_s, table, rule, plan)

    def falling(step: int) -> float:
        return lr * 0.5 * (1.0 + math.cos(math.pi * step / steps))

    trace: Trace = simulate(
        **named,
        schemes=IDEAL if job == "waiting" else plan,
        partitions=own,
        delays=table,
        rule=rule,
        steps=steps,
        optimizer=optimizer,
        momentum=0.9 if optimizer == "sgd" else 0.0,
        lr=falling if schedule == "cosine" else lr,
        batch_size=BATCH,
        seed=seed,
        evaluate_every=-(-steps // 3),
    )
    end = {name: float(values[0, -1]) for name, values in trace.evaluations.items()}
    return {
        "setting": setting,
        "optimizer": optimizer,
        "schedule": schedule,
        "job": job,
        "lr": lr,
        "seed": seed,
        "steps": steps,
        "rate": round(float(trace.contributions[0, :, SLOW].mean()), 3),
        "loss_at_a_third": f"{trace.evaluations['loss'][0, 1]:.5f}",
        "loss": f"{end['loss']:.5f}",
        "accuracy": f"{end['accuracy']:.4f}",
        "slow_accuracy": f"{end['slow']:.4f}",
        "command": "python " + " ".join([os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
    }


def best(rows: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Return seed -> row at the learning rate with the least loss, by its geometric mean over seeds."""
    by_lr: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    for row in rows:
        by_lr[str(row["lr"])][int(row["seed"])] = row
    return min(by_lr.values(), key=lambda runs: np.mean([math.log(float(row["loss"])) for row in runs.values()]))


def ratio(rows: dict[int, dict[str, Any]], others: dict[int, dict[str, Any]], name: str) -> str:
    """Return the geometric mean of rows / others over seeds, with its 95 % t interval."""
    logs = np.array([math.log(float(rows[seed][name]) / float(others[seed][name])) for seed in rows])
    if len(logs) < 2:
        return f"{math.exp(logs[0]):.2f}"
    half = stats.t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / math.sqrt(len(logs))
    low, middle, high = np.exp(logs.mean() + half * np.array([-1.0, 0.0, 1.0]))
    return f"{middle:.2f} ({low:.2f} - {high:.2f})"


def show(rows: list[dict[str, Any]]) -> None:
    """Print every job at its best learning rate beside "unbiased"."""
    table = Table(*CASE, "job", "lr", "loss over unbiased's", "at a third of the time", "accuracy", "slow one's digits")
    for case in dict.fromkeys(tuple(row[name] for name in CASE) for row in rows):
        found = {
            job: best([row for row in rows if row["job"] == job and tuple(row[name] for name in CASE) == case])
            for job in JOBS
        }
        for job, runs in found.items():
            means = [
                f"{np.mean([float(r[name]) for r in runs.values()]):.3f}" for name in ("accuracy", "slow_accuracy")
            ]
            compared = [ratio(runs, found["unbiased"], name) for name in ("loss", "loss_at_a_third")]
            table.add_row(*case, job, str(next(iter(runs.values()))["lr"]), *compared, *means)
    Console(width=180).print(table)


def main(
    seeds: Annotated[int, typer.Option(help="runs of every job at every learning rate")] = 5,
    rounds: Annotated[int, typer.Option(help="steps that waiting for everybody would make")] = 60,
) -> None:
    """Run, write benchmarks/results/weights.csv after every seed, and print the table."""
    torch.set_num_threads(1)
    of = task()
    rows: list[dict[str, Any]] = []
    for seed in range(seeds):
        for setting, optimizer, schedule, job in product(SETTINGS, RATES, ("cosine", "constant"), JOBS):
            for lr in RATES[optimizer]:
                rows.append(run(job, setting, optimizer, schedule, lr, seed, rounds, of))
        with (RESULTS / "weights.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(rows)
    show(rows)


if __name__ == "__main__":
    typer.run(main)
