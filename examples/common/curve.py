"""An example's curve: what each evaluation found, as CSV and as a picture."""

import csv
from collections.abc import Mapping
from pathlib import Path

Row = dict[str, float]  # step, time_s, and the metrics by name


def write(rows: list[Row], folder: Path) -> None:
    """Write curve.csv."""
    with (folder / "curve.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read(folder: Path) -> list[Row]:
    """Read curve.csv."""
    with (folder / "curve.csv").open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def draw(jobs: Mapping[str, list[Row]], path: Path) -> None:
    """Draw every metric of every job against seconds and steps."""
    from common.plots import curves  # matplotlib costs a second, and draws at the end only

    names = [name for name in next(iter(jobs.values()))[0] if name not in ("step", "time_s")]
    curves(
        {
            name: {
                title: [(int(row["step"]), row["time_s"], row[name]) for row in rows] for title, rows in jobs.items()
            }
            for name in names
        },
        path,
    )
