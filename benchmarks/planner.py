"""Time the bit allocators and what they lose against the optimum, and the code's closed form against cvxpy.

    python benchmarks/planner.py --rounds 3

Every allocator gets the same table of utilities: straggle probabilities drawn from U(.02, .5), Song & Choi's quantizer
bound, 2 to 16 bits, B = 4 K. Where an allocator's time grows too fast for a size it is left out there. The gap is the
residual it leads to over the least one, minus one; "exact" is checked against the dynamic program where that can go.
"""

from __future__ import annotations

import csv
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from torch_qgc.cli.pictures import budget_picture, figure, save, shares_picture
from torch_qgc.planner import PlanOptions, allocate_bits, make_plan, optimal_shares, quantization_variance
from torch_qgc.planner.bits import Method
from torch_qgc.planner.cadence import JobRounds
from torch_qgc.planner.deadline import choose_deadline
from torch_qgc.planner.delays import ShiftedExponential

ROOT = Path(__file__).parent
RESULTS, PICTURES = ROOT / "results", ROOT.parent / "docs" / "pictures"
SIZES = (10, 30, 100, 300, 1000, 10_000, 100_000)
MOST_WORKERS: dict[Method, int] = {
    "exact": 100_000,
    "dp": 1000,
    "low_complexity": 100,
    "greedy": 100_000,
    "relaxation": 100_000,
    "equal": 100_000,
}
FIELDS = ["problem", "method", "workers", "bits_per_worker", "round", "seconds", "gap", "hardware", "command"]


def utilities(workers: int) -> np.ndarray:
    """Return U [K, 17] of workers drawn with a fixed seed."""
    late = np.random.default_rng(0).uniform(0.02, 0.5, workers)[:, None]
    table = np.full((workers, 17), -np.inf)
    table[:, 2:] = (1 - late) / (late + quantization_variance(np.arange(2, 17), 512, norm="l2", bound="paper"))
    return table


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def allocation(rounds: int, mean_bits: int) -> list[dict[str, Any]]:
    """Time every allocator at every size; methods take turns."""
    rows = []
    for workers in SIZES:
        table = utilities(workers)
        methods = [method for method, most in MOST_WORKERS.items() if workers <= most]
        for turn in range(rounds):
            for method in methods:
                seconds, bits = timed(lambda m=method, t=table, k=workers: allocate_bits(t, mean_bits * k, m))
                utility = float(table[np.arange(workers), bits].sum())
                rows.append(
                    dict(problem="bits", method=method, workers=workers, round=turn, seconds=seconds, u=utility)
                )
        best = max(row["u"] for row in rows if row["workers"] == workers)
        for row in rows:
            if row["workers"] == workers:
                row |= {"gap": best / row.pop("u") - 1.0, "bits_per_worker": mean_bits}
    return rows


