"""Codes that send plain averages of whole partitions: none, random or grouped replicas."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import ArrayLike

from torch_qgc.errors import PlanError
from torch_qgc.planner import Plan, segment_weights
from torch_qgc.planner.checks import Floats
from torch_qgc.planner.variance import sign_variance
from torch_qgc.schemes.setting import Options, Setting

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["bgc", "erasurehead", "is_sgd", "one_bit_sgc", "sgc"]


def is_sgd(
    straggle_probs: ArrayLike,
    *,
    decode: Literal["ignore", "count", "unbiased"] = "ignore",
    **options: Unpack[Options],
) -> Plan:
    """Split the data equally, without replicas, and ignore stragglers.

    Args:
        straggle_probs: [K] in [0, 1].
        decode: weight of an arrival: "ignore": 1/K; "count": 1/|S| with |S| arrivals; "unbiased":
            1 / (K (1 - p_k)).
        options: see `Setting`.
    """
    rules = {"ignore": "uncorrected", "count": "arrival_count", "unbiased": "unbiased"}
    setting = Setting(straggle_probs=straggle_probs, **options)
    weights = segment_weights(np.full(setting.workers, 1.0 / setting.workers), setting.partitions)
    return setting.plan(weights, rule_named(rules, decode))


def bgc(
    straggle_probs: ArrayLike,
    *,
    replicas: float = 2.0,
    decode: Literal["mean", "count", "fixed"] = "mean",
    **options: Unpack[Options],
) -> Plan:
    """Give every partition to every worker with probability replicas / K: Bernoulli gradient codes.

    Z. Charles, D. Papailiopoulos and J. Ellenberg, "Approximate gradient coding via sparse random graphs",
    arXiv:1711.06771, 2017.

    Args:
        straggle_probs: [K] in [0, 1].
        replicas: s, expected copies of a partition, in (0, K].
        decode: weight of the sum that a worker sends: "mean": 1 / (s (1 - mean p)); "count": K / (s |S|), the
            authors' one-step decoding; "fixed": 1 / s. All over N.
        options: see `Setting`.
    """
    rules = {"mean": "homogeneous", "count": "arrival_count", "fixed": "uncorrected"}
    setting = Setting(straggle_probs=straggle_probs, **options)
    _check_replicas(replicas, setting.workers)
    holds = setting.random().random((setting.workers, setting.partitions)) < replicas / setting.workers
    return setting.plan(holds / replicas, rule_named(rules, decode))


def sgc(
    straggle_probs: ArrayLike,
    *,
    replicas: int = 2,
    heterogeneous: bool = False,
    **options: Unpack[Options],
) -> Plan:
    """Give every partition to `replicas` random workers, evenly: stochastic gradient codes.

    R. Bitar, M. Wootters and S. El Rouayheb, "Stochastic gradient coding for straggler mitigation in distributed
    learning", IEEE JSAIT 1(1), 2020.

    Args:
        straggle_probs: [K] in [0, 1].
        replicas: d, in [1, K].
        heterogeneous: weight arrivals by 1 / (d (1 - p_k)) instead of the authors' 1 / (d (1 - mean p)); the
            former is unbiased.
        options: see `Setting`.
    """
    setting = Setting(straggle_probs=straggle_probs, **options)
    return setting.plan(_random_replicas(setting, replicas), "unbiased" if heterogeneous else "homogeneous")


def one_bit_sgc(straggle_probs: ArrayLike, *, replicas: int = 2, **options: Unpack[Options]) -> Plan:
    """Send stochastic signs, one bit per coordinate, of a stochastic gradient code, whatever the budget.

    C. Li and M. Skoglund, "Distributed learning based on 1-bit gradient coding in the presence of stragglers",
    IEEE Trans. Commun. 72(8), 2024.

    Args:
        straggle_probs: [K] in [0, 1].
        replicas: d, in [1, K].
        options: see `Setting`; column 1 of a variance table is that of the stochastic sign.
    """
    setting = Setting(straggle_probs=straggle_probs, **options)
    bits = np.ones(setting.workers, dtype=np.int64)
    variance = None
    if isinstance(setting.variance, str):
        typical = setting.variance == "typical"
        q = sign_variance(norm=setting.norm, bound="typical" if typical else "tight")
        variance = np.full(setting.workers, q)
    return setting.plan(_random_replicas(setting, replicas), "homogeneous", bits=bits, variance=variance)


def erasurehead(
    straggle_probs: ArrayLike,
    *,
    replicas: int = 2,
    decode: Literal["first", "average"] = "first",
    **options: Unpack[Options],
) -> Plan:
    """Form groups of `replicas` workers with the same data; what no one of a group sends is left out.

    H. Wang, Z. Charles and D. Papailiopoulos, "ErasureHead: distributed gradient descent without delays using
    approximate gradient coding", arXiv:1901.09671, 2019.

    Args:
        straggle_probs: [K] in [0, 1]; neighbours form groups.
        replicas: s, must divide K.
        decode: "first": one arrival of a group is used; "average": all are, which lowers quantization noise.
        options: see `Setting`.
    """
    rules = {"first": "one_per_group", "average": "least_squares"}
    setting = Setting(straggle_probs=straggle_probs, **options)
    return setting.plan(setting.spread(grouped(setting.workers, replicas)), rule_named(rules, decode))


def grouped(num_workers: int, replicas: int) -> Floats:
    """Return [K, K / s] of ones and zeros: worker k holds group k // s.

    Raises:
        PlanError: s does not divide K.
    """
    _check_replicas(replicas, num_workers)
    if num_workers % replicas:
        raise PlanError(
            f"replicas: expected a divisor of the {num_workers} workers, got {replicas}: groups must be of equal size"
        )
    return np.repeat(np.eye(num_workers // replicas), replicas, axis=0)


def _random_replicas(setting: Setting, replicas: int) -> Floats:
    """Return weights 1/d where worker k holds partition n: d distinct workers each, all drawn alike."""
    _check_replicas(replicas, setting.workers)
    rank = np.argsort(setting.random().random((setting.partitions, setting.workers)), axis=1)
    weights = np.zeros((setting.workers, setting.partitions))
    weights[rank[:, :replicas].T, np.arange(setting.partitions)] = 1.0 / replicas
    return weights


def _check_replicas(replicas: float, num_workers: int) -> None:
    if not 0 < replicas <= num_workers:
        raise PlanError(f"replicas: expected a number in (0, {num_workers}], one per worker at most, got {replicas}")


def rule_named(rules: dict[str, str], decode: str) -> str:
    """Return the decode rule behind a scheme's own word for it."""
    if decode not in rules:
        raise PlanError(f"decode: expected one of {', '.join(rules)}, got {decode!r}")
    return rules[decode]
