"""The error of one round under any scheme, exactly or over sampled arrivals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike
from scipy import sparse

from torch_qgc.errors import PlanError
from torch_qgc.planner import Plan
from torch_qgc.planner.checks import Floats, Mask, per_worker
from torch_qgc.planner.rules import FIXED
from torch_qgc.schemes.blocks import BlockPlan
from torch_qgc.schemes.feedback import ErrorFeedback
from torch_qgc.schemes.parts import PartPlan

__all__ = ["RoundError", "Scheme", "residual", "round_error"]

Scheme: TypeAlias = Plan | BlockPlan | PartPlan | ErrorFeedback
Gram: TypeAlias = Literal["aligned", "orthogonal"] | ArrayLike

_ENUMERABLE_WORKERS = 16
_MASKS_PER_PASS = 4096


@dataclass(frozen=True)
class RoundError:
    """Parts of E||ghat - g||^2 / ||g||^2.

    Attributes:
        total: all of it.
        bias: ||E ghat - g||^2 / ||g||^2.
        standard_error: of `total` as an estimate; 0 if it is exact.
    """

    total: float
    bias: float
    standard_error: float = 0.0


def residual(
    plan: Scheme,
    gram: Gram = "aligned",
    masks: Literal["exact"] | int | ArrayLike = "exact",
    *,
    gradients: ArrayLike | None = None,
    variance: ArrayLike | None = None,
    seed: int = 0,
) -> float:
    """Return E||ghat - g||^2 / ||g||^2 of one round: `round_error(...).total`."""
    return round_error(plan, gram, masks, gradients=gradients, variance=variance, seed=seed).total


def round_error(
    plan: Scheme,
    gram: Gram = "aligned",
    masks: Literal["exact"] | int | ArrayLike = "exact",
    *,
    gradients: ArrayLike | None = None,
    variance: ArrayLike | None = None,
    seed: int = 0,
) -> RoundError:
    """Return the mean squared error of what a round decodes to, and how much of it is bias.

        E||ghat - g||^2 = E_S [ ||sum_{k in S} c_k(S) h_k - g||^2 + sum_{k in S} c_k(S)^2 v_k ||h_k||^2 ]

    over the sets S of workers that arrive, independently with probability 1 - p_k. For fixed c this is Song & Choi
    Appendix A; rules that depend on S are averaged over all sets, or over drawn ones.

    Args:
        plan: from any of the schemes, or `make_plan`.
        gram: inner products of the partitions' mean gradients, in any unit: "aligned" (all equal), "orthogonal" (equal
            norms), or [N, N] positive semidefinite.
        masks: "exact"; or how many arrival patterns to draw; or patterns [M, K] bool themselves, equally likely.
        gradients: [N, dim] the partitions' mean gradients, instead of `gram`.
        variance: scalar or [K] relative variance v_k of payloads, instead of the plan's own: to compare plans under
            another noise than they were made for.
        seed: of drawn patterns.
    Raises:
        PlanError: shapes that do not fit; more than 16 unreliable workers to enumerate the arrivals of.
    """
    if isinstance(plan, BlockPlan):
        return _blocks_error(plan, gram, masks, gradients, variance, seed)
    inner = plan.plan if isinstance(plan, ErrorFeedback) else plan
    v = inner.variance if variance is None else per_worker(variance, inner.num_workers, "variance")
    factor = _factor(inner, gram, gradients)
    sent = _scaled_rows(inner) @ factor
    target = np.atleast_2d(inner.target if isinstance(inner, PartPlan) else inner.partition_fractions) @ factor
    size = float(np.sum(_dense(target) ** 2))
    if not size > 0:
        raise PlanError("gram: expected a gradient that is not zero, got one that is: no relative error exists")
    energy = _squares(sent)
    if isinstance(plan, ErrorFeedback):
        mean, second = plan.moments(v)
        noise = np.multiply(second - mean**2, energy, out=np.zeros_like(energy), where=inner.shares > 0)
        sent = sparse.diags_array(mean) @ sent
    else:
        noise = np.multiply(v, energy, out=np.zeros_like(energy), where=inner.shares > 0)
    if isinstance(masks, str) and isinstance(inner, Plan) and inner.decoder in FIXED:
        return _fixed_error(inner, sent, target, noise, size)
    return _averaged_error(inner, _dense(sent), _dense(target), noise, size, _patterns(inner, masks, seed))


# ------------------------------------------------------------------------------------------ the two sums
def _fixed_error(plan: Plan, sent: Any, target: Any, noise: Floats, size: float) -> RoundError:
    """Sum in closed form over arrivals: coefficients that do not depend on them leave one variance per worker."""
    p = plan.straggle_probs
    c = plan.coefficients(np.ones(plan.num_workers, dtype=bool))
    bias = float(np.sum((_dense((c * (1.0 - p)) @ sent) - _dense(target)) ** 2))
    used = c != 0
    spread = c[used] ** 2 * (1.0 - p[used]) * (p[used] * _squares(sent)[used] + noise[used])
    return RoundError((bias + float(spread.sum())) / size, bias / size)


def _averaged_error(
    plan: Plan | PartPlan,
    sent: Floats,
    target: Floats,
    noise: Floats,
    size: float,
    patterns: tuple[Mask, Floats | None],
) -> RoundError:
    """Average over arrival patterns; `patterns` are [M, K] and their probabilities, or None: equally likely."""
    arrived, chances = patterns
    weights = np.full(len(arrived), 1.0 / len(arrived)) if chances is None else chances
    errors = np.empty(len(arrived))
    mean = np.zeros(target.shape)
    for start in range(0, len(arrived), _MASKS_PER_PASS):
        part = slice(start, start + _MASKS_PER_PASS)
        c = np.stack([np.atleast_2d(plan.coefficients(mask)) for mask in arrived[part]])  # [masks, parts, K]
        decoded = c @ sent
        mean += np.einsum("m,mpd->pd", weights[part], decoded)
        lost = np.multiply(c**2, noise, out=np.zeros_like(c), where=c != 0).sum(axis=(1, 2))
        errors[part] = np.sum((decoded - target) ** 2, axis=(1, 2)) + lost
    total = float(weights @ errors)
    doubt = 0.0 if chances is not None else float(errors.std(ddof=min(1, len(errors) - 1))) / np.sqrt(len(errors))
    return RoundError(total / size, float(np.sum((mean - target) ** 2)) / size, doubt / size)


def _patterns(
    plan: Plan | PartPlan, masks: Literal["exact"] | int | ArrayLike, seed: int
) -> tuple[Mask, Floats | None]:
    p = plan.straggle_probs
    if not isinstance(masks, str):
        if np.ndim(masks) == 0:
            count = int(np.asarray(masks))
            if count < 1:
                raise PlanError(f"masks: expected 'exact' or at least 1 pattern, got {masks}")
            return np.random.default_rng(seed).random((count, len(p))) >= p, None
        given = np.asarray(masks, dtype=bool)
        if given.ndim != 2 or given.shape[1] != len(p) or not len(given):
            raise PlanError(f"masks: expected patterns of shape [M, {len(p)}], got {given.shape}")
        return given, None
    if masks != "exact":
        raise PlanError(f"masks: expected 'exact', a number or patterns [M, {len(p)}], got {masks!r}")
    unsure = np.flatnonzero((p > 0) & (p < 1))  # idle ones too: some rules count arrivals
    if len(unsure) > _ENUMERABLE_WORKERS:
        raise PlanError(
            f"masks: expected at most {_ENUMERABLE_WORKERS} unreliable workers to enumerate the arrivals of, got "
            f"{len(unsure)}; draw some with masks=10000"
        )
    codes = np.arange(1 << len(unsure))[:, None] >> np.arange(len(unsure)) & 1
    arrived = np.tile(p == 0, (len(codes), 1))
    arrived[:, unsure] = codes == 1
    return arrived, np.where(codes == 1, 1.0 - p[unsure], p[unsure]).prod(axis=1)


# --------------------------------------------------------------------------------------- inner products
def _factor(plan: Plan | PartPlan, gram: Gram, gradients: ArrayLike | None) -> Any:
    """Return F [parts N, r] with F F^T the inner products of what the columns of the weights stand for."""
    n, parts = plan.num_partitions, len(plan.plans) if isinstance(plan, PartPlan) else 1
    if gradients is not None:
        given = np.asarray(gradients, dtype=np.float64)
        if given.ndim != 2 or len(given) != n:
            raise PlanError(f"gradients: expected shape [{n}, dim], got {given.shape}")
        given = np.pad(given, ((0, 0), (0, -given.shape[1] % parts)))
        cut = given.reshape(n, parts, -1).transpose(1, 0, 2).reshape(n * parts, -1)
        return _root(cut @ cut.T)
    if isinstance(gram, str):
        if gram not in ("aligned", "orthogonal"):
            raise PlanError(f"gram: expected 'aligned', 'orthogonal' or [N, N] inner products, got {gram!r}")
        one = np.ones((n, 1)) if gram == "aligned" else sparse.eye_array(n, format="csr")
    else:
        products = np.asarray(gram, dtype=np.float64)
        if products.shape != (n, n) or not np.allclose(products, products.T):
            raise PlanError(f"gram: expected a symmetric matrix of shape [{n}, {n}], got shape {products.shape}")
        one = _root(products)
    return one if parts == 1 else np.kron(np.eye(parts), _dense(one))


def _root(gram: Floats) -> Floats:
    values, vectors = np.linalg.eigh(gram)
    if values[0] < -1e-9 * max(float(values[-1]), 0.0):
        raise PlanError(f"gram: expected a positive semidefinite matrix, got one with eigenvalue {values[0]:.3g}")
    return np.asarray(vectors * np.sqrt(np.maximum(values, 0.0)))


def _scaled_rows(plan: Plan | PartPlan) -> Any:
    """Return rows w_kn / sum_n |w_kn|: what worker k's mean gradient is made of."""
    mass = plan.shares * plan.weights.shape[1]
    scale = np.divide(1.0, mass, out=np.zeros_like(mass), where=mass > 0)
    if isinstance(plan.weights, np.ndarray):
        return scale[:, None] * plan.weights
    return sparse.diags_array(scale) @ plan.weights


