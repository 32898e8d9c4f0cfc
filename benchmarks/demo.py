"""The demo over seeds: when does each job reach a given AP50, in the same time and on the same workers?

    python benchmarks/demo.py --tune          three learning rates per job, of a seed of their own
    python benchmarks/demo.py --seeds 5       every job at its own best one: benchmarks/results/demo.csv
    python benchmarks/demo.py --plot          docs/pictures/demo.png and a table, from the CSV alone

Rows are kept as they come, and what has a row is not run again, so that it may be interrupted at any time. Run it on a
machine that does nothing else: on two cores the workers' own computing must fit beside their sleeping. `--pace 2` makes
everything that is emulated, and the jobs, take twice as long, which halves what the cores matter.
"""

from __future__ import annotations

import csv
import math
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from scipy import stats

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))

from common.files import replacing  # noqa: E402
from detection import comparison, demo, rendering  # noqa: E402
from detection.curves import COLOURS  # noqa: E402
from detection.settings import JOBS, PANELS, Settings  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
PICTURE = ROOT / "docs" / "pictures" / "demo.png"
RATES = (3e-3, 6e-3, 1.2e-2)
TUNING_SEED = 100  # not one of those that are reported
KEY = ("panel", "job", "seed", "lr", "seconds", "pace")

Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    """Return the rows of a CSV file, none if it is not there."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def add(path: Path, row: Row) -> None:
    """Add a row to a CSV file, which is replaced as a whole: a kill leaves the old or the new one."""
    rows = [*read(path), row]
    with replacing(path) as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def key_of(row: Row) -> tuple[str, ...]:
    """Return what tells rows apart."""
    return tuple(str(row[name]) for name in KEY)


def measure(s: Settings, console: Console) -> Row:
    """Run one job, judge its models, and return its row."""
    script = ROOT / "examples" / "detection_mobilenetv3.py"
    result = comparison.run(script, s, console, title=f"{s.panel} {s.job}, seed {s.seed}, lr {s.lr:g}")
    (outcome,) = comparison.judge([(s, result)], console)
    points = outcome.points
    return {name: str(getattr(s, name)) for name in KEY} | {
        "steps": result.steps,
        "ap50": f"{points[-1].ap50:.4f}",
        "ap50_slow": f"{points[-1].ap50_slow:.4f}",
        "times_s": " ".join(f"{point.time_s:.1f}" for point in points),
        "ap50s": " ".join(f"{point.ap50:.4f}" for point in points),
        "used": " ".join(f"{part:.2f}" for part in result.used),
        "load": f"{os.getloadavg()[2]:.1f}",
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}, torch {comparison.torch.__version__}",
        "command": "python " + " ".join([os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
    }


def seconds_to(level: float, row: Row) -> float:
    """Return when a job has reached an AP50; inf if it has not."""
    times_s, values = ([float(word) for word in row[name].split()] for name in ("times_s", "ap50s"))
    return comparison.seconds_to(level, times_s, values)


def summary(rows: Sequence[Row], level: float) -> dict[tuple[str, str], tuple[list[float], list[Row]]]:
    """Return (panel, job) -> the seconds to a level of the seeds that have reached it, and the rows of all seeds."""
    found = {}
    for panel, job in product(PANELS, JOBS):
        of = [row for row in rows if (row["panel"], row["job"]) == (panel, job)]
        if of:
            found[panel, job] = [t for row in of if math.isfinite(t := seconds_to(level, row))], of
    return found


def show(rows: Sequence[Row], level: float, console: Console) -> None:
    """Print every job's seconds to the level, and where it ends."""
    table = Table("data", "job", "lr", f"seconds to AP50 {level:g}", "reached", "AP50", "slow workers' own", "steps")
    for (panel, job), (times_s, of) in summary(rows, level).items():
        means = [f"{statistics.mean(float(row[name]) for row in of):.3f}" for name in ("ap50", "ap50_slow")]
        steps = f"{statistics.mean(float(row['steps']) for row in of):.0f}"
        reach = f"{statistics.mean(times_s):.0f} +- {half_width(times_s):.0f}" if times_s else "-"
        table.add_row(PANELS[panel], JOBS[job].title, of[0]["lr"], reach, f"{len(times_s)} of {len(of)}", *means, steps)
    console.print(table)


