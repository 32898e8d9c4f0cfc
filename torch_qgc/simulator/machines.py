"""Unequal machines, described by what makes them slow: the time of a step follows from its batch and payload sizes."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np

from torch_qgc.errors import ConfigError, PlanError
from torch_qgc.kernels import payload_bytes
from torch_qgc.planner import Plan
from torch_qgc.planner.batches import apportion
from torch_qgc.planner.checks import Floats, per_worker

__all__ = ["Change", "Demand", "Load", "Machines", "PerWorker", "Times"]

#: One number for all workers, or one per worker.
PerWorker = float | tuple[float, ...]

_SECONDS = ("batch_s", "fixed_s", "tail_s", "pause_s", "up_s", "down_s")


class Load(NamedTuple):
    """What a step asks of the machines.

    Attributes:
        batches: [K] each worker's batch, in units of the mean batch.
        up: [K] size of each worker's payload, in units of the fp32 gradient.
        down: size of a result, in the same unit.
    """

    batches: Floats
    up: Floats
    down: float

    @classmethod
    def plain(cls, workers: int) -> Load:
        """Return mean batches, and fp32 both ways."""
        return cls(np.ones(workers), np.ones(workers), 1.0)


class Demand(NamedTuple):
    """From a plan to what a step by it asks of the machines.

    Attributes:
        up: coordinates of each vector that a worker sends in a step.
        down: coordinates of each vector of a result; together they are the gradient.
        downlink_bits: of these.
        batch_size: samples of a mean batch; None: batches do not follow the plan, and are all alike.
        moves: any worker could have drawn them.
    """

    up: tuple[int, ...]
    down: tuple[int, ...]
    downlink_bits: int
    batch_size: int | None = None
    moves: bool = False

    def payload_bytes(self, bits: int) -> int:
        """Return the size of what a worker sends in a step."""
        return sum(payload_bytes(numel, bits) for numel in self.up)

    def load(self, plan: Plan) -> Load:
        """Return what a step asks of the machines."""
        plain = 4 * sum(self.down)
        batches = np.ones(plan.num_workers)
        if self.batch_size is not None:
            batches = apportion(plan.batches, self.batch_size) / self.batch_size
        up = np.array([self.payload_bytes(bits) / plain for bits in plan.bits.tolist()])
        return Load(batches, up, sum(payload_bytes(numel, self.downlink_bits) for numel in self.down) / plain)


class Times(NamedTuple):
    """How long a step takes each worker, [K] seconds each.

    Attributes:
        own_s: from BEGIN until the gradient is computed.
        up_s: for which the payload occupies the worker's link.
        down_s: for which the result does.
    """

    own_s: Floats
    up_s: Floats
    down_s: Floats


class Change(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A cause that grows or shrinks for a while, or in waves.

    Args:
        of: which field of `Machines` is multiplied.
        factor: by what, >= 0.
        workers: of whom; None: of all.
        start, stop: the first step it holds for, and the first it no longer does; None: to the end.
        period: steps of a wave 1 + (factor - 1) sin^2(pi (step - start) / period), which starts at 1 and is at `factor`
            in the middle: a load that comes and goes with the hour of the day. None: the factor itself.
    Raises:
        ConfigError: a value out of range.
    """

    of: Literal["batch_s", "fixed_s", "tail_s", "pause_s", "up_s", "down_s"]
    factor: float
    workers: tuple[int, ...] | None = None
    start: int = 0
    stop: int | None = None
    period: int | None = None

    def __post_init__(self) -> None:
        if self.of not in _SECONDS:
            raise ConfigError(f"change: expected of = one of {', '.join(_SECONDS)}, got {self.of!r}")
        if not 0 <= self.factor < math.inf:
            raise ConfigError(f"change of {self.of}: expected a finite factor >= 0, got {self.factor}")
        if self.start < 0 or (self.stop is not None and self.stop <= self.start):
            raise ConfigError(f"change of {self.of}: expected 0 <= start < stop, got {self.start} and {self.stop}")
        if self.period is not None and self.period < 1:
            raise ConfigError(f"change of {self.of}: expected a period of at least 1 step, got {self.period}")

    def at(self, step: int) -> float:
        """Return the factor of a step."""
        if step < self.start or (self.stop is not None and step >= self.stop):
            return 1.0
        if self.period is None:
            return self.factor
        return 1.0 + (self.factor - 1.0) * math.sin(math.pi * (step - self.start) / self.period) ** 2


