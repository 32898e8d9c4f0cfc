"""Decode rules: which coefficient every contribution of a round gets, for the gradient and for its square."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from torch_qgc.errors import PlanError
from torch_qgc.planner.baseline_rules import BASELINE_RULES, dense_weights
from torch_qgc.planner.checks import Floats, Received, Rule
from torch_qgc.planner.fields import PlanFields

__all__ = [
    "BALANCED",
    "DECODERS",
    "FIXED",
    "RULES",
    "SCALING",
    "SECOND_TRACKS",
    "Scale",
    "corrected_shares",
    "second_rule",
    "second_scale",
]

#: A round -> by what its first track is multiplied to give the second.
Scale: TypeAlias = Callable[[Received], float]
#: The sum of a round's weights over all arrivals -> by what these weights are multiplied.
Factor: TypeAlias = Callable[[float], float]
_Makes: TypeAlias = Callable[[PlanFields], Rule]

# Adam squares a gradient times this number in fp32: below it little would be left.
_LEAST_SHRINK = 1e-12


def corrected_shares(shares: Floats, rates: NDArray[Any]) -> Floats:
    """Return c = m / r, 0 where r = 0: r contributions a round with c each sum to m on average."""
    corrected: Floats = np.divide(shares, rates, out=np.zeros_like(shares), where=rates > 0)
    return corrected


# -------------------------------------------------- weights of a worker's own, times one number for the round
def _corrected(plan: PlanFields) -> Rule:
    """m_k / r_k: the decoded gradient is the true one on average."""
    return lambda received: received.corrected


def _annealed(plan: PlanFields) -> Rule:
    """m_k min(1 / r_k, burst / theta), theta the temperature: the learning rate over the highest one so far.

    No payload moves the parameters further than `burst` of full weight would at the peak of the learning rate. What is
    decoded has weight m_k min(1, burst r_k / theta) on average, so it is unbiased from theta <= burst r_k on.
    """
    most = plan.burst * plan.shares
    return lambda received: np.minimum(received.corrected, most / received.temperature)


def _one(plan: PlanFields) -> Factor:
    """1: weights stay as they are."""
    return lambda total: 1.0


def _hajek(plan: PlanFields) -> Factor:
    """1 / the sum of weights over all arrivals: they always sum to one, at the price of a small bias."""
    return lambda total: 1.0 / total if total > 0.0 else 1.0


def _ridge(plan: PlanFields) -> Factor:
    """alpha / (alpha + R), R the residual of the unbiased decoder.

    The least alpha bias^2 + variance over all decoders when partitions' gradients are equal: Song & Choi eq.
    (36) for an optimally structured code, where R = 1/S and the least is a uniform shrink.
    """
    shrink = plan.second_track_alpha / (plan.second_track_alpha + plan.residual_bound)
    if shrink < _LEAST_SHRINK:
        raise PlanError(
            f"second_track_alpha: expected at least {_LEAST_SHRINK:g} of the residual {plan.residual_bound:.3g}, got "
            f"{plan.second_track_alpha:.3g}, which shrinks gradients to {shrink:.3g} of themselves; raise it, or take "
            "'hajek'"
        )
    return lambda total: shrink


# Of a decoder: the weights of workers, and the number that multiplies them.
_WEIGHTS: dict[str, _Makes] = {
    "unbiased": _corrected,
    "annealed": _annealed,
    "hajek": _corrected,
    "ridge": _corrected,
}
_FACTORS: dict[str, Callable[[PlanFields], Factor]] = {
    "unbiased": _one,
    "annealed": _one,
    "hajek": _hajek,
    "ridge": _ridge,
}


def _scaled(weights: _Makes, factor: Callable[[PlanFields], Factor]) -> _Makes:
    """Return the rule that multiplies weights by a factor of their sum over the arrivals."""

    def make(plan: PlanFields) -> Rule:
        weigh, multiply = weights(plan), factor(plan)

        def rule(received: Received) -> Floats:
            each = weigh(received)
            return each * (received.arrived > 0) * multiply(float(each @ received.arrived))

        return rule

    return make


def second_rule(plan: PlanFields) -> Rule | None:
    """Return the rule of the second track: 'hajek' and 'ridge' multiply the weights of the plan's decoder."""
    if plan.second_track is None:
        return None
    if plan.second_track in _FACTORS:
        weights = _WEIGHTS.get(plan.decoder, _corrected)
        return _scaled(weights, _FACTORS[plan.second_track])(plan)
    return RULES[plan.second_track](plan)


