"""The fixed decoder of the second track for any code; for codes of `make_plan` it is the decode rule "ridge"."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from torch_qgc.errors import PlanError
from torch_qgc.planner.checks import Floats, per_worker, probabilities

__all__ = ["second_moment_decoder"]

Gram = Literal["mixed", "aligned", "orthogonal"]


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
