"""Decide who answers for which data, with how many bits, and how arrivals are weighed: docs/planner.md."""

from torch_qgc.planner import deadline, delays, variance
from torch_qgc.planner.batches import Batches, apportion, choose_batches
from torch_qgc.planner.bits import allocate_bits
from torch_qgc.planner.links import bits_within
from torch_qgc.planner.make import make_plan
from torch_qgc.planner.options import PlanOptions
from torch_qgc.planner.placement import placed_weights
from torch_qgc.planner.plan import Plan
from torch_qgc.planner.second_moment import second_moment_decoder
from torch_qgc.planner.shares import load, optimal_shares, segment_weights, split_components
from torch_qgc.planner.variance import quantization_variance

__all__ = [
    "Batches",
    "Plan",
    "PlanOptions",
    "allocate_bits",
    "apportion",
    "bits_within",
    "choose_batches",
    "deadline",
    "delays",
    "load",
    "make_plan",
    "optimal_shares",
    "placed_weights",
    "quantization_variance",
    "second_moment_decoder",
    "segment_weights",
    "split_components",
    "variance",
]