class Machines(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, dict=True):
    """K machines, each with its own reasons to be late.

        own_k  = fixed_s + batch_s B_k exp(jitter z - jitter^2 / 2) + tail_s e + pause_s [u < pause_chance]
        up_k   = up_s (size of the payload),   down_k = down_s (size of the result)

    with z standard normal, e standard exponential and u uniform, drawn for every worker and step whatever the batch
    is: two runs that differ in batches or bits meet the same weather. Each field below is one number or one per worker.

    Args:
        workers: K.
        batch_s: seconds of a mean batch (B_k = 1): a slow processor has more.
        fixed_s: seconds of a step that do not depend on the batch.
        tail_s: mean of an exponential wait in every step.
        pause_chance: chance of a step to be interrupted, in [0, 1].
        pause_s: seconds that an interruption takes.
        up_s, down_s: seconds in which the worker's link carries an fp32 gradient to the aggregator, and back.
        jitter: standard deviation of the logarithm of the computing time; its mean stays the same.
        changes: what changes from step to step; several changes of one cause multiply.
    Raises:
        ConfigError: a value out of range.
    """

    workers: int
    batch_s: PerWorker = 1.0
    fixed_s: PerWorker = 0.0
    tail_s: PerWorker = 0.0
    pause_chance: PerWorker = 0.0
    pause_s: PerWorker = 0.0
    up_s: PerWorker = 0.0
    down_s: PerWorker = 0.0
    jitter: PerWorker = 0.0
    changes: tuple[Change, ...] = ()

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ConfigError(f"machines: expected at least 1 worker, got {self.workers}")
        for name in (*_SECONDS, "pause_chance", "jitter"):
            values = self._of[name]
            if not np.all(np.isfinite(values)) or (name == "pause_chance" and np.any(values > 1.0)):
                raise ConfigError(f"machines: {name}: expected finite numbers, chances of at most 1, got {values}")
        for change in self.changes:
            if change.workers is not None and not all(0 <= k < self.workers for k in change.workers):
                raise ConfigError(f"machines: expected changes of workers 0..{self.workers - 1}, got {change.workers}")

    @cached_property
    def _of(self) -> dict[str, Floats]:
        """The fields as [K]."""
        try:
            return {
                name: per_worker(getattr(self, name), self.workers, name)
                for name in (*_SECONDS, "pause_chance", "jitter")
            }
        except PlanError as error:
            raise ConfigError(f"machines: {error}") from error

    def times(self, rng: np.random.Generator, step: int, load: Load) -> Times:
        """Draw the times of a step.

        Args:
            rng: the generator of this step, fresh, so that all steps are independent.
            step: its number, for the changes.
            load: batches and sizes.
        """
        of = self._at(step)
        z, e, u = rng.standard_normal(self.workers), rng.standard_exponential(self.workers), rng.random(self.workers)
        computing = of["batch_s"] * load.batches * np.exp(of["jitter"] * z - of["jitter"] ** 2 / 2.0)
        waiting = of["tail_s"] * e + np.where(u < of["pause_chance"], of["pause_s"], 0.0)
        return Times(of["fixed_s"] + computing + waiting, of["up_s"] * load.up, of["down_s"] * load.down)

    def _at(self, step: int) -> dict[str, Floats]:
        if not self.changes:
            return self._of
        of: dict[str, Any] = dict(self._of)
        for change in self.changes:
            factor = np.ones(self.workers)
            factor[slice(None) if change.workers is None else list(change.workers)] = change.at(step)
            of[change.of] = of[change.of] * factor
        return of
