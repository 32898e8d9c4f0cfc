"""What was seen in a case of real processes, as a row of a table."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from helpers.script import Board
from helpers.stage import Stage


def measured(stage: Stage) -> dict[str, Any]:
    """Return what was seen of the case, for a table."""
    survivors = [rank for rank in stage.ranks if rank not in stage.killed]
    ends = {rank: stage.came_to(rank) for rank in survivors}
    failed = [rank for rank, end in ends.items() if end is not None and end.error is not None]
    went_on = [rank for rank, end in ends.items() if end is not None and end.error is None]
    outcomes: dict[str, list[int]] = {}
    for rank, end in ends.items():
        if rank in stage.hung:
            name = "hung"
        else:
            name = "ended" if end is None else (end.error or "trained to the end").split(":")[0]
        outcomes.setdefault(name, []).append(rank)
    board = stage.board
    others = [gap for rank in went_on if rank not in stage.hit for gap in _gaps_s(board, rank)]
    hit = [gap for rank in went_on if rank in stage.hit for gap in _gaps_s(board, rank)]
    told = [board.failed_s[rank] - board.fault_s for rank in failed if board.fault_s]
    made = [int((board.made_s[rank] > 0).sum()) for rank in went_on or survivors]
    return {
        "ranks": len(stage.ranks),
        "outcome": "; ".join(f"{name}: {_shown(ranks)}" for name, ranks in outcomes.items()),
        "killed": _shown(stage.killed),
        "steps": stage.steps,
        "steps_lost": stage.steps - min(made, default=0),
        "stall_s": _longest(others),
        "stall_of_hit_s": _longest(hit),
        "told_s": _longest(told),
    }


def _gaps_s(board: Board, rank: int) -> list[float]:
    """Return the times between a rank's steps that end after the fault, those at the gate left out."""
    steps = np.flatnonzero(board.made_s[rank])
    made_s, waited_s = board.made_s[rank, steps], board.waited_s[rank, steps]
    gaps_s = np.diff(made_s) - waited_s[1:]
    return gaps_s[made_s[1:] > board.fault_s].tolist() if board.fault_s else []


def _longest(times_s: list[float]) -> str:
    return f"{max(times_s):.3f}" if times_s else ""


def _shown(ranks: Collection[int]) -> str:
    """Return numbers as "0 2-5 7"."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return " ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
