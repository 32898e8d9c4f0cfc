"""Reproduce the experiments of Song & Choi's section VI with the simulator.

    python examples/paper/run.py                          all figures at the small scale
    python examples/paper/run.py --figure 2a --figure 1   some of them
    python examples/paper/run.py --scale paper --data-dir DIR      COCO (in DIR/coco), 50 runs: for a GPU; not run yet

Finished jobs are kept in OUT/runs and not run again, so an interrupted command goes on where it was. Tables, figures
and the report are made anew from what is there; --publish puts them where the documentation has them.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, track

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the examples, of which this is one

from common.packages import DownloadError

from paper import allocators, config, convergence, detections, plots, report, tables
from paper.checks import Tables
from paper.convergence import Job
from torch_qgc.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent.parent
ALLOCATION = "1"
BITS = "3f"  # drawn from 2a's runs
MADE_FROM = {BITS: "2a"}


def main(
    figure: Annotated[list[str] | None, typer.Option(help="A panel, such as 1, 2a, 3f or 4; may be repeated.")] = None,
    scale: Annotated[str, typer.Option(help="small or paper.")] = "small",
    runs: Annotated[int | None, typer.Option(help="Repetitions, instead of the config's.")] = None,
    steps: Annotated[int | None, typer.Option(help="Rounds, instead of the config's.")] = None,
    processes: Annotated[int, typer.Option(help="Runs computed at the same time; 1 with a GPU.")] = 2,
    data_dir: Annotated[Path, typer.Option(help="Where downloads are kept, and COCO is looked for.")] = Path("data"),
    out: Annotated[Path, typer.Option(help="Where results, tables, figures and the report go.")] = Path("demo/paper"),
    publish: Annotated[bool, typer.Option("--publish", help="Copy them into docs and benchmarks/results.")] = False,
) -> None:
    """Run experiments, then write tables, figures and the report."""
    console = Console()
    torch.set_num_threads(1)
    try:
        experiments = config.experiments(scale, runs=runs, steps=steps)
        known = [ALLOCATION, *(panel.key for panel in experiments.panels), BITS]
        if unknown := set(figure or []) - set(known):
            raise ConfigError(f"figure: expected some of {', '.join(known)}, got {', '.join(sorted(unknown))}")
        chosen = [MADE_FROM.get(key, key) for key in figure or known]
        out.mkdir(parents=True, exist_ok=True)
        if ALLOCATION in chosen:
            _allocate(experiments, out, console)
        panels = [panel.key for panel in experiments.panels if panel.key in chosen]
        _simulate(convergence.jobs(experiments, panels), out, data_dir, processes, console)
        made = write_all(experiments, out, data_dir)
    except (ConfigError, DownloadError, FileNotFoundError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
    if publish:
        _publish(out)
    console.print(f"{len(made)} figures, tables and the report: {out}")


def _allocate(experiments: config.Experiments, out: Path, console: Console) -> None:
    path = out / "paper_allocators.csv"
    if path.exists():
        return
    rows = allocators.rows(
        experiments.allocation, lambda it: track(it, "Fig. 1: allocating", console=console, transient=True)
    )
    tables.write(path, allocators.FIELDS, rows)


def _simulate(found: list[Job], out: Path, data_dir: Path, processes: int, console: Console) -> None:
    pending = [job for job in found if convergence.result(job, out) is None]
    columns = (TextColumn("{task.description:<36}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    started_at = time.monotonic()
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("Simulating", total=len(found), completed=len(found) - len(pending))
        for job in convergence.execute(pending, out, data_dir, processes=processes):
            progress.update(bar, advance=1, description=job.name)
    if pending:
        elapsed_s = time.monotonic() - started_at
        console.print(f"{len(pending)} of {len(found)} simulations in {elapsed_s:.0f} s, {processes} at a time")


def write_all(experiments: config.Experiments, out: Path, data_dir: Path) -> list[Path]:
    """Write tables, figures and the report from the results in `out`; return the figures."""
    panels = [panel.key for panel in experiments.panels]
    found = convergence.collect(convergence.jobs(experiments, panels), out)
    tables.write(out / "paper_runs.csv", tables.RUN_FIELDS, convergence.run_rows(found))
    tables.write(out / "paper_curves.csv", tables.CURVE_FIELDS, convergence.curve_rows(found))
    tables.write(out / "paper_detections.csv", tables.DETECTION_FIELDS, convergence.detection_rows(found))
    allocation = out / "paper_allocators.csv"
    read = Tables(
        runs=tables.Runs(tables.read(out / "paper_runs.csv")),
        allocation=tables.read(allocation) if allocation.exists() else (),
        curves=tables.read(out / "paper_curves.csv"),
        detections=tables.read(out / "paper_detections.csv"),
    )
    made = _draw(experiments, read, out, data_dir)
    (out / "paper.md").write_text(report.markdown(experiments, read, [path.name for path in made]))
    return made


def _draw(experiments: config.Experiments, read: Tables, out: Path, data_dir: Path) -> list[Path]:
    made = []
    if read.allocation:
        made.append(out / "paper_1.png")
        plots.allocation(read.allocation, made[-1])
    for panel in experiments.panels:
        rows = [row for row in read.curves if row["panel"] == panel.key]
        if any(row["quantizer"] for row in rows):
            made.append(out / f"paper_{panel.key}.png")
            plots.convergence(rows, panel.heading, made[-1])
    rows = [row for row in read.curves if row["panel"] == MADE_FROM[BITS]]
    if any(row["quantizer"] for row in rows):
        made.append(out / f"paper_{BITS}.png")
        plots.convergence(rows, f"Fig. {BITS}: loss against bits sent", made[-1], over="total_bits")
    if detections.picture(experiments, out, data_dir, out / "paper_4_pictures.png"):
        made.append(out / "paper_4_pictures.png")
    return made


def _publish(out: Path) -> None:
    """Copy the report to docs, figures to docs/pictures and tables to benchmarks/results."""
    shutil.copy(out / "paper.md", ROOT / "docs")
    for path in out.glob("paper_*.png"):
        shutil.copy(path, ROOT / "docs" / "pictures")
    for path in out.glob("paper_*.csv"):
        shutil.copy(path, ROOT / "benchmarks" / "results")


if __name__ == "__main__":
    typer.run(main)