def _squares(rows: Any) -> Floats:
    squared = rows**2 if isinstance(rows, np.ndarray) else rows.multiply(rows)
    return np.asarray(squared.sum(axis=1)).reshape(-1)


def _dense(values: Any) -> Floats:
    return np.asarray(values if isinstance(values, np.ndarray) else values.toarray())


# ----------------------------------------------------------------------------------------------- slices
def _blocks_error(
    plan: BlockPlan,
    gram: Gram,
    masks: Literal["exact"] | int | ArrayLike,
    gradients: ArrayLike | None,
    variance: ArrayLike | None,
    seed: int,
) -> RoundError:
    """Add up over slices: they share no coordinates."""
    sizes = np.asarray(plan.fractions)
    slices: list[Floats | None] = [None] * len(plan.plans)
    if gradients is not None:
        whole = np.asarray(gradients, dtype=np.float64)
        cuts = np.round(np.cumsum(plan.fractions)[:-1] * whole.shape[1]).astype(int)
        parts = np.split(whole, cuts, axis=1)
        sizes = np.array([np.sum((plan.plans[0].partition_fractions @ part) ** 2) for part in parts])
        slices = list(parts)
    used = np.flatnonzero(sizes > 0)
    errors = [round_error(plan.plans[i], gram, masks, gradients=slices[i], variance=variance, seed=seed) for i in used]
    share = sizes[used] / sizes.sum()
    return RoundError(
        total=float(share @ [e.total for e in errors]),
        bias=float(share @ [e.bias for e in errors]),
        standard_error=float(np.sqrt(np.sum((share * [e.standard_error for e in errors]) ** 2))),
    )
