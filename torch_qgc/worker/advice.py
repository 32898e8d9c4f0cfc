"""What a user should be told about the loop: each piece of advice once, in the log of the rank that it concerns."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist

from torch_qgc.job.courses import Courses
from torch_qgc.logs import logger
from torch_qgc.protocol.contract import JobSpec
from torch_qgc.worker.report import Report

__all__ = ["Advice"]

_SEEN_OFTEN = 4  # steps in a row
_AFTER_STEPS = 60


class Advice:
    """Watch for what makes a deadline useless.

    Args:
        spec, courses: the job.
        worker: this worker's number.
        sequence_number: of the process group's newest collective; None if it has none.
    """

    def __init__(self, spec: JobSpec, courses: Courses, worker: int, sequence_number: Callable[[], int | None]) -> None:
        self.courses = courses
        self.first_step = spec.first_step  # of this worker
        self.own_collectives = 0  # over the aggregator
        self._spec, self._worker, self._sequence_number = spec, worker, sequence_number
        self._given: set[str] = set()
        self._after_backward: int | None = None
        self._before_forward: int | None = None
        self._collectives: dict[str, int] = {}
        self._step = 0
        self._behind = 0

    def after_backward(self) -> None:
        """A step's gradient was exchanged; what follows is the loop body."""
        self._after_backward = self._number()

    def before_forward(self, step: int) -> None:
        """A step begins."""
        self._step = step
        self._before_forward = self._number()
        self._compare(self._after_backward, self._before_forward, "loop body")
        self._after_backward = None

    def before_backward(self) -> None:
        """The forward pass is over."""
        self._compare(self._before_forward, self._number(), "forward pass")
        self._before_forward = None

    def _number(self) -> int | None:
        watches = self._spec.rule.may_be_late and "collective" not in self._given
        number = self._sequence_number() if watches else None
        return None if number is None else number + self.own_collectives

    def _compare(self, before: int | None, after: int | None, where: str) -> None:
        """Count the steps in a row in which a collective was made here."""
        if before is None or after is None or self._step < self.first_step + 3:  # DDP's own are in its first steps
            return
        self._collectives[where] = self._collectives.get(where, 0) + 1 if after != before else 0
        if self._collectives[where] >= _SEEN_OFTEN:
            self._give(
                "collective",
                f"worker {self._worker}: the {where} makes a collective in each step, so every rank waits for the "
                "slowest and the deadline does nothing. Usual culprits: a metric that is all-reduced, sync_dist=True, "
                "a barrier, a broadcast of the learning rate, SyncBatchNorm. Do it every n-th step, or at the end "
                "of an epoch; state.all_gather and state.barrier go on even if a rank dies",
            )

    def thin_step(self, steps_behind: int) -> None:
        """A step was made thin while others were so many steps ahead."""
        self._behind = self._behind + 1 if steps_behind > self._spec.rule.max_staleness else 0
        if self._behind >= _AFTER_STEPS:
            self._give(
                "bind",
                f"worker {self._worker} does not catch up: it has been more than {self._spec.rule.max_staleness} steps "
                f"behind for {_AFTER_STEPS} steps, although it computes a few samples only. QGCState(ghost=True) "
                "leaves the model's forward and backward pass out of such steps; and if the update is all that your "
                "loop does between backward and the next step, state.bind(optimizer, scheduler=...) leaves out the "
                "whole loop body",
            )

    def not_finite(self, step: int) -> None:
        """This worker's gradient was not finite."""
        self._give(
            f"finite {step // 100}",
            f"worker {self._worker}, step {step}: the gradient of this rank is not finite; it travels as such, "
            "and makes the decoded gradient of its blocks NaN on all ranks (a GradScaler skips the step on all)",
        )

    def step_made(self, counts: Report, usual_s: float | None) -> None:
        """A step was applied; look at the job as a whole now and then."""
        steps, deadline_s = counts.steps, self.courses.newest.deadline_s
        if steps != _AFTER_STEPS or deadline_s is None:
            return
        sums = counts.contribution_sums
        for k in range(self._spec.workers):
            if sums[k] <= 3.0:  # those of the steps that waited for all
                self._give(
                    f"never {k}",
                    f"worker {k} has contributed to none of the last {steps - 3} steps: its data is not learnt. Raise "
                    "the deadline above the time of its step, or give it less to do",
                )
        if usual_s is not None and usual_s > 2.0 * deadline_s and sums.min() >= steps - 3:
            self._give(
                "deadline",
                f"worker {self._worker}: a step takes {usual_s:.2f} s, more than two deadlines of "
                f"{deadline_s:g} s, and yet nobody was ever late: something outside of the hook makes "
                "the ranks wait for each other",
            )

    def _give(self, key: str, text: str) -> None:
        if key not in self._given:
            self._given.add(key)
            logger.warning("%s", text)


def sequence_number_of(group: dist.ProcessGroup | None) -> int | None:
    """Return the number of the newest collective of a process group, None where the backend has none."""
    try:
        if group is None:
            group = dist.distributed_c10d._get_default_group()
        return int(group._get_sequence_number_for_group())  # type: ignore[attr-defined]
    except (RuntimeError, AttributeError):
        return None
