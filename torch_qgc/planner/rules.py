"""Decode rules: which coefficient every contribution of a round gets, for the gradient and for its square."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from torch_qgc.errors import PlanError
from torch_qgc.planner.baseline_rules import BASELINE_RULES, dense_weights
from torch_qgc.planner.checks import Floats, Rule, per_worker, probabilities
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
    "second_moment_decoder",
    "second_scale",
]

#: (arrived [K], corrected shares m_k / r_k [K]) -> what the shares of all arrivals are multiplied by.
Scale: TypeAlias = Callable[[NDArray[Any], Floats], float]

Gram = Literal["mixed", "aligned", "orthogonal"]

# Adam squares a gradient times this number in fp32: below it little would be left.
_LEAST_SHRINK = 1e-12


def corrected_shares(shares: Floats, rates: NDArray[Any]) -> Floats:
    """Return c = m / r, 0 where r = 0: r contributions a round with c each sum to m on average."""
    corrected: Floats = np.divide(shares, rates, out=np.zeros_like(shares), where=rates > 0)
    return corrected


# ------------------------------------------------------- rules that multiply corrected shares by one number
def _unbiased(plan: PlanFields) -> Scale:
    """1, so that c_k = m_k / r_k: the decoded gradient is the true one on average."""
    return lambda arrived, corrected: 1.0


def _hajek(plan: PlanFields) -> Scale:
    """1 / sum of m_k / r_k over all arrivals: weights always sum to one, at the price of a small bias."""

    def scale(arrived: NDArray[Any], corrected: Floats) -> float:
        total = float(corrected @ arrived)
        return 1.0 / total if total > 0.0 else 1.0

    return scale


def _ridge(plan: PlanFields) -> Scale:
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
    return lambda arrived, corrected: shrink


def _scaled(scale_of: Callable[[PlanFields], Scale]) -> Callable[[PlanFields], Rule]:
    """Return the rule c_k = scale m_k / r_k."""

    def make(plan: PlanFields) -> Rule:
        scale = scale_of(plan)
        return lambda arrived, corrected: corrected * (arrived > 0) * scale(arrived, corrected)

    return make


_SCALES: dict[str, Callable[[PlanFields], Scale]] = {"unbiased": _unbiased, "hajek": _hajek, "ridge": _ridge}


def second_scale(plan: PlanFields) -> Scale:
    """Return by what the first track of a round is multiplied to give the second: both rules are such multiples.

    It is 1 without a second track, and if nothing arrived that counts.

    Raises:
        PlanError: a rule that is not a multiple of the corrected shares.
    """
    if plan.second_track is None:
        return lambda arrived, corrected: 1.0
    if plan.decoder not in _SCALES or plan.second_track not in _SCALES:
        raise PlanError(
            f"second_track: expected None, or 'hajek' or 'ridge' beside decoder 'unbiased', 'hajek' or 'ridge', got "
            f"{plan.second_track!r} beside {plan.decoder!r}: that is not the first track times one number, so it is "
            "for the planner and the simulator only"
        )
    first, second = _SCALES[plan.decoder](plan), _SCALES[plan.second_track](plan)

    def scale(arrived: NDArray[Any], corrected: Floats) -> float:
        return second(arrived, corrected) / first(arrived, corrected) if float(corrected @ arrived) > 0.0 else 1.0

    return scale


# ----------------------------------------------------------------------------------------------- other rules
def _uncorrected(plan: PlanFields) -> Rule:
    """c_k = m_k: stragglers are ignored, and the decoded gradient lacks what they hold."""
    shares = plan.shares
    return lambda arrived, corrected: shares * (arrived > 0)


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

    def rule(arrived: NDArray[Any], corrected: Floats) -> Floats:
        weights = np.zeros(len(mass))
        present = np.flatnonzero((arrived > 0) & usable)
        if present.size:
            count = np.asarray(arrived)[present].astype(np.float64)
            system = gram[np.ix_(present, present)]
            system[np.diag_indices_from(system)] += noise[present] / count
            weights[present] = np.linalg.solve(system, target[present]) / count
        return weights

    return rule


#: Every decode rule by name. A new rule is one more entry; a rule outside BALANCED may come with any weights.
RULES: dict[str, Callable[[PlanFields], Rule]] = {
    **{name: _scaled(scale_of) for name, scale_of in _SCALES.items()},
    "uncorrected": _uncorrected,
    "lmmse": _lmmse,
    **BASELINE_RULES,
}
DECODERS = ("unbiased", "hajek", "ridge", "uncorrected")
SECOND_TRACKS = ("ridge", "hajek", "lmmse")
#: Rules that multiply corrected shares by one number: any two of them are multiples of each other.
SCALING = frozenset(_SCALES)
#: Rules whose coefficients do not depend on who else has arrived.
FIXED = frozenset({"unbiased", "ridge", "uncorrected", "homogeneous"})
#: Rules that rest on rows N m_k and columns N s_n of the weights.
BALANCED = frozenset({"unbiased", "hajek", "ridge", "lmmse"})


def second_moment_decoder(
    encode: ArrayLike, straggle_probs: ArrayLike, variance: ArrayLike, *, alpha: float, model: Gram = "mixed"
) -> Floats:
    """Return the fixed decoder d of the second track with the least weighted error, for any code.

        minimise  alpha ||E ghat - g||^2 + E||ghat - E ghat||^2                      Song & Choi eq. (36)
        d = alpha (alpha M Gamma M^T + diag(u))^-1 M Gamma 1,   M = diag(1-p) E,
        u_k = (1-p_k)(p_k+v_k) e_k^T Gamma' e_k

    Args:
        encode: [K, N], e_kn: worker k sends Q(sum_n e_kn g_n).
        straggle_probs: [K] in [0, 1].
        variance: scalar or [K], relative variance v_k >= 0.
        alpha: weight of the bias, > 0; more: closer to unbiased.
        model: the Gram matrices (Gamma, Gamma') of the partitions' gradients. "mixed": (I, 11^T), the paper's
            eq. (12) for the bias and Lemma 1 for the variance; "aligned": all ones; "orthogonal": identities.
    Returns:
        [K] float64. For codes with rows N m_k and columns 1 it is the unbiased decoder times one constant in
        the models "mixed" and "aligned" (docs/planner.md).
    Raises:
        PlanError: wrong shapes, alpha <= 0, an unknown model.
    """
    p = probabilities(straggle_probs)
    v = per_worker(variance, len(p), "variance")
    code = np.asarray(encode, dtype=np.float64)
    if code.ndim != 2 or code.shape[0] != len(p):
        raise PlanError(f"encode: expected shape [{len(p)}, N], got {code.shape}")
    if not alpha > 0:
        raise PlanError(f"alpha: expected a positive weight of the bias, got {alpha}")
    if model not in ("mixed", "aligned", "orthogonal"):
        raise PlanError(f"model: expected 'mixed', 'aligned' or 'orthogonal', got {model!r}")
    mean = (1.0 - p)[:, None] * code
    seen = mean.sum(axis=1)  # M 1
    energy = (code**2).sum(axis=1) if model == "orthogonal" else code.sum(axis=1) ** 2
    noise = (1.0 - p) * (p + v) * energy
    gram = np.outer(seen, seen) if model == "aligned" else mean @ mean.T
    target = seen * code.shape[1] if model == "aligned" else seen
    useful = noise > 0  # a worker that never arrives, or sends zero, has no say; a perfect one is limited by rounding
    useful |= seen != 0
    decoder = np.zeros(len(p))
    system = alpha * gram[np.ix_(useful, useful)] + np.diag(noise[useful])
    decoder[useful] = np.linalg.lstsq(system, alpha * target[useful], rcond=None)[0]
    return decoder