def half_width(values: Sequence[float]) -> float:
    """Return half of the 95 % t interval of a mean; nan for a single value."""
    if len(values) < 2:
        return math.nan
    return float(stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values)))


def draw(rows: Sequence[Row], level: float, path: Path) -> None:
    """Draw the seconds to a level: a bar per job, whiskers from the first to the last seed.

    Where a seed has not reached it, the bar is hatched up to the end of the job, and says how many have.
    """
    from matplotlib.figure import Figure

    found = summary(rows, level)
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(PANELS), sharey=True, squeeze=False)[0], PANELS):
        jobs = [job for job in JOBS if (panel, job) in found]
        for place, job in enumerate(jobs):
            times_s, of = found[panel, job]
            all_in = len(times_s) == len(of)
            height = statistics.mean(times_s) if all_in else float(of[0]["seconds"])
            look = {"color": COLOURS[place]} if all_in else {"facecolor": "white", "edgecolor": "0.6", "hatch": "//"}
            axes.barh(place, height, **look)
            if all_in:
                whiskers = [[height - min(times_s)], [max(times_s) - height]]
                axes.errorbar(height, place, xerr=whiskers, color="black", capsize=3)
            else:
                axes.text(1, place, f"{len(times_s)} of {len(of)} reach it", va="center", fontsize=8)
        axes.set_yticks(range(len(jobs)), [JOBS[job].title for job in jobs])
        axes.set(title=PANELS[panel], xlabel=f"seconds to AP50 {level:g}")
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=130, format="png")


def main(
    tune: Annotated[bool, typer.Option("--tune", help="Try learning rates instead.")] = False,
    plot: Annotated[bool, typer.Option("--plot", help="Run nothing: table and picture of what there is.")] = False,
    seeds: Annotated[int, typer.Option(help="Runs of every job.")] = 5,
    seconds: Annotated[float, typer.Option(help="How long each job trains.")] = Settings.seconds,
    pace: Annotated[float, typer.Option(help="How many times as long everything takes.")] = 1.0,
    job: Annotated[list[str] | None, typer.Option(help="Only this job.")] = None,
    panel: Annotated[list[str] | None, typer.Option(help="Only this panel.")] = None,
    level: Annotated[float, typer.Option(help="The AP50 to be reached.")] = 0.5,
    data_dir: Annotated[Path, typer.Option(help="Where rendered images are kept.")] = ROOT / "data",
    scratch: Annotated[Path, typer.Option(help="Where logs and models go.")] = ROOT / "demo" / "benchmark",
) -> None:
    """Run what has no row yet, write its row, and show all rows."""
    console = Console(width=150)
    path = RESULTS / ("demo_lr.csv" if tune else "demo.csv")
    if not plot:
        for seed, p, j in product([TUNING_SEED] if tune else range(seeds), panel or PANELS, job or JOBS):
            for lr in RATES if tune else [demo.tuned_lr(p, j)]:
                s = Settings(
                    data=rendering.digits(data_dir, seed=seed).resolve(),
                    folder=scratch / p / j / f"seed{seed}-lr{lr:g}",
                    panel=p,
                    job=j,
                    seed=seed,
                    lr=lr,
                    seconds=seconds,
                    pace=pace,
                )
                key = tuple(str(getattr(s, name)) for name in KEY)
                if key not in map(key_of, read(path)):
                    add(path, measure(s, console))
    rows = read(path)
    show(rows, level, console)
    if rows and not tune:
        draw(rows, level, PICTURE)


if __name__ == "__main__":
    typer.run(main)
