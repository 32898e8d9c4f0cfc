"""Machines with one reason to be slow each, and the data that they hold. A second is a healthy worker's mean batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from torch_qgc.simulator import Machines

__all__ = ["CLASSES", "SETTINGS", "Data", "Setting", "own_samples", "slow_classes"]

CLASSES = 10
#: "own": data cannot move, every worker has classes of its own; "shuffled": anybody may draw anything.
Data = Literal["own", "shuffled"]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """K unequal machines.

    Args:
        why: in words.
        machines: see `Machines`.
        deadline_s: of rounds with equal batches.
        slack: the deadline with batches by speed, over the time at which these are meant to end.
        slow: the workers whose classes are looked at by themselves.
        skewed: own data are drawn by Dirichlet(0.3) instead of being whole classes.
        bits, downlink_bits: of methods that encode; 32: they do not.
    """

    why: str
    machines: Machines
    deadline_s: float
    slack: float = 1.3
    slow: tuple[int, ...] = (4,)
    skewed: bool = False
    bits: int = 32
    downlink_bits: int = 32


def _five(**causes: Any) -> Machines:
    return Machines(**{"workers": 5, "fixed_s": 0.1, "jitter": 0.1, **causes})


def _last(value: float, others: float = 0.0) -> tuple[float, ...]:
    return (others,) * 4 + (value,)


SETTINGS = {
    "comp2": Setting(why="2x slower processor", machines=_five(batch_s=_last(2, 1)), deadline_s=1.5),
    "comp5": Setting(why="5x slower processor", machines=_five(batch_s=_last(5, 1)), deadline_s=1.5),
    "comp10": Setting(why="10x slower processor", machines=_five(batch_s=_last(10, 1)), deadline_s=1.5),
    "demo": Setting(
        why="another .9 + Exp(5.8) s in every step",
        machines=_five(fixed_s=_last(0.9, 0.1), tail_s=_last(5.8)),
        deadline_s=2.1,
    ),
    "tail": Setting(why="Exp(.7) s for everybody", machines=_five(tail_s=0.7), deadline_s=2.2, slack=1.5),
    "pause": Setting(
        why="6 s in half of the steps, others in 3 %",
        machines=_five(pause_chance=_last(0.5, 0.03), pause_s=6.0),
        deadline_s=1.6,
    ),
    "pauseall": Setting(
        why="8 s in 5 % of the steps, anybody", machines=_five(pause_chance=0.05, pause_s=8.0), deadline_s=1.6
    ),
    "link": Setting(
        why="4 s per fp32 gradient, each way",
        machines=_five(up_s=_last(4, 0.1), down_s=_last(4, 0.1)),
        deadline_s=1.6,
        bits=4,
        downlink_bits=8,
    ),
    "mix8": Setting(
        why="8 workers, of all kinds",
        machines=Machines(
            workers=8,
            batch_s=(1, 1, 1, 1.2, 1.5, 2, 4, 8),
            fixed_s=0.1,
            tail_s=(0.1, 0.1, 0.3, 0.1, 0.1, 0.3, 0.3, 0.3),
            pause_chance=0.02,
            pause_s=6.0,
            jitter=0.1,
        ),
        deadline_s=2.4,
        slack=1.5,
        slow=(6, 7),
        skewed=True,
    ),
    "even": Setting(why="nobody is slow", machines=_five(), deadline_s=1.5),
}


def own_samples(setting: Setting, labels: np.ndarray, seed: int) -> list[np.ndarray]:
    """Return the sample indices that each worker holds where data cannot move."""
    workers = setting.machines.workers
    if not setting.skewed:
        return [np.flatnonzero(labels * workers // CLASSES == k) for k in range(workers)]
    rng = np.random.default_rng([seed, 77])
    parts: list[list[int]] = [[] for _ in range(workers)]
    for digit in range(CLASSES):
        order = rng.permutation(np.flatnonzero(labels == digit))
        cuts = (np.cumsum(rng.dirichlet(np.full(workers, 0.3)))[:-1] * len(order)).astype(int)
        for part, piece in zip(parts, np.split(order, cuts)):
            part.extend(piece.tolist())
    # Nobody is left without data: a few random samples more.
    return [np.array(part + rng.integers(len(labels), size=max(16 - len(part), 0)).tolist()) for part in parts]


def slow_classes(setting: Setting, labels: np.ndarray, parts: Sequence[np.ndarray]) -> np.ndarray:
    """Return the classes of which the slow workers hold more than half."""
    held = np.bincount(labels[np.concatenate([parts[k] for k in setting.slow])], minlength=CLASSES)
    return np.flatnonzero(held > 0.5 * np.bincount(labels, minlength=CLASSES))
