"""Reproduce the experiments of Song & Choi's section VI with the simulator.

    python examples/paper/run.py                          all figures at the small scale
    python examples/paper/run.py --figure 2a --figure 1   some of them
    python examples/paper/run.py --scale paper --data-dir DIR      COCO (in DIR/coco), 50 runs: for a GPU; not run yet

Finished jobs are kept in OUT/runs and not run again, so an interrupted command goes on where it was. Tables, figure and
report are made anew from what is there; --publish puts them where the documentation has them.
"""

from __future__ import annotations

import shutil
import sys
import time
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, track

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the examples, of which this is one

from common.packages import DownloadError

from paper import allocators, config, convergence, plot, report, tables
from paper.config import Experiments
from paper.convergence import Job
from torch_qgc.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent.parent
ALLOCATION = "1"
BITS = "3f"  # made from 2a's runs
MADE_FROM = {BITS: "2a"}


def main(
    figure: Annotated[list[str] | None, typer.Option(help="A panel, such as 1, 2a, 3f or 4; may be repeated.")] = None,
    scale: Annotated[str, typer.Option(help="small or paper.")] = "small",
    runs: Annotated[int | None, typer.Option(help="Repetitions, instead of the config's.")] = None,
    steps: Annotated[int | None, typer.Option(help="Rounds, instead of the config's.")] = None,
    processes: Annotated[int, typer.Option(help="Runs computed at the same time; 1 with a GPU.")] = 2,
    data_dir: Annotated[Path, typer.Option(help="Where downloads are kept, and COCO is looked for.")] = Path("data"),
    out: Annotated[Path, typer.Option(help="Where results, tables, figure and report go.")] = Path("demo/paper"),
    publish: Annotated[bool, typer.Option("--publish", help="Copy them into docs and benchmarks/results.")] = False,
) -> None:
    """Run experiments, then write tables, figure and report."""
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
        write_all(experiments, out)
    except (ConfigError, DownloadError, FileNotFoundError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
    if publish:
        _publish(experiments, out)
    console.print(f"Tables, figure and report: {out}")


def _allocate(experiments: Experiments, out: Path, console: Console) -> None:
    path = out / "paper_allocators.csv"
    if not path.exists():
        shown = partial(track, description="Fig. 1: allocating", console=console, transient=True)
        tables.write(path, allocators.FIELDS, allocators.rows(experiments.allocation, shown))


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


def write_all(experiments: Experiments, out: Path) -> None:
    """Write tables, figure and report from the results in `out`."""
    found = convergence.collect(convergence.jobs(experiments, [panel.key for panel in experiments.panels]), out)
    runs, share = convergence.run_rows(found), partial(convergence.largest_share, experiments)
    of_2a = [(job, record) for job, record in found if job.panel.key == MADE_FROM[BITS]]
    tables.write(out / "paper_schemes.csv", tables.SCHEME_FIELDS, tables.summarize(runs, share))
    tables.write(out / "paper_bits.csv", tables.BITS_FIELDS, tables.at_equal_bits(convergence.curve_rows(of_2a)))
    tables.write(out / "paper_detections.csv", tables.DETECTION_FIELDS, convergence.detection_rows(found))
    report_on(experiments, out, pictures=out, page=out / "paper.md")


def report_on(experiments: Experiments, folder: Path, *, pictures: Path, page: Path) -> None:
    """Draw the figure and write the report from the tables in `folder`."""
    read = report.read(folder)
    if read.schemes.rows:
        plot.final_losses(experiments, read.schemes, pictures / report.PICTURE)
    page.write_text(report.markdown(experiments, read))


def _publish(experiments: Experiments, out: Path) -> None:
    """Copy the tables to benchmarks/results, and make the documentation's page and picture of them."""
    results = ROOT / "benchmarks" / "results"
    for path in out.glob("paper_*.csv"):
        shutil.copy(path, results)
    report_on(experiments, results, pictures=ROOT / "docs" / "pictures", page=ROOT / "docs" / "paper.md")


if __name__ == "__main__":
    typer.run(main)
