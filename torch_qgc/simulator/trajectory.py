"""One run of one scheme, step by step."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from torch_qgc.ddp.sampler import checked_partitions
from torch_qgc.ddp.settings import Limits
from torch_qgc.errors import ConfigError, PlanError
from torch_qgc.job.steering import Steering
from torch_qgc.planner import Plan
from torch_qgc.planner.checks import Floats
from torch_qgc.schemes import BlockPlan, PartPlan
from torch_qgc.simulator.arrivals import Arrivals, IndependentRounds, JobRounds, RoundOutcome
from torch_qgc.simulator.coding import Payload, SchemeCodec, plans_of
from torch_qgc.simulator.delays import DelaySource
from torch_qgc.simulator.descent import Descent, make_optimizer
from torch_qgc.simulator.experiment import Experiment, SchemeLike
from torch_qgc.simulator.gradients import Gradients
from torch_qgc.simulator.machines import Demand, Machines
from torch_qgc.simulator.trace import Trace
from torch_qgc.simulator.work import Computed, PartitionWork, Work, WorkerWork

__all__ = ["Trajectory"]


class Trajectory:
    """Train a copy of the model as a job with this scheme would. Each call of `advance` makes one step.

    Memory in bytes per coordinate: 4 for each of parameters, gradient, decoded tracks and the optimizer's state, and
    what the implementations of `Work` say; b_k / 8 for the payload of each worker in the round, and with late="fold"
    for each payload that has not arrived yet.

    Args:
        experiment: what is simulated.
        scheme: one of its schemes.
        seed: the seed of this run.
    Attributes:
        model: the copy that is trained.
        step: steps that were made.
        arrivals: the virtual clock. It does not depend on what is computed, so that a copy of it can be asked in
            advance when steps close.
    """

    def __init__(self, experiment: Experiment, scheme: SchemeLike, seed: int) -> None:
        self._experiment, self._seed = experiment, seed
        ideal = isinstance(scheme, str)
        made = experiment.ideal if isinstance(scheme, str) else scheme
        self.model = copy.deepcopy(experiment.model)
        gradients = self._gradients = Gradients(
            self.model,
            experiment.loss,
            experiment.dataset,
            collate=experiment.collate,
            micro_batch=experiment.micro_batch,
            seed=seed,
        )
        downlink_bits = 32 if ideal else experiment.downlink_bits
        plan_at = self._plan if experiment.rule is not None and not ideal else None
        self._codec = SchemeCodec(made, gradients.layout.numel, seed, downlink_bits, plan_at)
        self._demand = _demand(experiment, self._codec, downlink_bits)
        self.arrivals = _arrivals(experiment, self._codec, self._demand, seed, ideal=ideal)
        self._work = _work(experiment, self._codec, gradients, seed, plan_at)
        lr, schedule = experiment.optimizer_lr
        optimizer = make_optimizer(
            experiment.optimizer, gradients.layout.parameters, lr=lr, momentum=experiment.momentum
        )
        self._descent = Descent(gradients.layout, optimizer, lr=schedule, max_grad_norm=experiment.max_grad_norm)
        two = isinstance(optimizer, torch.optim.Adam) and any(p.second_track is not None for p in plans_of(made))
        self._tracks = [torch.zeros_like(gradients.scratch) for _ in range(1 + (two and not ideal))]
        self._payloads: dict[tuple[int, int], Payload] = {}
        self.step = 0
        steps, workers = experiment.steps, experiment.workers
        self._records: dict[str, NDArray[Any]] = {
            "loss": np.full(steps, np.nan),
            "residual": np.full(steps, np.nan),
            "bits_sent": np.zeros(steps, dtype=np.int64),
            "virtual_time_s": np.zeros(steps),
            "contributions": np.zeros((steps, workers), dtype=np.uint8),
        }
        self._evaluations: dict[int, dict[str, float]] = {}

    @property
    def done(self) -> bool:
        """All steps have been made."""
        return self.step >= self._experiment.steps

    @property
    def now_s(self) -> float:
        """Seconds on the virtual clock."""
        return float(self._records["virtual_time_s"][self.step - 1]) if self.step else 0.0

    def _plan(self, step: int) -> Plan:
        """Return the plan that holds for a step; of its first slice if a scheme has several."""
        courses = self.arrivals.courses
        return self._codec.slices[0].plan if courses is None else courses.at(step).plan

    def advance(self) -> None:
        """Make one step: close its round, compute the payloads that are needed, decode, update."""
        if self.step == 0:
            self._evaluate()
        outcome = self.arrivals.close(self.step)
        computed = self._compute(outcome)
        self._codec.decode(
            outcome.contributions,
            self._payloads,
            outcome.rates,
            self._tracks,
            step=self.step,
            temperature=float(self._experiment.temperatures[self.step]),
        )
        self._record(outcome, computed)
        self._forget(outcome)
        self._descent(self.step, self._tracks)
        self.step += 1
        self._evaluate()

    def _compute(self, outcome: RoundOutcome) -> Computed:
        in_time = {c.worker for c in outcome.contributions if c.made_for == self.step}
        active = self._codec.active
        all_needed = self._codec.remembers or self._folds
        wanted = {k for k in (outcome.wanted if all_needed else in_time) if active[k]}

        def send(worker: int, mixed: torch.Tensor) -> None:
            self._payloads[worker, self.step] = self._codec.encode(
                worker, self.step, mixed, delivered=worker in in_time
            )

        return self._work.compute(self.step, wanted, send)

    @property
    def _folds(self) -> bool:
        rule = self._experiment.rule
        return rule is not None and rule.late == "fold"

    def _forget(self, outcome: RoundOutcome) -> None:
        """Drop payloads that were decoded, or that are too old for any later round."""
        for contribution in outcome.contributions:
            self._payloads.pop((contribution.worker, contribution.made_for), None)
        rule = self._experiment.rule
        oldest = self.step + 1 - rule.max_staleness if rule is not None and self._folds else self.step + 1
        for key in [key for key in self._payloads if key[1] < oldest]:
            del self._payloads[key]

    def _record(self, outcome: RoundOutcome, computed: Computed) -> None:
        records, step = self._records, self.step
        records["loss"][step] = computed.loss
        records["virtual_time_s"][step] = outcome.closed_at_s
        bits = self._plan(step).bits
        records["bits_sent"][step] = 8 * sum(self._demand.payload_bytes(int(bits[k])) for k in outcome.began)
        for contribution in outcome.contributions:
            records["contributions"][step, contribution.worker] += 1
        if computed.gradient is not None:
            true = computed.gradient.double()
            size = float(true.square().sum())
            error = float((self._tracks[0].double() - true).square().sum())
            records["residual"][step] = error / size if size > 0.0 else math.nan

    def _evaluate(self) -> None:
        experiment = self._experiment
        if experiment.evaluate is None or self.step not in experiment.evaluation_steps:
            return
        modes = [(module, module.training) for module in self.model.modules()]
        self._gradients.reseed(self.step, -1)
        with torch.no_grad():
            values = experiment.evaluate(self.model)
        for module, training in modes:
            module.training = training
        self._evaluations[self.step] = {name: float(value) for name, value in values.items()}

    def trace(self) -> Trace:
        """Return what was recorded, as a trace of this run alone."""
        made = list(self._evaluations)
        names = list(self._evaluations[made[0]]) if made else []
        return Trace(
            seeds=np.array([self._seed]),
            **{name: values[None] for name, values in self._records.items()},
            evaluation_steps=np.array(made, dtype=np.int64),
            evaluations={name: np.array([[self._evaluations[s][name] for s in made]]) for name in names},
        )

    def state_dict(self) -> dict[str, Any]:
        """Return everything that changes from step to step."""
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self._descent.optimizer.state_dict(),
            "arrivals": self.arrivals,
            "payloads": self._payloads,
            "codec": self._codec.state_dict(),
            "records": self._records,
            "evaluations": self._evaluations,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self._descent.optimizer.load_state_dict(state["optimizer"])
        self.arrivals, self._payloads = state["arrivals"], state["payloads"]
        self._codec.load_state_dict(state["codec"])
        self._records, self._evaluations = state["records"], state["evaluations"]


def _work(
    experiment: Experiment,
    codec: SchemeCodec,
    gradients: Gradients,
    seed: int,
    plan_at: Callable[[int], Plan] | None,
) -> Work:
    plan = codec.slices[0].plan
    blocks = checked_partitions(plan, len(experiment.dataset), experiment.partitions, seed)
    size = experiment.batch_size
    if size is None or experiment.sampling == "partition":
        return PartitionWork(gradients, codec, blocks, plan.partition_fractions, batch_size=size, seed=seed)
    if isinstance(codec.scheme, BlockPlan | PartPlan):
        raise ConfigError(
            f"batch_size: expected None or sampling='partition' with a {type(codec.scheme).__name__}, whose workers do "
            "not send whole gradients"
        )
    try:
        return WorkerWork(
            gradients,
            plan,
            blocks,
            batch_size=size,
            moves=_moves(experiment, plan),
            seed=seed,
            exact_every=experiment.exact_every,
            plan_at=plan_at,
        )
    except PlanError as error:
        raise PlanError(f"{error}; or simulate it with sampling='partition'") from error


def _moves(experiment: Experiment, plan: Plan) -> bool:
    """Tell whether any worker may draw any sample, as `make_loader` does."""
    return experiment.partitions is None and plan.one_part_each


def _demand(experiment: Experiment, codec: SchemeCodec, downlink_bits: int) -> Demand:
    """Return what steps ask of the machines. Times that are given as they are do not follow batches."""
    follows = experiment.sampling == "worker" and isinstance(experiment.delays, Machines)
    return Demand(
        up=tuple(s.width for s in codec.slices),
        down=tuple(s.stop - s.start for s in codec.slices),
        downlink_bits=downlink_bits,
        batch_size=experiment.batch_size if follows else None,
        moves=_moves(experiment, codec.slices[0].plan),
    )


def _arrivals(experiment: Experiment, codec: SchemeCodec, demand: Demand, seed: int, *, ideal: bool) -> Arrivals:
    delays = DelaySource(experiment.delays, experiment.workers, seed)
    plan, rule, limits = codec.slices[0].plan, experiment.rule, Limits()
    if rule is None or ideal:
        load = demand.load(plan)
        if ideal:  # a ring all-reduce, in which nobody sends or receives more than this
            ring = (experiment.workers - 1) / experiment.workers
            load = load._replace(up=np.full(experiment.workers, ring), down=ring)
        deadline_s = None if ideal else experiment.deadline_s
        return IndependentRounds(delays, deadline_s, codec.active, _slice_ends(codec), load)
    steering = None
    if experiment.replans:
        plan.check_trainable()
        steering = Steering(
            experiment.workers,
            sum(demand.down),
            every=experiment.replans,
            auto_deadline=rule.deadline_s == "auto",
            late=rule.late,
            max_staleness=rule.max_staleness,
            norm=plan.norm,
            most_batch=limits.most_batch,
        )
    return JobRounds(delays, rule, codec.active, plan, demand=demand, log_steps=limits.log_steps, steering=steering)


def _slice_ends(codec: SchemeCodec) -> Floats:
    """Return the multiples of its delay after which a worker has finished each slice; [1] for payloads in one piece.

    A delay is the time of one partition's whole gradient. Slice i has a fraction x_i of the coordinates and needs the
    gradients of load_i partitions, so it takes x_i load_i of that time (`block_coordinate`).
    """
    if len(codec.slices) == 1:
        return np.ones(1)
    scheme = codec.scheme
    assert isinstance(scheme, BlockPlan)
    return np.asarray(np.cumsum([x * plan.load for x, plan in zip(scheme.fractions, scheme.plans)]))
