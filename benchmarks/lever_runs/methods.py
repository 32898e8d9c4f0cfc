"""What is compared: waiting, ignoring and folding late payloads, equal batches or batches by speed, and measuring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
import numpy as np

from lever_runs.settings import Setting
from torch_qgc.ddp.settings import UNKNOWN_LATE
from torch_qgc.planner import Plan, segment_weights
from torch_qgc.planner.batches import choose_batches
from torch_qgc.planner.cadence import JobRounds
from torch_qgc.planner.delays import Empirical
from torch_qgc.protocol.contract import ClosingRule
from torch_qgc.simulator import Machines
from torch_qgc.simulator.delays import DelaySource
from torch_qgc.simulator.machines import Load

__all__ = ["BATCH_SIZE", "METHODS", "Job", "Method", "make_job"]

BATCH_SIZE = 16
TRIAL_STEPS = 1000  # of which delays are measured before training
TRIAL_SEED = 1 << 20
MAX_STALENESS = 32
LEAST, LARGEST = 1 / 8, 8.0  # batches, as `choose_batches` has them


@dataclass(frozen=True, kw_only=True)
class Method:
    """How a job treats the late.

    Args:
        why: in words.
        late: "wait" for them, with a ring all-reduce of fp32; "ignore" or "fold" what comes after the deadline; or
            "measure" them while training, with the defaults of a job, and knowing nothing of the machines before.
        batches: batches by speed instead of equal ones.
        rule: further fields of the `ClosingRule`.
        decoder: what folded payloads weigh.
    """

    why: str
    late: Literal["wait", "ignore", "fold", "measure"]
    batches: bool = False
    rule: Mapping[str, Any] = field(default_factory=dict)
    decoder: str = "unbiased"


ALIVE = {"awaits": "alive"}  # a step without one of the workers takes its whole deadline
METHODS = {
    "waiting": Method(why="DDP", late="wait"),
    "waiting, batches": Method(why="DDP with batches by speed", late="wait", batches=True),
    "arrivals": Method(why="average of the arrivals", late="ignore"),
    "fold": Method(why="late payloads are folded in at m / r", late="fold", rule=ALIVE),
    "fold, batches": Method(why="the same, with batches by speed", late="fold", batches=True, rule=ALIVE),
    "fold, batches, begun": Method(why="and closing on who began", late="fold", batches=True),
    "fold, batches, begun, annealed": Method(
        why="and at m while the learning rate is high", late="fold", batches=True, decoder="annealed"
    ),
    "auto": Method(why="everything is measured while training", late="measure", decoder="annealed"),
}


@dataclass(frozen=True)
class Job:
    """The part of an experiment that a method decides: a plan, fields of `Experiment`, and whose data take part."""

    plan: Plan
    options: dict[str, Any]
    workers: list[int]


def make_job(method: Method, setting: Setting, parts: Sequence[np.ndarray] | None) -> Job:
    """Return what a method makes of a setting.

    Args:
        parts: the samples that each worker holds, or None if anybody may draw anything.
    """
    if method.late == "wait":
        return _waiting(method, setting, parts)
    if method.late == "measure":
        return _measuring(method, setting, parts)
    machines, workers = setting.machines, list(range(setting.machines.workers))
    bits, down = (setting.bits, setting.downlink_bits) if method.late == "fold" else (32, 32)
    load = Load(np.ones(len(workers)), np.full(len(workers), bits / 32), down / 32)
    deadline_s = setting.deadline_s
    if method.late == "ignore":  # a worker that is never in time is not part of the job
        delays_s = _trial(machines, load)
        workers = np.flatnonzero(delays_s.min(axis=0) < deadline_s).tolist()
        machines, load = _only(machines, workers), Load(load.batches[workers], load.up[workers], load.down)
        parts = None if parts is None else [parts[k] for k in workers]
    if method.batches:
        chosen = choose_batches(np.broadcast_to(machines.batch_s, len(workers)), _fixed_s(machines, load))
        load, deadline_s = load._replace(batches=chosen.batches), setting.slack * chosen.step_s
    trial = Empirical(delays_s=_trial(machines, load), caution=0.0)
    rates = JobRounds(trial, max_staleness=MAX_STALENESS).cadence(deadline_s).rates
    shares = rates * load.batches if method.late == "fold" else np.ones(len(workers))
    decoder = method.decoder if method.late == "fold" else "arrival_count"
    plan = _plan(parts, shares, rates, load.batches, bits, decoder)
    late = "fold" if method.late == "fold" else "drop"
    rule = ClosingRule(**{"deadline_s": deadline_s, "late": late, "max_staleness": MAX_STALENESS, **method.rule})
    return Job(plan, {"delays": machines, "rule": rule, "downlink_bits": down}, workers)


def _waiting(method: Method, setting: Setting, parts: Sequence[np.ndarray] | None) -> Job:
    machines, count = setting.machines, setting.machines.workers
    ring = (count - 1) / count  # of the gradient passes each link, each way
    links = {name: tuple(ring * np.broadcast_to(getattr(machines, name), count)) for name in ("up_s", "down_s")}
    machines = msgspec.structs.replace(machines, **links)
    batches = np.ones(count)
    if method.batches:
        batches = _together(machines, _fixed_s(machines, Load(batches, batches, 1.0)))
    plan = _plan(parts, batches, np.ones(count), batches, 32, "unbiased")
    return Job(plan, {"delays": machines}, list(range(count)))


def _measuring(method: Method, setting: Setting, parts: Sequence[np.ndarray] | None) -> Job:
    count = setting.machines.workers
    alike = np.ones(count)
    rule = ClosingRule(deadline_s="auto", quorum=count // 2, max_staleness=MAX_STALENESS, **method.rule)
    plan = _plan(parts, alike, np.full(count, 1.0 - UNKNOWN_LATE), alike, setting.bits, method.decoder)
    options = {"delays": setting.machines, "rule": rule, "downlink_bits": setting.downlink_bits}
    return Job(plan, options, list(range(count)))


def _fixed_s(machines: Machines, load: Load) -> np.ndarray:
    """Return [K] the median of the seconds of a step that do not depend on the batch."""
    return np.asarray(np.median(_trial(machines, load._replace(batches=np.zeros(machines.workers))), axis=0))


def _together(machines: Machines, fixed_s: np.ndarray) -> np.ndarray:
    """Return batches with which all end as nearly together as they can: nobody is left to come later."""
    speed_s = np.broadcast_to(np.asarray(machines.batch_s, dtype=float), fixed_s.shape)
    low, high = 0.0, float((fixed_s + LARGEST * speed_s).max())
    for _ in range(50):
        middle = (low + high) / 2
        total = np.clip((middle - fixed_s) / speed_s, LEAST, LARGEST).sum()
        low, high = (middle, high) if total < len(fixed_s) else (low, middle)
    return np.clip((high - fixed_s) / speed_s, LEAST, LARGEST)


def _plan(
    parts: Sequence[np.ndarray] | None,
    shares: np.ndarray,
    rates: np.ndarray,
    batches: np.ndarray,
    bits: int,
    decoder: str,
) -> Plan:
    """Return the plan of data that stay where they are, or of data that can move and are shared as told."""
    count = len(shares)
    sizes = None
    if parts is None:
        shares = shares / shares.sum()
        weights: Any = segment_weights(shares, count)
    else:
        sizes = np.array([len(part) for part in parts], dtype=float)
        shares = sizes / sizes.sum()
        weights = np.diag(count * shares)
    return Plan(
        straggle_probs=1.0 - rates,
        bits=np.full(count, bits),
        shares=shares,
        weights=weights,
        batches=batches,
        partition_sizes=sizes,
        decoder=decoder,
    )


def _trial(machines: Machines, load: Load) -> np.ndarray:
    """Return the delays [steps, K] of a trial run, in which nobody trains."""
    return DelaySource(machines, machines.workers, TRIAL_SEED).delays_s(TRIAL_STEPS, load)


def _only(machines: Machines, workers: Sequence[int]) -> Machines:
    """Return some of the machines."""
    causes = {
        name: tuple(value[k] for k in workers)
        for name in machines.__struct_fields__
        if isinstance(value := getattr(machines, name), tuple) and name != "changes"
    }
    return msgspec.structs.replace(machines, workers=len(workers), **causes)
