"""Which lever helps against which cause of slowness, at equal time on a virtual clock.

    python benchmarks/levers.py                 # some hours on two cores; goes on where it was interrupted
    python benchmarks/levers.py --quick         # a minute: whether it works
    python benchmarks/levers.py --only-tables   # of what has been run

Every method trains on the same digits and machines for as long as 200 rounds of a job that waits for all would take,
at the best of three learning rates, which are tried on other seeds than those that are measured. Rows of single runs
go to benchmarks/results/levers.csv, figures over seeds to levers_figures.csv beside it.
"""

from __future__ import annotations

import csv
import itertools
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from lever_runs.figures import Figures, Measured, best_lr, figures
from lever_runs.methods import METHODS
from lever_runs.rows import Rows
from lever_runs.settings import SETTINGS
from lever_runs.task import MODELS, dataset
from lever_runs.training import LRS, Outcome, Run, train

ROOT = Path(__file__).resolve().parent.parent
FIRST_TUNING_SEED = 1000
FIGURES = [
    "setting",
    "data",
    "optimizer",
    "model",
    "schedule",
    "rounds",
    "method",
    "seeds",
    "lr",
    "lr_at_edge",
    "reached",
    "time",
]
FIGURES += ["time_half", "loss_ratio", "loss_low", "loss_high", "slow_accuracy", "slow_half", "best_ratio", "best_low"]
FIGURES += ["best_high", "worse"]


class Case(NamedTuple):
    """Runs that differ in method, learning rate and seed only."""

    setting: str
    data: str
    optimizer: str
    model: str
    schedule: str
    rounds: int

    def run(self, method: str, lr: float, seed: int) -> Run:
        """Return one of them."""
        setting, data, optimizer, model, schedule, rounds = self
        return Run(setting, data, method, optimizer, model, schedule, rounds, lr, seed)


def best(case: Case, method: str, seeds: Iterable[int], done: dict[Run, Outcome]) -> float | None:
    """Return a method's best learning rate, or None before all have been tried."""
    tuned = {lr: [done.get(case.run(method, lr, seed)) for seed in seeds] for lr in LRS[case.optimizer]}
    found = {lr: [outcome for outcome in outcomes if outcome is not None] for lr, outcomes in tuned.items()}
    return best_lr(found) if found == tuned else None


def timed(run: Run) -> tuple[Outcome, float]:
    """Train in a process of its own, and return the CPU time as well."""
    torch.set_num_threads(1)
    start = time.process_time()
    return train(run), time.process_time() - start