def second_scale(plan: PlanFields) -> Scale:
    """Return by what the first track of a round is multiplied to give the second: both rules are such multiples.

    It is 1 without a second track, and if nothing arrived that counts.

    Raises:
        PlanError: a rule that is not a multiple of its decoder's weights.
    """
    if plan.second_track is None:
        return lambda received: 1.0
    if plan.decoder not in _FACTORS or plan.second_track not in _FACTORS:
        first = ", ".join(map(repr, _FACTORS))
        raise PlanError(
            f"second_track: expected None, or 'hajek' or 'ridge' beside a decoder out of {first}, got "
            f"{plan.second_track!r} beside {plan.decoder!r}: that is not the first track times one number, so it is "
            "for the planner and the simulator only"
        )
    weigh = _WEIGHTS[plan.decoder](plan)
    first_factor, second_factor = _FACTORS[plan.decoder](plan), _FACTORS[plan.second_track](plan)

    def scale(received: Received) -> float:
        total = float(weigh(received) @ received.arrived)
        return second_factor(total) / first_factor(total) if total > 0.0 else 1.0

    return scale


# ----------------------------------------------------------------------------------------------- other rules
def _uncorrected(plan: PlanFields) -> Rule:
    """c_k = m_k: stragglers are ignored, and the decoded gradient lacks what they hold."""
    shares = plan.shares
    return lambda received: shares * (received.arrived > 0)


def _lmmse(plan: PlanFields) -> Rule:
    """Solve for the weights with the least mean squared error given who arrived.

        w = (E Gamma E^T + diag(v_k e_k^T Gamma e_k / n_k))^-1 E Gamma s,   Gamma = (1 - rho) I + rho 1 1^T

    over the rows e_k of workers that are in, each with n_k contributions that share w_k; s are the
    partitions' fractions of the data and rho the correlation between partitions' gradients. Measured
    rates do not enter.
    """
    rho = plan.gradient_correlation
    rows = dense_weights(plan, "lmmse")
    mass = rows.sum(axis=1)
    rows = rows / np.where(mass > 0, mass, 1.0)[:, None]
    gram = (1.0 - rho) * (rows @ rows.T) + rho
    target = (1.0 - rho) * (rows @ plan.partition_fractions) + rho
    noise = np.where(mass > 0, plan.variance, 0.0) * np.diag(gram) + 1e-12
    usable = (mass > 0) & np.isfinite(noise)

    def rule(received: Received) -> Floats:
        weights = np.zeros(len(mass))
        present = np.flatnonzero((received.arrived > 0) & usable)
        if present.size:
            count = received.arrived[present].astype(np.float64)
            system = gram[np.ix_(present, present)]
            system[np.diag_indices_from(system)] += noise[present] / count
            weights[present] = np.linalg.solve(system, target[present]) / count
        return weights

    return rule


#: Every decode rule by name. A new rule is one more entry; a rule outside BALANCED may come with any weights.
RULES: dict[str, _Makes] = {
    **{name: _scaled(_WEIGHTS[name], _FACTORS[name]) for name in _FACTORS},
    "uncorrected": _uncorrected,
    "lmmse": _lmmse,
    **BASELINE_RULES,
}
DECODERS = ("unbiased", "annealed", "hajek", "ridge", "uncorrected")
SECOND_TRACKS = ("ridge", "hajek", "lmmse")
#: Rules that multiply corrected shares by one number: any two of them are multiples of each other.
SCALING = frozenset(_FACTORS)
#: Rules whose coefficients do not depend on who else has arrived.
FIXED = frozenset({"unbiased", "annealed", "ridge", "uncorrected", "homogeneous"})
#: Rules that rest on rows N m_k and columns N s_n of the weights.
BALANCED = frozenset({"unbiased", "annealed", "hajek", "ridge", "lmmse"})
