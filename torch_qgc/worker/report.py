"""What one worker has done and seen."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

__all__ = ["Report"]

PRIOR_ROUNDS, MEMORY_ROUNDS = 8, 128  # as of torch_qgc.job.rates.ArrivalRates


@dataclass(kw_only=True)
class Report:
    """Counts of one worker since its first step.

    Attributes:
        steps: steps this replica has applied = computed_steps + replayed_steps.
        computed_steps: steps for which this worker computed a gradient.
        replayed_steps: steps that closed without it and that it replayed.
        late_steps: computed steps that had closed before this worker's last chunk was out.
        rates: [K] payloads of each worker per round lately (an average that forgets over some 128 steps), without the
            steps that waited for all; at first what the plan expects.
        contribution_sums: [K] payloads of each worker that entered the rounds of these steps.
        bytes_sent, bytes_received: by this worker, headers included.
        wait_s: seconds the training thread waited for results.
        rejections: what aggregators said about messages they dropped, the newest hundred.
    """

    workers: int
    numel: int
    steps: int = 0
    computed_steps: int = 0
    replayed_steps: int = 0
    late_steps: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    wait_s: float = 0.0
    rejections: tuple[str, ...] = ()
    rates: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    contribution_sums: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    _rated_steps: int = 0

    def __post_init__(self) -> None:
        if self.contribution_sums.size == 0:
            self.contribution_sums = np.zeros(self.workers)
        if self.rates.size == 0:
            self.rates = np.ones(self.workers)

    def note(self, contributions: NDArray[np.float64], *, waited_for_all: bool) -> None:
        """Enter an applied step: [K] payloads of each worker per chunk."""
        self.steps += 1
        self.contribution_sums += contributions
        if not waited_for_all:
            self._rated_steps += 1
            weight = 1.0 / min(PRIOR_ROUNDS + self._rated_steps, MEMORY_ROUNDS)
            self.rates = self.rates + weight * (contributions - self.rates)

    @property
    def contributions(self) -> NDArray[np.float64]:
        """[K] payloads of each worker per round, the measured r_k (folded ones included)."""
        return self.contribution_sums / max(self.steps, 1)

    @property
    def bytes_sent_per_step(self) -> float:
        """Mean bytes this worker sent per step of the job."""
        return self.bytes_sent / max(self.steps, 1)

    def snapshot(self) -> Report:
        """Return a copy that no longer changes."""
        return copy.deepcopy(self)

    def __str__(self) -> str:
        shares = " ".join(f"{c:.2f}" for c in self.contributions)
        return (
            f"{self.steps} steps: {self.computed_steps} computed ({self.late_steps} of them late), "
            f"{self.replayed_steps} replayed; contributions per round [{shares}]; sent "
            f"{self.bytes_sent_per_step / 2**20:.2f} MiB per step (fp32 gradient: {self.numel * 4 / 2**20:.2f} MiB); "
            f"waited {self.wait_s:.1f} s"
        )