def sweep(runs: list[Run], rows: Rows, processes: int, until: float, name: str) -> bool:
    """Make the runs that are missing; tell whether all are there."""
    missing = [run for run in runs if run not in rows.outcomes]
    hardware = f"{os.cpu_count()} shared cores, {platform.machine()}, torch {torch.__version__}"
    command = shlex.join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]])
    columns = (name, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with (
        Progress(*columns, console=Console(stderr=True)) as bar,
        ProcessPoolExecutor(processes, mp_context=get_context("fork")) as pool,
    ):
        task = bar.add_task("", total=len(runs), completed=len(runs) - len(missing))
        waiting = iter(missing)
        pending = {pool.submit(timed, run): run for run in itertools.islice(waiting, processes)}
        while pending:
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                run = pending.pop(future)
                rows.add(run, *future.result(), hardware, command)
                bar.advance(task)
                if time.monotonic() < until and (following := next(waiting, None)) is not None:
                    pending[pool.submit(timed, following)] = following
    return all(run in rows.outcomes for run in runs)


def compared(
    cases: Iterable[Case], methods: Iterable[str], rows: Rows, tuning: range, seeds: range
) -> dict[Case, dict[str, Figures]]:
    """Return the figures of all methods that have been run to the end beside waiting and ignoring."""
    found: dict[Case, dict[str, Figures]] = {}
    for case in cases:
        lrs = {m: lr for m in methods if (lr := best(case, m, tuning, rows.outcomes)) is not None}
        measured: dict[str, Measured] = {}
        for method, lr in lrs.items():
            outcomes = {seed: rows.outcomes.get(case.run(method, lr, seed)) for seed in seeds}
            if None not in outcomes.values():
                measured[method] = {seed: outcome for seed, outcome in outcomes.items() if outcome is not None}
        if {"waiting", "arrivals"} <= measured.keys():
            found[case] = {
                m: figures(runs, measured["waiting"], measured["arrivals"], optimizer=case.optimizer, lr=lrs[m])
                for m, runs in measured.items()
            }
    return found


def save(found: dict[Case, dict[str, Figures]], path: Path, seeds: int) -> None:
    """Write the figures."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(FIGURES)
        for case, by_method in found.items():
            for method, f in by_method.items():
                numbers = [f.reached, *f.time, *f.loss, *f.slow_accuracy, *f.against_best]
                writer.writerow(
                    [*case, method, seeds, f.lr, int(f.at_edge), *(f"{x:.4g}" for x in numbers), int(f.worse)]
                )


def show(found: dict[Case, dict[str, Figures]], console: Console) -> None:
    """Print a table for each kind of data, optimizer, model and schedule."""
    for group in dict.fromkeys(case[1:] for case in found):
        table = Table(
            "setting",
            "method",
            "rate",
            "time",
            "final loss",
            "slow classes",
            title="{} data, {}, {}, {}, {} rounds".format(*group),
            caption="time to waiting's final loss, over waiting's; final loss over waiting's; accuracy on the slow "
            "workers' classes. 95 % intervals, paired by seed. *: the best learning rate is at the edge. "
            "worse: than the better one of waiting and ignoring, beyond noise.",
        )
        for case, by_method in found.items():
            if case[1:] == group:
                for method, f in by_method.items():
                    table.add_row(case.setting if method == "waiting" else "", method, *_cells(f))
                table.add_section()
        console.print(table)


def _cells(f: Figures) -> list[str]:
    return [
        f"{f.lr:g}{'*' if f.at_edge else ''}",
        f"{f.time[0]:.2f} ± {f.time[1]:.2f}" if math.isfinite(f.time[0]) else f"> 1 ({f.reached:.0%} reach it)",
        f"{f.loss[0]:.2f} ({f.loss[1]:.2f}-{f.loss[2]:.2f})" + (" [red]worse[/]" if f.worse else ""),
        f"{f.slow_accuracy[0]:.2f} ± {f.slow_accuracy[1]:.2f}",
    ]


def main(
    settings: Annotated[str, typer.Option(help="comma-separated")] = ",".join(SETTINGS),
    data: Annotated[str, typer.Option(help="own: classes of one's own; shuffled")] = "own,shuffled",
    methods: Annotated[str, typer.Option(help="separated by semicolons")] = ";".join(METHODS),
    optimizers: str = ",".join(LRS),
    models: str = ",".join(MODELS),
    schedules: Annotated[str, typer.Option(help="of the learning rate: constant, cosine")] = "constant",
    seeds: Annotated[int, typer.Option(help="that are measured", min=2)] = 5,
    tuning_seeds: Annotated[int, typer.Option(help="others, for the learning rates", min=1)] = 2,
    rounds: Annotated[int, typer.Option(help="the horizon, in mean rounds of waiting")] = 200,
    processes: int = os.cpu_count() or 1,
    minutes: Annotated[float, typer.Option(help="after which no run begins; a later call goes on")] = math.inf,
    out: Path = ROOT / "benchmarks" / "results" / "levers.csv",
    quick: Annotated[bool, typer.Option(help="two settings, one quarter of the time, into build/")] = False,
    only_tables: bool = False,
) -> None:
    """Run what is missing, save and print."""
    if quick:
        settings, data, optimizers, models, seeds, tuning_seeds, rounds = "comp5,link", "own", "adam", "mlp", 2, 1, 50
        out = ROOT / "build" / "levers.csv"
    lists = [names.split(",") for names in (settings, data, optimizers, models, schedules)]
    cases = [Case(*names, rounds) for names in itertools.product(*lists)]
    chosen, tuning, measured = (
        methods.split(";"),
        range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + tuning_seeds),
        range(seeds),
    )
    rows, until = Rows(out), time.monotonic() + 60 * minutes
    if not only_tables:
        dataset()  # downloads it before there are several processes
        tried = [
            case.run(m, lr, seed) for case in cases for m in chosen for lr in LRS[case.optimizer] for seed in tuning
        ]
        if sweep(tried, rows, processes, until, "learning rates"):
            lrs = {(case, m): best(case, m, tuning, rows.outcomes) for case in cases for m in chosen}
            runs = [case.run(m, lr, seed) for (case, m), lr in lrs.items() if lr is not None for seed in measured]
            sweep(runs, rows, processes, until, "measuring")
    found = compared(cases, chosen, rows, tuning, measured)
    save(found, out.with_name(f"{out.stem}_figures.csv"), seeds)
    show(found, Console())


if __name__ == "__main__":
    typer.run(main)