def code(rounds: int) -> list[dict[str, Any]]:
    """Time Theorem 1 against cvxpy on the problem it solves: min sum_k delta_k (sum_n a_kn)^2, columns sum to one."""
    try:
        import cvxpy
    except ImportError:
        return []
    rows = []
    for workers in (10, 30, 100, 300):
        late = np.random.default_rng(0).uniform(0.02, 0.5, workers)
        delta = (late + 0.1) / (1 - late)

        def by_solver(k: int = workers, factors: np.ndarray = delta) -> np.ndarray:
            weights = cvxpy.Variable((k, k), nonneg=True)
            error = cvxpy.sum_squares(cvxpy.multiply(np.sqrt(factors), cvxpy.sum(weights, axis=1)))
            cvxpy.Problem(cvxpy.Minimize(error), [cvxpy.sum(weights, axis=0) == 1]).solve(solver=cvxpy.CLARABEL)
            return np.asarray(weights.value).sum(axis=1) / k

        solvers = {"closed form": lambda p=late: optimal_shares(p, 0.1), f"cvxpy {cvxpy.__version__}": by_solver}
        for turn in range(rounds):
            for method, solve in solvers.items():
                seconds, shares = timed(solve)
                gap = float(np.sum(delta * shares**2)) * float(np.sum(1 / delta)) - 1.0
                rows.append(
                    dict(problem="code", method=method, workers=workers, round=turn, seconds=seconds, gap=gap)
                    | {"bits_per_worker": ""}
                )
    return rows


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """Print medians, as they stand in docs/planner.md."""
    for problem in dict.fromkeys(row["problem"] for row in rows):
        of_it = [row for row in rows if row["problem"] == problem]
        sizes = sorted({row["workers"] for row in of_it})
        table = Table("method", *(f"K = {k:,}" for k in sizes), title=f"{problem}: median time, gap of the residual")
        for method in dict.fromkeys(row["method"] for row in of_it):
            cells = []
            for k in sizes:
                here = [row for row in of_it if row["method"] == method and row["workers"] == k]
                median = statistics.median([row["seconds"] for row in here]) if here else 0.0
                cells.append(f"{1e3 * median:.3g} ms, {here[0]['gap']:.1e}" if here else "-")
            table.add_row(method, *cells)
        console.print(table)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw time and gap against the number of workers."""
    picture, (left, right) = figure(2)
    rows = [row for row in rows if row["problem"] == "bits"]
    for method in dict.fromkeys(row["method"] for row in rows):
        sizes = sorted({row["workers"] for row in rows if row["method"] == method})
        of = [[row for row in rows if row["method"] == method and row["workers"] == k] for k in sizes]
        left.loglog(sizes, [statistics.median(r["seconds"] for r in here) for here in of], "o-", ms=3, label=method)
        right.semilogx(sizes, [here[0]["gap"] for here in of], "o-", ms=3, label=method)
    left.set(xlabel="workers", ylabel="seconds")
    right.set(xlabel="workers", ylabel="residual above the least, relative")
    right.set_yscale("symlog", linthresh=1e-3)
    left.legend(fontsize="small")
    save(picture, path)


def pictures(folder: Path) -> None:
    """Draw the pictures of docs/planner.md: bits, shares, decoders and deadline of the page's own examples."""
    folder.mkdir(exist_ok=True)
    late = [0.05, 0.08, 0.12, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5]
    options = PlanOptions(norm="l2", variance="paper", noise_ratio=0.0)
    picture, (left, right) = figure(2)
    shares_picture(left, make_plan(late, options=options))
    budget_picture(right, late, options, 10)
    save(picture, folder / "planner_bits.png")

    picture, (axes,) = figure(1)
    for eta in (0.0, 0.3, 1.0, 10.0):
        axes.plot(late, make_plan(late, noise_ratio=eta).shares, "o-", ms=3, label=f"eta = {eta:g}")
    axes.set(xlabel="chance to be late", ylabel="share of the data", yscale="log")
    axes.legend()
    save(picture, folder / "planner_shares.png")

    from torch_qgc import schemes

    picture, (axes,) = figure(1)
    alike = np.linspace(0.0, 1.0, 11)
    for decoder in ("unbiased", "hajek", "ridge", "uncorrected"):
        plan = make_plan(late, decoder=decoder, noise_ratio=0.0)
        grams = [(1 - rho) * np.eye(10) + rho for rho in alike]
        axes.semilogy(alike, [schemes.residual(plan, gram) for gram in grams], "o-", ms=3, label=decoder)
    axes.set(xlabel="correlation of partitions' gradients", ylabel="error of a round")
    axes.legend()
    save(picture, folder / "planner_decoders.png")

    picture, (axes,) = figure(1)
    job = JobRounds(ShiftedExponential(mu=np.array([4.0, 2.0, 1.0, 0.5]), shift=1.0))
    cost = []
    for t in (times := np.geomspace(*job.search_s, 200)):
        cadence = job.cadence(t)
        plan = make_plan(1 - cadence.rates)
        cost.append((cadence.round_s + 0.1) * (1 + plan.shares @ cadence.staleness + plan.residual_bound))
    choice = choose_deadline(job, make_plan, overhead_s=0.1)
    axes.plot(times, cost)
    axes.plot(choice.deadline_s, choice.objective, "o", label=f"auto: {choice.deadline_s:.2f} s")
    axes.axhline(choice.waiting_objective, ls=":", color="0.5", label="waiting for all")
    axes.set(xlabel="deadline in s", ylabel="time to a given loss, relative", ylim=(0, 8))
    axes.legend()
    save(picture, folder / "planner_deadline.png")


def main(
    rounds: Annotated[int, typer.Option(help="measured turns of every method")] = 3,
    mean_bits: Annotated[int, typer.Option(help="budget over workers")] = 4,
    only_pictures: Annotated[bool, typer.Option("--only-pictures", help="draw docs/pictures and stop")] = False,
) -> None:
    """Measure allocators and the code, and draw the planner's pictures."""
    if not only_pictures:
        rows = allocation(rounds, mean_bits) + code(rounds)
        command = "python benchmarks/planner.py " + " ".join(sys.argv[1:])
        hardware = f"{platform.machine()}, {os.cpu_count()} shared cores, numpy {np.__version__}"
        RESULTS.mkdir(exist_ok=True)
        with (RESULTS / "planner.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            for row in rows:
                numbers = {"seconds": f"{row['seconds']:.6f}", "gap": f"{row['gap']:.3e}"}
                writer.writerow({**row, **numbers, "hardware": hardware, "command": command})
        plot(rows, RESULTS / "planner.png")
        show(rows, Console(width=160))
    pictures(PICTURES)


if __name__ == "__main__":
    typer.run(main)
