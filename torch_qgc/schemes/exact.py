"""Codes that recover the gradient exactly from any K - s workers, and decode to zero when they cannot."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import ArrayLike

from torch_qgc.errors import PlanError
from torch_qgc.planner import Plan
from torch_qgc.planner.checks import Floats
from torch_qgc.schemes.parts import PartPlan
from torch_qgc.schemes.replication import grouped, rule_named
from torch_qgc.schemes.setting import Options, Setting

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["cyclic", "cyclic_mds", "fractional_repetition", "ye_abbe"]

_ORDERS = 16  # of the evaluation points, of which the one with the least noise is taken


def fractional_repetition(
    straggle_probs: ArrayLike,
    *,
    stragglers: int = 1,
    decode: Literal["first", "average"] = "first",
    **options: Unpack[Options],
) -> Plan:
    """Form groups of s + 1 workers with the same data: exact while each group has an arrival.

    R. Tandon, Q. Lei, A. Dimakis and N. Karampatziakis, "Gradient coding: avoiding stragglers in distributed
    learning", ICML 2017, section 3.1.

    Args:
        straggle_probs: [K] in [0, 1].
        stragglers: s; s + 1 must divide K.
        decode: "first": one arrival of a group is used; "average": all are, which lowers quantization noise.
        options: see `Setting`.
    """
    setting = _setting(straggle_probs, stragglers, options)
    rule = rule_named({"first": "one_of_every_group", "average": "exact"}, decode)
    return setting.plan(setting.spread(grouped(setting.workers, stragglers + 1)), rule)


def cyclic(straggle_probs: ArrayLike, *, stragglers: int = 1, **options: Unpack[Options]) -> Plan:
    """Let worker k combine partitions k .. k + s with random coefficients of either sign.

    Tandon et al., Algorithm 2: with H [s, K] random and H 1 = 0, row k is the vector of the null space of H that is
    supported there. Any K - s rows span the all-ones vector with probability one.

    Args:
        straggle_probs: [K] in [0, 1].
        stragglers: s in [0, K - 1].
        options: see `Setting`; `num_partitions` must be a multiple of K.
    """
    setting = _setting(straggle_probs, stragglers, options)
    k, s = setting.workers, stragglers
    null = setting.random().standard_normal((s, k))
    null[:, -1] -= null.sum(axis=1)
    code = np.zeros((k, k))
    for row in range(k):
        held = (row + np.arange(s + 1)) % k
        code[row, held[0]] = 1.0
        if s:
            code[row, held[1:]] = -np.linalg.solve(null[:, held[1:]], null[:, held[0]])
    return setting.plan(setting.spread(code), "exact")


def cyclic_mds(straggle_probs: ArrayLike, *, stragglers: int = 1, **options: Unpack[Options]) -> Plan:
    """Take as rows the cyclic shifts of one codeword of a cyclic MDS code that contains the all-ones word.

        generator  prod_j (x - w^j)  over the s powers of w = exp(2 pi i / K) that are nearest to -1

    It has s + 1 coefficients, and any K - s shifts span the code. N. Raviv, I. Tamo, R. Tandon and A. Dimakis,
    "Gradient coding from cyclic MDS codes and expander graphs", IEEE Trans. Inf. Theory 66(12), 2020.

    Args:
        straggle_probs: [K] in [0, 1].
        stragglers: s in [0, K - 1], with K - s odd: else no such code is real.
        options: see `Setting`; `num_partitions` must be a multiple of K.
    """
    setting = _setting(straggle_probs, stragglers, options)
    k, s = setting.workers, stragglers
    if (k - s) % 2 == 0:
        raise PlanError(
            f"stragglers: expected an s with K - s odd, got s = {s} for K = {k}: no cyclic MDS code is real then; take "
            f"{s + 1}, or cyclic()"
        )
    powers = (k - s + 1) // 2 + np.arange(s)
    generator = np.real(np.poly(np.exp(2j * np.pi * powers / k))) if s else np.ones(1)
    first = np.zeros(k)
    first[: s + 1] = generator / np.abs(generator).sum()
    return setting.plan(setting.spread(np.stack([np.roll(first, row) for row in range(k)])), "exact")


def ye_abbe(
    straggle_probs: ArrayLike, *, replicas: int = 2, stragglers: int = 0, parts: int = 2, **options: Unpack[Options]
) -> PartPlan:
    """Cut the gradient into m parts and send one vector of the size of a part, with m times the bits per coordinate.

    Worker k evaluates at its point x_k, for each partition n that it holds and each part u, polynomials that vanish
    at the points of all who do not hold n and whose coefficients of degree K - d .. K - d + m - 1 are those of a unit
    vector. The sum is a polynomial of degree below K - s, known from any K - s points, and these coefficients of it
    are the parts of the gradient. M. Ye and E. Abbe, "Communication-computation efficient gradient coding", ICML 2018.

    Args:
        straggle_probs: [K] in [0, 1].
        replicas: d, partitions per worker (times N / K), >= s + m.
        stragglers: s.
        parts: m; a payload has 1/m of the coordinates and gets m times the bits of other schemes.
        options: see `Setting`; `num_partitions` must be a multiple of K.
    """
    setting = _setting(straggle_probs, stragglers, options)
    k = setting.workers
    if not (parts >= 1 and stragglers + parts <= replicas <= k):
        raise PlanError(
            f"replicas: expected d with stragglers + parts <= d <= K, got d = {replicas}, s = {stragglers}, "
            f"m = {parts} for K = {k}: each copy makes up for one straggler or one part"
        )
    # Chebyshev's points are the best conditioned real ones; neighbours, who share data, should not be close.
    points = np.cos((2 * np.arange(k) + 1) * np.pi / (2 * k))
    rng = setting.random()
    orders = [rng.permutation(points) for _ in range(_ORDERS)]
    code = min((_polynomial_code(order, replicas, parts) for order in orders), key=_noise)
    by_partition = setting.spread(code.transpose(1, 0, 2).reshape(parts * k, k))
    bits, _ = setting.equal_bits(parts)
    plans = [setting.plan(weights, "exact", bits=bits) for weights in by_partition.reshape(parts, k, -1)]
    return PartPlan(plans=tuple(plans))


def _polynomial_code(points: Floats, replicas: int, parts: int) -> Floats:
    """Return [K, m, K] coefficients of worker, part and partition: see `ye_abbe`."""
    k = len(points)
    code = np.zeros((k, parts, k))
    for n in range(k):
        holders = (n - np.arange(replicas)) % k
        others = np.setdiff1d(np.arange(k), holders)
        polynomial = lowest = np.atleast_1d(np.poly(points[others]))[::-1]  # by rising degree
        for u in range(parts):
            code[holders, u, n] = np.polynomial.polynomial.polyval(points[holders], polynomial)
            constant = polynomial[k - replicas - 1] if replicas < k else 0.0
            raised = np.concatenate([[0.0], polynomial])
            raised[: len(lowest)] -= constant * lowest
            polynomial = raised
    return code


def _noise(code: Floats) -> float:
    """Return what a unit of relative noise in every payload adds up to when all arrive, for orthogonal gradients."""
    workers, parts, partitions = code.shape
    rows = code.reshape(workers, -1)
    target = np.kron(np.eye(parts), np.ones(partitions))
    decode = np.linalg.lstsq(rows.T, target.T, rcond=1e-12)[0]  # [K, m]
    return float(np.sum(decode**2 * np.sum(rows**2, axis=1)[:, None]))


def _setting(straggle_probs: ArrayLike, stragglers: int, options: Options) -> Setting:
    setting = Setting(straggle_probs=straggle_probs, **options)
    if not 0 <= stragglers < setting.workers:
        raise PlanError(f"stragglers: expected a number in [0, {setting.workers - 1}], got {stragglers}")
    return setting
