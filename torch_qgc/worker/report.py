"""What one worker has done and seen."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from torch_qgc.worker.session import Session

__all__ = ["Report"]


@dataclass(kw_only=True)
class Report:
    """Counts of one worker since its first step.

    Attributes:
        computed_steps: steps for which this worker computed a gradient.
        thin_steps: steps that closed without it, whose loop body ran on a few samples for the result only.
        replayed_steps: steps that closed without it and that it replayed by the bound update.
        late_steps: computed steps that had closed before this worker's last chunk was out.
        rates: [K] contributions of each worker per round lately, r_k: the estimate that decoding takes its coefficients
            from (`torch_qgc.job.rates.ArrivalRates`), over all chunks; at first what the plan expects.
        contribution_sums: [K] payloads of each worker that entered the rounds of these steps.
        bytes_sent, bytes_received: by this worker, headers included.
        wait_s: seconds the training thread waited for results.
        rejections: what aggregators said about messages they dropped, the newest hundred.
        gone: workers that are no longer in the job, and how they went: "left" or "lost".
    """

    workers: int
    numel: int
    computed_steps: int = 0
    thin_steps: int = 0
    replayed_steps: int = 0
    late_steps: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    wait_s: float = 0.0
    rejections: tuple[str, ...] = ()
    gone: dict[int, str] = field(default_factory=dict)
    rates: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    contribution_sums: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))

    def __post_init__(self) -> None:
        if self.contribution_sums.size == 0:
            self.contribution_sums = np.zeros(self.workers)

    def note(self, counts: NDArray[np.int64], *, chunks: int) -> None:
        """Enter one of the `chunks` rounds of a step: [K] payloads of each worker."""
        self.contribution_sums += counts / chunks

    @property
    def steps(self) -> int:
        """Steps that this replica has applied."""
        return self.computed_steps + self.thin_steps + self.replayed_steps

    @property
    def contributions(self) -> NDArray[np.float64]:
        """[K] payloads of each worker per round, the measured r_k (folded ones included)."""
        return self.contribution_sums / max(self.steps, 1)

    @property
    def bytes_sent_per_step(self) -> float:
        """Mean bytes this worker sent per step of the job."""
        return self.bytes_sent / max(self.steps, 1)

    def snapshot(self, rates: NDArray[np.float64], session: Session | None) -> Report:
        """Return a copy that no longer changes, with the rates and what the session has counted."""
        made = copy.deepcopy(self)
        made.rates = rates
        if session is not None:
            made.bytes_sent, made.bytes_received = session.bytes_sent, session.bytes_received
            made.rejections, made.gone = tuple(session.rejections), dict(session.gone)
        return made

    def __str__(self) -> str:
        shares = " ".join(f"{c:.2f}" for c in self.contributions)
        return (
            f"{self.steps} steps: {self.computed_steps} computed ({self.late_steps} of them late), "
            f"{self.thin_steps} thin, {self.replayed_steps} replayed; contributions per round [{shares}]; sent "
            f"{self.bytes_sent_per_step / 2**20:.2f} MiB per step (fp32 gradient: {self.numel * 4 / 2**20:.2f} MiB); "
            f"waited {self.wait_s:.1f} s"
        )
