"""The plan: everything the two ends of a job must agree on before the first round."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torch_qgc.errors import PlanError
from torch_qgc.planner import consistency, rules, serial, trainable
from torch_qgc.planner.checks import Floats, Received, Rule
from torch_qgc.planner.fields import PlanFields
from torch_qgc.planner.shares import dense_rows, diagonal_weights, load

__all__ = ["Plan"]

_ROWS_SHOWN = 16


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Plan(PlanFields):
    """Who answers for which data, with how many bits, and how arrivals are weighed.

    Worker k draws its samples from partition n with probability weights[k, n] / weights[k].sum(), sends the
    mean gradient h_k of its batch in bits[k] bits, and the round decodes to

        ghat = sum over contributions of c_k Q(h_k),   E ghat = sum_n s_n gbar_n   with decoder "unbiased"

    where s_n is partition n's fraction of the data and gbar_n its mean gradient. See Song & Choi eq. (2),
    (12) and Theorem 1; their l_k is N m_k here, their a_kn is weights[k, n] when sizes are equal.

    Arrays are copied and made read-only. Plans compare and hash by content, and pickle.

    Args:
        straggle_probs: [K] float64 in [0, 1], chance that worker k misses a round.
        bits: [K] int64 bits per coordinate: 2 .. 16; 32: sent unquantized; 1: stochastic signs; 0: sends nothing.
        shares: [K] float64 >= 0, sum 1: fraction of the data that worker k answers for.
        weights: [K, N] float64 >= 0, array or scipy.sparse.csr_array; rows sum to N m_k, columns to N s_n.
        variance: [K] relative variance of what worker k sends about its mean gradient; empty: what is typical
            of its bits.
        batches: [K] > 0, mean at least 1: samples of worker k's batch in units of the batch size (`apportion` makes
            whole samples of them); empty: equal batches, all 1. See `torch_qgc.planner.choose_batches`.
        partition_sizes: [N] > 0 in any unit; None: equal.
        bit_budget: bits per coordinate over all workers that `bits` must keep to, or None.
        norm: "max" or "l2", what the scale is that 512 coordinates share.
        decoder: "unbiased", "annealed", "hajek", "ridge" or "uncorrected": see docs/planner.md; or a rule of the codes
            in torch_qgc.schemes. These may come with weights of any sign and balance, for which rows of |weights|
            sum to N m_k and h_k = sum_n weights[k, n] gbar_n / (N m_k).
        burst: of "annealed", how many payloads of full weight m_k at the peak of the learning rate one payload may move
            the parameters as far as, >= 1; more: less bias; less: steadier steps.
        second_track: None, "ridge", "hajek" or "lmmse": how the gradient is decoded that Adam squares.
        second_track_alpha: weight of squared bias against variance in "ridge"; more: closer to unbiased.
        gradient_correlation: in [0, 1], what "lmmse" assumes between the gradients of two partitions.
    Raises:
        PlanError: anything inconsistent: the message says what was expected.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        consistency.check(self)
        # Rules that cannot be built for this plan must fail here, not in the first round.
        _ = self._first, self._second

    # -------------------------------------------------------------------------------------- decoding
    def coefficients(
        self, arrived: NDArray[Any], *, rates: NDArray[Any] | None = None, temperature: float = 1.0
    ) -> Floats:
        """Return the coefficient of each contribution of every worker in a round.

        Args:
            arrived: [K] bool, or int counts: a late payload may be folded into a later round, so that a
                worker contributes twice.
            rates: [K] expected contributions per round r_k; None: 1 - p_k.
            temperature: the learning rate of the step over the highest one so far, in (0, 1]. "annealed" alone heeds
                it; lower: closer to "unbiased".
        Returns:
            [K] float64, 0 where nothing arrived, nothing is expected (r_k = 0) or the share is 0.
        Raises:
            PlanError: wrong shape, or a temperature out of range.
        """
        return self._first(self._received(arrived, rates, temperature))

    def second_coefficients(
        self, arrived: NDArray[Any], *, rates: NDArray[Any] | None = None, temperature: float = 1.0
    ) -> Floats | None:
        """Return the second track's coefficients, as `coefficients` does; None without a second track."""
        return None if self._second is None else self._second(self._received(arrived, rates, temperature))

    def second_scale(
        self, arrived: NDArray[Any], *, rates: NDArray[Any] | None = None, temperature: float = 1.0
    ) -> float:
        """Return the number by which `coefficients` of a round are multiplied to give `second_coefficients`.

        It is 1 without a second track, and if nothing arrived that has a coefficient.

        Args:
            arrived, rates, temperature: as in `coefficients`.
        Raises:
            PlanError: wrong shape, a temperature out of range, or tracks that are no multiples of each other: "lmmse",
                or a second track beside "uncorrected" or a rule of the codes in torch_qgc.schemes.
        """
        return self._second_scale(self._received(arrived, rates, temperature))

    def shared_out(self, shares: Floats) -> Plan:
        """Return this plan for data that can move: cut anew, so that everybody answers for such a part of them.

        Args:
            shares: [K] > 0, sum 1.
        Raises:
            PlanError: this plan codes, so that parts of the data are at more than one worker; or shares out of range.
        """
        if not self.one_part_each:
            raise PlanError("expected a plan in which every worker has one partition to itself, got one that codes")
        return dataclasses.replace(self, shares=shares, weights=diagonal_weights(shares), partition_sizes=shares)

    def check_trainable(self) -> None:
        """Check that a job can train with this plan.

        Raises:
            PlanError: a code that is for comparisons (stochastic signs, data at a worker that sends nothing, gradients
                that are subtracted), coefficients that are not finite, or a second track that is not a multiple of
                the first: see `second_scale`.
        """
        trainable.check(self)

    def _received(self, arrived: NDArray[Any], rates: NDArray[Any] | None, temperature: float) -> Received:
        """Return what rules are told of a round."""
        arrived = np.asarray(arrived)
        if arrived.shape != self.shares.shape:
            raise PlanError(f"arrived: expected shape [{self.num_workers}], got {arrived.shape}")
        if not 0.0 < temperature <= 1.0:
            raise PlanError(
                f"temperature: expected the learning rate over the highest one so far, in (0, 1], got {temperature}"
            )
        if rates is None:
            return Received(arrived, self._corrected, temperature)
        rates = np.asarray(rates)
        if rates.shape != self.shares.shape:
            raise PlanError(f"rates: expected shape [{self.num_workers}], got {rates.shape}")
        return Received(arrived, rules.corrected_shares(self.shares, rates), temperature)

    @cached_property
    def _first(self) -> Rule:
        return rules.RULES[self.decoder](self)

    @cached_property
    def _second(self) -> Rule | None:
        return rules.second_rule(self)

    @cached_property
    def _second_scale(self) -> rules.Scale:
        return rules.second_scale(self)

    @cached_property
    def _corrected(self) -> Floats:
        return rules.corrected_shares(self.shares, 1.0 - self.straggle_probs)

    # ------------------------------------------------------------------------------------ properties
    @cached_property
    def load(self) -> float:
        """Mean number of workers that hold a partition."""
        return load(self.weights)

    def partition_probabilities(self, worker: int) -> Floats:
        """Return [N] probabilities that a worker draws a sample from each partition; zeros at share 0.

        Raises:
            PlanError: the code subtracts gradients, which sampling cannot do.
        """
        row: Floats = dense_rows(self.weights, worker, worker + 1)[0]
        if np.any(row < 0):
            raise PlanError(
                f"weights: expected entries >= 0 to draw samples by, got {row.min():.3g} for worker {worker}: this "
                "code is for comparisons, train with one of make_plan"
            )
        total = float(row.sum())
        return row / total if total > 0 else row

    # ------------------------------------------------------------------------------- text and identity
    def to_json(self) -> str:
        """Return the plan as canonical JSON: equal plans give equal text, and floats survive exactly."""
        return serial.to_json(self)

    @classmethod
    def from_json(cls, text: str | bytes) -> Plan:
        """Return the plan that `to_json` wrote.

        Raises:
            PlanError: not JSON, not a plan, another format, or a plan that does not hold together.
        """
        return serial.from_json(text, cls)

    def digest(self) -> str:
        """Return a hex fingerprint of the plan: equal on two ends if and only if their plans are equal."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        return hashlib.blake2b(self.to_json().encode(), digest_size=16).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self._digest == other._digest

    def __hash__(self) -> int:
        return hash(self._digest)

    def __reduce__(self) -> tuple[Any, ...]:
        return Plan.from_json, (self.to_json(),)

    def __repr__(self) -> str:
        budget = "" if self.bit_budget is None else f" of {self.bit_budget}"
        bound = f", residual <= {self.residual_bound:.4g}" if self.decoder in rules.BALANCED else ""
        second = "" if self.second_track is None else f", second track {self.second_track}"
        lines = [
            f"Plan({self.num_workers} workers, {self.num_partitions} partitions, {self.spent_bits:g}{budget} bits per "
            f"coordinate, {self.norm} norm, {self.decoder}{second}, "
            f"load {self.load:.3g}{bound})"
        ]
        everybody = self.coefficients(np.ones(self.num_workers, dtype=bool))
        unequal = bool(np.any(self.batches != 1.0))
        header = f"{'worker':>8} {'late':>7} {'bits':>5}" + (f" {'batch':>6}" if unequal else "")
        lines.append(f"{header} {'share':>8} {'coefficient':>12}")
        for k in range(min(self.num_workers, _ROWS_SHOWN)):
            row = f"{k:>8} {self.straggle_probs[k]:>7.4g} {self.bits[k]:>5}"
            row += f" {self.batches[k]:>6.3g}" if unequal else ""
            lines.append(f"{row} {self.shares[k]:>8.4f} {everybody[k]:>12.4f}")
        if self.num_workers > _ROWS_SHOWN:
            lines.append(f"     ... and {self.num_workers - _ROWS_SHOWN} more")
        return "\n".join(lines)
