"""Planning anew after a round has closed: the same at an aggregator and in the simulator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch_qgc.errors import ConfigError, PlanError
from torch_qgc.job.courses import Course
from torch_qgc.job.rounds import Rounds
from torch_qgc.job.steering import Choice, Steering
from torch_qgc.logs import logger
from torch_qgc.planner import Plan

__all__ = ["replan_if_due"]


def replan_if_due(
    steering: Steering, rounds: Rounds[Any], replan: Callable[[Plan, float | None], Course]
) -> tuple[Course, Choice] | None:
    """Choose and enter a plan and a deadline where it is time to, from what the workers' steps have taken.

    Args:
        steering: has been told of every step that was delivered.
        rounds: of the job, of which some have just closed.
        replan: enters a plan and a deadline as the next course; raises PlanError or ConfigError if the job cannot train
            with them.
    Returns:
        The new course and the choice behind it, or None if what holds goes on.
    """
    step = rounds.newest
    if not steering.is_due(step, rounds.roster.awaited):
        return None
    try:
        choice = steering.choose(step, rounds.courses.at(step))
        if choice is None:
            return None
        course = replan(choice.plan, choice.deadline_s)
    except (PlanError, ConfigError) as error:  # no reason to end a job that has a plan
        logger.warning("no new plan in step %d: %s", step, error)
        return None
    logger.info("plan %d from step %d on: %s", course.version, course.from_step, choice)
    return course, choice
