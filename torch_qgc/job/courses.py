"""What holds from which step on: the plan and the deadline of a job, which may be chosen anew while it runs."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch_qgc.errors import ConfigError, ProtocolError
from torch_qgc.planner import Plan
from torch_qgc.planner.checks import Floats
from torch_qgc.protocol import messages
from torch_qgc.protocol.contract import MOST_SECONDS, ClosingRule, JobSpec

__all__ = ["KEPT", "Course", "Courses"]

KEPT = 64  # of the newest: more than there are changes within the log


@dataclass(frozen=True, kw_only=True)
class Course:
    """What holds from a step on, until a newer course does.

    Attributes:
        version: 0 for what the job has begun with, then 1, 2, ...
        from_step: the first step that it holds for.
        plan: who answers for which data, with which batch and how many bits, and how arrivals are weighed.
        deadline_s: seconds after a step's first BEGIN at which it closes; None: steps wait for all.
    Raises:
        ConfigError: the deadline is not positive, or in more than thirty years.
    """

    version: int
    from_step: int
    plan: Plan
    deadline_s: float | None

    def __post_init__(self) -> None:
        if self.deadline_s is not None and not 0.0 < self.deadline_s <= MOST_SECONDS:
            raise ConfigError(
                f"deadline_s: expected more than 0 and at most {MOST_SECONDS:g} s, or None to wait for all, got "
                f"{self.deadline_s}"
            )

    def to_frames(self) -> list[Any]:
        """Return the message that tells of it."""
        return [
            messages.encode_message(messages.Replan(self.version, self.from_step, self.deadline_s)),
            self.plan.to_json().encode(),
        ]

    @classmethod
    def from_frames(cls, replan: messages.Replan, rest: Sequence[Any], spec: JobSpec) -> Course:
        """Return the course that a message tells of.

        Args:
            rest: the frames after the header.
            spec: the job.
        Raises:
            ProtocolError, PlanError, ConfigError: it is none, or this job cannot train with it.
        """
        plan = messages.plan_frame(rest, f"plan {replan.version} from step {replan.from_step} on")
        course = cls(version=replan.version, from_step=replan.from_step, plan=plan, deadline_s=replan.deadline_s)
        course.check(spec)
        return course

    def check(self, spec: JobSpec) -> None:
        """Check that a job can train with this course.

        Raises:
            ConfigError: it cannot; names the remedy.
        """
        spec.check_plan(self.plan)
        if self.deadline_s is not None and not spec.rule.may_be_late:
            raise ConfigError(
                f"deadline_s: expected None, got {self.deadline_s:g} s: this job has been set up to wait for all; "
                "begin it with a deadline, or with deadline_s='auto'"
            )


class Courses:
    """The courses of one job. Both ends hold the same, so that both apply a change at the same step.

    A payload keeps the share of the step that it was made for, whenever it is folded, so that what is decoded stays
    unbiased over changes.

    Args:
        rule: when rounds close; "auto" waits for all until a course says otherwise.
        plan: what the job begins with.
        first_step: of the job.
    """

    def __init__(self, rule: ClosingRule, plan: Plan, first_step: int = 0) -> None:
        self.rule = rule
        self._begin_with(plan, first_step)

    def _begin_with(self, plan: Plan, first_step: int) -> None:
        deadline_s = None if self.rule.deadline_s == "auto" else self.rule.deadline_s
        self.first_step = first_step
        # Replaced as a whole, so that another thread may read it.
        self._courses: tuple[Course, ...] = (Course(version=0, from_step=first_step, plan=plan, deadline_s=deadline_s),)
        self._lacks_some = False  # of the first changes

    def come_back(self, plan: Plan, first_step: int) -> None:
        """Put in place what a running job has begun with, for a worker that comes back to it with a later checkpoint.

        The changes since then are to be added, from the oldest on that is still kept.

        Args:
            plan: the job's first one.
            first_step: of the job.
        Raises:
            ConfigError: the worker's own plan is for another job: loaders may have been made of it already.
        """
        own = self._courses[0].plan
        if dataclasses.replace(own, straggle_probs=plan.straggle_probs) != plan:
            raise ConfigError(
                f"plan: expected the running job's, with digest {plan.digest()}, got one with digest {own.digest()} "
                "that differs in more than how often workers are late: pass the same arguments as when the job was "
                "started"
            )
        self._begin_with(plan, first_step)
        self._lacks_some = True

    @property
    def first(self) -> Course:
        """What the job has begun with."""
        return self._courses[0]

    def at(self, step: int) -> Course:
        """Return the course that holds for a step."""
        courses = self._courses
        return courses[max(bisect.bisect_right(courses, step, key=lambda course: course.from_step) - 1, 0)]

    @property
    def newest(self) -> Course:
        """The newest course, which may hold for later steps only."""
        return self._courses[-1]

    @property
    def changes(self) -> tuple[Course, ...]:
        """The courses that are kept, oldest first, but for the one that the job has begun with."""
        return tuple(course for course in self._courses if course.version)

    def add(self, course: Course) -> bool:
        """Take a new course; tell whether it is new here.

        Raises:
            ProtocolError: another of this version is known, or it is out of order.
        """
        newest = self.newest
        if course.version <= newest.version:
            known = next((c for c in self._courses if c.version == course.version), course)
            if known != course:
                raise ProtocolError(
                    f"plan {course.version}: expected the one with digest {known.plan.digest()} from step "
                    f"{known.from_step} on, got {course.plan.digest()} from step {course.from_step} on"
                )
            return False
        follows = course.version == newest.version + 1 or self._lacks_some
        if not follows or course.from_step <= newest.from_step:
            raise ProtocolError(
                f"plan {course.version} from step {course.from_step} on: expected number {newest.version + 1}, for a "
                f"step after {newest.from_step}"
            )
        self._courses = (self._courses[0], *self._courses[1:][1 - KEPT :], course)
        self._lacks_some = False
        return True

    def following(self, plan: Plan, deadline_s: float | None, *, open_step: int) -> Course:
        """Return a course that is next, from the first step on that no worker can have begun; it is still to be added.

        Args:
            open_step: the newest.
        """
        newest = self.newest
        # Every worker hears of it before the result of the step that is open now, without which it begins no later one.
        from_step = max(open_step, newest.from_step) + 1
        return Course(version=newest.version + 1, from_step=from_step, plan=plan, deadline_s=deadline_s)

    def changes_at(self, step: int) -> bool:
        """Tell whether a new course begins at a step."""
        course = self.at(step)
        return bool(course.version) and course.from_step == step

    def rates_at(self, step: int) -> tuple[Floats | None, Floats]:
        """Return [K] contributions per round that the plans before a step and at it expect.

        The first is None if the step before has waited for all: nobody could be late.
        """
        before = None if self.waits_for_all(step - 1) else 1.0 - self.at(step - 1).plan.straggle_probs
        return before, 1.0 - self.at(step).plan.straggle_probs

    # --- what the rule says at a step -------------------------------------------------------------------------

    def deadline_s(self, step: int) -> float | None:
        """Return the deadline of a step; None: it waits for all."""
        return None if self.warms_up(step) else self.at(step).deadline_s

    def warms_up(self, step: int) -> bool:
        """Tell whether a step is one of the first, in which all must take part."""
        return step - self.first_step < self.rule.warmup_steps

    def waits_for_all(self, step: int) -> bool:
        """Tell whether a step closes only when every live worker is in."""
        return self.deadline_s(step) is None

    def wait_before_joining_s(self, step: int, elapsed_s: float | None, usual_s: float | None) -> float:
        """Tell a worker that comes to an open step how long to wait for it to close; 0: join it.

        A worker that comes back from a pause to a step that is half done had better begin the next one with the others:
        if it can still make this one, they would wait for it, and if it cannot, it would be late again, and go on half
        a step behind them. Where late payloads are folded, that holds for workers that make a step which they begin
        with the others; a slower one had better compute at once. A step that has just begun is always tried, else a
        slow worker would never take part. One that lasts for longer than this worker would take waits for somebody
        else, and one that is still open after its deadline lacks its quorum, and needs everybody.

        Args:
            step: of the job.
            elapsed_s: for how long the step's clock has been running; None if nobody has begun it.
            usual_s: how long this worker usually takes; None if it does not know yet.
        """
        deadline_s = self.deadline_s(step)
        if deadline_s is None or elapsed_s is None or usual_s is None:
            return 0.0
        if self.rule.late == "fold" and usual_s > deadline_s:
            return 0.0
        makes_it = elapsed_s + usual_s <= deadline_s
        closes_s = min(usual_s, deadline_s) if makes_it else deadline_s  # as far as it can tell
        if elapsed_s < closes_s / 4 or elapsed_s > closes_s:
            return 0.0
        return 1.25 * closes_s - elapsed_s  # a quarter for the results to come

    def __repr__(self) -> str:
        return f"Courses(number {self.newest.version}, from step {self.newest.from_step} on)"
