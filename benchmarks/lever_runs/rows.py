"""The CSV of runs: a row per run, appended as soon as it is through, so that an interrupted sweep goes on."""

from __future__ import annotations

import csv
import os
from dataclasses import asdict, fields
from pathlib import Path

from lever_runs.training import Outcome, Run

__all__ = ["Rows"]

_RUN = [f.name for f in fields(Run)]
_FIELDS = [*_RUN, "steps", "loss", "accuracy", "slow_accuracy", "cpu_s", "hardware", "command"]


class Rows:
    """What has been run so far.

    Args:
        path: of the file; a row that an interruption has cut is left out, and written over.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.outcomes: dict[Run, Outcome] = {}
        self.cpu_s = 0.0
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        complete = [line for line in lines if line.endswith("\n")]
        for row in csv.DictReader(complete):
            self.outcomes[_run(row)] = _outcome(row)
            self.cpu_s += float(row["cpu_s"])
        if complete != lines or not lines:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            partial.write_text("".join(complete) or ",".join(_FIELDS) + "\n")
            os.replace(partial, path)

    def add(self, run: Run, outcome: Outcome, cpu_s: float, hardware: str, command: str) -> None:
        """Append a run."""
        self.outcomes[run] = outcome
        self.cpu_s += cpu_s
        row = {
            **asdict(run),
            "steps": outcome.steps,
            "loss": " ".join(f"{value:.5g}" for value in outcome.loss),
            "accuracy": f"{outcome.accuracy:.4f}",
            "slow_accuracy": f"{outcome.slow_accuracy:.4f}",
            "cpu_s": f"{cpu_s:.2f}",
            "hardware": hardware,
            "command": command,
        }
        with self._path.open("a", newline="") as file:
            csv.DictWriter(file, _FIELDS, lineterminator="\n").writerow(row)


def _run(row: dict[str, str]) -> Run:
    values = {name: row[name] for name in _RUN}
    return Run(**{**values, "rounds": int(row["rounds"]), "lr": float(row["lr"]), "seed": int(row["seed"])})


def _outcome(row: dict[str, str]) -> Outcome:
    loss = [float(value) for value in row["loss"].split()]
    return Outcome(int(row["steps"]), loss, float(row["accuracy"]), float(row["slow_accuracy"]))
