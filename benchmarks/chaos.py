"""What faults cost: how long the others stand still, how many steps are lost, and how soon all hear of an error.

    python benchmarks/chaos.py

Runs the cases of tests/chaos, in which real processes are killed, stopped and cut off, and keeps what is seen in each.
`stall_s` is the longest time between two steps of the ranks that nothing was done to, `stall_of_hit_s` that of the
others, both after the fault; `told_s` is the time from the fault until the last rank has raised its error. `steps_lost`
are those that the ranks have not made that went on, or that nobody has made if none did. `held` says whether all was as
the case demands. One run of each case.
"""

from __future__ import annotations

import csv
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "chaos.csv"


def main(short: bool = typer.Option(False, help="only the cases that `make test` runs; nothing is saved")) -> None:
    """Run, save and print."""
    with tempfile.TemporaryDirectory() as folder:
        seen = Path(folder) / "seen.csv"
        cases = [] if short else ["-m", "chaos"]
        environment = {**os.environ, "CHAOS_CSV": str(seen), "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-m", "pytest", "tests/chaos", *cases], cwd=ROOT, env=environment)
        with seen.open(newline="") as file:
            rows = list(csv.DictReader(file))
    hardware = f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}"
    rows = [{**row, "hardware": hardware, "command": "python benchmarks/chaos.py"} for row in rows]
    if not short:
        with RESULTS.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    table = Table(*list(rows[0])[:-2])
    for row in rows:
        table.add_row(*map(escape, list(row.values())[:-2]))
    Console(width=200).print(table)


if __name__ == "__main__":
    typer.run(main)
