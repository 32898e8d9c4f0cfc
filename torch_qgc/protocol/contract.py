"""What all workers and all aggregators of one job agree on, and the one check of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec

from torch_qgc.errors import ConfigError, PlanError
from torch_qgc.kernels import BLOCK, payload_bytes
from torch_qgc.planner import Plan

__all__ = ["MOST_SECONDS", "ClosingRule", "Count", "Digest", "Index", "JobSpec", "Seconds", "Step"]

Index = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
Step = Annotated[int, msgspec.Meta(ge=0, lt=2**53)]
Count = Annotated[int, msgspec.Meta(ge=1, lt=2**53)]
MOST_SECONDS = 1e9  # thirty years: sums and squares of such times are numbers
Seconds = Annotated[float, msgspec.Meta(ge=0.0, le=MOST_SECONDS)]
Digest = Annotated[str, msgspec.Meta(max_length=128)]

MOST_WORKERS = 8192  # a result's header has a byte for each
MOST_STALENESS = 200  # a worker's payloads in one round are counted in a byte
MOST_CELLS = 1 << 22  # workers x chunks, for each of which an aggregator keeps some 40 bytes
MOST_CHUNKS = 1 << 16  # for each of which it keeps some 500 bytes more
MOST_CHUNK_NUMEL = 1 << 26  # 256 MiB unquantized, the largest message that sockets take
LEAST_LOG_STEPS = 4


class ClosingRule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When a step closes, and what becomes of payloads that come after that.

    Args:
        deadline_s: seconds after the step's first BEGIN at which it closes without the late ones; None waits
            for all, as DDP does. Shorter: faster steps, more stragglers left out. "auto": waits for all until it is
            known how long workers take, then what reaches a given loss soonest (docs/tuning.md).
        awaits: whom a step waits for until its deadline. "begun": those that have begun it, if their usual time lets
            them make it, and those that were in the step before and are about to begin; a worker that is still busy
            with an older step, or catching up, costs no time. "alive": every live worker.
        warmup_steps: that many first steps of a job wait for all (DDP's own one-time collectives happen there).
        quorum: a step never closes on fewer arrivals; the deadline is extended until they are in.
        late: "fold" lets a late payload enter the open round of its chunk, "drop" discards it.
        max_staleness: how many steps old a folded payload may be; one that is about to grow older is awaited until
            the deadline.
        on_loss: what a worker's death does: "continue" spreads its share over the others, "fail" ends the job.
    Raises:
        ConfigError: a value out of range.
    """

    deadline_s: float | Literal["auto"] | None = None
    awaits: Literal["begun", "alive"] = "begun"
    warmup_steps: int = 3
    quorum: int = 1
    late: Literal["fold", "drop"] = "fold"
    max_staleness: int = 32
    on_loss: Literal["continue", "fail"] = "continue"

    @property
    def may_be_late(self) -> bool:
        """Steps may close without workers that are alive."""
        return self.deadline_s is not None

    def __post_init__(self) -> None:
        deadline_s: Any = self.deadline_s
        if deadline_s not in (None, "auto") and not (
            isinstance(deadline_s, int | float) and 0 < deadline_s <= MOST_SECONDS
        ):
            raise ConfigError(
                "deadline_s: expected a positive number of seconds, 'auto', or None to wait for all, got "
                f"{self.deadline_s!r}"
            )
        for name, least, most in (
            ("warmup_steps", 0, 2**31 - 1),
            ("quorum", 1, MOST_WORKERS),
            ("max_staleness", 0, MOST_STALENESS),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or not least <= value <= most:
                raise ConfigError(f"{name}: expected a whole number in {least}..{most}, got {value!r}")
        for name, words in (
            ("awaits", ("begun", "alive")),
            ("late", ("fold", "drop")),
            ("on_loss", ("continue", "fail")),
        ):
            if getattr(self, name) not in words:
                raise ConfigError(f"{name}: expected {words[0]!r} or {words[1]!r}, got {getattr(self, name)!r}")


class JobSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything all workers and all aggregators of one job must agree on, beside the plan that `plan_digest` names."""

    workers: Annotated[int, msgspec.Meta(ge=1, le=MOST_WORKERS)]
    numel: Count  # coordinates of the flat gradient
    chunk_numel: Count  # coordinates of a chunk (the last one may be shorter)
    layout_digest: Digest  # names, shapes and order of the parameters
    plan_digest: Digest
    first_step: Step  # where the job starts: 0, or where its checkpoint was taken
    seed: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
    aggregators: Annotated[int, msgspec.Meta(ge=1, le=65536)]  # chunk c belongs to aggregator c mod this
    downlink_bits: Annotated[int, msgspec.Meta(ge=2, le=32)]  # 32: results are plain fp32
    rule: ClosingRule
    verify_every: Index  # steps between parameter hashes; 0: never
    replan_every: Index  # steps between new plans; 0: never
    control_variates: bool  # what a worker usually sends stands in for it while it is late
    most_batch: Annotated[float, msgspec.Meta(ge=1.0, le=1024.0)]  # a worker's largest batch, in mean batches
    log_steps: Annotated[int, msgspec.Meta(ge=LEAST_LOG_STEPS, lt=2**31)]  # results kept for late workers
    log_bytes: Count  # and their size, whichever is less
    join_timeout_s: Seconds  # how long the first step waits for workers that have not joined
    away_s: Seconds  # how long a worker whose connection is gone may take to come back before it counts as lost
    stall_timeout_s: Seconds  # how long a worker may keep the others waiting without a sign of its training thread
    one_group: bool  # workers share a process group, in which DDP's first steps need all of them

    @property
    def chunks(self) -> int:
        """Number of chunks of the flat gradient."""
        return -(-self.numel // self.chunk_numel)

    def chunk_span(self, chunk: int) -> tuple[int, int]:
        """Return (offset, numel) of a chunk in the flat gradient."""
        offset = chunk * self.chunk_numel
        return offset, min(self.chunk_numel, self.numel - offset)

    def owned_by(self, aggregator: int) -> range:
        """Return the chunks of an aggregator."""
        return range(aggregator, self.chunks, self.aggregators)

    def log_capacity(self, aggregator: int) -> int:
        """Return how many steps of results an aggregator's log holds."""
        return min(self.log_steps, self.log_bytes // max(self.step_bytes(aggregator), 1))

    def step_bytes(self, aggregator: int) -> int:
        """Return the payload bytes of one step's results of an aggregator."""
        owned = self.owned_by(aggregator)
        whole = len(owned) * payload_bytes(self.chunk_numel, self.downlink_bits)
        if self.chunks - 1 not in owned:
            return whole
        last = self.chunk_span(self.chunks - 1)[1]
        return whole - payload_bytes(self.chunk_numel, self.downlink_bits) + payload_bytes(last, self.downlink_bits)

    def validate(self, plan: Plan) -> None:
        """Check everything that both ends rely on: a worker before it sends, an aggregator before it builds.

        Args:
            plan: the plan of the job.
        Raises:
            ConfigError: a value out of range, values or a plan that contradict each other; names the remedy.
        """
        _check_schema(self)
        if self.chunk_numel % BLOCK or self.chunk_numel > MOST_CHUNK_NUMEL:
            raise ConfigError(
                f"chunk_numel: expected a positive multiple of {BLOCK} up to {MOST_CHUNK_NUMEL:,}, got "
                f"{self.chunk_numel:,}"
            )
        if self.chunks > MOST_CHUNKS or self.workers * self.chunks > MOST_CELLS:
            raise ConfigError(
                f"chunk_numel: expected at most {MOST_CHUNKS:,} chunks and {MOST_CELLS:,} workers x chunks, got "
                f"{self.workers} x {self.chunks:,}: raise Limits(chunk_numel=...)"
            )
        if self.aggregators > self.chunks:
            raise ConfigError(
                f"aggregators: expected at most one per chunk, got {self.aggregators} for {self.chunks} chunks of "
                f"{self.chunk_numel:,} coordinates: lower aggregators, or Limits(chunk_numel=...) to at most "
                f"{max(self.numel // self.aggregators // BLOCK * BLOCK, BLOCK):,}"
            )
        if self.rule.quorum > self.workers:
            raise ConfigError(f"quorum: expected at most the {self.workers} workers, got {self.rule.quorum}")
        if 16 < self.downlink_bits < 32:
            raise ConfigError(f"downlink_bits: expected 2..16, or 32 for fp32, got {self.downlink_bits}")
        capacity = self.log_capacity(0)  # aggregator 0 has as many chunks as any
        if capacity < LEAST_LOG_STEPS:
            raise ConfigError(
                f"log_bytes: expected room for the results of at least {LEAST_LOG_STEPS} steps, "
                f"{LEAST_LOG_STEPS * self.step_bytes(0):,} bytes per aggregator, got {self.log_bytes:,}: raise "
                "Limits(log_bytes=...), lower downlink_bits, or take more aggregators"
            )
        if plan.digest() != self.plan_digest:
            raise ConfigError(
                f"plan: expected the one with digest {self.plan_digest}, got {plan.digest()}: pass the same plan to "
                "every rank"
            )
        self.check_plan(plan)

    def check_plan(self, plan: Plan) -> None:
        """Check that this job can train with a plan.

        Raises:
            ConfigError: it cannot; names the remedy.
        """
        if plan.num_workers != self.workers:
            raise ConfigError(
                f"plan: expected one for {self.workers} workers (the process group's size), got one for "
                f"{plan.num_workers}: make_plan needs one straggle probability per rank"
            )
        mute = [worker for worker, bits in enumerate(plan.bits.tolist()) if bits == 0]
        if mute:
            raise ConfigError(
                f"plan: expected at least 2 bits for every worker, got 0 for worker {mute[0]}, of which nothing would "
                "ever come: leave its rank out of the process group"
            )
        try:
            plan.check_trainable()
        except PlanError as error:
            raise ConfigError(str(error)) from error


def _check_schema(spec: JobSpec) -> None:
    """Apply to values that were set here what decoding applies to values that were received."""
    try:
        values = msgspec.to_builtins(spec)
    except TypeError as error:
        raise ConfigError(f"expected Python's own numbers and strings, got {spec!r} ({error})") from error
    try:
        msgspec.convert(values, JobSpec)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at ")
        path = where.strip("`").removeprefix("$.").split(".")
        raise ConfigError(f"{'.'.join(path)}: {what[:1].lower()}{what[1:]}, got {_at(values, path)!r}") from error


def _at(values: Any, path: Sequence[str]) -> Any:
    for name in path:
        values = values.get(name) if isinstance(values, dict) else None
    return values
