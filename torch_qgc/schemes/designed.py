"""Codes that are designed for each worker's chance to be late: ours, and its predecessor without bits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from numpy.typing import ArrayLike

from torch_qgc.planner import Plan, make_plan, optimal_shares, segment_weights
from torch_qgc.schemes.setting import Options, Setting

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["osgc", "qgc"]


def qgc(straggle_probs: ArrayLike, *, seed: int = 0, **options: Any) -> Plan:
    """Return Song & Choi's design, for gradients of all the data and one track: `make_plan`, which needs no seed.

    Like the other codes it knows nothing of batch noise: `make_plan` itself has noise_ratio=1 and a second track.

    Args:
        straggle_probs: [K] in [0, 1].
        options: of `make_plan`.
    """
    return make_plan(straggle_probs, **{"noise_ratio": 0.0, "second_track": None, **options})


def osgc(straggle_probs: ArrayLike, **options: Unpack[Options]) -> Plan:
    """Return the optimally structured code for q = 0, sent with equal bits.

        m_k proportional to (1 - p_k) / p_k,   c_k = m_k / (1 - p_k)

    H. Song and W. Choi, "Approximate gradient coding for distributed learning with heterogeneous stragglers",
    arXiv:2510.22539, 2025.

    Args:
        straggle_probs: [K] in [0, 1].
        options: see `Setting`.
    """
    setting = Setting(straggle_probs=straggle_probs, **options)
    shares = optimal_shares(setting.late, 0.0)
    return setting.plan(segment_weights(shares, setting.partitions), "unbiased")
