"""From a file of recorded delays to straggle probabilities."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from torch_qgc.errors import ConfigError, PlanError
from torch_qgc.planner import Plan
from torch_qgc.planner.cadence import JobRounds
from torch_qgc.planner.checks import Floats
from torch_qgc.planner.deadline import choose_deadline
from torch_qgc.planner.delays import Empirical

__all__ = ["Lateness", "lateness_at", "lateness_from", "read_delays"]


class Lateness(NamedTuple):
    """How late workers are.

    Attributes:
        straggle_probs: [K], chance of each worker to miss a round of a job.
        deadline_s: the deadline that they are for, if one is known.
        speedup: how many times sooner a loss is reached with it than by waiting for all, if it was chosen and all come.
    """

    straggle_probs: Floats
    deadline_s: float | None = None
    speedup: float | None = None


def lateness_from(listed: str | None, delays: Path | None, deadline_s: str, plan: Callable[[Floats], Plan]) -> Lateness:
    """Return how late workers are, from their straggle probabilities or from recorded delays.

    Args:
        listed: numbers with commas between them; or
        delays: a CSV, see `read_delays`, with
        deadline_s, plan: as in `lateness_at`.
    Raises:
        ConfigError: both or neither.
        PlanError: no numbers.
    """
    if (listed is None) == (delays is None):
        raise ConfigError("expected --straggle-probs or --delays, got both or neither: give one")
    if delays is not None:
        return lateness_at(read_delays(delays), deadline_s, plan)
    assert listed is not None
    try:
        return Lateness(np.array([float(word) for word in listed.split(",")]))
    except ValueError:
        raise PlanError(f"straggle_probs: expected numbers with commas between, got {listed!r}: try 0.05,0.1") from None


def read_delays(path: Path) -> Floats:
    """Return [rounds, K] seconds from a CSV; a first line that is not numbers is taken for a heading.

    Raises:
        PlanError: not a table of numbers; the message names line and column.
        OSError: the file cannot be read.
    """
    with path.open(newline="") as file:
        lines = [(number, cells) for number, cells in enumerate(csv.reader(file), start=1) if cells]
    if lines and not any(_seconds(cell) is not None for cell in lines[0][1]):
        lines = lines[1:]
    if not lines:
        raise PlanError(f"{path}: expected a row of delays in seconds for every round, got none")
    width = len(lines[0][1])
    rows = []
    for number, cells in lines:
        if len(cells) != width:
            raise PlanError(f"{path}, line {number}: expected {width} columns, one per worker, got {len(cells)}")
        row = [math.inf if not cell.strip() else _seconds(cell) for cell in cells]
        for column, value in enumerate(row):
            if value is None or not value >= 0:
                raise PlanError(
                    f"{path}, line {number}, column {column + 1}: expected seconds >= 0, or nothing if the payload "
                    f"never came, got {cells[column]!r}"
                )
        rows.append(row)
    return np.array(rows, dtype=np.float64)


def lateness_at(delays_s: Floats, deadline_s: str, plan: Callable[[Floats], Plan]) -> Lateness:
    """Return how late workers are in a job that folds late payloads.

    Args:
        delays_s: [rounds, K].
        deadline_s: seconds, or "auto": the one that reaches a given loss soonest.
        plan: what is made of straggle probabilities.
    """
    rounds = JobRounds(Empirical(delays_s=delays_s))
    if deadline_s == "auto":
        choice = choose_deadline(rounds, plan)
        speedup = choice.speedup if math.isfinite(choice.speedup) else None
        return Lateness(choice.straggle_probs, choice.deadline_s, speedup)
    try:
        deadline = float(deadline_s)
    except ValueError:
        deadline = math.nan
    if not deadline > 0:
        raise PlanError(f"deadline_s: expected seconds > 0 or 'auto', got {deadline_s!r}")
    return Lateness(1.0 - rounds.cadence(deadline).rates, deadline)


def _seconds(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None
