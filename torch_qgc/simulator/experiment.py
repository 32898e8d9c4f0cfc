"""What is simulated: the settings that decide a trace, and the checks of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeAlias

import numpy as np
import torch

from torch_qgc.errors import ConfigError
from torch_qgc.planner import Plan, segment_weights
from torch_qgc.planner.checks import Floats
from torch_qgc.planner.temperature import LEAST, temperatures
from torch_qgc.planner.variance import MOST_BITS, PASS_THROUGH_BITS
from torch_qgc.protocol.contract import ClosingRule
from torch_qgc.schemes import BlockPlan, ErrorFeedback, PartPlan, Scheme
from torch_qgc.simulator.coding import plans_of
from torch_qgc.simulator.delays import DelaysLike, DelaySource, workers_of
from torch_qgc.simulator.descent import OptimizerLike
from torch_qgc.simulator.gradients import Collate, Loss, Samples
from torch_qgc.simulator.machines import Load, Machines
from torch_qgc.simulator.task import Evaluate
from torch_qgc.worker.layout import Layout

__all__ = ["IDEAL", "Experiment", "SchemeLike"]

#: Stands for a scheme that waits for all workers, quantizes nothing and shares the data equally.
IDEAL: Literal["ideal"] = "ideal"
SchemeLike: TypeAlias = Scheme | Literal["ideal"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Experiment:
    """A training run under several schemes, all with the same data, delays and dither.

    The task:
        model: a module. Every scheme and run trains a copy of it, in the mode that it is in.
        loss: (model, batch) -> mean loss over the batch; it moves the batch to the model's device if that is needed.
        dataset: a map-style data set.
        collate: makes a batch of a list of samples; None takes torch's default.
        partitions: N lists of sample indices, for data that cannot move; None cuts a random permutation into N.
        micro_batch: the most samples per forward pass; fewer need less memory.
    The schemes:
        schemes: name -> Plan, BlockPlan, PartPlan, ErrorFeedback or IDEAL, all of K workers.
    The clock, of which `deadline_s` and `rule` exclude each other:
        delays: machines, whose times follow from batches and bits; a delay model; or seconds [rounds, K] that are taken
            row by row. All schemes of a run get the same draws.
        deadline_s: rounds are independent, and a worker is in if its delay is at most this (Song & Choi); None waits
            for all workers.
        rule: rounds are those of a running job (`JobRounds`), closed by this rule. Only plans can run like this.
        replan_every: steps between two looks at why workers are slow, as in `QGCState`: batches (those per worker, of
            `Machines`), bits and, with deadline_s="auto", the deadline are chosen anew; 0: never; None: 50 with "auto",
            else 0.
        downlink_bits: 32 sends results as fp32; 2..16 encodes them as well. IDEAL does not.
    Training:
        steps: how many steps are made.
        optimizer: "sgd", "adam" (which takes the second track of a plan that has one), or a function from parameters to
            a torch optimizer.
        lr: learning rate, or step -> learning rate; None leaves that of the given optimizer.
        momentum: of "sgd".
        max_grad_norm: the decoded gradient is clipped to this norm; None does not clip.
        batch_size: samples per worker and step, which a plan's `batches` are multiples of, or per partition and step;
            None computes the gradients of whole partitions, each once per step.
        sampling: "worker" draws a batch from the share of each worker; "partition" draws one from each partition, the
            same for all workers that hold it, which every code can do.
    Repetition:
        runs, seed: run r takes seed + r for data, delays and dither, and equals a single run with that seed.
    Measurement:
        evaluate: model -> name -> number, called without gradients on the copy that is trained: at the beginning,
            every `evaluate_every` steps (0 leaves these out) and at the end.
        exact_every: with batches per worker, the number of steps between two computations of the true gradient, each
            of which takes a pass over the data; 0 never computes it.

    Raises:
        ConfigError: a value out of range, or schemes, delays or partitions that do not fit each other.
    """

    model: torch.nn.Module
    loss: Loss
    dataset: Samples
    schemes: Mapping[str, SchemeLike]
    delays: DelaysLike
    steps: int
    deadline_s: float | None = None
    rule: ClosingRule | None = None
    replan_every: int | None = None
    downlink_bits: int = PASS_THROUGH_BITS
    lr: float | Callable[[int], float] | None = None
    optimizer: OptimizerLike = "sgd"
    momentum: float = 0.0
    max_grad_norm: float | None = None
    batch_size: int | None = None
    sampling: Literal["worker", "partition"] = "worker"
    partitions: Sequence[Sequence[int]] | None = None
    collate: Collate | None = None
    micro_batch: int | None = None
    runs: int = 1
    seed: int = 0
    evaluate: Evaluate | None = None
    evaluate_every: int = 0
    exact_every: int = 0
    workers: int = field(init=False)

    def __post_init__(self) -> None:
        self._check_numbers()
        counts = {name: plans_of(s)[0].num_workers for name, s in self.schemes.items() if not isinstance(s, str)}
        if len(set(counts.values())) > 1:
            raise ConfigError(f"schemes: expected plans of the same number of workers, got {counts}")
        object.__setattr__(self, "workers", next(iter(counts.values()), workers_of(self.delays)))
        DelaySource(self.delays, self.workers, self.seed)
        for name, scheme in self.schemes.items():
            if isinstance(scheme, str) and scheme != IDEAL:
                raise ConfigError(f"scheme {name!r}: expected a plan or {IDEAL!r}, got {scheme!r}")
            if self.rule is not None and isinstance(scheme, BlockPlan | PartPlan | ErrorFeedback):
                raise ConfigError(
                    f"scheme {name!r}: expected a Plan with `rule`, got {type(scheme).__name__}, which no running job "
                    "takes: give deadline_s instead"
                )

    def _check_numbers(self) -> None:
        if not self.schemes:
            raise ConfigError("schemes: expected at least one, got none")
        if not hasattr(self.dataset, "__len__") or not hasattr(self.dataset, "__getitem__"):
            raise ConfigError(
                f"dataset: expected a map-style data set, got {type(self.dataset).__name__}: list it first"
            )
        least = {"steps": 1, "runs": 1, "seed": 0, "evaluate_every": 0, "exact_every": 0}
        if self.replan_every is not None:
            least["replan_every"] = 0
        for name in ("batch_size", "micro_batch"):
            if getattr(self, name) is not None:
                least[name] = 1
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ConfigError(f"{name}: expected at least {bound}, got {getattr(self, name)}")
        if self.deadline_s is not None and not 0 < self.deadline_s < float("inf"):
            raise ConfigError(f"deadline_s: expected seconds > 0, or None to wait for all, got {self.deadline_s}")
        if self.deadline_s is not None and self.rule is not None:
            raise ConfigError("expected deadline_s or rule, got both: the rule has a deadline of its own")
        if self.replan_every and self.rule is None:
            raise ConfigError("replan_every: expected a rule beside it, got none: only running jobs plan anew")
        if self.lr is None and not callable(self.optimizer):
            raise ConfigError(f"lr: expected a learning rate for optimizer {self.optimizer!r}, got None")
        if self.sampling not in ("worker", "partition"):
            raise ConfigError(f"sampling: expected 'worker' or 'partition', got {self.sampling!r}")
        if not 2 <= self.downlink_bits <= MOST_BITS and self.downlink_bits != PASS_THROUGH_BITS:
            raise ConfigError(f"downlink_bits: expected 2..{MOST_BITS}, or 32 for fp32, got {self.downlink_bits}")

    @cached_property
    def ideal(self) -> Plan:
        """The plan behind IDEAL: equal shares and no quantization, with the partitions of the first plan."""
        plans = [plans_of(scheme)[0] for scheme in self.schemes.values() if not isinstance(scheme, str)]
        if plans:
            count, sizes = plans[0].num_partitions, plans[0].partition_sizes
        else:
            count, sizes = self.workers if self.partitions is None else len(self.partitions), None
        shares = np.full(self.workers, 1.0 / self.workers)
        return Plan(
            straggle_probs=np.zeros(self.workers),
            bits=np.full(self.workers, PASS_THROUGH_BITS),
            shares=shares,
            weights=segment_weights(shares, count, partition_sizes=sizes),
            partition_sizes=sizes,
        )

    @property
    def replans(self) -> int:
        """Steps between two plans of a job; 0: the plan stays as it is."""
        if self.replan_every is not None:
            return self.replan_every
        return 50 * (self.rule is not None and self.rule.deadline_s == "auto")

    @property
    def optimizer_lr(self) -> tuple[float, Callable[[int], float] | None]:
        """The learning rate of the first step, and the schedule or None."""
        if callable(self.lr):
            return float(self.lr(0)), self.lr
        return (0.0 if self.lr is None else float(self.lr)), None

    @cached_property
    def temperatures(self) -> Floats:
        """The learning rate of each step over the highest one so far, [steps] in (0, 1].

        As in training, a number stays what it is, and what is decoded is to be unbiased with it: next to 0.
        """
        if not callable(self.lr):
            return np.full(self.steps, LEAST)
        return temperatures([float(self.lr(step)) for step in range(self.steps)])

    @property
    def evaluation_steps(self) -> list[int]:
        """The numbers of steps after which evaluations are made."""
        if self.evaluate is None:
            return []
        every = self.evaluate_every or self.steps
        return sorted({*range(0, self.steps, every), self.steps})

    def fingerprint(self, scheme: SchemeLike, seed: int) -> str:
        """Return a hex digest of the settings of one run, by which its checkpoint is found.

        Functions (loss, evaluate, a schedule) enter by their names only, and the data by its length.
        """
        plans = ["ideal"] if isinstance(scheme, str) else [plan.to_json() for plan in plans_of(scheme)]
        extra: list[Any] = [scheme.contraction, scheme.acknowledged] if isinstance(scheme, ErrorFeedback) else []
        extra += [scheme.fractions] if isinstance(scheme, BlockPlan) else []
        named = (
            "steps",
            "deadline_s",
            "rule",
            "replans",
            "momentum",
            "max_grad_norm",
            "batch_size",
            "sampling",
            "micro_batch",
        )
        values = [repr(getattr(self, name)) for name in (*named, "evaluate_every", "exact_every")]
        functions = [getattr(f, "__qualname__", repr(f)) for f in (self.lr, self.optimizer, self.loss, self.evaluate)]
        values += [repr(self.downlink_bits)]
        source = DelaySource(self.delays, self.workers, seed)
        delays: list[Any] = source.delays_s(2, Load.plain(self.workers)).tolist()
        delays += [repr(self.delays)] if isinstance(self.delays, Machines) else []  # changes may come later
        blocks = None if self.partitions is None else [list(map(int, block)) for block in self.partitions]
        start = Layout(self.model.named_parameters()).parameter_digest()
        content = [plans, extra, seed, values, functions, delays, blocks, start, len(self.dataset)]
        return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()
